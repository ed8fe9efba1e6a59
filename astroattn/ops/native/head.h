// One head of one sequence: where its tokens lie, and what both directions compute of it.
//
// The keys are worked on in the order of their clusters: `sorted` lists the tokens, those of the prefix first, then
// cluster after cluster; `place` is its inverse, and rows, logits and lists of keys go by places.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <utility>

#include "axes.h"
#include "memory.h"
#include "numbers.h"
#include "vectors.h"

// Numbers that depend on the length of a sequence, as in layout.py. Field order is that of the rows made in near_far.py.
struct Layout {
    int64_t tile, high, wide, exact_keys, candidates, hidden;
};

// Field order is the order of `_Problem` in near_far.py.
struct Problem {
    int64_t batch, heads, tokens, dim, value_dim;
    int64_t type;
    int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];  // of batch, head and token, in elements
    int64_t prefix, rows, columns;  // rows: 0 without a grid
    int64_t by_content, steps, most_keys, threads;
    double scale;

    int64_t body() const { return tokens - prefix; }
    // Where row `token` of head z begins in a tensor of such strides.
    int64_t at(const int64_t* stride, int64_t z, int64_t token) const {
        return z / heads * stride[0] + z % heads * stride[1] + token * stride[2];
    }
};

struct Tensors {
    const void *query, *key, *value;
    const int64_t* lengths;  // [batch] or null
    const Layout* layouts;   // [batch]
    void* out;               // [batch, heads, tokens, value_dim], of its own strides like the three above
    float* log_p;            // [batch, heads, tokens]
    int32_t *order, *winners;  // [batch, heads, body]
    float* mass;               // [batch, heads, body]
    int32_t* keys;             // [batch, heads, sub-tiles, most_keys]
};

// Work is cut into blocks that do not depend on the number of threads, so neither do the results. Tiles: TALL a block.
constexpr int64_t TOKENS_PER_BLOCK = 1024;
constexpr int64_t SUBTILE = 4, FEW = 4;  // queries of a sub-tile; sub-tiles that are worked on at once
// What a cluster's sums must come to, relative to the tile's largest term of it; below, they are measured from their own.
constexpr float LEAST_SUM = 1e-26f;

struct Head {
    struct Bench;  // what a thread needs besides

    const Problem& p;
    const Tensors& t;
    int64_t z, dim, value_dim, padded;  // dims padded to vectors, tokens to panels and room for one more vector
    int64_t most_tiles = 1, most_tile = SUBTILE, most_hidden = 0, most_exact = 0, most_candidates = 0, most_near = 0;
    int64_t length = 0, body = 0, tiles = 0, hidden = 0;  // of this sequence
    Layout layout{};
    std::atomic<bool> broken{false};  // whether a key holds NaN or infinity, which a weight of 0 would hide
    // Rows k_stride and v_stride apart: the caller's own where they are float32 without gaps; rows far apart would cost
    // more in cache misses than a copy does. far_k, far_v: the same in the order of the places.
    const float *k, *v, *far_k, *far_v;
    int64_t k_stride, v_stride, far_k_stride, far_v_stride;
    bool own_keys, own_values;
    float *q, *key_rows, *value_rows, *sorted_keys, *sorted_values, *panels, *mean, *share, *logits, *weights,
        *mass, *total;
    int32_t *order, *winners, *sorted, *place, *start, *next;

    Head(const Problem& problem, const Tensors& tensors, Arena& arena)
        : p(problem),
          t(tensors),
          dim(round_up(p.dim, LANES)),
          value_dim(round_up(p.value_dim, LANES)),
          padded(round_up(p.tokens + LANES, PANEL)),
          own_keys(p.type == FLOAT32 && p.dim == dim && p.key_stride[2] == dim),
          own_values(p.type == FLOAT32 && p.value_dim == value_dim && p.value_stride[2] == value_dim) {
        for (int64_t b = 0; b < p.batch; b++) {
            const Layout& x = t.layouts[b];
            int64_t real = (t.lengths ? t.lengths[b] : p.tokens) - p.prefix;
            if (real <= 0) continue;
            most_tiles = std::max(most_tiles, (real + x.tile - 1) / x.tile);
            most_tile = std::max(most_tile, x.tile);
            most_hidden = std::max(most_hidden, x.hidden);
            most_exact = std::max(most_exact, x.exact_keys);
            most_candidates = std::max(most_candidates, x.candidates);
            most_near = std::max(most_near, SUBTILE * x.high * x.wide);
        }
        bool far = most_hidden > 0, means = far || most_exact > 0;
        arena.take(q, p.tokens * dim);
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
        for (auto list : {&order, &winners, &sorted, &place}) arena.take(*list, padded);
        arena.take(start, most_hidden + 2);
        arena.take(next, most_hidden + 1);
    }

