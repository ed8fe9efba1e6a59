// Forward: learn the clusters, choose the exact keys, attend.
#pragma once

#include <utility>

#include "head.h"

struct Forward : Head {
    using Head::Head;

    // Mean square of r in each dimension.
    void measure_spread() {
        std::fill(metric, metric + dim, 0.0f);
        for (int64_t g = 0; g < p.groups; g++)
            for (int64_t d = 0; d < dim; d++) metric[d] += partial[g * dim + d];
        for (int64_t d = 0; d < dim; d++) metric[d] /= float(std::max<int64_t>(body_length(), 1));
    }

    // The block's part of sum_g share_g P[g][n], while its rows are in cache.
    void weigh_keys(int64_t block) {
        int64_t first = block * TALL, last = std::min(first + TALL, p.groups);
        for (int64_t n = 0; n < padded; n += LANES) {
            vec sum = {};
            for (int64_t g = first; g < last; g++) sum += share[g] * load(attention + g * padded + n);
            store(masses + block * padded + n, sum);
        }
    }

    void join_masses(int64_t block) {
        int64_t first = block * TOKENS_PER_BLOCK, last = std::min(first + TOKENS_PER_BLOCK, padded);
        std::fill(mass + first, mass + last, 0.0f);
        for (int64_t part = 0; part < group_blocks(); part++)
            for (int64_t n = first; n < last; n += LANES)
                store(mass + n, load(mass + n) + load(masses + part * padded + n));
        for (int64_t n = first; n < std::min(p.prefix, last); n++) mass[n] = 0;
    }

    // The start: keys at equal distances along the sequence.
    void start_learning() {
        for (int64_t j = 0; j < p.hidden; j++) {
            int64_t i = (2 * j + 1) * (t.lengths ? body_length() : p.body()) / (2 * p.hidden);
            const float* from = k + (p.prefix + std::min(i, p.body() - 1)) * k_stride;
            std::copy(from, from + dim, weights + j * dim);
        }
        prepare_weights();
    }

    // For |sqrt(metric) (k - w)|^2 = ... - 2 k . (metric w) + |sqrt(metric) w|^2: the products, in panels' rows.
    void prepare_weights() {
        for (int64_t j = 0; j < p.hidden; j++) {
            float norm = 0, *row = weights + j * dim;
            for (int64_t d = 0; d < dim; d++) {
                norm += row[d] * row[d] * metric[d];
                row[d] *= -2 * metric[d];
            }
            weight_norm[j] = norm;
        }
    }

    // The winner of each key, and, by it, sums of (x, 1) weighted by mass, x the key or the value.
    void assign(int64_t block, bool sum_values) {
        int64_t first = block * TOKENS_PER_BLOCK, last = std::min(first + TOKENS_PER_BLOCK, p.tokens);
        const float* a[TALL];
        float distances[TALL][PANEL], *c[TALL];
        for (int r = 0; r < TALL; r++) c[r] = distances[r];
        for (int64_t n = first; n < last; n += PANEL) {
            vec best[WIDE];
            ivec winner[WIDE] = {};
            for (int w = 0; w < WIDE; w++) best[w] = spread(INFINITY);
            for (int64_t j = 0; j < p.hidden; j += TALL) {
                int rows = int(std::min<int64_t>(TALL, p.hidden - j));
                for (int r = 0; r < rows; r++) a[r] = weights + (j + r) * dim;
                dot_panel(rows, WIDE, a, panels + n * dim, dim, c);
                for (int r = 0; r < rows; r++)
                    for (int w = 0; w < WIDE; w++) {
                        vec distance = load(distances[r] + w * LANES) + weight_norm[j + r];
                        winner[w] = distance < best[w] ? spread(int32_t(j + r)) : winner[w];
                        best[w] = distance < best[w] ? distance : best[w];
                    }
            }
            for (int w = 0; w < WIDE; w++) {
                store(winners + n + w * LANES, winner[w]);
                store(error + n + w * LANES, best[w]);  // becomes the squared distance, later the error
            }
        }
        sum_values ? add_up(block, v, v_stride, value_dim) : add_up(block, k, k_stride, dim);
    }

