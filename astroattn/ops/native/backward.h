// Backward, given the choices of the forward (order, winners, mass and keys are constants).
//
// With p the share of an exact key in a query's attention, a that of exp(u.k - top) of a cluster's keys,
// delta = d_out . out - d_log_p:
//   exact keys: dl = p (d_out.v - delta), dv += p d_out, dq += dl k, dk += dl q
//   neurons:    dl = a (d_out.s - delta z), dr += dl w, dw += dl r, ds += a d_out, dz -= a delta
//   their keys: dl = exp(u.k - top) (ds.v + dz), dv += exp(u.k - top) ds, du += dl k, dk += dl u,
//               and dk += mass / (mass of the cluster) dw
//   r = q - u:  dq += dr + (du - sum of dr over the tile) / number of queries in the tile
// What reaches the keys that no sub-tile of the tile takes is the same for all of them: ds and dz are summed first.
#pragma once

#include "reading.h"

// Field order is the order of `_Gradients` in near_far.py.
struct Gradients {
    const void* d_out;                // [batch, heads, tokens, value_dim]
    const float* d_log_p;             // [batch, heads, tokens]
    void *d_query, *d_key, *d_value;  // [batch, heads, tokens, ...]
    int64_t d_out_stride[3], d_query_stride[3], d_key_stride[3], d_value_stride[3];
};

struct Backward : Reading {
    static constexpr int TALL_UP = int((TALL + FEW - 1) / FEW * FEW);

    const Gradients& gradients;
    float *d_out, *delta, *dq, *dk, *dv, *dw, *du, *tile_ds, *tile_dz, *sub_ds, *sub_dz, *dl, *dots, *far_dl,
        *far_shares;

    Backward(const Problem& problem, const Tensors& tensors, const Gradients& given, Arena& arena)
        : Reading(problem, tensors, arena), gradients(given) {
        const int64_t m = round_up(most_hidden, LANES), far = m > 0;
        const int64_t columns = std::max({most_columns(), most_union(), p.prefix || far ? padded : 0});
        arena.take(d_out, p.tokens * value_dim);
        arena.take(delta, p.tokens);
        arena.take(dq, p.tokens * dim);
        arena.take(dk, p.tokens * dim);
        arena.take(dv, p.tokens * value_dim);
        arena.take(dw, m * dim);
        arena.take(du, most_tiles * dim);
        arena.take(tile_ds, TALL_UP * m * value_dim);
        arena.take(tile_dz, TALL_UP * m);
        arena.take(sub_ds, FEW * m * value_dim);
        arena.take(sub_dz, FEW * m);
        for (auto list : {&dl, &dots}) arena.take(*list, SUBTILE * columns);
        arena.take(far_dl, far * TALL * padded);
        arena.take(far_shares, far || p.prefix ? FEW * padded : 0);
    }

    void run(Bench& room) {
        load_gradients();
        for (int64_t i = 0; i < token_blocks(); i++) load_tokens(i);
        for (int64_t i = 0; i < body; i++) order[i] = t.order[z * p.body() + i] + int32_t(p.prefix);
        if (hidden) restore_hidden();
        for (int64_t block = 0; block < tile_blocks(); block++) {
            const int64_t rows = tiles_of(block);
            sum_far(block, room);
            std::fill(tile_ds, tile_ds + TALL_UP * hidden * value_dim, 0.0f);
            std::fill(tile_dz, tile_dz + TALL_UP * hidden, 0.0f);
            if (hidden) std::fill(far_dl, far_dl + rows * padded, 0.0f);
            for (int64_t r = 0; r < rows; r++) tile_gradients(block * TALL + r, r, room);
            if (hidden) far_gradients(block, room);
        }
        if (hidden) finish_hidden();
        prefix_gradients(room);
        put_gradients(room);
    }

