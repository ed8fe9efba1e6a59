// One head of one sequence: where its tokens lie, and what both directions compute of it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>

#include "memory.h"
#include "numbers.h"
#include "vectors.h"

// Field order is the order of `Problem` in __init__.py.
struct Problem {
    int64_t batch, heads, tokens, dim, value_dim;
    int64_t type;
    int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // of batch, head and token, in elements
    int64_t prefix, rows, columns, tile_high, tile_wide, window_high, window_wide;
    int64_t exact_keys, groups, hidden, steps;
    int64_t threads;
    double scale;

    int64_t body() const { return tokens - prefix; }
    int64_t down() const { return (rows + tile_high - 1) / tile_high; }
    int64_t across() const { return (columns + tile_wide - 1) / tile_wide; }
    int64_t tiles() const { return down() * across(); }
    int64_t slots() const { return tile_high * tile_wide; }
    int64_t window() const { return window_high * window_wide; }
    // Where row `token` of head z begins in a tensor of such strides.
    int64_t at(const int64_t* stride, int64_t z, int64_t token) const {
        return z / heads * stride[0] + z % heads * stride[1] + token * stride[2];
    }
};

struct Tensors {
    const void *query, *key, *value;
    const int64_t* lengths;  // [batch] or null
    void* out;               // [batch, heads, tokens, value_dim], of its own strides like the three above
    float* log_p;            // [batch, heads, tokens]
    int32_t* winners;        // [batch, heads, body]
    float* mass;             // [batch, heads, body]
    int32_t* keys;           // [batch, heads, groups, exact_keys]
};

// Work is cut into blocks that do not depend on the number of threads, so neither do the results.
constexpr int64_t TOKENS_PER_BLOCK = 1024, TILES_PER_BLOCK = 16;
constexpr int64_t QUERIES = 64;  // of a tile that are read at once

struct Head {
    struct Bench;  // what a thread needs besides

    const Problem& p;
    const Tensors& t;
    int64_t z, dim, value_dim, padded;  // dims padded to vectors, tokens to panels
    int64_t length = 0;                 // real tokens
    int64_t real_tiles = 0;
    bool shared = false;              // whether tiles share groups
    std::atomic<bool> broken{false};  // whether a key holds NaN or infinity, which a weight of 0 would hide
    // Rows k_stride and v_stride apart: the caller's own where they are float32 without gaps; rows far apart would cost
    // more in cache misses than a copy does.
    const float *k, *v;
    int64_t k_stride, v_stride;
    bool own_keys, own_values;
    float *q, *key_rows, *value_rows, *panels, *mean, *share, *attention, *log_sum, *metric, *weights, *weight_norm,
        *mass, *masses, *error, *partial;
    float *z_sum, *log_z, *s_mean, *weight_panels;
    int32_t *winners, *order, *start, *next;

    Head(const Problem& problem, const Tensors& tensors, Arena& arena)
        : p(problem),
          t(tensors),
          dim(round_up(p.dim, LANES)),
          value_dim(round_up(p.value_dim, LANES)),
          padded(round_up(p.tokens, PANEL)),
          own_keys(p.type == FLOAT32 && p.dim == dim && p.key_stride[2] == dim),
          own_values(p.type == FLOAT32 && p.value_dim == value_dim && p.value_stride[2] == value_dim) {
        int64_t m = p.hidden;
        arena.take(q, p.tokens * dim);
        arena.take(key_rows, own_keys ? 0 : p.tokens * dim);
        arena.take(value_rows, own_values ? 0 : p.tokens * value_dim);
        arena.take(panels, padded * dim);
        arena.take(mean, p.groups * dim);
        arena.take(share, p.groups);
        arena.take(attention, p.groups * padded);
        arena.take(log_sum, p.groups);
        arena.take(metric, dim);
        arena.take(weights, round_up(m, PANEL) * dim);
        arena.take(weight_norm, m);
        arena.take(mass, padded);
        arena.take(masses, group_blocks() * padded);
        arena.take(error, padded);
        arena.take(partial, std::max(token_blocks() * m * (std::max(dim, value_dim) + 1), p.groups * dim));
        arena.take(z_sum, p.groups * m);
        arena.take(log_z, p.groups * m);
        arena.take(s_mean, p.groups * m * value_dim);
        arena.take(weight_panels, round_up(m, PANEL) * dim);
        arena.take(winners, padded);
        arena.take(order, padded);
        arena.take(start, m + 1);
        arena.take(next, m);
    }

