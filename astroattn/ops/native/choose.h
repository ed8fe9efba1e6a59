// Which keys each sub-tile reads exactly: the near keys of its queries, and others that it asks for most.
#pragma once

#include "clusters.h"

constexpr float MOST_MISS = 8;  // as in near_far.py

struct Choose : Clusters {
    using Clusters::Clusters;

    struct Bench : Order::Bench {
        float *within, *base, *drive_of, *offset, *directions, *sub_mean, *expected, *log_share, *gain, *bias,
            *mean_bias, *value, *distance, *normaliser, *of_prefix;
        int32_t *found, *candidate, *token, *begin, *near_size, *column, *taken;

        Bench(const Choose& head, Arena& arena) : Order::Bench(head, arena) {
            const int64_t few = round_up(head.most_candidates, LANES), subtiles = head.most_subtiles();
            arena.take(expected, head.padded);
            for (auto list : {&within, &base, &drive_of}) arena.take(*list, few + LANES);
            arena.take(offset, AXES * few);
            arena.take(directions, subtiles * AXES);
            arena.take(sub_mean, subtiles * head.dim);
            for (auto list : {&found, &column, &taken}) arena.take(*list, head.padded + LANES);
            for (auto list : {&candidate, &token}) arena.take(*list, few);
            arena.take(bias, head.t.bias ? head.most_tile * few : 0);
            for (auto list : {&mean_bias, &value, &distance}) arena.take(*list, few + LANES);
            arena.take(begin, head.most_hidden + 1);
            for (auto list : {&log_share, &gain}) arena.take(*list, round_up(head.most_hidden, PANEL));
            arena.take(near_size, subtiles);
            arena.take(normaliser, subtiles);
            arena.take(of_prefix, head.most_hidden ? subtiles * round_up(head.p.prefix, PANEL) : 0);
            if (!arena.block) return;
            std::fill(column, column + head.padded, 0);
            std::fill(taken, taken + head.padded, 0);
        }
    };

    void choose_keys(int64_t block, Bench& room) {
        if (hidden) std::fill(masses + block * padded, masses + (block + 1) * padded, 0.0f);
        for (int64_t tile = block * TALL; tile < block * TALL + tiles_of(block); tile++) {
            if (hidden) sort_logits(tile, room);
            for (int64_t s = 0; s < subtiles_of(tile); s++) take_near(tile, s, room);
            if (layout.exact_keys) take_others(tile, room);
            if (!hidden) continue;
            for (int64_t s = 0; s < subtiles_of(tile); s++)
                for (int64_t i = 0; i < room.near_size[s]; i++)
                    leave_rest(place[keys_of(tile, s)[i] + p.prefix], queries_of(tile), room);
            add(masses + block * padded + p.prefix, room.expected + p.prefix, 1, round_up(body, LANES));
        }
    }

    // By place from now on; and the attention that the tile is expected to give.
    void sort_logits(int64_t tile, Bench& room) {
        float *row = logits + tile * padded, *expected = room.expected;
        for (int64_t i = p.prefix; i < length; i++) room.scratch[i] = row[sorted[i]];
        std::copy(room.scratch + p.prefix, room.scratch + length, row + p.prefix);
        if (t.bias && layout.exact_keys) {
            float* variance = unlike + tile * padded;
            for (int64_t i = p.prefix; i < length; i++) room.scratch[i] = variance[sorted[i]];
            std::copy(room.scratch + p.prefix, room.scratch + length, variance + p.prefix);
        }
        for (int64_t i = p.prefix; i < length; i += LANES)
            store(expected + i, exponential(load(row + i) - log_sum[tile]) * share[tile]);
    }

