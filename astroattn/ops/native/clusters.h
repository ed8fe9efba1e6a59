// The clusters of the keys, by weighted k-means in the metric of what the queries of a tile ask for differently.
#pragma once

#include "order.h"

constexpr float LEAST_SPREAD = 1e-6f, LEAST_MASS = 1e-12f;  // as in near_far.py

struct Clusters : Order {
    float *point_panels, *centres, *centre_norm, *tile_sums, *log_sum, *weight_panels, *key_mass, *masses, *narrow,
        *wide, *along, *log_value, *within, *bonus, *values, *log_distance, *middle, *unlike;
    float log_spread = 0;  // how far values are apart

    Clusters(const Problem& problem, const Tensors& tensors, Arena& arena) : Order(problem, tensors, arena) {
        const int64_t m = most_hidden, blocks = (most_tiles + TALL - 1) / TALL, some = m ? padded : 0;
        for (auto list : {&point_panels, &along}) arena.take(*list, some * AXES);
        arena.take(centres, m * AXES);
        arena.take(centre_norm, m);
        arena.take(tile_sums, std::max(token_blocks() * m * (AXES + 1), blocks * tile_partial()));
        arena.take(log_sum, most_tiles);
        arena.take(weight_panels, round_up(m, PANEL) * dim);
        arena.take(masses, blocks * some);
        for (auto list : {&narrow, &wide}) arena.take(*list, dim);
        for (auto list : {&key_mass, &log_value, &within, &bonus}) arena.take(*list, some);
        arena.take(values, m * value_dim);
        arena.take(log_distance, t.bias ? some : 0);
        arena.take(middle, value_dim);
        arena.take(unlike, t.bias && m && most_exact ? most_tiles * padded : 0);  // the variance of a tile's bias
    }

    int64_t tile_partial() const { return 2 * dim + AXES * AXES; }

    // What the tiles' mean queries attend to, and how their queries differ.
    void read_tiles(int64_t block, Bench& room) {
        float *inner = tile_sums + block * tile_partial(), *both = inner + dim;
        std::fill(inner, inner + tile_partial(), 0.0f);
        Moments moment;
        for (int64_t tile = block * TALL; tile < block * TALL + tiles_of(block); tile++) {
            average_queries(tile);
            if (!hidden) continue;
            const int64_t number = queries_of(tile);
            const int32_t* tokens = tokens_of(tile);
            moment.add_spread(query_axes, tokens, number);
            for (int64_t i = 0; layout.exact_keys && i < number; i += SUBTILE) {
                const int64_t few = std::min(SUBTILE, number - i);
                for (int64_t d = 0; d < dim; d += LANES) {
                    vec row[SUBTILE], average = {}, inside = {};
                    for (int64_t r = 0; r < few; r++) average += row[r] = load(q + tokens[i + r] * dim + d);
                    average /= float(few);
                    for (int64_t r = 0; r < few; r++) inside += (row[r] - average) * (row[r] - average);
                    vec outside = average - load(mean + tile * dim + d);
                    store(inner + d, load(inner + d) + inside);
                    store(both + d, load(both + d) + inside + outside * outside * float(few));
                }
            }
        }
        moment.give(both + dim);
        attend_means(block);
        for (int64_t tile = block * TALL; t.bias && tile < block * TALL + tiles_of(block); tile++) {
            measure_bias(tile, room.scratch, hidden && layout.exact_keys ? unlike + tile * padded : nullptr);
            add(logits + tile * padded, room.scratch, 1, padded);
        }
        if (hidden) expect(block, room);
    }

    // The attention that the tiles' queries are expected to give to each key: their part of its mass.
    void expect(int64_t block, Bench& room) {
        float* to = masses + block * padded;
        std::fill(to, to + padded, 0.0f);
        for (int64_t tile = block * TALL; tile < block * TALL + tiles_of(block); tile++) {
            const float* row = logits + tile * padded;
            const float top = top_of(row, 0, length);
            vec all = {};
            for (int64_t n = 0; n < length; n += LANES) {
                vec e = exponential(load(row + n) - top);
                store(room.scratch + n, e);
                all += e;
            }
            log_sum[tile] = top + std::log(sum(all));
            add(to, room.scratch, share[tile] / sum(all), round_up(length, LANES));
        }
    }

