// How a sub-tile reads the keys: all of them through the sums of their clusters, and its exact keys corrected.
//
// A tile adds up z = sum exp(u.k - top) and s = sum exp(u.k - top) v over every key of a cluster, once. With
// a = exp(r.w + top), a query's softmax has the terms a (s, z) of each cluster and exp(q.k) - a exp(u.k - top) of each
// exact key. That loses digits where the clusters weigh much more than the result. Then the clusters of which the
// sub-tile reads nearly everything exactly get sums of their own, over what is left of them.
#pragma once

#include <utility>

#include "head.h"

constexpr float MOST_LOST = 8;  // what the clusters may weigh, relative to the result; its log2 is the bits lost

// The clusters' sums: top, the largest u.k; z and s [m][value_dim] from there.
struct Sums {
    float *top, *z, *s;
};

struct Reading : Head {
    using Head::Head;

    int64_t most_list() const { return round_up(p.prefix + p.most_keys, LANES); }  // of a sub-tile's exact keys
    int64_t most_subtiles() const { return most_tile / SUBTILE; }
    int64_t most_columns() const { return most_list() + round_up(most_hidden, LANES); }

    // What a thread needs besides.
    struct Bench {
        float *rest, *rest_panels, *drive, *scores, *out, *shares, *zeros, *zero_row, *share, *taken;
        int32_t *list, *owner;  // exact keys of a sub-tile, the prefix first: their places and clusters
        uint8_t* marks;
        Sums sums[TALL], apart;
        const float** a;
        float **c, **o;
        const float** b;

        Bench(const Reading& head, Arena& arena) {
            const Problem& p = head.p;
            const int64_t m = round_up(head.most_hidden, PANEL), tile = round_up(head.most_tile, PANEL);
            const int64_t subtiles = head.most_subtiles(), rows = std::max({tile, p.prefix, m});
            arena.take(rest, tile * head.dim);
            arena.take(rest_panels, tile * head.dim);
            arena.take(drive, std::max(tile, subtiles) * m);
            arena.take(scores, std::max(SUBTILE * head.most_columns(), p.prefix * head.padded));
            arena.take(out, std::max(SUBTILE, p.prefix) * std::max(head.dim, head.value_dim));
            arena.take(shares, TALL * head.padded);
            arena.take(zeros, head.dim);
            arena.take(zero_row, head.value_dim);
            arena.take(taken, m);
            arena.take(share, head.most_list());
            for (auto x : {&list, &owner}) arena.take(*x, head.most_list());
            arena.take(marks, head.padded);
            for (int i = 0; i <= TALL; i++) {
                Sums& x = i < TALL ? sums[i] : apart;
                arena.take(x.top, m);
                arena.take(x.z, m);
                arena.take(x.s, m * head.value_dim);
            }
            for (auto list : {&a, &b}) arena.take(*list, rows);
            for (auto list : {&c, &o}) arena.take(*list, rows);
            if (!arena.block) return;
            std::fill(zeros, zeros + head.dim, 0.0f);
            std::fill(zero_row, zero_row + head.value_dim, 0.0f);
            std::fill(marks, marks + head.padded, uint8_t(0));
        }
    };