    // Weights move to the mean of what they have won; a neuron that has won nothing stays.
    void learn() {
        join_partial(dim);
        for (int64_t j = 0; j < p.hidden; j++) {
            const float* sums = partial + j * (dim + 1);
            float* row = weights + j * dim;
            for (int64_t d = 0; d < dim; d++)
                row[d] = sums[dim] != 0 ? sums[d] / sums[dim] : metric[d] > 0 ? row[d] / (-2 * metric[d]) : 0;
        }
        prepare_weights();
    }

    // |r.(k - w)| |v - mean v|: partial holds the sums of v.
    void measure_errors(int64_t block) {
        int64_t first = std::max(block * TOKENS_PER_BLOCK, p.prefix),
                last = std::min((block + 1) * TOKENS_PER_BLOCK, length);
        for (int64_t n = first; n < last; n++) {
            const float* sums = partial + winners[n] * (value_dim + 1);
            float scale = sums[value_dim] != 0 ? 1 / sums[value_dim] : 0;
            vec square = {}, off = {};
            for (int64_t d = 0; d < dim; d += LANES) {
                vec x = load(k + n * k_stride + d);
                square += x * x * load(metric + d);
            }
            for (int64_t d = 0; d < value_dim; d += LANES) {
                vec x = load(v + n * v_stride + d) - load(sums + d) * scale;
                off += x * x;
            }
            error[n] = std::sqrt(std::max(error[n] + sum(square), 0.0f) * sum(off));
        }
    }

    // Each group takes the keys it asks for most; then what it attends exactly leaves P.
    void choose(int64_t block, Bench& room) {
        float* scores = room.scores;
        int32_t* found = room.found;
        for (int64_t g = block * TALL; g < std::min((block + 1) * TALL, p.groups); g++) {
            const float* row = attention + g * padded;
            int32_t* keys = t.keys + (z * p.groups + g) * p.exact_keys;
            std::fill(keys, keys + p.exact_keys, -1);
            if (p.exact_keys) {
                for (int64_t n = 0; n < padded; n += LANES)
                    store(scores + n, p.hidden ? load(row + n) * load(error + n) : load(row + n));
                std::fill(scores, scores + p.prefix, 0.0f);
                for (int64_t tile = first_tile(g); tile < first_tile(g + 1); tile++)
                    for_near(tile, [&](int64_t n) { scores[n] = 0; });
                int64_t count = take_largest(scores, padded, p.exact_keys, found, room.few);
                for (int64_t i = 0; i < count; i++) keys[i] = int32_t(found[i] - p.prefix);
            }
            leave_out_exact(g);
        }
    }

    // The `most` largest positive scores: their indices, in order. Of every bucket of scores the largest are a sample
    // whose own `most` largest lie below as many scores; only those above the least of them are looked at again.
    static int64_t take_largest(const float* scores, int64_t count, int64_t most, int32_t* found, float* few) {
        int64_t buckets = round_up(2 * most, LANES);
        float low = 0;
        if (buckets < count) {
            std::fill(few, few + buckets, 0.0f);
            for (int64_t from = 0; from < count; from += buckets)
                for (int64_t n = from; n < std::min(from + buckets, count); n += LANES)
                    store(few + n - from, larger(load(scores + n), load(few + n - from)));
            low = threshold(few, buckets, most).first;
        }
        int64_t size = 0;
        for (int64_t n = 0; n < count; n += LANES)
            for (uint32_t bits = bits_of(load(scores + n) > low); bits; bits &= bits - 1)
                found[size++] = int32_t(n + __builtin_ctz(bits));
        if (size <= most) return size;
        std::fill(few, few + round_up(size, LANES), 0.0f);
        for (int64_t i = 0; i < size; i++) few[i] = scores[found[i]];
        auto [below, high] = threshold(few, round_up(size, LANES), most);
        int64_t number = 0, ties = most;
        for (int64_t i = 0; i < size; i++) ties -= few[i] > high;
        for (int64_t i = 0; i < size; i++)
            if (few[i] > high || (few[i] > below && ties-- > 0)) found[number++] = found[i];
        return number;
    }

