// The order in which the queries are cut into tiles: by what they ask for, or by where they stand.
#pragma once

#include "axes.h"
#include "reading.h"
#include "select.h"

struct Order : Reading {
    float *query_axes, *key_axes, *points, *partial, *samples, *basis, *shift;
    int32_t *split_first, *split_middle, *split_last, *begins, *next_begins;
    int64_t levels = 0, level_start[2 * 64 + 1];  // the tree's splits, level by level
    Moment metric;                                // a Cholesky factor

    struct Bench : Reading::Bench {
        float* scratch;
        int32_t *ranks, *moved;

        Bench(const Order& head, Arena& arena) : Reading::Bench(head, arena) {
            arena.take(scratch, head.longest);
            for (auto list : {&ranks, &moved}) arena.take(*list, head.longest + LANES);
        }
    };

    Order(const Problem& problem, const Tensors& tensors, Arena& arena) : Reading(problem, tensors, arena) {
        for (auto list : {&query_axes, &key_axes, &points}) arena.take(*list, longest * AXES);
        arena.take(partial, token_blocks() * AXES * (AXES + 1));
        arena.take(samples, SAMPLES * (2 * dim + AXES) + 2 * dim);
        arena.take(basis, 2 * dim * AXES);
        arena.take(shift, 2 * AXES);
        for (auto list : {&split_first, &split_middle, &split_last}) arena.take(*list, all_subtiles() + 1);
        for (auto list : {&begins, &next_begins}) arena.take(*list, all_subtiles() + 1);
    }

    int used_axes() const { return int(std::min<int64_t>(AXES, p.dim)); }
    bool by_axes() const { return body && (p.by_content || means()); }

    void begin(int64_t index) {
        Reading::begin(index);
        levels = 0;
        level_start[0] = 0;
        if (p.by_content) {
            for (int64_t i = 0; i < asked; i++) order[i] = int32_t(p.prefix + i);
            plan_tree();
        } else {
            order_positions();
        }
    }

    // As `cuts` in layout.py: each node is cut into two runs of tiles, then of sub-tiles, as nearly equal as that
    // allows.
    void plan_tree() {
        int64_t nodes = asked ? 1 : 0, splits = 0;
        begins[0] = 0;
        for (int64_t unit : {layout.tile, SUBTILE})
            for (;;) {
                int64_t number = 0;
                for (int64_t i = 0; i < nodes; i++) {
                    const int64_t first = begins[i], last = i + 1 < nodes ? begins[i + 1] : asked;
                    const int64_t units = (last - first + unit - 1) / unit, middle = first + (units + 1) / 2 * unit;
                    next_begins[number++] = int32_t(first);
                    if (units < 2) continue;
                    split_first[splits] = int32_t(first);
                    split_middle[splits] = int32_t(middle);
                    split_last[splits++] = int32_t(last);
                    next_begins[number++] = int32_t(middle);
                }
                if (number == nodes) break;
                std::swap(begins, next_begins);
                nodes = number;
                level_start[++levels] = splits;
            }
    }

    // As they stand, or the patches along a curve.
    void order_positions() {
        for (int64_t i = 0, at = 0; at < asked; i++) {
            const int32_t place = t.curve ? t.curve[i] : int32_t(i);
            if (place < asked) order[at++] = int32_t(p.prefix) + place;
        }
    }

    // Rows behind the prefix, `all` there, at equal distances, less their mean, times a factor.
    void take_sample(const float* rows, int64_t stride, int64_t all, int64_t number, float factor, float* sample,
                     float* centre) const {
        std::fill(centre, centre + dim, 0.0f);
        for (int64_t i = 0; i < number; i++) {
            const float* row = rows + (p.prefix + (2 * i + 1) * all / (2 * number)) * stride;
            std::copy(row, row + dim, sample + i * dim);
            add(centre, row, 1 / float(number), dim);
        }
        for (int64_t i = 0; i < number * dim; i += LANES)
            store(sample + i, (load(sample + i) - load(centre + i % dim)) * factor);
    }

    void find_basis() {
        const int64_t queries = std::min<int64_t>(SAMPLES, asked), keys = std::min<int64_t>(SAMPLES, body);
        float *sample_q = samples, *sample_k = sample_q + SAMPLES * dim, *seen = sample_k + SAMPLES * dim;
        float *mean_q = seen + SAMPLES * AXES, *mean_k = mean_q + dim;
        take_sample(q, dim, asked, queries, 1 / std::sqrt(float(queries)), sample_q, mean_q);
        take_sample(k, k_stride, body, keys, 1 / std::sqrt(float(keys)), sample_k, mean_k);
        find_axes(sample_q, queries, sample_k, keys, dim, used_axes(), basis, basis + dim * AXES, seen);
        project(mean_q, dim, 1, dim, basis, shift);
        project(mean_k, dim, 1, dim, basis + dim * AXES, shift + AXES);
    }

    // The rows of a block, of so many behind the prefix.
    std::pair<int64_t, int64_t> part_of(int64_t block, int64_t count) const {
        return {std::max(block * TOKENS_PER_BLOCK, p.prefix),
                std::min((block + 1) * TOKENS_PER_BLOCK, p.prefix + count)};
    }