    void load_gradients() {
        for (int64_t n = 0; n < p.tokens; n++) {
            float *row = d_out + n * value_dim, *out = dv + n * value_dim;  // dv is not in use yet
            read_row(gradients.d_out, p.at(gradients.d_out_stride, z, n), Type(p.type), p.value_dim, 1, row);
            read_row(t.out, p.at(p.out_stride, z, n), Type(p.type), p.value_dim, 1, out);
            float dot = 0;
            for (int64_t d = 0; d < p.value_dim; d++) dot += row[d] * out[d];
            delta[n] = dot - gradients.d_log_p[z * p.tokens + n];
            std::fill(row + p.value_dim, row + value_dim, 0.0f);
        }
        std::fill(dq, dq + p.tokens * dim, 0.0f);
        std::fill(dk, dk + p.tokens * dim, 0.0f);
        std::fill(dv, dv + p.tokens * value_dim, 0.0f);
        std::fill(dw, dw + hidden * dim, 0.0f);
        std::fill(du, du + tiles * dim, 0.0f);
    }

    // The clusters, w, u and u.k, from the choices.
    void restore_hidden() {
        const int64_t offset = z * p.body() - p.prefix;
        for (int64_t n = p.prefix; n < length; n++) winners[n] = t.winners[offset + n];
        sort_keys();
        copy_rows(0, length);
        for (int64_t i = p.prefix; i < length; i++) mass[i] = t.mass[offset + sorted[i]];
        for (int64_t j = 0; j < hidden; j++) average_keys(j);
        for (int64_t i = 0; i < panel_blocks(); i++) pack_keys(i, far_k, far_k_stride);
        for (int64_t tile = 0; tile < tiles; tile++) average_queries(tile);
        for (int64_t i = 0; i < tile_blocks(); i++) attend_means(i);
    }

    static float dot_rows(const float* a, const float* b, int64_t count) {
        vec dot = {};
        for (int64_t d = 0; d < count; d += LANES) dot += load(a + d) * load(b + d);
        return sum(dot);
    }

    void tile_gradients(int64_t tile, int64_t r, Bench& room) {
        const TileKeys& x = room.keys[r];
        const int64_t subtiles = subtiles_of(tile);
        begin_tile(tile, x, room);
        for (int64_t from = 0; from < subtiles; from += FEW) {
            std::fill(sub_ds, sub_ds + FEW * hidden * value_dim, 0.0f);
            std::fill(sub_dz, sub_dz + FEW * hidden, 0.0f);
            if (hidden) sum_left(tile, from, x, room);
            for (int64_t s = from; s < std::min(from + FEW, subtiles); s++) subtile_gradients(tile, s, r, room);
            if (hidden) union_gradients(r, x, room);
        }
    }

    void subtile_gradients(int64_t tile, int64_t subtile, int64_t r, Bench& room) {
        const TileKeys& x = room.keys[r];
        const int64_t m = hidden, slot = subtile % FEW, first = subtile * SUBTILE, size = x.size[subtile];
        const int64_t rows = std::min(SUBTILE, queries_of(tile) - first);
        const int32_t* list = x.list + subtile * most_list();
        const float *go[SUBTILE], *queries[SUBTILE], *rest[SUBTILE], *zeros[SUBTILE];
        float *grads[SUBTILE], *ds = sub_ds + slot * m * value_dim, *dz = sub_dz + slot * m;
        quad log_p, deltas;
        const auto [wide, columns] = score(tile, subtile, slot, x, room);
        for (int64_t i = 0; i < SUBTILE; i++) {  // a query that is not there has no share in anything
            const int64_t n = tokens_of(tile)[std::min(first + i, queries_of(tile) - 1)];
            go[i] = i < rows ? d_out + n * value_dim : room.zero_row;
            queries[i] = i < rows ? q + n * dim : room.zeros;
            rest[i] = i < rows ? room.rest + (first + i) * dim : room.zeros;
            log_p[i] = i < rows ? t.log_p[z * p.tokens + n] : INFINITY;
            deltas[i] = i < rows ? delta[n] : 0;
            zeros[i] = room.zeros;
            grads[i] = room.out + i * dim;
        }
        float *shares = room.scores, *neurons = shares + SUBTILE * wide, *dl_neurons = dl + SUBTILE * wide;
        dot_quad(go, far_v, far_v_stride, value_dim, list, size, dots);
        dot_quad(go, room.s + slot * m * value_dim, value_dim, value_dim, nullptr, m, dots + SUBTILE * wide);
        for (int64_t c = 0; c < SUBTILE * columns; c += LANES)
            store(shares + c, exponential(load(shares + c) - repeat(log_p)));
        for (int64_t c = 0; c < SUBTILE * wide; c += LANES)
            store(dl + c, load(shares + c) * (load(dots + c) - repeat(deltas)));
        for (int64_t j = 0; j < m; j++) {
            const quad share = load_quad(neurons + SUBTILE * j), part = share * deltas;
            const quad dot = load_quad(dots + SUBTILE * (wide + j));
            store_quad(dl_neurons + SUBTILE * j, share * dot - part * room.z[slot * m + j]);
            dz[j] -= part[0] + part[1] + part[2] + part[3];
        }
        add_quad(dl, far_k, far_k_stride, dim, list, size, zeros, grads);
        for (int64_t i = 0; i < rows; i++) add(dq + tokens_of(tile)[first + i] * dim, grads[i], 1, dim);
        outer_quad(dl, queries, list, size, dim, dk);
        outer_quad(shares, go, list, size, value_dim, dv);
        if (!m) return;
        outer_quad(dl_neurons, rest, nullptr, m, dim, dw);
        outer_quad(neurons, go, nullptr, m, value_dim, ds);
        add_quad(dl_neurons, weights, dim, dim, nullptr, m, zeros, grads);
        for (int64_t i = 0; i < rows; i++) {
            add(dq + tokens_of(tile)[first + i] * dim, grads[i], 1, dim);
            add(du + tile * dim, grads[i], -1, dim);  // r = q - u
        }
        for (int64_t j = 0; j < m; j++)
            if (room.top[slot * m + j] != x.top[j]) apart_gradients(tile, subtile, j, r, room);
    }