    // Neighbouring floats, or floats with the same scores above them, low < high: more than `most` scores lie above low
    // and at most `most` above high. (0, 0) if at most `most` are positive. Bisection of the bits, which are ordered as
    // floats are.
    static std::pair<float, float> threshold(const float* scores, int64_t count, int64_t most) {
        auto above = [&](float limit) {
            int64_t number = 0;
            for (int64_t n = 0; n < count; n += LANES) number += __builtin_popcount(bits_of(load(scores + n) > limit));
            return number;
        };
        vec top = {};
        for (int64_t n = 0; n < count; n += LANES) top = larger(load(scores + n), top);
        float low = 0, high = largest(top);
        if (above(low) <= most) return {0.0f, 0.0f};
        for (;;) {
            int32_t low_bits, high_bits;
            memcpy(&low_bits, &low, sizeof low);
            memcpy(&high_bits, &high, sizeof high);
            if (high_bits - low_bits <= 1) return {low, high};
            int32_t bits = low_bits + (high_bits - low_bits) / 2;
            float middle;
            memcpy(&middle, &bits, sizeof middle);
            int64_t number = above(middle);
            (number > most ? low : high) = middle;
            if (number == most) return {high, high};
        }
    }

    void return_choices() const {
        std::copy(winners + p.prefix, winners + p.tokens, t.winners + z * p.body());
        std::copy(mass + p.prefix, mass + p.tokens, t.mass + z * p.body());
    }

    void attend_tiles(int64_t block, Bench& room) {
        for (int64_t tile = block * TILES_PER_BLOCK; tile < std::min((block + 1) * TILES_PER_BLOCK, p.tiles()); tile++)
            attend_tile(tile, room);
        if (block == 0) attend_prefix(room);
        int64_t first = length + (p.tokens - length) * block / tile_blocks();
        int64_t last = length + (p.tokens - length) * (block + 1) / tile_blocks();
        std::fill(room.out, room.out + value_dim, 0.0f);
        for (int64_t n = first; n < last; n++) {
            put(n, room.out);
            t.log_p[z * p.tokens + n] = -INFINITY;
        }
    }

    void attend_tile(int64_t tile, Bench& room) {
        TileView x = view(tile, room);
        for (int64_t from = 0; from < x.queries; from += QUERIES)
            attend_queries(room.tokens + from, int(std::min(QUERIES, x.queries - from)), x, room);
    }

    void attend_queries(const int64_t* tokens, int rows, const TileView& x, Bench& room) {
        int64_t m = p.hidden, g = x.group, wide = x.wide(), columns = wide + round_up(m, LANES);
        score(tokens, rows, x, columns, room);
        for (int r = 0; r < rows; r++) {
            float *row = room.logits + r * columns, *neurons = row + wide;
            t.log_p[z * p.tokens + tokens[r]] = normalise(row, columns, columns);
            if (shared) {  // the group's s holds the near keys' shares: they are taken out of their weights
                for (int64_t i = x.near_from; m && i < x.near_to; i++) {
                    int32_t n = room.index[i], j = winners[n];
                    if (room.ratio[j] > 0)
                        row[i] -= neurons[j] * room.ratio[j] * attention[g * padded + n] / z_sum[g * m + j];
                }
                for (int64_t j = 0; j < m; j++) neurons[j] *= room.ratio[j];
            }
            room.shares[r] = row;
            room.o[r] = room.out + r * value_dim;
            std::fill(room.o[r], room.o[r] + value_dim, 0.0f);
        }
        add_rows<VALUES>(rows, room.shares, v, v_stride, value_dim, room.index, x.count, room.o);
        for (int r = 0; r < rows; r++) room.shares[r] += wide;
        add_rows<NEITHER>(rows, room.shares, s_mean + g * m * value_dim, value_dim, value_dim, nullptr, m, room.o);
        for (int r = 0; r < rows; r++) put(tokens[r], room.o[r]);
    }

