// What is decided before anything is attended to: the order of the queries, the clusters, the exact keys.
#pragma once

#include <utility>
#include <vector>

#include "head.h"
#include "select.h"

constexpr float LEAST_SPREAD = 1e-6f, MOST_MISS = 8, LEAST_MASS = 1e-12f;  // as in near_far.py

struct Choose : Head {
    struct Bench;

    float *query_axes, *key_axes, *points, *point_panels, *centres, *centre_norm, *partial, *samples, *basis, *shift;
    float *log_sum, *weight_panels, *key_mass, *masses, *narrow, *wide, *along, *log_value, *within, *bonus, *values;
    int32_t *owner, *split_first, *split_middle, *split_last;
    int64_t levels = 0, level_start[2 * 64 + 1];  // the tree's splits, level by level
    Moment metric;                                // its Cholesky factor

    Choose(const Problem& problem, const Tensors& tensors, Arena& arena) : Head(problem, tensors, arena) {
        int64_t m = most_hidden, blocks = (most_tiles + TALL - 1) / TALL;
        for (auto list : {&query_axes, &key_axes, &points, &point_panels, &along}) arena.take(*list, padded * AXES);
        arena.take(centres, (m + TALL) * AXES);
        arena.take(centre_norm, m);
        arena.take(partial, std::max(token_blocks() * std::max<int64_t>(m * (AXES + 1), AXES * (AXES + 1)),
                                     blocks * tile_partial()));
        arena.take(samples, 2 * SAMPLES * dim + SAMPLES * AXES);
        arena.take(basis, 2 * dim * AXES);
        arena.take(shift, 2 * AXES);
        arena.take(log_sum, most_tiles);
        arena.take(key_mass, padded);
        arena.take(weight_panels, round_up(m, PANEL) * dim);
        arena.take(masses, m ? blocks * padded : 0);
        for (auto list : {&narrow, &wide}) arena.take(*list, dim);
        for (auto list : {&log_value, &within, &bonus}) arena.take(*list, padded);
        arena.take(values, m * value_dim);
        arena.take(owner, padded);
        for (auto list : {&split_first, &split_middle, &split_last}) arena.take(*list, p.body() / SUBTILE + 1);
    }

    int64_t tile_partial() const { return 2 * dim + AXES * AXES; }
    int used_axes() const { return int(std::min<int64_t>(AXES, p.dim)); }
    bool by_axes() const { return body && (p.by_content || means()); }

    // ---- coordinates and order ----

    void begin(int64_t index) {
        Head::begin(index);
        for (int64_t i = 0; i < body; i++) order[i] = int32_t(p.prefix + i);
        levels = 0;
        level_start[0] = 0;
        if (p.by_content) plan_tree();
        else if (p.rows) order_grid();
    }

    // As `cuts` in layout.py: each node is cut into two runs of tiles, then of sub-tiles, as nearly equal as that allows.
    void plan_tree() {
        int32_t* begins = next_begins(0);
        int64_t nodes = body ? 1 : 0, splits = 0;
        begins[0] = 0;
        for (int64_t unit : {layout.tile, SUBTILE})
            for (;;) {
                int32_t* now = next_begins(levels % 2);
                int32_t* then = next_begins(levels % 2 + 1);
                int64_t number = 0;
                for (int64_t i = 0; i < nodes; i++) {
                    int64_t first = now[i], last = i + 1 < nodes ? now[i + 1] : body;
                    int64_t units = (last - first + unit - 1) / unit;
                    then[number++] = int32_t(first);
                    if (units < 2) continue;
                    int64_t middle = first + (units + 1) / 2 * unit;
                    split_first[splits] = int32_t(first);
                    split_middle[splits] = int32_t(middle);
                    split_last[splits++] = int32_t(last);
                    then[number++] = int32_t(middle);
                }
                if (number == nodes) break;
                nodes = number;
                level_start[++levels] = splits;
            }
    }
    int32_t* next_begins(int64_t which) const { return which % 2 ? owner : winners; }  // not in use yet

