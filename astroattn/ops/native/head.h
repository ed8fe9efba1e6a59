// One head of one sequence: where its tokens lie, and what both directions compute of it.
//
// The keys are worked on in the order of their clusters: `sorted` lists the tokens, those of the prefix first, then
// cluster after cluster; `place` is its inverse, and rows, logits, lists of keys and `owners`, their clusters, go by
// places.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>

#include "axes.h"
#include "memory.h"
#include "numbers.h"
#include "vectors.h"

// Numbers that depend on the length of a sequence, as in layout.py. Field order is that of the rows made in
// near_far.py.
struct Layout {
    int64_t tile, high, wide, exact_keys, candidates, hidden;
};

// Field order is the order of `_Problem` in near_far.py.
struct Problem {
    int64_t batch, heads, tokens, queries, dim, value_dim;
    int64_t type;
    // Of batch, head and token, in elements; of a bias its query is the token.
    int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3], bias_stride[3];
    int64_t prefix, rows, columns;  // rows: 0 without a grid
    int64_t by_content, steps, cross, most_keys, threads;
    double scale;

    int64_t body() const { return tokens - prefix; }
    int64_t asked() const { return queries - prefix; }
    // Where row `token` of head z begins in a tensor of such strides.
    int64_t at(const int64_t* stride, int64_t z, int64_t token) const {
        return z / heads * stride[0] + z % heads * stride[1] + token * stride[2];
    }
};

struct Tensors {
    const void *query, *key, *value;
    const float* bias;          // [batch, heads, queries, tokens], added to the logits, or null
    const int64_t* lengths;     // [batch] or null
    const Layout* layouts;      // [batch]
    const double* least_error;  // [batch]
    const int32_t* curve;       // the patches of a grid in the order of their positions, or null
    void* out;                  // [batch, heads, queries, value_dim], of its own strides like the three above
    float* log_p;               // [batch, heads, queries]
    int32_t *order, *winners;   // [batch, heads, asked], [batch, heads, body]
    float* mass;                // [batch, heads, body]
    int32_t* keys;              // [batch, heads, sub-tiles, most_keys]
};

// Work is cut into blocks that do not depend on the number of threads, so neither do the results. Tiles: TALL a block.
constexpr int64_t TOKENS_PER_BLOCK = 1024;
constexpr int64_t SUBTILE = 4;  // queries

struct Head {
    const Problem& p;
    const Tensors& t;
    int64_t z, dim, value_dim, padded;  // dims padded to vectors, tokens to panels and room for one more vector
    int64_t longest;                    // the same of the tokens or of the queries, whichever are more
    int64_t most_tiles = 1, most_tile = SUBTILE, most_hidden = 0, most_exact = 0, most_candidates = 0;
    int64_t length = 0, body = 0, asked = 0, tiles = 0, hidden = 0;  // of this sequence
    Layout layout{};
    double least_error = 0;
    std::atomic<bool> broken{false};  // whether a key holds NaN or infinity, which a weight of 0 would hide
    // Rows k_stride and v_stride apart: the caller's own where they are float32 without gaps; rows far apart would cost
    // more in cache misses than a copy does, unless they are read only once. far_k, far_v: in the order of the places.
    const float *k, *v, *far_k, *far_v;
    int64_t k_stride, v_stride, far_k_stride, far_v_stride;
    bool own_keys, own_values;
    float *q, *key_rows, *value_rows, *sorted_keys, *sorted_values, *panels, *mean, *share, *logits, *weights, *mass,
        *total;
    int32_t *order, *winners, *sorted, *place, *owners, *start, *next;

    Head(const Problem& problem, const Tensors& tensors, Arena& arena)
        : p(problem),
          t(tensors),
          dim(round_up(p.dim, LANES)),
          value_dim(round_up(p.value_dim, LANES)),
          padded(round_up(p.tokens + LANES, PANEL)),
          longest(round_up(std::max(p.tokens, p.queries) + LANES, PANEL)),
          own_keys(p.type == FLOAT32 && p.dim == dim && p.key_stride[2] == dim) {
        for (int64_t b = 0; b < p.batch; b++) {
            const Layout& x = t.layouts[b];
            int64_t real = (t.lengths ? t.lengths[b] : p.tokens) - p.prefix;
            if (real <= 0) continue;
            most_tiles = std::max(most_tiles, ((p.cross ? p.queries : real) + x.tile - 1) / x.tile);
            most_tile = std::max(most_tile, x.tile);
            most_hidden = std::max(most_hidden, x.hidden);
            most_exact = std::max(most_exact, x.exact_keys);
            most_candidates = std::max(most_candidates, x.candidates);
        }
        bool far = most_hidden > 0, means = far || most_exact > 0;
        const bool once = far || p.value_stride[2] == value_dim;  // when they are sorted by their clusters
        own_values = p.type == FLOAT32 && p.value_dim == value_dim && once;
        arena.take(q, p.queries * dim);
        arena.take(key_rows, own_keys ? 0 : p.tokens * dim);
        arena.take(value_rows, own_values ? 0 : p.tokens * value_dim);
        arena.take(sorted_keys, far ? p.tokens * dim : 0);
        arena.take(sorted_values, far ? p.tokens * value_dim : 0);
        arena.take(panels, padded * dim);
        arena.take(mean, most_tiles * dim);
        arena.take(share, most_tiles);
        arena.take(logits, means ? most_tiles * padded : 0);
        arena.take(weights, round_up(most_hidden, PANEL) * dim);
        arena.take(mass, padded);
        arena.take(total, most_hidden);
        arena.take(order, longest);
        for (auto list : {&winners, &sorted, &place, &owners}) arena.take(*list, padded);
        arena.take(start, most_hidden + 2);
        arena.take(next, most_hidden + 1);
    }