    void begin(int64_t index) {
        z = index;
        length = t.lengths ? t.lengths[z / p.heads] : p.tokens;
        real_tiles = t.lengths ? std::max<int64_t>((body_length() + p.slots() - 1) / p.slots(), 1) : p.tiles();
        shared = real_tiles > p.groups;
        broken = false;
        auto rows_of = [&](bool own, const void* from, const int64_t* stride, const float* copy) {
            return own ? static_cast<const float*>(from) + p.at(stride, z, 0) : copy;
        };
        k = rows_of(own_keys, t.key, p.key_stride, key_rows);
        v = rows_of(own_values, t.value, p.value_stride, value_rows);
        k_stride = own_keys ? p.key_stride[2] : dim;
        v_stride = own_values ? p.value_stride[2] : value_dim;
    }

    int64_t body_length() const { return std::max<int64_t>(length - p.prefix, 0); }
    int64_t token_blocks() const { return (p.tokens + TOKENS_PER_BLOCK - 1) / TOKENS_PER_BLOCK; }
    int64_t panel_blocks() const { return (padded + TOKENS_PER_BLOCK - 1) / TOKENS_PER_BLOCK; }
    int64_t group_blocks() const { return (p.groups + TALL - 1) / TALL; }
    int64_t tile_blocks() const { return (p.tiles() + TILES_PER_BLOCK - 1) / TILES_PER_BLOCK; }

    int64_t group_of(int64_t tile) const {
        return std::min(shared ? tile * p.groups / real_tiles : tile, p.groups - 1);
    }
    // The first tile of a group; tiles of padding are in none.
    int64_t first_tile(int64_t group) const {
        return shared ? (group * real_tiles + p.groups - 1) / p.groups : std::min(group, real_tiles);
    }

    // Calls f(token) for each real token in the tile's slots.
    template <typename F>
    void for_slots(int64_t tile, F f) const {
        int64_t top = tile / p.across() * p.tile_high, left = tile % p.across() * p.tile_wide;
        for (int64_t row = top; row < std::min(top + p.tile_high, p.rows); row++)
            for (int64_t column = left; column < std::min(left + p.tile_wide, p.columns); column++) {
                int64_t token = p.prefix + row * p.columns + column;
                if (token < length) f(token);
            }
    }
    // Calls f(token) for each real token of the tile's near field; a tile of padding has none.
    template <typename F>
    void for_near(int64_t tile, F f) const {
        if (tile >= real_tiles) return;
        int64_t top = tile / p.across() * p.tile_high, left = tile % p.across() * p.tile_wide;
        int64_t end = t.lengths ? body_length() : p.columns;
        int64_t row = top + halve(p.tile_high - p.window_high);
        row = std::clamp<int64_t>(row, 0, p.rows - p.window_high);
        int64_t column = left + halve(std::min(end - left, p.tile_wide) - p.window_wide);
        column = std::max<int64_t>(std::min(column, end - p.window_wide), 0);
        for (int64_t y = row; y < row + p.window_high; y++)
            for (int64_t x = column; x < std::min(column + p.window_wide, end); x++) f(p.prefix + y * p.columns + x);
    }
    static int64_t halve(int64_t x) { return x >= 0 ? x / 2 : -((1 - x) / 2); }  // rounds down

    // ---- the stages, each over its own blocks; one begins when the one before has ended for all blocks ----

    void load_tokens(int64_t block) {
        Type type = Type(p.type);
        int64_t first = block * TOKENS_PER_BLOCK, last = std::min(first + TOKENS_PER_BLOCK, p.tokens);
        for (int64_t n = first; n < last; n++) {
            auto copy = [&](const void* from, const int64_t* stride, int64_t width, float factor, float* to,
                            int64_t room) {
                read_row(from, p.at(stride, z, n), type, width, factor, to + n * room);
                std::fill(to + n * room + width, to + (n + 1) * room, 0.0f);
            };
            copy(t.query, p.query_stride, p.dim, float(p.scale), q, dim);
            if (!own_keys) copy(t.key, p.key_stride, p.dim, 1, key_rows, dim);
            if (!own_values) copy(t.value, p.value_stride, p.value_dim, 1, value_rows, value_dim);
        }
        vec zeros = {};
        for (int64_t n = first; n < std::min(last, length); n++)
            for (int64_t d = 0; d < dim; d += LANES) zeros += load(k + n * k_stride + d) * 0.0f;
        if (sum(zeros) != 0) broken = true;
        for (int64_t n = first; n < std::min(first + TOKENS_PER_BLOCK, padded); n += PANEL)
            fill_panel(k, k_stride, dim, n, p.tokens, panels + n * dim);
    }

