// Backward, given the choices of the forward (winners, mass and keys are constants).
//
// With a = the share of a neuron in a query's attention, p that of an exact key, delta = d_out . out - d_log_p:
//   exact keys: dl = p (d_out.v - delta), dv += p d_out, dq += dl k, dk += dl q
//   neurons:    dl = a (d_out.s/z - delta), dr += dl w, dw += dl r, ds += a/z d_out, dz -= a/z delta
//   far keys:   dl = P (ds.v + dz), dv += P ds, du += dl k, dk += dl u, and dk += mass / (mass of the cluster) dw
//   r = q - u:  dq += dr + (du - sum of dr over the group) / number of queries in the group
#pragma once

#include "head.h"

// Field order is the order of `Gradients` in __init__.py.
struct Gradients {
    const void* d_out;                // [batch, heads, tokens, value_dim]
    const float* d_log_p;             // [batch, heads, tokens]
    void *d_query, *d_key, *d_value;  // [batch, heads, tokens, ...]
    int64_t d_out_stride[3], d_query_stride[3], d_key_stride[3], d_value_stride[3];
};

struct Backward : Head {
    const Gradients& gradients;
    float *d_out, *delta, *dq, *dk, *dv, *dw, *du, *ds, *dz, *tile_ds, *tile_dz, *dl, *far_dl, *far_shares, *shares,
        *value_dots, *total;
    int32_t* every;  // 0, 1, 2, ...

    Backward(const Problem& problem, const Tensors& tensors, const Gradients& given, Arena& arena)
        : Head(problem, tensors, arena), gradients(given) {
        int64_t m = round_up(p.hidden, LANES), columns = std::max(most_exact() + m, p.prefix ? padded : 0);
        int64_t rows = std::max({std::min(round_up(p.slots(), 4), QUERIES), round_up(p.prefix, 4), int64_t(TALL)});
        arena.take(d_out, p.tokens * value_dim);
        arena.take(delta, p.tokens);
        arena.take(dq, p.tokens * dim);
        arena.take(dk, p.tokens * dim);
        arena.take(dv, p.tokens * value_dim);
        arena.take(dw, m * dim);
        arena.take(du, p.groups * dim);
        arena.take(ds, TALL * m * value_dim);
        arena.take(dz, TALL * m);
        arena.take(tile_ds, m * value_dim);
        arena.take(tile_dz, m);
        arena.take(dl, rows * columns);
        arena.take(shares, rows * columns);
        arena.take(value_dots, rows * columns);
        arena.take(far_dl, round_up(TALL, 4) * padded);
        arena.take(far_shares, TALL * padded);
        arena.take(total, m);
        arena.take(every, padded);
    }