    void begin(int64_t index) {
        z = index;
        length = t.lengths ? t.lengths[z / p.heads] : p.tokens;
        body = std::max<int64_t>(length - p.prefix, 0);
        layout = t.layouts[z / p.heads];
        least_error = t.least_error[z / p.heads];
        asked = p.cross && body ? p.queries : body;
        tiles = asked ? (asked + layout.tile - 1) / layout.tile : 0;
        hidden = layout.hidden;
        broken = false;
        auto rows_of = [&](bool own, const void* from, const int64_t* stride, const float* copy) {
            return own ? static_cast<const float*>(from) + p.at(stride, z, 0) : copy;
        };
        k = rows_of(own_keys, t.key, p.key_stride, key_rows);
        v = rows_of(own_values, t.value, p.value_stride, value_rows);
        k_stride = own_keys ? p.key_stride[2] : dim;
        v_stride = own_values ? p.value_stride[2] : value_dim;
        far_k = hidden ? sorted_keys : k;
        far_v = hidden ? sorted_values : v;
        far_k_stride = hidden ? dim : k_stride;
        far_v_stride = hidden ? value_dim : v_stride;
        for (int32_t n = 0; n < int32_t(length); n++) sorted[n] = place[n] = n;
    }

    int64_t real_queries() const { return p.cross ? asked : length; }  // the others are padding
    bool means() const { return body && (hidden || layout.exact_keys); }
    int64_t token_blocks() const { return (std::max(p.tokens, p.queries) + TOKENS_PER_BLOCK - 1) / TOKENS_PER_BLOCK; }
    int64_t panel_blocks() const { return (padded + TOKENS_PER_BLOCK - 1) / TOKENS_PER_BLOCK; }
    int64_t tile_blocks() const { return (tiles + TALL - 1) / TALL; }
    int64_t tiles_of(int64_t block) const { return std::min<int64_t>(TALL, tiles - block * TALL); }
    int64_t all_subtiles() const { return (p.asked() + SUBTILE - 1) / SUBTILE; }

    // The tokens of a tile's queries, and how many there are.
    const int32_t* tokens_of(int64_t tile) const { return order + tile * layout.tile; }
    int64_t queries_of(int64_t tile) const { return std::min(layout.tile, asked - tile * layout.tile); }
    int64_t subtiles_of(int64_t tile) const { return (queries_of(tile) + SUBTILE - 1) / SUBTILE; }
    int32_t* keys_of(int64_t tile, int64_t subtile) const {
        return t.keys + (z * all_subtiles() + tile * layout.tile / SUBTILE + subtile) * p.most_keys;
    }

    // ---- the stages, each over its own blocks; one begins when the one before has ended for all blocks ----

    void load_tokens(int64_t block) {
        Type type = Type(p.type);
        const int64_t first = block * TOKENS_PER_BLOCK, last = first + TOKENS_PER_BLOCK;
        auto copy = [&](const void* from, const int64_t* stride, int64_t count, int64_t width, float factor, float* to,
                        int64_t room) {
            for (int64_t n = first; n < std::min(last, count); n++) {
                read_row(from, p.at(stride, z, n), type, width, factor, to + n * room);
                std::fill(to + n * room + width, to + (n + 1) * room, 0.0f);
            }
        };
        copy(t.query, p.query_stride, p.queries, p.dim, float(p.scale), q, dim);
        if (!own_keys) copy(t.key, p.key_stride, p.tokens, p.dim, 1, key_rows, dim);
        if (!own_values) copy(t.value, p.value_stride, p.tokens, p.value_dim, 1, value_rows, value_dim);
        vec zeros = {};
        for (int64_t n = first; n < std::min(last, length); n++)
            for (int64_t d = 0; d < dim; d += LANES) zeros += load(k + n * k_stride + d) * 0.0f;
        if (sum(zeros) != 0) broken = true;
    }

    void pack_keys(int64_t block, const float* rows, int64_t stride) {
        int64_t first = block * TOKENS_PER_BLOCK;
        for (int64_t n = first; n < std::min(first + TOKENS_PER_BLOCK, padded); n += PANEL)
            fill_panel(rows, stride, dim, n, length, panels + n * dim);
    }