    void average_queries(int64_t block) {
        for (int64_t g = block * TALL; g < std::min((block + 1) * TALL, p.groups); g++) {
            float *u = mean + g * dim, *spread_of = partial + g * dim;
            std::fill(u, u + dim, 0.0f);
            std::fill(spread_of, spread_of + dim, 0.0f);
            int64_t count = 0;
            auto every = [&](auto f) {
                for (int64_t tile = first_tile(g); tile < first_tile(g + 1); tile++) for_slots(tile, f);
            };
            every([&](int64_t n) {
                for (int64_t d = 0; d < dim; d += LANES) store(u + d, load(u + d) + load(q + n * dim + d));
                count++;
            });
            for (int64_t d = 0; d < dim; d++) u[d] /= float(std::max<int64_t>(count, 1));
            every([&](int64_t n) {
                for (int64_t d = 0; d < dim; d += LANES) {
                    vec rest = load(q + n * dim + d) - load(u + d);
                    store(spread_of + d, load(spread_of + d) + rest * rest);
                }
            });
            share[g] = float(count) / float(std::max<int64_t>(body_length(), 1));
        }
    }

    // P[g][n]: the attention of the mean queries to all real keys.
    void attend_means(int64_t block) {
        int64_t first = block * TALL;
        int rows = int(std::min<int64_t>(TALL, p.groups - first));
        const float* a[TALL];
        float* c[TALL];
        for (int r = 0; r < rows; r++) a[r] = mean + (first + r) * dim;
        for (int64_t n = 0; n < padded; n += PANEL) {
            for (int r = 0; r < rows; r++) c[r] = attention + (first + r) * padded + n;
            dot_panel(rows, WIDE, a, panels + n * dim, dim, c);
        }
        for (int r = 0; r < rows; r++) log_sum[first + r] = normalise(attention + (first + r) * padded, length, padded);
    }

    // Softmax of a row in place, zeros past the length; returns the log of the normaliser.
    static float normalise(float* row, int64_t count, int64_t end) {
        std::fill(row + count, row + end, -INFINITY);
        vec top = spread(-INFINITY);
        for (int64_t n = 0; n < end; n += LANES) top = larger(load(row + n), top);
        float high = std::max(largest(top), -3e38f);
        vec total = {};
        for (int64_t n = 0; n < end; n += LANES) {
            vec e = exponential(load(row + n) - high);
            store(row + n, e);
            total += e;
        }
        float all = sum(total);
        float factor = all == 0 ? 0 : 1 / all;
        for (int64_t n = 0; n < end; n += LANES) store(row + n, load(row + n) * factor);
        return high + std::log(all);
    }

    void add_up(int64_t block, const float* x, int64_t stride, int64_t width) {
        float* sums = partial + block * p.hidden * (width + 1);
        std::fill(sums, sums + p.hidden * (width + 1), 0.0f);
        int64_t first = std::max(block * TOKENS_PER_BLOCK, p.prefix),
                last = std::min((block + 1) * TOKENS_PER_BLOCK, length);
        for (int64_t n = first; n < last; n++) {
            float *to = sums + winners[n] * (width + 1), weight = mass[n];
            for (int64_t d = 0; d < width; d += LANES) store(to + d, load(to + d) + weight * load(x + n * stride + d));
            to[width] += weight;
        }
    }

    // The first block's sums become those of all.
    void join_partial(int64_t width) {
        int64_t count = p.hidden * (width + 1);
        for (int64_t block = 1; block < token_blocks(); block++)
            for (int64_t i = 0; i < count; i++) partial[i] += partial[block * count + i];
    }

    // w: the mean of each cluster's keys, weighted by mass; of an empty cluster 0.
    void average_keys() {
        join_partial(dim);
        for (int64_t j = 0; j < p.hidden; j++) {
            const float* sums = partial + j * (dim + 1);
            bool empty = sums[dim] == 0;
            for (int64_t d = 0; d < dim; d++) weights[j * dim + d] = empty ? 0 : sums[d] / sums[dim];
        }
        for (int64_t j = 0; j < p.hidden; j += PANEL)
            fill_panel(weights, dim, dim, j, p.hidden, weight_panels + j * dim);
    }

    // Tokens in order of their clusters.
    void sort_tokens() {
        std::fill(start, start + p.hidden + 1, 0);
        for (int64_t n = p.prefix; n < length; n++) start[winners[n] + 1]++;
        for (int64_t j = 0; j < p.hidden; j++) start[j + 1] += start[j];
        std::copy(start, start + p.hidden, next);
        for (int64_t n = p.prefix; n < length; n++) order[next[winners[n]]++] = int32_t(n);
    }