    void begin(int64_t index) {
        z = index;
        length = t.lengths ? t.lengths[z / p.heads] : p.tokens;
        body = std::max<int64_t>(length - p.prefix, 0);
        layout = t.layouts[z / p.heads];
        tiles = body ? (body + layout.tile - 1) / layout.tile : 0;
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

    bool means() const { return body && (hidden || layout.exact_keys); }
    int64_t token_blocks() const { return (p.tokens + TOKENS_PER_BLOCK - 1) / TOKENS_PER_BLOCK; }
    int64_t panel_blocks() const { return (padded + TOKENS_PER_BLOCK - 1) / TOKENS_PER_BLOCK; }
    int64_t tile_blocks() const { return (tiles + TALL - 1) / TALL; }
    int64_t tiles_of(int64_t block) const { return std::min<int64_t>(TALL, tiles - block * TALL); }
    int64_t all_subtiles() const { return (p.body() + SUBTILE - 1) / SUBTILE; }

    // The tokens of a tile's queries, and how many there are.
    const int32_t* tokens_of(int64_t tile) const { return order + tile * layout.tile; }
    int64_t queries_of(int64_t tile) const { return std::min(layout.tile, body - tile * layout.tile); }
    int64_t subtiles_of(int64_t tile) const { return (queries_of(tile) + SUBTILE - 1) / SUBTILE; }
    int32_t* keys_of(int64_t tile, int64_t subtile) const {
        return t.keys + (z * all_subtiles() + tile * layout.tile / SUBTILE + subtile) * p.most_keys;
    }

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
        share[tile] = float(number) / float(body);
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
        float all = add_row(mass + start[j], far_k + start[j] * far_k_stride, far_k_stride, dim, nullptr,
                            start[j + 1] - start[j], w, w);
        total[j] = all < FLT_MIN ? 1 : all;
        for (int64_t d = 0; d < dim; d += LANES) store(w + d, load(w + d) / total[j]);
    }

    int64_t most_list() const { return round_up(p.prefix + p.most_keys, LANES); }  // of a sub-tile's exact keys
    int64_t most_subtiles() const { return most_tile / SUBTILE; }
    int64_t most_union() const { return round_up(std::min(p.body(), most_subtiles() * p.most_keys), LANES) + LANES; }
    int64_t most_columns() const { return most_list() + round_up(most_hidden, LANES); }

    // The keys that the sub-tiles of a tile read exactly.
    struct TileKeys {
        int32_t *list, *size;  // places of each sub-tile, the prefix first
        int32_t *all, *begin;  // places of the union without the prefix, in order, and where each cluster begins in it
        int64_t count;         // of the union
        float *share, *top;    // exp(u.k - top) of the union's keys, top the largest u.k of each cluster
        float *z, *s;          // sums of exp(u.k - top) and the same times v over each cluster without the union
    };

    struct Bench {
        float *rest, *rest_panels, *drive, *scores, *out, *shares, *zeros, *zero_row;
        float *left, *top, *z, *s;  // of a few sub-tiles
        int32_t* slot;
        uint8_t* marks;
        TileKeys keys[TALL];
        const float **a, **b;
        float **c, **o;

        Bench(const Head& head, Arena& arena) {
            const Problem& p = head.p;
            const int64_t m = round_up(head.most_hidden, PANEL), tile = round_up(head.most_tile, PANEL);
            const int64_t subtiles = head.most_subtiles(), rows = std::max({tile, p.prefix, m});
            arena.take(rest, tile * head.dim);
            arena.take(rest_panels, tile * head.dim);
            arena.take(drive, tile * m);
            arena.take(scores, std::max(SUBTILE * head.most_columns(), p.prefix * head.padded));
            arena.take(out, std::max(SUBTILE, p.prefix) * std::max(head.dim, head.value_dim));
            arena.take(shares, TALL * head.padded);
            arena.take(left, FEW * head.most_union());
            arena.take(top, FEW * m);
            arena.take(z, FEW * m);
            arena.take(s, FEW * m * head.value_dim);
            arena.take(zeros, head.dim);
            arena.take(zero_row, head.value_dim);
            arena.take(slot, head.padded);
            arena.take(marks, head.padded + 8);  // read eight at a time
            for (TileKeys& x : keys) {
                arena.take(x.list, subtiles * head.most_list());
                arena.take(x.size, subtiles);
                arena.take(x.all, head.most_union());
                arena.take(x.begin, m + 1);
                arena.take(x.share, head.most_union());
                arena.take(x.top, m);
                arena.take(x.z, m);
                arena.take(x.s, m * head.value_dim);
            }
            for (auto list : {&a, &b}) arena.take(*list, rows);
            for (auto list : {&c, &o}) arena.take(*list, rows);
            if (!arena.block) return;
            std::fill(zeros, zeros + head.dim, 0.0f);
            std::fill(zero_row, zero_row + head.value_dim, 0.0f);
            std::fill(marks, marks + head.padded + 8, uint8_t(0));
        }
    };

