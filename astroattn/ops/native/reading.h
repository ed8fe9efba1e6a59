// How a tile reads the keys: its sums over the clusters, and what each sub-tile makes of them and of its exact keys.
#pragma once

#include <utility>

#include "head.h"

// What a cluster's sums must come to, relative to the tile's largest term of it; below, they are measured from their
// own.
constexpr float LEAST_SUM = 1e-26f;

struct Reading : Head {
    using Head::Head;

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

    // What a thread needs besides.
    struct Bench {
        float *rest, *rest_panels, *drive, *scores, *out, *shares, *zeros, *zero_row;
        float *left, *top, *z, *s;  // of a few sub-tiles
        int32_t* slot;
        uint8_t* marks;
        TileKeys keys[TALL];
        const float **a, **b;
        float **c, **o;

        Bench(const Reading& head, Arena& arena) {
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

    // What the queries of a sub-tile make of it, four side by side in room.scores: q.k of its exact keys, filled up
    // with -infinity to whole vectors, and r.w + top of the neurons, the same. Returns where these begin and how many
    // columns there are. `slot`: which one it is of the FEW.
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