    // What the group attends exactly leaves its row of P.
    void leave_out_exact(int64_t g) {
        float* row = attention + g * padded;
        const int32_t* keys = t.keys + (z * p.groups + g) * p.exact_keys;
        std::fill(row, row + p.prefix, 0.0f);
        for (int64_t i = 0; i < p.exact_keys; i++)
            if (keys[i] >= 0) row[keys[i] + p.prefix] = 0;
        if (!shared) for_near(g, [&](int64_t n) { row[n] = 0; });
    }

    // z, its logarithm with the means' normaliser, and s / z, of each group and cluster.
    void write_hidden(int64_t block) {
        int64_t first = block * TALL, m = p.hidden;
        int rows = int(std::min<int64_t>(TALL, p.groups - first));
        const float* c[TALL];
        float* s[TALL];
        for (int r = 0; r < TALL; r++) c[r] = attention + (first + std::min(r, rows - 1)) * padded;
        for (int64_t j = 0; j < m; j++) {
            const int32_t* members = order + start[j];
            int64_t count = start[j + 1] - start[j];
            float total[TALL] = {};
            for (int64_t i = 0; i < count; i++)
                for (int r = 0; r < TALL; r++) total[r] += c[r][members[i]];
            for (int r = 0; r < rows; r++) {
                s[r] = s_mean + ((first + r) * m + j) * value_dim;
                std::fill(s[r], s[r] + value_dim, 0.0f);
            }
            add_rows<BOTH>(rows, c, v, v_stride, value_dim, members, count, s);
            for (int r = 0; r < rows; r++) {
                int64_t at = (first + r) * m + j;
                bool alive = !(total[r] < 1e-36f);  // NaN is alive
                z_sum[at] = alive ? total[r] : 0;
                float factor = alive ? 1 / total[r] : 0;
                for (int64_t d = 0; d < value_dim; d += LANES) store(s[r] + d, load(s[r] + d) * factor);
            }
        }
        for (int64_t g = first; g < first + rows; g++) {
            int64_t j = 0;
            for (; j + LANES <= m; j += LANES)
                store(log_z + g * m + j, logarithm(load(z_sum + g * m + j)) + log_sum[g]);
            for (; j < m; j++) log_z[g * m + j] = std::log(z_sum[g * m + j]) + log_sum[g];
        }
    }

    int64_t most_exact() const { return round_up(p.prefix + p.window() + p.exact_keys, PANEL); }

    struct Bench {
        float *rest, *logits, *out, *scores, *few, *panel, *zeros, *zero_row, *ratio, *left;
        int32_t *index, *found, *first;  // first: 0, 1, 2, ...
        const float **a, **b, **shares;
        float **c, **o;
        int64_t* tokens;

        Bench(const Head& head, Arena& arena) {
            const Problem& p = head.p;
            int64_t queries = std::min(round_up(p.slots(), 4), QUERIES), rows = std::max(queries, p.prefix);
            int64_t columns = head.most_exact() + round_up(p.hidden, PANEL);
            arena.take(rest, queries * head.dim);
            arena.take(logits, std::max(queries * columns, p.prefix * head.padded));
            arena.take(out, std::max<int64_t>(rows, 1) * head.value_dim);
            arena.take(scores, head.padded);
            arena.take(few, std::max(head.padded, round_up(2 * p.exact_keys, LANES)));
            arena.take(panel, PANEL * head.dim);
            arena.take(zeros, head.dim);
            arena.take(zero_row, head.value_dim);
            arena.take(ratio, p.hidden);
            arena.take(left, p.hidden);
            arena.take(index, head.most_exact());
            arena.take(found, head.padded);
            arena.take(first, round_up(p.hidden, LANES));
            for (auto list : {&a, &b, &shares}) arena.take(*list, rows);
            for (auto list : {&c, &o}) arena.take(*list, rows);
            arena.take(tokens, p.slots());
            if (!arena.block) return;
            std::fill(zeros, zeros + head.dim, 0.0f);
            std::fill(zero_row, zero_row + head.value_dim, 0.0f);
            for (int64_t j = 0; j < round_up(p.hidden, LANES); j++) first[j] = int32_t(std::min(j, p.hidden - 1));
        }
    };

    // What the queries of a tile attend to, and which queries it has.
    struct TileView {
        int64_t group, queries, count, near_from, near_to;  // exact keys: prefix, near [near_from, near_to), chosen
        const float* log_z;                                 // of the neurons, as the tile sees them

        int64_t wide() const { return round_up(count, LANES); }  // where the neurons' columns begin
    };