    void join_masses(int64_t block, float* to) {
        const int64_t first = block * TOKENS_PER_BLOCK, last = std::min(first + TOKENS_PER_BLOCK, padded);
        std::fill(to + first, to + last, 0.0f);
        for (int64_t part = 0; part < tile_blocks(); part++)
            add(to + first, masses + part * padded + first, 1, last - first);
    }

    // ---- clusters: k-means of the keys in the metric of r ----

    void measure_queries() {
        const int64_t size = tile_partial();
        for (int64_t block = 1; block < tile_blocks(); block++) add(tile_sums, tile_sums + block * size, 1, size);
        const float number = float(asked);
        for (int64_t d = 0; d < dim; d++) {
            narrow[d] = tile_sums[d] / number;
            wide[d] = tile_sums[dim + d] / number;
        }
        for (int64_t i = 0; i < AXES * AXES; i++) metric[i / AXES][i % AXES] = tile_sums[2 * dim + i] / number;
        factorise(metric, used_axes());
    }

    void place_keys(int64_t block) {
        place_points(block, body, key_axes);
        const int64_t first = block * TOKENS_PER_BLOCK;
        for (int64_t n = first; n < std::min(first + TOKENS_PER_BLOCK, length); n++) {
            float* panel = point_panels + n / PANEL * PANEL * AXES + n % PANEL;
            for (int64_t a = 0; a < AXES; a++) panel[a * PANEL] = points[n * AXES + a];
        }
    }

    // The start: keys at equal distances along the sequence.
    void start_learning() {
        for (int64_t j = 0; j < hidden; j++) {
            const float* from = points + (p.prefix + (2 * j + 1) * body / (2 * hidden)) * AXES;
            std::copy(from, from + AXES, centres + j * AXES);
        }
        measure_centres();
    }
    void measure_centres() {
        for (int64_t j = 0; j < hidden; j++) {
            centre_norm[j] = 0;
            for (int64_t a = 0; a < AXES; a++) centre_norm[j] += centres[j * AXES + a] * centres[j * AXES + a];
        }
    }

    void assign(int64_t block) {
        const int64_t first = block * TOKENS_PER_BLOCK, last = std::min(first + TOKENS_PER_BLOCK, length);
        const float* a[TALL];
        float dots[TALL][PANEL], *c[TALL];
        for (int r = 0; r < TALL; r++) c[r] = dots[r];
        for (int64_t n = first; n < last; n += PANEL) {
            vec best[WIDE];
            ivec winner[WIDE] = {};
            for (int w = 0; w < WIDE; w++) best[w] = spread(INFINITY);
            for (int64_t j = 0; j < hidden; j += TALL) {
                const int rows = int(std::min<int64_t>(TALL, hidden - j));
                for (int r = 0; r < rows; r++) a[r] = centres + (j + r) * AXES;
                dot_panel(rows, WIDE, a, point_panels + n * AXES, AXES, c);
                for (int r = 0; r < rows; r++)
                    for (int w = 0; w < WIDE; w++) {  // |x - w|^2 without |x|^2
                        vec distance = centre_norm[j + r] - 2 * load(dots[r] + w * LANES);
                        winner[w] = distance < best[w] ? spread(int32_t(j + r)) : winner[w];
                        best[w] = distance < best[w] ? distance : best[w];
                    }
            }
            for (int w = 0; w < WIDE; w++) store(winners + n + w * LANES, winner[w]);
        }
    }

    void add_up(int64_t block) {
        float* sums = tile_sums + block * hidden * (AXES + 1);
        std::fill(sums, sums + hidden * (AXES + 1), 0.0f);
        const int64_t last = std::min((block + 1) * TOKENS_PER_BLOCK, length);
        for (int64_t n = std::max(block * TOKENS_PER_BLOCK, p.prefix); n < last; n++) {
            float* to = sums + winners[n] * (AXES + 1);
            Axes x, all;
            get(x, points + n * AXES);
            get(all, to);
            put(to, all + x * key_mass[n]);
            to[AXES] += key_mass[n];
        }
    }

    // Centres move to the mean of what they have won; one that has won nothing stays.
    void learn() {
        const int64_t size = hidden * (AXES + 1);
        for (int64_t block = 1; block < token_blocks(); block++)
            for (int64_t i = 0; i < size; i++) tile_sums[i] += tile_sums[block * size + i];
        for (int64_t j = 0; j < hidden; j++) {
            const float* sums = tile_sums + j * (AXES + 1);
            for (int64_t a = 0; sums[AXES] > 0 && a < AXES; a++) centres[j * AXES + a] = sums[a] / sums[AXES];
        }
        measure_centres();
    }