    void run(Bench& room) {
        load_gradients();
        for (int64_t i = 0; i < token_blocks(); i++) load_tokens(i);
        if (p.hidden || p.exact_keys)
            for (int64_t i = 0; i < group_blocks(); i++) average_queries(i);
        if (p.hidden) restore_hidden();
        for (int64_t block = 0; block < group_blocks(); block++) {
            int64_t first = block * TALL, last = std::min(first + TALL, p.groups);
            std::fill(ds, ds + TALL * p.hidden * value_dim, 0.0f);
            std::fill(dz, dz + TALL * p.hidden, 0.0f);
            for (int64_t tile = first_tile(first); tile < first_tile(last); tile++) tile_gradients(tile, first, room);
            if (p.hidden) far_gradients(first, int(last - first));
        }
        if (p.hidden) finish_hidden();
        prefix_gradients(room);
        put_gradients();
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
            every[n] = int32_t(n);
        }
        std::fill(every + p.tokens, every + padded, 0);
        std::fill(dq, dq + p.tokens * dim, 0.0f);
        std::fill(dk, dk + p.tokens * dim, 0.0f);
        std::fill(dv, dv + p.tokens * value_dim, 0.0f);
        std::fill(dw, dw + p.hidden * dim, 0.0f);
        std::fill(du, du + p.groups * dim, 0.0f);
    }

    // w, P of the far keys, z and s, from the choices.
    void restore_hidden() {
        std::copy(t.winners + z * p.body(), t.winners + (z + 1) * p.body(), winners + p.prefix);
        std::copy(t.mass + z * p.body(), t.mass + (z + 1) * p.body(), mass + p.prefix);
        for (int64_t i = 0; i < token_blocks(); i++) add_up(i, k, k_stride, dim);
        average_keys();
        for (int64_t j = 0; j < p.hidden; j++) total[j] = partial[j * (dim + 1) + dim];
        sort_tokens();
        for (int64_t i = 0; i < group_blocks(); i++) {
            attend_means(i);
            for (int64_t g = i * TALL; g < std::min((i + 1) * TALL, p.groups); g++) leave_out_exact(g);
            write_hidden(i);
        }
    }

    void tile_gradients(int64_t tile, int64_t first, Bench& room) {
        TileView x = view(tile, room);
        float *to_ds = ds + (x.group - first) * p.hidden * value_dim, *to_dz = dz + (x.group - first) * p.hidden;
        if (x.queries == 0) return;
        std::fill(tile_ds, tile_ds + p.hidden * value_dim, 0.0f);
        std::fill(tile_dz, tile_dz + p.hidden, 0.0f);
        for (int64_t from = 0; from < x.queries; from += QUERIES)
            query_gradients(room.tokens + from, int(std::min(QUERIES, x.queries - from)), x, room);
        for (int64_t i = 0; i < p.hidden * value_dim; i += LANES) store(to_ds + i, load(to_ds + i) + load(tile_ds + i));
        for (int64_t j = 0; j < p.hidden; j++) to_dz[j] += tile_dz[j];
        if (!shared || !p.hidden) return;
        for (int64_t i = x.near_from; i < x.near_to; i++) {  // near keys were taken out of the tile's z and s
            int64_t n = room.index[i], j = winners[n];
            float c = -attention[x.group * padded + n];
            float dot = dot_rows(tile_ds + j * value_dim, v + n * v_stride, value_dim);
            scale_add(dv + n * value_dim, tile_ds + j * value_dim, c, value_dim);
            float dl_near = c * (dot + tile_dz[j]);
            scale_add(du + x.group * dim, k + n * k_stride, dl_near, dim);
            scale_add(dk + n * dim, mean + x.group * dim, dl_near, dim);
        }
    }

    static float dot_rows(const float* a, const float* b, int64_t count) {
        vec dot = {};
        for (int64_t d = 0; d < count; d += LANES) dot += load(a + d) * load(b + d);
        return sum(dot);
    }
    static void scale_add(float* to, const float* from, float factor, int64_t count) {
        for (int64_t d = 0; d < count; d += LANES) store(to + d, load(to + d) + factor * load(from + d));
    }

    void query_gradients(const int64_t* tokens, int rows, const TileView& x, Bench& room) {
        int64_t m = p.hidden, g = x.group, wide = x.wide(), columns = wide + round_up(m, LANES);
        const float *go[QUERIES + 3], *queries[QUERIES], *probabilities[QUERIES], *dls[QUERIES];
        float *dots[QUERIES + 3], *grads[QUERIES];
        score(tokens, rows, x, columns, room);
        for (int r = 0; r < round_up(rows, 4); r++) {
            go[r] = r < rows ? d_out + tokens[r] * value_dim : room.zero_row;
            dots[r] = value_dots + r * columns;
        }
        for (int r = 0; r < rows; r += 4) dot_gathered(go + r, v, v_stride, value_dim, room.index, x.count, dots + r);
        for (int r = 0; r < round_up(rows, 4); r++) dots[r] += wide;
        for (int r = 0; m && r < rows; r += 4)
            dot_gathered(go + r, s_mean + g * m * value_dim, value_dim, value_dim, room.first, m, dots + r);

        for (int r = 0; r < rows; r++) {
            int64_t n = tokens[r];
            const float log_p = t.log_p[z * p.tokens + n];
            float *logits = room.logits + r * columns, *p_of = shares + r * columns, *dl_of = dl + r * columns;
            float *of_value = value_dots + r * columns, *of_neuron = of_value + wide;
            for (int64_t c = 0; c < columns; c += LANES) store(p_of + c, exponential(load(logits + c) - log_p));
            if (shared && m) {  // s / z of the tile, not of the group
                for (int64_t j = 0; j < m; j++) of_neuron[j] *= room.ratio[j];
                for (int64_t i = x.near_from; i < x.near_to; i++) {
                    int64_t at = room.index[i], j = winners[at];
                    if (room.ratio[j] > 0)
                        of_neuron[j] -= room.ratio[j] * attention[g * padded + at] / z_sum[g * m + j] * of_value[i];
                }
            }
            for (int64_t c = 0; c < columns; c += LANES)
                store(dl_of + c, load(p_of + c) * (load(of_value + c) - delta[n]));
            for (int64_t c = x.count; c < wide; c++) dl_of[c] = 0;
            for (int64_t c = wide + m; c < columns; c++) dl_of[c] = 0;
            queries[r] = q + n * dim;
            probabilities[r] = p_of;
            dls[r] = dl_of;
            grads[r] = dq + n * dim;
        }
        add_rows<VALUES>(rows, dls, k, k_stride, dim, room.index, x.count, grads);
        add_outer(rows, dls, queries, room.index, x.count, dim, dk);
        add_outer(rows, probabilities, go, room.index, x.count, value_dim, dv);
        if (!m) return;

        // room.rest becomes dr: first dw takes r from it.
        for (int r = 0; r < rows; r++) {
            dls[r] += wide;
            float* a = shares + r * columns + wide;
            for (int64_t j = 0; j < m; j++) {
                float whole = z_sum[g * m + j], ratio = shared ? room.ratio[j] : 1;
                a[j] = whole > 0 ? a[j] * ratio / whole : 0;
                tile_dz[j] -= a[j] * delta[tokens[r]];
            }
            probabilities[r] = a;
        }
        add_outer(rows, dls, room.b, nullptr, m, dim, dw);
        add_outer(rows, probabilities, go, nullptr, m, value_dim, tile_ds);
        for (int r = 0; r < rows; r++) {
            grads[r] = room.rest + r * dim;
            std::fill(grads[r], grads[r] + dim, 0.0f);
        }
        add_rows<NEITHER>(rows, dls, weights, dim, dim, nullptr, m, grads);
        for (int r = 0; r < rows; r++) {
            scale_add(dq + tokens[r] * dim, grads[r], 1, dim);
            scale_add(du + g * dim, grads[r], -1, dim);  // r = q - u
        }
    }

    // Through the sums of the groups [first, first + rows) to the far keys, their values, and the mean queries.
    void far_gradients(int64_t first, int rows) {
        int64_t m = p.hidden;
        const float *rows_ds[TALL + 3], *c[TALL], *dls[TALL], *means[TALL];
        float *dots[TALL + 3], *to_u[TALL];
        std::fill(tile_ds, tile_ds + value_dim, 0.0f);  // a row of zeros
        for (int64_t j = 0; j < m; j++) {
            const int32_t* members = order + start[j];
            int64_t count = start[j + 1] - start[j];
            for (int r = 0; r < round_up(rows, 4); r++) {
                rows_ds[r] = r < rows ? ds + (r * m + j) * value_dim : tile_ds;
                dots[r] = far_dl + r * padded + start[j];
            }
            dot_members(rows, rows_ds, members, count, dots);
            for (int r = 0; r < rows; r++) {
                const float* attention_of = attention + (first + r) * padded;
                float *shares_of = far_shares + r * padded, add = dz[r * m + j];
                for (int64_t i = 0; i < count; i++) {
                    shares_of[i] = attention_of[members[i]];
                    dots[r][i] = shares_of[i] * (dots[r][i] + add);
                }
                c[r] = shares_of;
            }
            add_outer(rows, c, rows_ds, members, count, value_dim, dv);
        }
        for (int r = 0; r < rows; r++) {
            dls[r] = far_dl + r * padded;
            means[r] = mean + (first + r) * dim;
            to_u[r] = du + (first + r) * dim;
        }
        add_rows<VALUES>(rows, dls, k, k_stride, dim, order, start[m], to_u);
        add_outer(rows, dls, means, order, start[m], dim, dk);
    }

    // c[r][i] = a[r] . v[members[i]]; nothing is written past `count`.
    void dot_members(int rows, const float* const* a, const int32_t* members, int64_t count, float* const* c) const {
        int64_t whole = count / (LANES / 4) * (LANES / 4);
        for (int r = 0; r < rows; r += 4) dot_gathered(a + r, v, v_stride, value_dim, members, whole, c + r);
        for (int64_t i = whole; i < count; i++)
            for (int r = 0; r < rows; r++) c[r][i] = dot_rows(a[r], v + members[i] * v_stride, value_dim);
    }

    // From w to the keys that it is the mean of, and from the mean queries to the queries.
    void finish_hidden() {
        for (int64_t n = p.prefix; n < length; n++) {
            int64_t j = winners[n];
            if (total[j] != 0) scale_add(dk + n * dim, dw + j * dim, mass[n] / total[j], dim);
        }
        for (int64_t g = 0; g < p.groups; g++)
            for (int64_t tile = first_tile(g); tile < first_tile(g + 1); tile++)
                for_slots(tile, [&](int64_t n) {
                    scale_add(dq + n * dim, du + g * dim, 1 / (share[g] * float(body_length())), dim);
                });
    }

    void prefix_gradients(Bench& room) {
        int rows = int(std::min(p.prefix, length));
        for (int from = 0; from < rows; from += 4) {
            const float *queries[4], *go[4], *dls[4], *probabilities[4];
            float *logits[4], *dots[4], *grads[4];
            int now = std::min(4, rows - from);
            for (int r = 0; r < 4; r++) {
                queries[r] = r < now ? q + (from + r) * dim : room.zeros;
                go[r] = r < now ? d_out + (from + r) * value_dim : room.zero_row;
                logits[r] = dl + r * padded;
                dots[r] = value_dots + r * padded;
            }
            dot_gathered(queries, k, k_stride, dim, every, length, logits);
            dot_gathered(go, v, v_stride, value_dim, every, length, dots);
            for (int r = 0; r < now; r++) {
                float* p_of = shares + r * padded;
                for (int64_t n = 0; n < length; n += LANES) {
                    vec share = exponential(load(logits[r] + n) - t.log_p[z * p.tokens + from + r]);
                    store(p_of + n, share);
                    store(logits[r] + n, share * (load(dots[r] + n) - delta[from + r]));
                }
                dls[r] = logits[r];
                probabilities[r] = p_of;
                grads[r] = dq + (from + r) * dim;
            }
            add_rows<VALUES>(now, dls, k, k_stride, dim, every, length, grads);
            add_outer(now, dls, queries, every, length, dim, dk);
            add_outer(now, probabilities, go, every, length, value_dim, dv);
        }
    }

    void put_gradients() {
        Type type = Type(p.type);
        for (int64_t n = 0; n < p.tokens; n++) {
            for (int64_t d = 0; d < dim; d++) dq[n * dim + d] *= float(p.scale);
            write_row(gradients.d_query, p.at(gradients.d_query_stride, z, n), type, p.dim, dq + n * dim);
            write_row(gradients.d_key, p.at(gradients.d_key_stride, z, n), type, p.dim, dk + n * dim);
            write_row(gradients.d_value, p.at(gradients.d_value_stride, z, n), type, p.value_dim, dv + n * value_dim);
        }
    }
};