    // Through the sums of a cluster that were measured from their own largest: they are not the tile's.
    void apart_gradients(int64_t tile, int64_t subtile, int64_t j, int64_t r, Bench& room) {
        const int64_t at = subtile % FEW * hidden + j;
        float *ds = sub_ds + at * value_dim, &dz = sub_dz[at];
        for_left(tile, subtile, j, room.keys[r], room, [&](int64_t i, float u_k) {
            const float share = std::exp(u_k - room.top[at]);
            far_dl[r * padded + i] += share * (dot_rows(ds, far_v + i * far_v_stride, value_dim) + dz);
            add(dv + i * value_dim, ds, share, value_dim);
        });
        std::fill(ds, ds + value_dim, 0.0f);
        dz = 0;
    }

    // Through the sums of some sub-tiles to the keys of the tile's union that they do not take; and their part of the
    // tile's own sums.
    void union_gradients(int64_t r, const TileKeys& x, Bench& room) {
        const int64_t m = hidden;
        const float* rows[FEW];
        for (int64_t j = 0; j < m; j++) {
            const int64_t first = x.begin[j], count = x.begin[j + 1] - first;
            const float* shares = room.left + FEW * first;
            quad more;
            for (int64_t s = 0; s < FEW; s++) {
                rows[s] = sub_ds + (s * m + j) * value_dim;
                more[s] = sub_dz[s * m + j];
                add(tile_ds + (r * m + j) * value_dim, rows[s], 1, value_dim);
                tile_dz[r * m + j] += more[s];
            }
            dot_quad(rows, far_v, far_v_stride, value_dim, x.all + first, count, dots);
            for (int64_t i = 0; i < count; i++) {
                const quad part = load_quad(shares + FEW * i) * (load_quad(dots + FEW * i) + more);
                far_dl[r * padded + x.all[first + i]] += part[0] + part[1] + part[2] + part[3];
            }
            outer_quad(shares, rows, x.all + first, count, value_dim, dv);
        }
    }