    void attend_prefix(Bench& room) {
        int rows = int(std::min(p.prefix, length));
        for (int r = 0; r < rows; r++) room.a[r] = q + r * dim;
        for (int64_t n = 0; n < padded; n += PANEL) {
            for (int r = 0; r < rows; r++) room.c[r] = room.logits + r * padded + n;
            dot_panel(rows, WIDE, room.a, panels + n * dim, dim, room.c);
        }
        for (int r = 0; r < rows; r++) {
            float* row = room.logits + r * padded;
            t.log_p[z * p.tokens + r] = normalise(row, length, padded);
            room.shares[r] = row;
            room.o[r] = room.out + r * value_dim;
            std::fill(room.o[r], room.o[r] + value_dim, 0.0f);
        }
        add_rows<NEITHER>(rows, room.shares, v, v_stride, value_dim, nullptr, length, room.o);
        for (int r = 0; r < rows; r++) put(r, room.o[r]);
    }

    void put(int64_t n, float* row) const {
        if (broken && n < length) {
            std::fill(row, row + value_dim, NAN);
            t.log_p[z * p.tokens + n] = NAN;
        }
        write_row(t.out, p.at(p.out_stride, z, n), Type(p.type), p.value_dim, row);
    }
};

// The stages in order: blocks of a stage, and what a block does.
template <typename Run>
void stages(Forward& head, Run run) {
    const Problem& p = head.p;
    using Bench = Head::Bench;
    bool means = p.hidden || p.exact_keys;
    run(head.token_blocks(), [&](int64_t i, Bench&) { head.load_tokens(i); });
    if (means) {
        run(head.group_blocks(), [&](int64_t i, Bench&) { head.average_queries(i); });
        run(head.group_blocks(), [&](int64_t i, Bench&) {
            head.attend_means(i);
            head.weigh_keys(i);
        });
    }
    if (p.hidden) {
        run(head.panel_blocks(), [&](int64_t i, Bench&) { head.join_masses(i); });
        run(1, [&](int64_t, Bench&) {
            head.measure_spread();
            head.start_learning();
        });
        for (int64_t step = 0; step < p.steps; step++) {
            run(head.token_blocks(), [&](int64_t i, Bench&) { head.assign(i, false); });
            run(1, [&](int64_t, Bench&) { head.learn(); });
        }
        run(head.token_blocks(), [&](int64_t i, Bench&) { head.assign(i, true); });
        run(1, [&](int64_t, Bench&) {
            head.sort_tokens();
            if (p.exact_keys) head.join_partial(head.value_dim);
        });
        if (p.exact_keys) run(head.token_blocks(), [&](int64_t i, Bench&) { head.measure_errors(i); });
    }
    if (means)
        run(head.group_blocks(), [&](int64_t i, Bench& room) {
            head.choose(i, room);
            head.weigh_keys(i);
            if (p.hidden) head.write_hidden(i);
        });
    if (p.hidden) {
        run(head.panel_blocks(), [&](int64_t i, Bench&) { head.join_masses(i); });
        run(head.token_blocks(), [&](int64_t i, Bench&) { head.add_up(i, head.k, head.k_stride, head.dim); });
        run(1, [&](int64_t, Bench&) {
            head.average_keys();
            head.return_choices();
        });
    }
    run(head.tile_blocks(), [&](int64_t i, Bench& room) { head.attend_tiles(i, room); });
}
