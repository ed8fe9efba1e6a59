// Backward, given the choices of the forward (order, winners, mass and keys are constants).
//
// With p the share of an exact key in a query's attention, a = exp(r.w + top - log p) of a cluster, e = exp(u.k - top)
// of one of its keys and delta = d_out . out - d_log_p:
//   exact keys: dl = p (d_out.v - delta), dq += dl k, dk += dl q, dv += (p - a e) d_out
//   clusters:   dl = a (d_out.s - delta z), less a e (d_out.v - delta) of each exact key; dr += dl w, dw += dl r,
//               ds += a d_out, dz -= a delta
//   all keys:   dl = e (ds.v + dz), less a e (d_out.v - delta) of each exact key; dv += e ds, du += dl k, dk += dl u,
//               and dk += mass / (mass of the cluster) dw
//   r = q - u:  dq += dr + (du - sum of dr over the tile) / number of queries in the tile
// ds and dz are summed over a tile first. A sub-tile that has sums of its own sums these for itself.
#pragma once

#include "reading.h"

// Field order is the order of `_Gradients` in near_far.py.
struct Gradients {
    const void* d_out;                // [batch, heads, queries, value_dim]
    const float* d_log_p;             // [batch, heads, queries]
    void *d_query, *d_key, *d_value;  // [batch, heads, queries or tokens, ...]
    int64_t d_out_stride[3], d_query_stride[3], d_key_stride[3], d_value_stride[3];
};

struct Backward : Reading {
    static constexpr int64_t FEW = 4;  // tiles that are worked on at once
    static constexpr int TALL_UP = int((TALL + FEW - 1) / FEW * FEW);

    const Gradients& gradients;
    float *d_out, *delta, *dq, *dk, *dv, *dw, *du, *tile_ds, *tile_dz, *own_ds, *own_dz, *dl, *dots, *far_dl,
        *far_shares;

    Backward(const Problem& problem, const Tensors& tensors, const Gradients& given, Arena& arena)
        : Reading(problem, tensors, arena), gradients(given) {
        const int64_t m = round_up(most_hidden, LANES), far = m > 0;
        const int64_t columns = std::max(most_columns(), p.prefix || far ? padded : 0);
        arena.take(d_out, p.queries * value_dim);
        arena.take(delta, p.queries);
        arena.take(dq, p.queries * dim);
        arena.take(dk, p.tokens * dim);
        arena.take(dv, std::max(p.tokens, p.queries) * value_dim);
        arena.take(dw, m * dim);
        arena.take(du, most_tiles * dim);
        arena.take(tile_ds, TALL_UP * m * value_dim);
        arena.take(tile_dz, TALL_UP * m);
        arena.take(own_ds, m * value_dim);
        arena.take(own_dz, m);
        for (auto list : {&dl, &dots}) arena.take(*list, SUBTILE * columns);
        arena.take(far_dl, far * TALL * padded);
        arena.take(far_shares, far || p.prefix ? FEW * padded : 0);
    }

    void run(Bench& room) {
        load_gradients();
        for (int64_t i = 0; i < token_blocks(); i++) load_tokens(i);
        for (int64_t i = 0; i < asked; i++) order[i] = t.order[z * p.asked() + i] + int32_t(p.prefix);
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
        for (int64_t n = 0; n < p.queries; n++) {
            float *row = d_out + n * value_dim, *out = dv + n * value_dim;  // dv is not in use yet
            read_row(gradients.d_out, p.at(gradients.d_out_stride, z, n), Type(p.type), p.value_dim, 1, row);
            read_row(t.out, p.at(p.out_stride, z, n), Type(p.type), p.value_dim, 1, out);
            float dot = 0;
            for (int64_t d = 0; d < p.value_dim; d++) dot += row[d] * out[d];
            delta[n] = dot - gradients.d_log_p[z * p.queries + n];
            std::fill(row + p.value_dim, row + value_dim, 0.0f);
        }
        std::fill(dq, dq + p.queries * dim, 0.0f);
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
        for (int64_t tile = 0; t.bias && tile < tiles; tile++) {
            measure_bias(tile, dots, nullptr);
            for (int64_t i = 0; i < length; i++) logits[tile * padded + i] += dots[sorted[i]];
        }
    }