    // The windows of the sub-tile's queries, each key once.
    void take_near(int64_t tile, int64_t subtile, Bench& room) {
        int32_t *keys = keys_of(tile, subtile), size = 0;
        const int64_t rows = p.rows ? p.rows : 1, columns = p.rows ? p.columns : body;
        const int64_t first = subtile * SUBTILE, last = std::min(first + SUBTILE, queries_of(tile));
        for (int64_t i = first; i < last; i++) {
            const int32_t token = tokens_of(tile)[i] - int32_t(p.prefix);
            const int32_t row = p.rows ? token / int32_t(columns) : 0, column = token - row * int32_t(columns);
            const int64_t top = std::clamp<int64_t>(row - layout.high / 2, 0, rows - layout.high);
            const int64_t left = std::clamp<int64_t>(column - layout.wide / 2, 0, columns - layout.wide);
            for (int64_t y = top; y < top + layout.high; y++)
                for (int64_t x = left; x < left + layout.wide; x++) {
                    const int64_t key = y * columns + x;
                    if (key >= body || room.marks[key] || size == p.most_keys) continue;
                    room.marks[key] = 1;
                    keys[size++] = int32_t(key);
                }
        }
        for (int32_t i = 0; i < size; i++) {
            room.marks[keys[i]] = 0;
            room.taken[place[keys[i] + p.prefix]] += int32_t(last - first);
        }
        std::fill(keys + size, keys + p.most_keys, -1);
        room.near_size[subtile] = size;
    }

    // u_s of the sub-tiles, in all and in a few coordinates.
    void average_subtiles(int64_t tile, Bench& room) {
        const int32_t* tokens = tokens_of(tile);
        const int64_t number = queries_of(tile);
        Axes all = {}, x;
        for (int64_t i = 0; i < number; i++) {
            get(x, query_axes + tokens[i] * AXES);
            all += x;
        }
        for (int64_t s = 0; s < subtiles_of(tile); s++) {
            const int64_t first = s * SUBTILE, few = std::min(SUBTILE, number - first);
            float* u = room.sub_mean + s * dim;
            Axes part = {};
            for (int64_t d = 0; d < dim; d++) u[d] = -mean[tile * dim + d];
            for (int64_t i = first; i < first + few; i++) {
                add(u, q + tokens[i] * dim, 1 / float(few), dim);
                get(x, query_axes + tokens[i] * AXES);
                part += x;
            }
            put(room.directions + s * AXES, part / float(few) - all / float(number));
        }
    }

    // What exp(u.k) is divided by to be the attention that is expected of the tile, in logarithms.
    float log_whole(int64_t tile) const { return log_sum[tile] - std::log(share[tile]); }

    // How much more than the tile's mean query one of its sub-tiles asks for each cluster, at most.
    void measure_gains(int64_t tile, Bench& room) {
        const int subtiles = int(subtiles_of(tile));
        const int64_t columns = round_up(hidden, LANES), apart = round_up(hidden, PANEL);
        float *log_share = room.log_share, *gain = room.gain;
        for (int s = 0; s < subtiles; s++) room.a[s] = room.sub_mean + s * dim;
        for (int64_t j = 0; j < hidden; j += PANEL) {
            for (int s = 0; s < subtiles; s++) room.c[s] = room.drive + s * apart + j;
            dot_panel(subtiles, vectors_of(hidden - j), room.a, weight_panels + j * dim, dim, room.c);
        }
        for (int64_t j = 0; j < hidden; j++)
            log_share[j] = std::max(sum_of(room.expected + start[j], start[j + 1] - start[j]), FLT_MIN);
        const int64_t before = round_up(p.prefix, PANEL);
        for (int64_t n = 0; n < before; n += PANEL) {
            for (int s = 0; s < subtiles; s++) room.c[s] = room.of_prefix + s * before + n;
            dot_panel(subtiles, WIDE, room.a, panels + n * dim, dim, room.c);
        }
        std::fill(log_share + hidden, log_share + columns, 0.0f);
        for (int64_t j = 0; j < columns; j += LANES) {
            store(log_share + j, logarithm(load(log_share + j)));
            store(gain + j, spread(-INFINITY));
        }
        for (int s = 0; s < subtiles; s++) {
            const float* drive = room.drive + s * apart;
            vec top = spread(-3e38f), all = {};
            for (int64_t j = 0; j < columns; j += LANES) top = larger(load(drive + j) + load(log_share + j), top);
            float high = largest(top), *of_prefix = room.of_prefix + s * before;
            for (int64_t i = 0; i < p.prefix; i++)
                high = std::max(high, of_prefix[i] += logits[tile * padded + i] - log_whole(tile));
            for (int64_t j = 0; j < columns; j += LANES)
                all += exponential(load(drive + j) + load(log_share + j) - high);
            float total = sum(all);
            for (int64_t i = 0; i < p.prefix; i++) total += std::exp(of_prefix[i] - high);
            const float normaliser = room.normaliser[s] = high + std::log(total);
            for (int64_t j = 0; j < columns; j += LANES)
                store(gain + j, larger(load(drive + j) - normaliser, load(gain + j)));
        }
    }