    // The sums of the tiles of a block. room.shares gets exp(u.k - top).
    void sum_far(int64_t block, Bench& room) const {
        const int rows = int(tiles_of(block));
        const float* c[TALL];
        float* s[TALL];
        for (int64_t j = 0; j < hidden; j++) {
            const int64_t first = start[j], last = start[j + 1];
            for (int r = 0; r < rows; r++) {
                const Sums& x = room.sums[r];
                const float* u_k = logits + (block * TALL + r) * padded;
                float* shares = room.shares + r * padded;
                x.top[j] = top_of(u_k, first, last);
                for (int64_t i = first; i < last; i += LANES)  // runs into the next cluster, which follows
                    store(shares + i, exponential(load(u_k + i) - x.top[j]));
                x.z[j] = sum_of(shares + first, last - first);
                c[r] = shares + first;
                s[r] = x.s + j * value_dim;
                std::fill(s[r], s[r] + value_dim, 0.0f);
            }
            add_rows(rows, c, far_v + first * far_v_stride, far_v_stride, value_dim, last - first, s);
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

    // r of a tile's queries and r.w [m][queries].
    void begin_tile(int64_t tile, Bench& room) const {
        if (!hidden) return;
        const int64_t number = queries_of(tile), wide = round_up(layout.tile, PANEL);
        for (int64_t i = 0; i < number; i++) {
            const float *row = q + tokens_of(tile)[i] * dim, *u = mean + tile * dim;
            for (int64_t d = 0; d < dim; d += LANES) store(room.rest + i * dim + d, load(row + d) - load(u + d));
        }
        for (int64_t j = 0; j < hidden; j++) room.a[j] = weights + j * dim;
        for (int64_t i = 0; i < number; i += PANEL) {
            const int width = vectors_of(number - i);
            fill_panel(room.rest, dim, dim, i, number, room.rest_panels, width);
            for (int64_t j = 0; j < hidden; j++) room.c[j] = room.drive + j * wide + i;
            dot_panel(int(hidden), width, room.a, room.rest_panels, dim, room.c);
        }
    }

    // The sub-tile's exact keys, and what the r-th tile of the block gives them in its sums; returns how many.
    int64_t list_keys(int64_t tile, int64_t subtile, int64_t r, Bench& room) const {
        const int32_t *keys = keys_of(tile, subtile), *places = place + p.prefix;
        const float* shares = room.shares + r * padded;
        int64_t size = 0;
        for (; size < p.prefix; size++) {
            room.list[size] = int32_t(size);
            room.owner[size] = 0;
            room.share[size] = 0;
        }
        for (int64_t i = 0; i < p.most_keys && keys[i] >= 0; i++, size++) {
            const int32_t at = room.list[size] = places[keys[i]];
            room.owner[size] = hidden ? owners[at] : 0;
            room.share[size] = hidden ? shares[at] : 0;
        }
        return size;
    }

    // Sums of its own for a sub-tile that reads nearly everything of some clusters exactly; the others' are the tile's.
    // An exact key of such a cluster has no share in its sums. What is left may be nothing: z = 0, a top of -infinity.
    const Sums& sum_apart(int64_t tile, int64_t size, int64_t r, Bench& room) const {
        const Sums &from = room.sums[r], &to = room.apart;
        std::copy(from.top, from.top + hidden, to.top);
        std::copy(from.z, from.z + hidden, to.z);
        std::copy(from.s, from.s + hidden * value_dim, to.s);
        std::fill(room.taken, room.taken + hidden, 0.0f);
        for (int64_t i = p.prefix; i < size; i++) room.taken[room.owner[i]] += room.share[i];
        for (int64_t j = 0; j < hidden; j++) {
            if (room.taken[j] <= (1 - 1 / MOST_LOST) * from.z[j]) continue;
            float &top = to.top[j] = -INFINITY, &z_of = to.z[j] = 0;
            float* s = to.s + j * value_dim;
            std::fill(s, s + value_dim, 0.0f);
            for_left(tile, j, size, room, [&](int64_t, float u_k) { top = std::max(top, u_k); });
            for_left(tile, j, size, room, [&](int64_t i, float u_k) {
                const float share = std::exp(u_k - top);
                z_of += share;
                add(s, far_v + i * far_v_stride, share, value_dim);
            });
            room.taken[j] = INFINITY;  // marks it
        }
        for (int64_t i = p.prefix; i < size; i++)
            if (room.taken[room.owner[i]] == INFINITY) room.share[i] = 0;
        return to;
    }

    // The weight of all clusters together, from that of each: exp(r.w + top) of each query [m][4].
    quad weigh(const float* neurons, const Sums& x) const {
        quad all = {};
        for (int64_t j = 0; j < hidden; j++) all += load_quad(neurons + SUBTILE * j) * x.z[j];
        return all;
    }

    // Whether the tile's sums would lose digits for one of the queries; not what is left of them for the sub-tile.
    bool loses_digits(quad clusters, quad all, int64_t queries, const Sums& x, const Bench& room) const {
        if (!hidden || &x == &room.apart) return false;
        for (int64_t r = 0; r < queries; r++)
            if (!(clusters[r] <= MOST_LOST * all[r])) return true;
        return false;
    }

    // Calls f(place, u.k) for the cluster's keys that the sub-tile does not read exactly.
    template <typename F>
    void for_left(int64_t tile, int64_t j, int64_t size, Bench& room, F f) const {
        auto mark = [&](uint8_t to) {
            for (int64_t i = p.prefix; i < size; i++) room.marks[room.list[i]] = to;
        };
        mark(1);
        for (int64_t i = start[j]; i < start[j + 1]; i++)
            if (!room.marks[i]) f(i, logits[tile * padded + i]);
        mark(0);
    }

    // What the queries of a sub-tile make of it, four side by side in room.scores: q.k of its exact keys, filled up
    // with -infinity to whole vectors, and r.w + top of the neurons, the same. Returns where these begin and how many
    // columns there are.
    std::pair<int64_t, int64_t> score(int64_t tile, int64_t subtile, int64_t size, const Sums& x, Bench& room) const {
        const int64_t wide = round_up(size, IN_STEP), all = wide + round_up(hidden, IN_STEP);
        const int64_t first = subtile * SUBTILE, drives = round_up(layout.tile, PANEL);
        const float* a[SUBTILE];
        for (int64_t r = 0; r < SUBTILE; r++)
            a[r] = first + r < queries_of(tile) ? q + tokens_of(tile)[first + r] * dim : room.zeros;
        dot_quad(a, far_k, far_k_stride, dim, room.list, size, room.scores);
        for (int64_t r = 0; t.bias && first + r < queries_of(tile) && r < SUBTILE; r++)
            add_bias(tokens_of(tile)[first + r], room.list, size, room.scores + r);
        std::fill(room.scores + SUBTILE * size, room.scores + SUBTILE * wide, -INFINITY);
        for (int64_t j = 0; j < hidden; j++)
            store_quad(room.scores + SUBTILE * (wide + j), load_quad(room.drive + j * drives + first) + x.top[j]);
        std::fill(room.scores + SUBTILE * (wide + hidden), room.scores + SUBTILE * all, -INFINITY);
        return {wide, all};
    }
};