    static float dot_rows(const float* a, const float* b, int64_t count) {
        vec dot = {};
        for (int64_t d = 0; d < count; d += LANES) dot += load(a + d) * load(b + d);
        return sum(dot);
    }

    void tile_gradients(int64_t tile, int64_t r, Bench& room) {
        begin_tile(tile, room);
        for (int64_t s = 0; s < subtiles_of(tile); s++) {
            const int64_t size = list_keys(tile, s, r, room);
            float *ds = tile_ds + r * hidden * value_dim, *dz = tile_dz + r * hidden;
            if (subtile_gradients(tile, s, r, size, room.sums[r], ds, dz, room)) continue;
            std::fill(own_ds, own_ds + hidden * value_dim, 0.0f);
            std::fill(own_dz, own_dz + hidden, 0.0f);
            subtile_gradients(tile, s, r, size, sum_apart(tile, size, r, room), own_ds, own_dz, room);
            for (int64_t j = 0; j < hidden; j++)
                if (room.taken[j] == INFINITY) apart_gradients(tile, j, r, size, room);
            add(ds, own_ds, 1, hidden * value_dim);
            for (int64_t j = 0; j < hidden; j++) dz[j] += own_dz[j];
        }
    }

    // As `attend_subtile`.
    bool subtile_gradients(int64_t tile, int64_t subtile, int64_t r, int64_t size, const Sums& x, float* ds, float* dz,
                           Bench& room) {
        const int64_t m = hidden, first = subtile * SUBTILE;
        const int64_t rows = std::min(SUBTILE, queries_of(tile) - first);
        const float *go[SUBTILE], *queries[SUBTILE], *rest[SUBTILE], *zeros[SUBTILE];
        float *grads[SUBTILE], *keys_dl = far_dl + r * padded;
        quad log_p, deltas;
        for (int64_t i = 0; i < SUBTILE; i++) {  // a query that is not there has no share in anything
            const int64_t n = tokens_of(tile)[std::min(first + i, queries_of(tile) - 1)];
            go[i] = i < rows ? d_out + n * value_dim : room.zero_row;
            queries[i] = i < rows ? q + n * dim : room.zeros;
            rest[i] = i < rows ? room.rest + (first + i) * dim : room.zeros;
            log_p[i] = i < rows ? t.log_p[z * p.queries + n] : INFINITY;
            deltas[i] = i < rows ? delta[n] : 0;
            zeros[i] = room.zeros;
            grads[i] = room.out + i * dim;
        }
        const auto [wide, columns] = score(tile, subtile, size, x, room);
        float *shares = room.scores, *neurons = shares + SUBTILE * wide, *dl_neurons = dl + SUBTILE * wide;
        for (int64_t c = 0; c < SUBTILE * columns; c += LANES)  // far above 0 only where it is tried again
            store(shares + c, exponential(smaller(load(shares + c) - repeat(log_p), spread(80.0f))));
        if (loses_digits(weigh(neurons, x), quad{} + 1.0f, rows, x, room)) return false;

        dot_quad(go, far_v, far_v_stride, value_dim, room.list, size, dots);
        dot_quad(go, x.s, value_dim, value_dim, nullptr, m, dots + SUBTILE * wide);
        for (int64_t j = 0; j < m; j++) {
            const quad part = load_quad(neurons + SUBTILE * j), dot = load_quad(dots + SUBTILE * (wide + j));
            store_quad(dl_neurons + SUBTILE * j, part * (dot - deltas * x.z[j]));
            dz[j] -= sum_of_four(part * deltas);
        }
        for (int64_t i = 0; i < size; i++) {
            const quad part = load_quad(shares + SUBTILE * i), dot = load_quad(dots + SUBTILE * i) - deltas;
            store_quad(dl + SUBTILE * i, part * dot);
            if (!m) continue;
            const int64_t j = room.owner[i];
            const quad through = load_quad(neurons + SUBTILE * j) * room.share[i], lost = through * dot;
            store_quad(shares + SUBTILE * i, part - through);
            store_quad(dl_neurons + SUBTILE * j, load_quad(dl_neurons + SUBTILE * j) - lost);
            keys_dl[room.list[i]] -= sum_of_four(lost);
        }
        add_quad(dl, far_k, far_k_stride, dim, room.list, size, zeros, grads);
        for (int64_t i = 0; i < rows; i++) add(dq + tokens_of(tile)[first + i] * dim, grads[i], 1, dim);
        outer_quad(dl, queries, room.list, size, dim, dk);
        outer_quad(shares, go, room.list, size, value_dim, dv);
        if (!m) return true;
        outer_quad(dl_neurons, rest, nullptr, m, dim, dw);
        outer_quad(neurons, go, nullptr, m, value_dim, ds);
        add_quad(dl_neurons, weights, dim, dim, nullptr, m, zeros, grads);
        for (int64_t i = 0; i < rows; i++) {
            add(dq + tokens_of(tile)[first + i] * dim, grads[i], 1, dim);
            add(du + tile * dim, grads[i], -1, dim);  // r = q - u
        }
        return true;
    }