    // Candidates of the tile, and of them those that each sub-tile asks for most.
    void take_others(int64_t tile, Bench& room) {
        const float* u_k = logits + tile * padded;
        int32_t* ranks = room.ranks;
        average_subtiles(tile, room);
        if (hidden) {
            measure_gains(tile, room);
            const float* variance = unlike + tile * padded;
            auto of_key = [&](int64_t i) {  // the error of reading it through its cluster, in logarithms
                if (!t.bias) return load(bonus + i);
                const vec of_bias = larger(load(variance + i), spread(FLT_MIN));
                return log_root(load(bonus + i), load(log_distance + i) + 0.5f * logarithm(of_bias));
            };
            for (int64_t j = 0; j < hidden; j++)
                for (int64_t i = start[j]; i < start[j + 1]; i += LANES)  // runs into the next cluster, which follows
                    store(ranks + i - p.prefix, rank_of(load(u_k + i) + of_key(i) + room.gain[j]));
        } else {
            for (int64_t i = p.prefix; i < length; i += LANES) store(ranks + i - p.prefix, rank_of(load(u_k + i)));
        }
        fill_ranks(ranks, body);
        // of exp(u.k) times what the scores have beside it, in logarithms
        const float least = std::log(float(least_error)) + log_spread + log_whole(tile);
        const bool some = hidden && least_error > 0;
        const int32_t limit = some ? rank_of(spread(least))[0] : NEVER;
        const int64_t few = take_largest(ranks, body, layout.candidates, limit, room.moved, room.found);
        const int64_t columns = round_up(few, LANES);
        for (int64_t i = 0; i < few; i++) {
            const int64_t at = room.candidate[i] = room.found[i] + int32_t(p.prefix);
            const float* offset = (hidden ? along : key_axes) + at * AXES;
            for (int64_t a = 0; a < AXES; a++) room.offset[a * columns + i] = offset[a];
            room.base[i] = u_k[at];
            room.value[i] = hidden ? log_value[at] : 0;
            if (t.bias) room.distance[i] = hidden ? log_distance[at] : 0;
            room.within[i] = hidden ? within[at] : 0;
            room.token[i] = sorted[at];
            room.column[at] = int32_t(i + 1);
        }
        int64_t at = 0;
        for (int64_t j = 0; j < hidden; j++) {
            room.begin[j] = int32_t(at);
            while (at < few && room.candidate[at] < start[j + 1]) at++;
        }
        room.begin[hidden] = int32_t(few);
        if (t.bias) gather_bias(tile, few, room);
        for (int64_t s = 0; s < subtiles_of(tile); s++) {
            rank_candidates(tile, s, few, room);
            int32_t *keys = keys_of(tile, s), size = room.near_size[s];
            for (int32_t i = 0; i < size; i++) {
                const int32_t there = room.column[place[keys[i] + p.prefix]];
                if (there) ranks[there - 1] = NEVER;
            }
            const int32_t own_limit = some ? rank_of(spread(least + room.normaliser[s]))[0] : NEVER;
            const Cut cut = cut_largest(ranks, few, std::min(layout.exact_keys, p.most_keys - size), own_limit);
            const int64_t number = list_taken(ranks, few, cut, room.found);
            const int32_t queries = int32_t(std::min(SUBTILE, queries_of(tile) - s * SUBTILE));
            for (int64_t i = 0; i < number; i++) {
                const int32_t which = room.found[i];
                keys[size++] = room.token[which] - int32_t(p.prefix);
                room.taken[room.candidate[which]] += queries;
            }
        }
        for (int64_t i = 0; i < few; i++) room.column[room.candidate[i]] = 0;
        if (hidden)
            for (int64_t i = 0; i < few; i++) leave_rest(room.candidate[i], queries_of(tile), room);
    }