    void list_keys(int64_t tile, Bench& room, TileKeys& x) const {
        // Local copies: the compiler takes it that writing a byte may change any member.
        uint8_t* const marks = room.marks;
        int32_t* const all = x.all;
        const int32_t *const places = place + p.prefix, prefix = int32_t(p.prefix);
        const int64_t most = p.most_keys, subtiles = subtiles_of(tile), end = length;
        for (int64_t s = 0; s < subtiles; s++) {
            const int32_t* keys = keys_of(tile, s);
            int32_t *list = x.list + s * most_list(), size = prefix;
            for (int32_t n = 0; n < prefix; n++) list[n] = n;
            for (int64_t i = 0; i < most && keys[i] >= 0; i++) {
                const int32_t at = list[size++] = places[keys[i]];
                marks[at] = 1;
            }
            x.size[s] = size;
        }
        int64_t count = 0;
        for (int64_t n = prefix; n < end; n += 8) {
            uint64_t eight;
            memcpy(&eight, marks + n, sizeof eight);
            for (; eight; eight &= eight - 1) all[count++] = int32_t(n + __builtin_ctzll(eight) / 8);
        }
        for (int64_t i = 0; i < count; i++) marks[all[i]] = 0;
        x.count = count;
        int64_t i = 0;
        for (int64_t j = 0; j < hidden; j++) {
            x.begin[j] = int32_t(i);
            while (i < x.count && x.all[i] < start[j + 1]) i++;
        }
        x.begin[hidden] = int32_t(x.count);
    }

    // The sums of the tiles of a block over the keys that none of their sub-tiles reads exactly. room.shares gets
    // exp(u.k - top) of those keys, 0 for the others.
    void sum_far(int64_t block, Bench& room) const {
        const int rows = int(tiles_of(block));
        const float* c[TALL];
        float* s[TALL];
        for (int r = 0; r < rows; r++) list_keys(block * TALL + r, room, room.keys[r]);
        for (int64_t j = 0; j < hidden; j++) {
            const int64_t first = start[j], last = start[j + 1];
            for (int r = 0; r < rows; r++) {
                TileKeys& x = room.keys[r];
                const float* u_k = logits + (block * TALL + r) * padded;
                float* shares = room.shares + r * padded;
                x.top[j] = top_of(u_k, first, last);
                for (int64_t i = first; i < last; i += LANES)  // runs into the next cluster, which follows
                    store(shares + i, exponential(load(u_k + i) - x.top[j]));
                for (int64_t i = x.begin[j]; i < x.begin[j + 1]; i++) {
                    x.share[i] = shares[x.all[i]];
                    shares[x.all[i]] = 0;
                }
                x.z[j] = sum_of(shares + first, last - first);
                c[r] = shares + first;
                s[r] = x.s + j * value_dim;
                std::fill(s[r], s[r] + value_dim, 0.0f);
            }
            add_rows<NEITHER>(rows, c, far_v + first * far_v_stride, far_v_stride, value_dim, nullptr, last - first, s);
        }
    }