    // The patches along a Z-curve.
    void order_grid() {
        std::vector<std::pair<uint64_t, int32_t>> codes;
        for (int64_t i = 0; i < body; i++) {
            uint64_t row = uint64_t(i / p.columns), column = uint64_t(i % p.columns), code = 0;
            for (int bit = 0; bit < 31; bit++)
                code |= (column >> bit & 1) << (2 * bit) | (row >> bit & 1) << (2 * bit + 1);
            codes.emplace_back(code, int32_t(p.prefix + i));
        }
        std::sort(codes.begin(), codes.end());
        for (int64_t i = 0; i < body; i++) order[i] = codes[size_t(i)].second;
    }

    void find_basis() {
        const int64_t number = std::min<int64_t>(SAMPLES, body);
        float *sample_q = samples, *sample_k = samples + SAMPLES * dim, *seen = samples + 2 * SAMPLES * dim;
        float means[2][AXES];
        auto take = [&](const float* rows, int64_t stride, float* sample, float* centre) {
            std::fill(centre, centre + dim, 0.0f);
            for (int64_t i = 0; i < number; i++) {
                const float* row = rows + (p.prefix + (2 * i + 1) * body / (2 * number)) * stride;
                std::copy(row, row + dim, sample + i * dim);
                add(centre, row, 1 / float(number), dim);
            }
            const float scale = 1 / std::sqrt(float(number));
            for (int64_t i = 0; i < number * dim; i += LANES)
                store(sample + i, (load(sample + i) - load(centre + i % dim)) * scale);
        };
        take(q, dim, sample_q, narrow);
        take(k, k_stride, sample_k, wide);
        find_axes(sample_q, sample_k, number, dim, used_axes(), basis, basis + dim * AXES, seen);
        project(narrow, dim, 1, dim, basis, means[0]);
        project(wide, dim, 1, dim, basis + dim * AXES, means[1]);
        std::copy(means[0], means[0] + 2 * AXES, shift);
    }