    TileView view(int64_t tile, Bench& room) const {
        TileView x{group_of(tile), 0, 0, 0, 0, nullptr};
        for_slots(tile, [&](int64_t n) { room.tokens[x.queries++] = n; });
        if (x.queries == 0) return x;
        int32_t* index = room.index;
        for (int64_t n = 0; n < std::min(p.prefix, length); n++) index[x.count++] = int32_t(n);
        x.near_from = x.count;
        for_near(tile, [&](int64_t n) { index[x.count++] = int32_t(n); });
        x.near_to = x.count;
        const int32_t* keys = t.keys + (z * p.groups + x.group) * p.exact_keys;
        for (int64_t i = 0; i < p.exact_keys; i++)
            if (keys[i] >= 0) index[x.count++] = int32_t(keys[i] + p.prefix);
        std::fill(index + x.count, index + round_up(x.count, PANEL), 0);
        x.log_z = log_z + x.group * p.hidden;
        if (shared && p.hidden) x.log_z = leave_out_near(x, room);
        return x;
    }

    // Logits of some queries of a tile: [exact keys, filled up with -inf ; neurons, the same], x.wide() apart.
    void score(const int64_t* tokens, int rows, const TileView& x, int64_t columns, Bench& room) const {
        int64_t m = p.hidden, wide = x.wide();
        for (int r = 0; r < rows; r++) {
            const float* row = q + tokens[r] * dim;
            room.a[r] = row;
            float* rest = room.rest + r * dim;
            for (int64_t d = 0; d < dim; d += LANES) store(rest + d, load(row + d) - load(mean + x.group * dim + d));
            room.b[r] = rest;
        }
        exact_logits(rows, x.count, columns, room);
        for (int64_t j = 0; j < m; j += PANEL) {
            int width = int(std::min<int64_t>(WIDE, (m - j + LANES - 1) / LANES));
            for (int r = 0; r < rows; r++) room.c[r] = room.logits + r * columns + wide + j;
            dot_panel(rows, width, room.b, weight_panels + j * dim, dim, room.c);
        }
        for (int r = 0; r < rows; r++) {
            float* neurons = room.logits + r * columns + wide;
            for (int64_t j = 0; j < m; j++) neurons[j] += x.log_z[j];
            std::fill(neurons + m, room.logits + (r + 1) * columns, -INFINITY);
        }
    }

    void exact_logits(int rows, int64_t count, int64_t columns, Bench& room) const {
        const int32_t* index = room.index;
        if (rows <= 8) {  // few queries: transposing the keys would cost more than it saves
            for (int r = rows; r < round_up(rows, 4); r++) room.a[r] = room.zeros;
            for (int r = 0; r < round_up(rows, 4); r++) room.c[r] = room.logits + r * columns;
            for (int r = 0; r < rows; r += 4) dot_gathered(&room.a[r], k, k_stride, dim, index, count, &room.c[r]);
        } else {
            for (int64_t n = 0; n < count; n += PANEL) {
                for (int64_t i = 0; i < PANEL; i += LANES)
                    for (int64_t d = 0; d < dim; d += LANES) {
                        vec block[LANES];
                        for (int64_t e = 0; e < LANES; e++) block[e] = load(k + index[n + i + e] * k_stride + d);
                        transpose(block);
                        for (int64_t e = 0; e < LANES; e++) store(room.panel + (d + e) * PANEL + i, block[e]);
                    }
                int width = int(std::min<int64_t>(WIDE, (count - n + LANES - 1) / LANES));
                for (int r = 0; r < rows; r++) room.c[r] = room.logits + r * columns + n;
                dot_panel(rows, width, room.a, room.panel, dim, room.c);
            }
        }
        for (int r = 0; r < rows; r++) {
            float* row = room.logits + r * columns;
            std::fill(row + count, row + round_up(count, LANES), -INFINITY);
        }
    }

    // Where tiles share a group, the keys near to this one leave the group's sums: log z of the tile, and z of the
    // group over z of the tile (0: what is left is rounding).
    const float* leave_out_near(const TileView& x, Bench& room) const {
        int64_t m = p.hidden, g = x.group;
        float *left = room.left, *ratio = room.ratio;
        std::copy(z_sum + g * m, z_sum + (g + 1) * m, left);
        for (int64_t i = x.near_from; i < x.near_to; i++)
            left[winners[room.index[i]]] -= attention[g * padded + room.index[i]];
        for (int64_t j = 0; j < m; j++) {
            float whole = z_sum[g * m + j];
            bool alive = !(left[j] <= 16 * 1.1920929e-7f * whole);
            ratio[j] = alive ? whole / left[j] : 0;
            left[j] = !alive ? -INFINITY : left[j] == whole ? float(log_z[g * m + j]) : std::log(left[j]) + log_sum[g];
        }
        return left;
    }
};