    static float top_of(const float* x, int64_t first, int64_t last) {
        vec top = spread(-3e38f);
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) top = larger(load(x + i), top);
        float high = largest(top);
        for (; i < last; i++) high = std::max(high, x[i]);
        return high;
    }
    static float sum_of(const float* x, int64_t count) {
        vec all = {};
        int64_t i = 0;
        for (; i + LANES <= count; i += LANES) all += load(x + i);
        float rest = sum(all);
        for (; i < count; i++) rest += x[i];
        return rest;
    }

    // r of a tile's queries, r.w [m][queries], and where each key is in the union.
    void begin_tile(int64_t tile, const TileKeys& x, Bench& room) const {
        if (!hidden) return;
        const int64_t number = queries_of(tile), wide = round_up(layout.tile, PANEL);
        for (int64_t i = 0; i < number; i++) {
            const float *row = q + tokens_of(tile)[i] * dim, *u = mean + tile * dim;
            for (int64_t d = 0; d < dim; d += LANES) store(room.rest + i * dim + d, load(row + d) - load(u + d));
        }
        for (int64_t i = 0; i < x.count; i++) room.slot[x.all[i]] = int32_t(i);
        for (int64_t j = 0; j < hidden; j++) room.a[j] = weights + j * dim;
        for (int64_t i = 0; i < number; i += PANEL) {
            fill_panel(room.rest, dim, dim, i, number, room.rest_panels);
            for (int64_t j = 0; j < hidden; j++) room.c[j] = room.drive + j * wide + i;
            dot_panel(int(hidden), WIDE, room.a, room.rest_panels, dim, room.c);
        }
    }

    // What FEW sub-tiles from `first` on read through each cluster: z and s of the tile and of those of the union that
    // they do not take, from the cluster's top. room.left gets the latter's exp(u.k - top), 0 for those taken.
    void sum_left(int64_t tile, int64_t first, const TileKeys& x, Bench& room) const {
        const int64_t now = std::min(FEW, subtiles_of(tile) - first), m = hidden;
        const float* from[FEW];
        float *left = room.left, *to[FEW];
        for (int64_t i = 0; i < x.count; i++) store_quad(left + FEW * i, x.share[i] - quad{});
        for (int64_t s = 0; s < now; s++) {
            const int32_t *list = x.list + (first + s) * most_list(), size = x.size[first + s];
            for (int64_t i = p.prefix; i < size; i++) left[FEW * room.slot[list[i]] + s] = 0;
        }
        for (int64_t j = 0; j < m; j++) {
            const int64_t begin = x.begin[j], count = x.begin[j + 1] - begin;
            for (int64_t s = 0; s < FEW; s++) {
                from[s] = x.s + j * value_dim;
                to[s] = room.s + (s * m + j) * value_dim;
            }
            add_quad(left + FEW * begin, far_v, far_v_stride, value_dim, x.all + begin, count, from, to);
            quad z = x.z[j] - quad{};
            for (int64_t i = begin; i < begin + count; i++) z += load_quad(left + FEW * i);
            for (int64_t s = 0; s < now; s++) {
                room.z[s * m + j] = z[s];
                room.top[s * m + j] = x.top[j];
                if (z[s] < LEAST_SUM) sum_apart(tile, first + s, j, s, x, room);
            }
        }
    }

    // Calls f(place, u.k) for the cluster's keys that the sub-tile does not read exactly.
    template <typename F>
    void for_left(int64_t tile, int64_t subtile, int64_t j, const TileKeys& x, Bench& room, F f) const {
        const int32_t *list = x.list + subtile * most_list(), size = x.size[subtile];
        auto mark = [&](uint8_t to) {
            for (int64_t i = p.prefix; i < size; i++) room.marks[list[i]] = to;
        };
        mark(1);
        for (int64_t i = start[j]; i < start[j + 1]; i++)
            if (!room.marks[i]) f(i, logits[tile * padded + i]);
        mark(0);
    }

    // The same from the largest of what is left of the cluster, which is far below the tile's. Of an empty cluster:
    // z = 0 and a top of -infinity.
    void sum_apart(int64_t tile, int64_t subtile, int64_t j, int64_t slot, const TileKeys& x, Bench& room) const {
        float &top = room.top[slot * hidden + j], &z_of = room.z[slot * hidden + j];
        float* s = room.s + (slot * hidden + j) * value_dim;
        top = -INFINITY;
        z_of = 0;
        std::fill(s, s + value_dim, 0.0f);
        for_left(tile, subtile, j, x, room, [&](int64_t, float u_k) { top = std::max(top, u_k); });
        if (top == -INFINITY) return;
        for_left(tile, subtile, j, x, room, [&](int64_t i, float u_k) {
            const float share = std::exp(u_k - top);
            z_of += share;
            add(s, far_v + i * far_v_stride, share, value_dim);
        });
    }

    // What the queries of a sub-tile make of it, four side by side in room.scores: q.k of its exact keys, filled up with
    // -infinity to whole vectors, and r.w + top of the neurons, the same. Returns where these begin and how many columns
    // there are. `slot`: which one it is of the FEW.
    std::pair<int64_t, int64_t> score(int64_t tile, int64_t subtile, int64_t slot, const TileKeys& x,
                                      Bench& room) const {
        const int64_t size = x.size[subtile], wide = round_up(size, IN_STEP), all = wide + round_up(hidden, IN_STEP);
        const int64_t first = subtile * SUBTILE, drives = round_up(layout.tile, PANEL);
        const float* a[SUBTILE];
        for (int64_t r = 0; r < SUBTILE; r++)
            a[r] = first + r < queries_of(tile) ? q + tokens_of(tile)[first + r] * dim : room.zeros;
        dot_quad(a, far_k, far_k_stride, dim, x.list + subtile * most_list(), size, room.scores);
        std::fill(room.scores + SUBTILE * size, room.scores + SUBTILE * wide, -INFINITY);
        for (int64_t j = 0; j < hidden; j++)
            store_quad(room.scores + SUBTILE * (wide + j),
                       load_quad(room.drive + j * drives + first) + room.top[slot * hidden + j]);
        std::fill(room.scores + SUBTILE * (wide + hidden), room.scores + SUBTILE * all, -INFINITY);
        return {wide, all};
    }
};