    // q Y and k P, about centred, and the sums that the key's moment needs.
    void project_tokens(int64_t block) {
        Moments sums;
        Axes all = {}, x, centre;
        for (int side = 0; side < 2; side++) {
            const auto [first, last] = part_of(block, side ? body : asked);
            float* rows = side ? key_axes : query_axes;
            if (first < last && side)
                project(k + first * k_stride, k_stride, last - first, dim, basis + dim * AXES, rows + first * AXES);
            else if (first < last) project(q + first * dim, dim, last - first, dim, basis, rows + first * AXES);
            get(centre, shift + side * AXES);
            for (int64_t n = first; n < last; n++) {
                get(x, rows + n * AXES);
                x -= centre;
                put(rows + n * AXES, x);
                if (!side) continue;
                all += x;
                sums.add(x);
            }
        }
        float* to = partial + block * AXES * (AXES + 1);
        sums.give(to);
        put(to + AXES * AXES, all);
    }

    void measure_keys() {
        constexpr int64_t size = AXES * (AXES + 1);
        for (int64_t block = 1; block < token_blocks(); block++)
            for (int64_t i = 0; i < size; i++) partial[i] += partial[block * size + i];
        const float number = float(body), *all = partial + AXES * AXES;
        for (int a = 0; a < AXES; a++)
            for (int b = 0; b < AXES; b++)
                metric[a][b] = partial[a * AXES + b] / number - all[a] / number * (all[b] / number);
        factorise(metric, used_axes());
    }

    void place_points(int64_t block, int64_t count, const float* axes) {
        const auto [first, last] = part_of(block, count);
        if (first < last) transform(axes + first * AXES, last - first, metric, points + first * AXES);
    }

    // Neighbours stay together where they ask for the same more nearly than the tree could tell: `keep_neighbours`.
    void keep_neighbours(Bench& room) {
        const int64_t count = asked / SUBTILE, trials = std::min<int64_t>(TRIALS, count);
        int32_t* by_content = room.moved;
        std::copy(order, order + asked, by_content);
        order_positions();
        float content = 0, position = 0;
        take_sample(k, k_stride, body, std::min<int64_t>(TRIALS, body), 1, samples, samples + TRIALS * dim);
        for (int64_t i = 0; i < trials; i++) {
            const int64_t first = (2 * i + 1) * count / (2 * trials) * SUBTILE;
            content += differences(by_content + first, room.rest);
            position += differences(order + first, room.rest);
        }
        if (!(position < NEIGHBOURS * content)) std::copy(by_content, by_content + asked, order);
    }

    // How much the queries of a sub-tile differ in what they make of a few keys, less what is the same for all of
    // these.
    float differences(const int32_t* tokens, float* rest) const {
        const int64_t number = std::min<int64_t>(TRIALS, body);
        const float* rows[SUBTILE];
        float dots[SUBTILE * TRIALS];
        for (int64_t r = 0; r < SUBTILE; r++) rows[r] = rest + r * dim;
        for (int64_t d = 0; d < dim; d += LANES) {
            vec row[SUBTILE], average = {};
            for (int64_t r = 0; r < SUBTILE; r++) average += row[r] = load(q + tokens[r] * dim + d);
            for (int64_t r = 0; r < SUBTILE; r++) store(rest + r * dim + d, row[r] - average / float(SUBTILE));
        }
        dot_quad(rows, samples, dim, dim, nullptr, number, dots);
        if (t.bias) add_differences(tokens, number, dots);
        float all = 0;
        for (int64_t i = 0; i < SUBTILE * number; i++) all += dots[i] * dots[i];
        return all;
    }

    void add_differences(const int32_t* tokens, int64_t number, float* dots) const {
        quad bias[TRIALS], all = {};
        for (int64_t i = 0; i < number; i++) {
            for (int64_t r = 0; r < SUBTILE; r++)
                bias[i][r] = bias_of(tokens[r])[p.prefix + (2 * i + 1) * body / (2 * number)];
            bias[i] -= (bias[i][0] + bias[i][1] + (bias[i][2] + bias[i][3])) / float(SUBTILE);
            all += bias[i];
        }
        for (int64_t i = 0; i < number; i++)
            store_quad(dots + SUBTILE * i, load_quad(dots + SUBTILE * i) + bias[i] - all / float(number));
    }

    // Cuts a node of the tree across its principal direction: the lower part goes to the left.
    void split(int64_t which, Bench& room) {
        const int64_t first = split_first[which], count = split_last[which] - first;
        const int64_t left = split_middle[which] - first;
        int32_t *tokens = order + first, *ranks = room.ranks, *moved = room.moved;
        Moments sums;
        Moment moment;
        Axes direction, x;
        sums.add_spread(points, tokens, count);
        sums.give(moment[0]);
        principal(moment, direction);
        for (int64_t i = 0; i < count; i++) {
            get(x, points + tokens[i] * AXES);
            x *= direction;
            room.scratch[i] = x[0] + x[1] + (x[2] + x[3]) + (x[4] + x[5] + (x[6] + x[7]));
        }
        for (int64_t i = 0; i < count; i += LANES) store(ranks + i, rank_of(load(room.scratch + i)));
        fill_ranks(ranks, count);
        Cut cut = cut_largest(ranks, count, count - left);
        int64_t low = 0, high = 0;
        for (int64_t i = 0; i < count; i++) {
            const bool right = cut.takes(ranks[i]);
            moved[high] = tokens[i];
            tokens[low] = tokens[i];
            high += right;
            low += !right;
        }
        std::copy(moved, moved + high, tokens + low);
    }
};