    // Through the sums of a block's tiles to the keys that none of their sub-tiles takes; then through u.k.
    void far_gradients(int64_t block, Bench& room) {
        const int64_t m = hidden, all = tiles_of(block);
        const float *dls[TALL], *means[TALL];
        float* to_u[TALL];
        for (int64_t from = 0; from < all; from += FEW)
            for (int64_t j = 0; j < m; j++) {
                const int64_t first = start[j], count = start[j + 1] - first, now = std::min(FEW, all - from);
                const float* rows[FEW];
                for (int64_t r = 0; r < FEW; r++) rows[r] = tile_ds + ((from + r) * m + j) * value_dim;
                dot_quad(rows, far_v + first * far_v_stride, far_v_stride, value_dim, nullptr, count, dots);
                for (int64_t i = 0; i < count; i++) {
                    quad shares = {};
                    for (int64_t r = 0; r < now; r++) {
                        const int64_t at = (from + r) * padded + first + i;
                        shares[r] = room.shares[at];
                        far_dl[at] += shares[r] * (dots[FEW * i + r] + tile_dz[(from + r) * m + j]);
                    }
                    store_quad(far_shares + FEW * i, shares);
                }
                outer_quad(far_shares, rows, nullptr, count, value_dim, dv + first * value_dim);
            }
        const int rows = int(all);
        for (int r = 0; r < rows; r++) {
            dls[r] = far_dl + r * padded + p.prefix;
            means[r] = mean + (block * TALL + r) * dim;
            to_u[r] = du + (block * TALL + r) * dim;
        }
        add_rows<NEITHER>(rows, dls, far_k + p.prefix * far_k_stride, far_k_stride, dim, nullptr, body, to_u);
        add_outer(rows, dls, means, nullptr, body, dim, dk + p.prefix * dim);
    }

    // From w to the keys that it is the mean of, and from the mean queries to the queries.
    void finish_hidden() {
        for (int64_t j = 0; j < hidden; j++)
            for (int64_t i = start[j]; i < start[j + 1]; i++) add(dk + i * dim, dw + j * dim, mass[i] / total[j], dim);
        for (int64_t tile = 0; tile < tiles; tile++)
            for (int64_t i = 0; i < queries_of(tile); i++)
                add(dq + tokens_of(tile)[i] * dim, du + tile * dim, 1 / float(queries_of(tile)), dim);
    }

    void prefix_gradients(Bench& room) {
        const int64_t rows = std::min(p.prefix, length);
        float* shares = far_shares;
        for (int64_t from = 0; from < rows; from += SUBTILE) {
            const float *queries[SUBTILE], *go[SUBTILE], *so_far[SUBTILE];
            float* grads[SUBTILE];
            quad log_p, deltas;
            for (int64_t r = 0; r < SUBTILE; r++) {
                const bool real = from + r < rows;
                queries[r] = real ? q + (from + r) * dim : room.zeros;
                go[r] = real ? d_out + (from + r) * value_dim : room.zero_row;
                log_p[r] = real ? t.log_p[z * p.tokens + from + r] : INFINITY;
                deltas[r] = real ? delta[from + r] : 0;
                so_far[r] = grads[r] = real ? dq + (from + r) * dim : room.out + r * dim;
            }
            dot_quad(queries, far_k, far_k_stride, dim, nullptr, length, shares);
            dot_quad(go, far_v, far_v_stride, value_dim, nullptr, length, dots);
            for (int64_t c = 0; c < SUBTILE * length; c += LANES) {
                vec share = exponential(load(shares + c) - repeat(log_p));
                store(shares + c, share);
                store(dl + c, share * (load(dots + c) - repeat(deltas)));
            }
            add_quad(dl, far_k, far_k_stride, dim, nullptr, length, so_far, grads);
            outer_quad(dl, queries, nullptr, length, dim, dk);
            outer_quad(shares, go, nullptr, length, value_dim, dv);
        }
    }

    void put_gradients(const Bench& room) {
        const Type type = Type(p.type);
        for (int64_t n = 0; n < p.tokens; n++) {
            const bool real = n < length;
            for (int64_t d = 0; d < dim; d++) dq[n * dim + d] *= float(p.scale);
            const float* key = real ? dk + place[n] * dim : room.zeros;
            const float* value = real ? dv + place[n] * value_dim : room.zero_row;
            write_row(gradients.d_query, p.at(gradients.d_query_stride, z, n), type, p.dim, dq + n * dim);
            write_row(gradients.d_key, p.at(gradients.d_key_stride, z, n), type, p.dim, key);
            write_row(gradients.d_value, p.at(gradients.d_value_stride, z, n), type, p.value_dim, value);
        }
    }
};