    // q Y and k P, about centred, and the sums that the key's moment needs.
    void project_tokens(int64_t block) {
        const int64_t first = std::max(block * TOKENS_PER_BLOCK, p.prefix),
                      last = std::min((block + 1) * TOKENS_PER_BLOCK, length);
        Moments sums;
        Axes all = {}, x, centre;
        if (first < last) {
            project(q + first * dim, dim, last - first, dim, basis, query_axes + first * AXES);
            project(k + first * k_stride, k_stride, last - first, dim, basis + dim * AXES, key_axes + first * AXES);
        }
        for (int side = 0; side < 2; side++) {
            float* rows = side ? key_axes : query_axes;
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

    void place_points(int64_t block, const float* axes) {
        const int64_t first = std::max(block * TOKENS_PER_BLOCK, p.prefix),
                      last = std::min((block + 1) * TOKENS_PER_BLOCK, length);
        if (first < last) transform(axes + first * AXES, last - first, metric, points + first * AXES);
    }

    // Cuts a node of the tree across its principal direction: the lower part goes to the left.
    void split(int64_t which, Bench& room) {
        const int64_t first = split_first[which], count = split_last[which] - first;
        const int64_t left = split_middle[which] - first;
        int32_t *tokens = order + first, *ranks = room.slot, *moved = room.moved;
        Moments sums;
        Moment moment;
        Axes mean = {}, direction, x;
        for (int64_t i = 0; i < count; i++) {
            get(x, points + tokens[i] * AXES);
            mean += x;
        }
        mean /= float(count);
        for (int64_t i = 0; i < count; i++) {
            get(x, points + tokens[i] * AXES);
            sums.add(x - mean);
        }
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

    // ---- tiles: what their mean queries attend to, and how their queries differ ----

    struct Bench : Head::Bench {
        float *scratch, *within, *base, *drive_of, *offset, *directions, *sub_mean, *expected;
        int32_t *moved, *ranks, *found, *candidate, *token, *begin, *near_size, *column, *taken;

        Bench(const Choose& head, Arena& arena) : Head::Bench(head, arena) {
            const int64_t few = round_up(head.most_candidates, LANES), subtiles = head.most_subtiles();
            for (auto list : {&scratch, &expected}) arena.take(*list, head.padded);
            for (auto list : {&within, &base, &drive_of}) arena.take(*list, few + LANES);
            arena.take(offset, AXES * few);
            arena.take(directions, subtiles * AXES);
            arena.take(sub_mean, subtiles * head.dim);
            for (auto list : {&moved, &ranks, &found, &column, &taken}) arena.take(*list, head.padded + LANES);
            for (auto list : {&candidate, &token}) arena.take(*list, few);
            arena.take(begin, head.most_hidden + 1);
            arena.take(near_size, subtiles);
            if (!arena.block) return;
            std::fill(column, column + head.padded, 0);
            std::fill(taken, taken + head.padded, 0);
        }
    };

    void read_tiles(int64_t block, Bench& room) {
        float *inner = partial + block * tile_partial(), *both = inner + dim;
        std::fill(inner, inner + tile_partial(), 0.0f);
        Moments moment;
        for (int64_t tile = block * TALL; tile < block * TALL + tiles_of(block); tile++) {
            average_queries(tile);
            if (!hidden) continue;
            const int64_t number = queries_of(tile);
            const int32_t* tokens = tokens_of(tile);
            Axes centre = {}, x;
            for (int64_t i = 0; i < number; i++) {
                get(x, query_axes + tokens[i] * AXES);
                centre += x;
            }
            centre /= float(number);
            for (int64_t i = 0; i < number; i++) {
                get(x, query_axes + tokens[i] * AXES);
                moment.add(x - centre);
            }
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
        for (int64_t block = 1; block < tile_blocks(); block++) add(partial, partial + block * size, 1, size);
        const float number = float(body);
        for (int64_t d = 0; d < dim; d++) {
            narrow[d] = partial[d] / number;
            wide[d] = partial[dim + d] / number;
        }
        for (int64_t i = 0; i < AXES * AXES; i++) metric[i / AXES][i % AXES] = partial[2 * dim + i] / number;
        factorise(metric, used_axes());
    }

    void place_keys(int64_t block) {
        place_points(block, key_axes);
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
        float* sums = partial + block * hidden * (AXES + 1);
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
            for (int64_t i = 0; i < size; i++) partial[i] += partial[block * size + i];
        for (int64_t j = 0; j < hidden; j++) {
            const float* sums = partial + j * (AXES + 1);
            for (int64_t a = 0; sums[AXES] > 0 && a < AXES; a++) centres[j * AXES + a] = sums[a] / sums[AXES];
        }
        measure_centres();
    }

    // The cluster's rows, and how far off each of its keys is read through it: |v - mean v|, and the mean square of
    // r.(k - w), of r within the sub-tiles alone and of all of it.
    void measure_cluster(int64_t j) {
        const int64_t first = start[j], last = start[j + 1], count = last - first;
        copy_rows(j ? first : 0, last);  // the prefix too
        for (int64_t i = first; i < last; i++) {
            mass[i] = key_mass[sorted[i]];
        }
        if (!layout.exact_keys) return;
        average_keys(j);
        float *value = values + j * value_dim, centre[AXES] = {};
        std::fill(value, value + value_dim, 0.0f);
        add_row(mass + first, far_v + first * far_v_stride, far_v_stride, value_dim, nullptr, count, value, value);
        for (int64_t d = 0; d < value_dim; d += LANES) store(value + d, load(value + d) / total[j]);
        for (int64_t i = first; i < last; i++)
            for (int64_t a = 0; a < AXES; a++) centre[a] += mass[i] / total[j] * key_axes[sorted[i] * AXES + a];
        for (int64_t i = first; i < last; i++) {
            vec off = {}, inside = {}, both = {};
            for (int64_t d = 0; d < value_dim; d += LANES) {
                vec x = load(far_v + i * far_v_stride + d) - load(value + d);
                off += x * x;
            }
            for (int64_t d = 0; d < dim; d += LANES) {
                vec x = load(far_k + i * far_k_stride + d) - load(weights + j * dim + d);
                inside += x * x * load(narrow + d);
                both += x * x * load(wide + d);
            }
            within[i] = sum(inside) + LEAST_SPREAD;
            log_value[i] = std::max(sum(off), FLT_MIN);
            bonus[i] = sum(both) + LEAST_SPREAD;
            for (int64_t a = 0; a < AXES; a++) along[i * AXES + a] = key_axes[sorted[i] * AXES + a] - centre[a];
        }
        for (float* row : {log_value, bonus}) {
            int64_t i = first;
            for (; i + LANES <= last; i += LANES) store(row + i, 0.5f * logarithm(load(row + i)));
            for (; i < last; i++) row[i] = 0.5f * std::log(row[i]);
        }
        for (int64_t i = first; i < last; i++) bonus[i] += log_value[i];
    }

    void pack_weights() {
        for (int64_t j = 0; j < hidden; j += PANEL)
            fill_panel(weights, dim, dim, j, hidden, weight_panels + j * dim);
    }

    // ---- exact keys ----

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
        for (int64_t i = p.prefix; i < length; i += LANES)
            store(expected + i, exponential(load(row + i) - log_sum[tile]) * share[tile]);
    }

    // The windows of the sub-tile's queries, each key once.
    void take_near(int64_t tile, int64_t subtile, Bench& room) {
        int32_t *keys = keys_of(tile, subtile), size = 0;
        const int64_t rows = p.rows ? p.rows : 1, columns = p.rows ? p.columns : body;
        const int64_t first = subtile * SUBTILE, last = std::min(first + SUBTILE, queries_of(tile));
        for (int64_t i = first; i < last; i++) {
            const int64_t token = tokens_of(tile)[i] - p.prefix;
            const int64_t top = std::clamp<int64_t>(token / columns - layout.high / 2, 0, rows - layout.high);
            const int64_t left = std::clamp<int64_t>(token % columns - layout.wide / 2, 0, columns - layout.wide);
            for (int64_t y = top; y < top + layout.high; y++)
                for (int64_t x = left; x < left + layout.wide; x++) {
                    const int64_t key = y * columns + x;
                    if (key >= body || room.marks[key]) continue;
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

    // How much more than the tile's mean query one of its sub-tiles asks for each cluster, at most.
    void measure_gains(int64_t tile, Bench& room) {
        const int subtiles = int(subtiles_of(tile));
        const int64_t columns = round_up(hidden, PANEL);
        float *log_share = room.top, *gain = room.z;
        for (int s = 0; s < subtiles; s++) room.a[s] = room.sub_mean + s * dim;
        for (int64_t j = 0; j < hidden; j += PANEL) {
            for (int s = 0; s < subtiles; s++) room.c[s] = room.drive + s * columns + j;
            dot_panel(subtiles, WIDE, room.a, weight_panels + j * dim, dim, room.c);
        }
        for (int64_t j = 0; j < hidden; j++)
            log_share[j] = std::max(sum_of(room.expected + start[j], start[j + 1] - start[j]), FLT_MIN);
        std::fill(log_share + hidden, log_share + columns, 0.0f);
        for (int64_t j = 0; j < columns; j += LANES) {
            store(log_share + j, logarithm(load(log_share + j)));
            store(gain + j, spread(-INFINITY));
        }
        for (int s = 0; s < subtiles; s++) {
            const float* drive = room.drive + s * columns;
            vec top = spread(-3e38f), all = {};
            for (int64_t j = 0; j < columns; j += LANES) top = larger(load(drive + j) + load(log_share + j), top);
            const float high = largest(top);
            for (int64_t j = 0; j < columns; j += LANES)
                all += exponential(load(drive + j) + load(log_share + j) - high);
            const float normaliser = high + std::log(sum(all));
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
            for (int64_t j = 0; j < hidden; j++)
                for (int64_t i = start[j]; i < start[j + 1]; i += LANES)  // runs into the next cluster, which follows
                    store(ranks + i - p.prefix, rank_of(load(u_k + i) + load(bonus + i) + room.z[j]));
        } else {
            for (int64_t i = p.prefix; i < length; i += LANES)
                store(ranks + i - p.prefix, rank_of(load(u_k + i)));
        }
        fill_ranks(ranks, body);
        const int64_t few = take_largest(ranks, body, layout.candidates, room.moved, room.found);
        const int64_t columns = round_up(few, LANES);
        for (int64_t i = 0; i < few; i++) {
            const int64_t at = room.candidate[i] = room.found[i] + int32_t(p.prefix);
            const float* offset = (hidden ? along : key_axes) + at * AXES;
            for (int64_t a = 0; a < AXES; a++) room.offset[a * columns + i] = offset[a];
            room.base[i] = u_k[at] + (hidden ? log_value[at] : 0);
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
        for (int64_t s = 0; s < subtiles_of(tile); s++) {
            rank_candidates(s, few, room);
            int32_t *keys = keys_of(tile, s), size = room.near_size[s];
            for (int32_t i = 0; i < size; i++) {
                const int32_t there = room.column[place[keys[i] + p.prefix]];
                if (there) ranks[there - 1] = NEVER;
            }
            const int64_t number = list_taken(ranks, few, cut_largest(ranks, few, layout.exact_keys), room.found);
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

    // Attention expected of the sub-tile's mean query times the error of reading the key through its cluster, which
    // takes exp(r.w) for exp(r.k).
    void rank_candidates(int64_t subtile, int64_t few, Bench& room) {
        const float *direction = room.directions + subtile * AXES, *drive = room.drive + subtile * round_up(hidden, PANEL);
        const int64_t columns = round_up(few, LANES);
        for (int64_t j = 0; j < hidden; j++)
            for (int64_t i = room.begin[j]; i < room.begin[j + 1]; i += LANES)  // runs into the next cluster's
                store(room.drive_of + i, spread(drive[j]));
        for (int64_t i = 0; i < few; i += LANES) {
            vec inner = {};
            for (int64_t a = 0; a < AXES; a++) inner += direction[a] * load(room.offset + a * columns + i);
            vec score = load(room.base + i) + inner;
            if (hidden) {
                inner = larger(inner, spread(-MOST_MISS));
                vec miss = 1 - exponential(larger(-inner, spread(-MOST_MISS)));
                score += load(room.drive_of + i) + 0.5f * rough_logarithm(miss * miss + load(room.within + i));
            }
            store(room.ranks + i, rank_of(score));
        }
        fill_ranks(room.ranks, few);
    }

    // A key's mass is the attention of the queries that do not read it exactly.
    void leave_rest(int64_t at, int64_t queries, Bench& room) const {
        room.expected[at] *= float(queries - room.taken[at]) / float(queries);
        room.taken[at] = 0;
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

    void return_choices() const {
        const int64_t offset = z * p.body(), first = int64_t(p.prefix);
        for (int64_t i = 0; i < p.body(); i++) {
            const bool real = i < body;
            t.order[offset + i] = real ? order[i] - int32_t(first) : int32_t(i);
            t.winners[offset + i] = real && hidden ? winners[first + i] : 0;
            t.mass[offset + i] = real && hidden ? mass[place[first + i]] : 0;
        }
        const int64_t used = (body + SUBTILE - 1) / SUBTILE;
        int32_t* keys = t.keys + z * all_subtiles() * p.most_keys;
        std::fill(keys + used * p.most_keys, keys + all_subtiles() * p.most_keys, -1);
    }
};