    void average_queries(int64_t tile) {
        float* u = mean + tile * dim;
        const int64_t number = queries_of(tile);
        std::fill(u, u + dim, 0.0f);
        for (int64_t i = 0; i < number; i++) add(u, q + tokens_of(tile)[i] * dim, 1, dim);
        for (int64_t d = 0; d < dim; d += LANES) store(u + d, load(u + d) / float(number));
        share[tile] = float(number) / float(asked);
    }

    // The bias of a query on every token.
    const float* bias_of(int64_t n) const { return t.bias + p.at(p.bias_stride, z, n); }

    // Adds the bias of a query on keys at these places, of all of them without a list, to every fourth number.
    void add_bias(int64_t token, const int32_t* places, int64_t count, float* scores) const {
        const float* bias = bias_of(token);
        for (int64_t i = 0; i < count; i++) scores[SUBTILE * i] += bias[sorted[places ? places[i] : i]];
    }

    // The mean of a tile's bias, by token, and where there is room for it the variance.
    void measure_bias(int64_t tile, float* average, float* variance) const {
        const float number = float(queries_of(tile));
        std::fill(average + length, average + padded, 0.0f);
        if (variance) std::fill(variance + length, variance + padded, 0.0f);
        int64_t n = 0;  // a row of the caller's ends with its last token
        for (; n + WIDE * LANES <= length; n += WIDE * LANES) {
            vec all[WIDE] = {}, squares[WIDE] = {};
            for (int64_t i = 0; i < queries_of(tile); i++) {
                const float* row = bias_of(tokens_of(tile)[i]) + n;
                for (int w = 0; w < WIDE; w++) {
                    const vec x = load(row + w * LANES);
                    all[w] += x;
                    squares[w] += x * x;
                }
            }
            for (int w = 0; w < WIDE; w++) {
                const vec centre = all[w] / number;
                store(average + n + w * LANES, centre);
                if (variance) store(variance + n + w * LANES, larger(squares[w] / number - centre * centre, vec{}));
            }
        }
        for (; n < length; n++) {
            float all = 0, squares = 0;
            for (int64_t i = 0; i < queries_of(tile); i++) {
                const float x = bias_of(tokens_of(tile)[i])[n];
                all += x;
                squares += x * x;
            }
            average[n] = all / number;
            if (variance) variance[n] = std::max(squares / number - average[n] * average[n], 0.0f);
        }
    }

    static void add(float* to, const float* from, float factor, int64_t count) {
        for (int64_t d = 0; d < count; d += LANES) store(to + d, load(to + d) + factor * load(from + d));
    }

    // u.k of the tiles of a block with all real keys, -infinity behind them.
    void attend_means(int64_t block) {
        const int rows = int(tiles_of(block));
        const float* a[TALL];
        float* c[TALL];
        for (int r = 0; r < rows; r++) a[r] = mean + (block * TALL + r) * dim;
        for (int64_t n = 0; n < padded; n += PANEL) {
            for (int r = 0; r < rows; r++) c[r] = logits + (block * TALL + r) * padded + n;
            dot_panel(rows, WIDE, a, panels + n * dim, dim, c);
        }
        for (int r = 0; r < rows; r++) {
            float* row = logits + (block * TALL + r) * padded;
            std::fill(row + length, row + padded, -INFINITY);
        }
    }

    // Places in the order of the clusters.
    void sort_keys() {
        std::fill(start, start + hidden + 1, 0);
        for (int64_t n = p.prefix; n < length; n++) start[winners[n] + 1]++;
        start[0] = int32_t(std::min(p.prefix, length));
        for (int64_t j = 0; j < hidden; j++) start[j + 1] += start[j];
        std::copy(start, start + hidden, next);
        for (int64_t n = p.prefix; n < length; n++) {
            place[n] = next[winners[n]]++;
            sorted[place[n]] = int32_t(n);
            owners[place[n]] = winners[n];
        }
    }

    void copy_rows(int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i++) {
            const float *key = k + sorted[i] * k_stride, *value = v + sorted[i] * v_stride;
            std::copy(key, key + dim, sorted_keys + i * dim);
            std::copy(value, value + value_dim, sorted_values + i * value_dim);
        }
    }

    // w: the mean of the cluster's keys, weighted by mass (by place); of an empty cluster 0.
    void average_keys(int64_t j) {
        float* w = weights + j * dim;
        std::fill(w, w + dim, 0.0f);
        float all =
            add_row(mass + start[j], far_k + start[j] * far_k_stride, far_k_stride, dim, start[j + 1] - start[j], w, w);
        total[j] = all < FLT_MIN ? 1 : all;
        for (int64_t d = 0; d < dim; d += LANES) store(w + d, load(w + d) / total[j]);
    }
};