    // The cluster's rows, and how far off each of its keys is read through it: |v - mean v|, and the mean square of
    // r.(k - w), of r within the sub-tiles alone and of all of it.
    void measure_cluster(int64_t j) {
        const int64_t first = start[j], last = start[j + 1], count = last - first;
        copy_rows(j ? first : 0, last);  // the prefix too
        for (int64_t i = first; i < last; i++) mass[i] = key_mass[sorted[i]];
        if (!layout.exact_keys) return;
        average_keys(j);
        float *value = values + j * value_dim, centre[AXES] = {};
        std::fill(value, value + value_dim, 0.0f);
        add_row(mass + first, far_v + first * far_v_stride, far_v_stride, value_dim, count, value, value);
        for (int64_t d = 0; d < value_dim; d += LANES) store(value + d, load(value + d) / total[j]);
        for (int64_t i = first; i < last; i++)
            for (int64_t a = 0; a < AXES; a++) centre[a] += mass[i] / total[j] * key_axes[sorted[i] * AXES + a];
        for (int64_t i = first; i < last; i++) {
            vec inside = {}, both = {};
            for (int64_t d = 0; d < dim; d += LANES) {
                vec x = load(far_k + i * far_k_stride + d) - load(weights + j * dim + d);
                inside += x * x * load(narrow + d);
                both += x * x * load(wide + d);
            }
            within[i] = sum(inside) + LEAST_SPREAD;
            log_value[i] = std::max(value_distance(i, value), FLT_MIN);
            bonus[i] = sum(both) + LEAST_SPREAD;
            if (t.bias) log_distance[i] = std::max(value_distance(i, middle), FLT_MIN);
            for (int64_t a = 0; a < AXES; a++) along[i * AXES + a] = key_axes[sorted[i] * AXES + a] - centre[a];
        }
        for (float* row : {log_value, bonus, log_distance}) {
            if (row == log_distance && !t.bias) continue;
            int64_t i = first;
            for (; i + LANES <= last; i += LANES) store(row + i, 0.5f * logarithm(load(row + i)));
            for (; i < last; i++) row[i] = 0.5f * std::log(row[i]);
        }
        for (int64_t i = first; i < last; i++) bonus[i] += log_value[i];
    }

    // The root of the mean of |v - mean v|^2.
    void measure_spread() {
        std::fill(middle, middle + value_dim, 0.0f);
        for (int64_t n = p.prefix; n < length; n++) add(middle, v + n * v_stride, 1 / float(body), value_dim);
        vec squares = {};
        for (int64_t n = p.prefix; n < length; n++)
            for (int64_t d = 0; d < value_dim; d += LANES) {
                const vec x = load(v + n * v_stride + d) - load(middle + d);
                squares += x * x;
            }
        log_spread = std::log(std::max(std::sqrt(sum(squares) / float(body)), FLT_MIN));
    }

    // The mean of all values, by the attention that is expected.
    void average_values() {
        float all = 0;
        std::fill(middle, middle + value_dim, 0.0f);
        for (int64_t n = p.prefix; n < length; n++) {
            all += key_mass[n];
            add(middle, v + n * v_stride, key_mass[n], value_dim);
        }
        for (int64_t d = 0; d < value_dim; d++) middle[d] /= std::max(all, FLT_MIN);
    }
    // |v - from|^2 of the value at a place.
    float value_distance(int64_t i, const float* from) const {
        vec off = {};
        for (int64_t d = 0; d < value_dim; d += LANES) {
            const vec x = load(far_v + i * far_v_stride + d) - load(from + d);
            off += x * x;
        }
        return sum(off);
    }

    void pack_weights() {
        for (int64_t j = 0; j < hidden; j += PANEL) fill_panel(weights, dim, dim, j, hidden, weight_panels + j * dim);
    }

    // w of the keys by what is left of their mass, which is measured from the cluster's largest.
    void finish_cluster(int64_t j) {
        float largest = FLT_MIN;
        for (int64_t i = start[j]; i < start[j + 1]; i++) {
            mass[i] += LEAST_MASS * key_mass[sorted[i]];
            largest = std::max(largest, mass[i]);
        }
        for (int64_t i = start[j]; i < start[j + 1]; i++) mass[i] /= largest;
        average_keys(j);
    }
};