    static float sum_of_four(quad x) { return x[0] + x[1] + (x[2] + x[3]); }

    // Through the sums of a cluster that are not the tile's.
    void apart_gradients(int64_t tile, int64_t j, int64_t r, int64_t size, Bench& room) {
        float *ds = own_ds + j * value_dim, &dz = own_dz[j];
        for_left(tile, j, size, room, [&](int64_t i, float u_k) {
            const float share = std::exp(u_k - room.apart.top[j]);
            far_dl[r * padded + i] += share * (dot_rows(ds, far_v + i * far_v_stride, value_dim) + dz);
            add(dv + i * value_dim, ds, share, value_dim);
        });
        std::fill(ds, ds + value_dim, 0.0f);
        dz = 0;
    }

    // Through the sums of a block's tiles to the keys; then through u.k.
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
        add_rows(rows, dls, far_k + p.prefix * far_k_stride, far_k_stride, dim, body, to_u);
        add_outer(rows, dls, means, body, dim, dk + p.prefix * dim);
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
                log_p[r] = real ? t.log_p[z * p.queries + from + r] : INFINITY;
                deltas[r] = real ? delta[from + r] : 0;
                so_far[r] = grads[r] = real ? dq + (from + r) * dim : room.out + r * dim;
            }
            dot_quad(queries, far_k, far_k_stride, dim, nullptr, length, shares);
            for (int64_t r = 0; t.bias && from + r < rows && r < SUBTILE; r++)
                add_bias(from + r, nullptr, length, shares + r);
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
        for (int64_t n = 0; n < p.queries; n++) {
            for (int64_t d = 0; d < dim; d++) dq[n * dim + d] *= float(p.scale);
            write_row(gradients.d_query, p.at(gradients.d_query_stride, z, n), type, p.dim, dq + n * dim);
        }
        for (int64_t n = 0; n < p.tokens; n++) {
            const bool real = n < length;
            const float* key = real ? dk + place[n] * dim : room.zeros;
            const float* value = real ? dv + place[n] * value_dim : room.zero_row;
            write_row(gradients.d_key, p.at(gradients.d_key_stride, z, n), type, p.dim, key);
            write_row(gradients.d_value, p.at(gradients.d_value_stride, z, n), type, p.value_dim, value);
        }
    }
};