    // 1 - exp(-d), d within bounds.
    static vec missed(vec d) { return 1 - exponential(larger(-larger(d, spread(-MOST_MISS)), spread(-MOST_MISS))); }

    // log (exp(2 x) + exp(2 y))^1/2: errors that have nothing to do with each other, in logarithms.
    static vec log_root(vec x, vec y) {
        const vec high = larger(x, y), low = x + y - high;
        return high + 0.5f * rough_logarithm(1 + exponential(2 * (low - high)));
    }

    // The bias of a tile's queries on its candidates, less the mean over the tile.
    void gather_bias(int64_t tile, int64_t few, Bench& room) const {
        const int64_t columns = round_up(few, LANES), number = queries_of(tile);
        std::fill(room.mean_bias, room.mean_bias + columns, 0.0f);
        for (int64_t i = 0; i < number; i++) {
            const float* bias = bias_of(tokens_of(tile)[i]);
            float* to = room.bias + i * columns;
            for (int64_t c = 0; c < few; c++) to[c] = bias[room.token[c]];
            std::fill(to + few, to + columns, 0.0f);
            add(room.mean_bias, to, 1 / float(number), columns);
        }
        for (int64_t i = 0; i < number; i++) add(room.bias + i * columns, room.mean_bias, -1, columns);
    }

    // Attention expected of the sub-tile's mean query times the error of reading the key through its cluster, which
    // takes exp(r.w) for exp(r.k).
    void rank_candidates(int64_t tile, int64_t subtile, int64_t few, Bench& room) {
        const float *direction = room.directions + subtile * AXES,
                    *drive = room.drive + subtile * round_up(hidden, PANEL);
        const int64_t columns = round_up(few, LANES);
        for (int64_t j = 0; j < hidden; j++)
            for (int64_t i = room.begin[j]; i < room.begin[j + 1]; i += LANES)  // runs into the next cluster's
                store(room.drive_of + i, spread(drive[j]));
        for (int64_t i = 0; i < few; i += LANES) {
            vec inner = {};
            for (int64_t a = 0; a < AXES; a++) inner += direction[a] * load(room.offset + a * columns + i);
            vec score = load(room.base + i) + inner, error = {};
            if (hidden) {
                const vec miss = missed(inner);
                error = load(room.value + i) + 0.5f * rough_logarithm(miss * miss + load(room.within + i));
                score += load(room.drive_of + i);
            }
            if (t.bias) {
                const int64_t first = subtile * SUBTILE, rows = std::min(SUBTILE, queries_of(tile) - first);
                vec all = {}, squares = {};
                for (int64_t r = 0; r < rows; r++) {
                    const vec x = load(room.bias + (first + r) * columns + i);
                    all += x;
                    squares += x * x;
                }
                all /= float(rows);
                score += all;
                const vec apart = larger(squares / float(rows) - all * all, spread(FLT_MIN));
                const vec miss = missed(all);
                if (hidden)
                    error = log_root(error, load(room.distance + i) + 0.5f * rough_logarithm(miss * miss + apart));
            }
            score += error;
            store(room.ranks + i, rank_of(score));
        }
        fill_ranks(room.ranks, few);
    }

    // A key's mass is the attention of the queries that do not read it exactly.
    void leave_rest(int64_t at, int64_t queries, Bench& room) const {
        room.expected[at] *= float(queries - room.taken[at]) / float(queries);
        room.taken[at] = 0;
    }

    void return_choices() const {
        const int64_t offset = z * p.body(), first = int64_t(p.prefix);
        for (int64_t i = 0; i < p.asked(); i++)
            t.order[z * p.asked() + i] = i < asked ? order[i] - int32_t(first) : int32_t(i);
        for (int64_t i = 0; i < p.body(); i++) {
            const bool real = i < body;
            t.winners[offset + i] = real && hidden ? winners[first + i] : 0;
            t.mass[offset + i] = real && hidden ? mass[place[first + i]] : 0;
        }
        const int64_t used = (asked + SUBTILE - 1) / SUBTILE;
        int32_t* keys = t.keys + z * all_subtiles() * p.most_keys;
        std::fill(keys + used * p.most_keys, keys + all_subtiles() * p.most_keys, -1);
    }
};
