// Linear attention through a static hidden layer: the mathematics of static.py, forward and backward.
//
// Tokens are taken ROWS at a time: their response to all neurons stays in cache, nothing of size tokens x neurons is
// written to memory. Keys are measured from the largest gain of each neuron so far (the top), queries from their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "activations.h"
#include "memory.h"
#include "numbers.h"

// Field order is the order of `Linear` in linear.py.
struct LinearProblem {
    int64_t batch, heads, queries, keys, dim, value_dim, hidden, type, activation, weight_batches, threads;
    int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];
    double scale_root;

    int64_t at(const int64_t* stride, int64_t z, int64_t token) const {
        return z / heads * stride[0] + z % heads * stride[1] + token * stride[2];
    }
    // Which of the weights [weight_batches, heads] a head of a sequence has.
    int64_t weights_of(int64_t z) const { return weight_batches > 1 ? z : z % heads; }
};

struct LinearTensors {
    const void *query, *key, *value;
    const float *weight, *phase;  // [weight_batches, heads, hidden, dim], [weight_batches, heads, hidden]
    const bool* key_mask;         // [batch, keys] or null
    void* out;                    // [batch, heads, queries, value_dim]
    float *log_p, *kv_state, *z_state, *top;
};

struct LinearGradients {
    const void* d_out;
    const float* d_log_p;
    void *d_query, *d_key, *d_value;
    float* d_weight;  // [weight_batches, heads, hidden, dim]
    int64_t d_out_stride[3], d_query_stride[3], d_key_stride[3], d_value_stride[3];
};

constexpr int64_t ROWS = 48;  // tokens at a time

// What a thread needs: the hidden layer of one head, and a block of tokens.
struct LinearRoom {
    const LinearProblem& p;
    const LinearTensors& t;
    int64_t dim, value_dim, m, wide;  // m padded to vectors, wide to panels
    float shift;
    float *weight, *panels, *phase, *x, *y, *half, *drive, *gain, *phi, *dots, *given, *rows_out, *kv, *kv_panels, *z,
        *top;
    float *d_kv, *d_z, *d_weight;  // partial gradients of the state and of W
    const float* a[ROWS];
    float* c[ROWS];

    LinearRoom(const LinearProblem& problem, const LinearTensors& tensors, Arena& arena)
        : p(problem),
          t(tensors),
          dim(round_up(p.dim, LANES)),
          value_dim(round_up(p.value_dim, LANES)),
          m(round_up(p.hidden, LANES)),
          wide(round_up(p.hidden, PANEL)),
          shift(shift_of(p.activation, double(p.hidden))) {
        int64_t most = std::max(dim, value_dim);
        arena.take(weight, wide * dim);
        arena.take(panels, wide * dim);
        arena.take(phase, wide);
        arena.take(x, ROWS * dim);
        arena.take(y, ROWS * value_dim);
        arena.take(half, ROWS);
        for (auto list : {&drive, &gain, &phi, &dots, &given}) arena.take(*list, ROWS * wide);
        arena.take(rows_out, ROWS * most);
        arena.take(kv, wide * value_dim);
        arena.take(kv_panels, wide * value_dim);
        arena.take(z, wide);
        arena.take(top, wide);
        arena.take(d_kv, wide * value_dim);
        arena.take(d_z, wide);
        arena.take(d_weight, wide * dim);
    }

    void load_weights(int64_t head) {
        std::fill(weight, weight + wide * dim, 0.0f);
        std::fill(phase, phase + wide, 0.0f);
        const int64_t which = p.weights_of(head);
        for (int64_t j = 0; j < p.hidden; j++)
            memcpy(weight + j * dim, t.weight + (which * p.hidden + j) * p.dim, size_t(p.dim) * sizeof(float));
        memcpy(phase, t.phase + which * p.hidden, size_t(p.hidden) * sizeof(float));
        for (int64_t j = 0; j < wide; j += PANEL) fill_panel(weight, dim, dim, j, wide, panels + j * dim);
    }

    // kv and z (of a state, or their gradients) and top.
    void load_state(const float* kv_of, const float* z_of, const float* top_of) {
        std::fill(kv, kv + wide * value_dim, 0.0f);
        for (int64_t j = 0; j < p.hidden; j++)
            memcpy(kv + j * value_dim, kv_of + j * p.value_dim, size_t(p.value_dim) * sizeof(float));
        load_row(z_of, 0, z);
        load_row(top_of, LEAST, top);
        for (int64_t j = 0; j < wide; j += PANEL)
            fill_panel(kv, value_dim, value_dim, j, wide, kv_panels + j * value_dim);
    }
    void put_state(float* kv_to, float* z_to, float* top_to) const {
        for (int64_t j = 0; j < p.hidden; j++)
            memcpy(kv_to + j * p.value_dim, kv + j * value_dim, size_t(p.value_dim) * sizeof(float));
        memcpy(z_to, z, size_t(p.hidden) * sizeof(float));
        if (top_to) memcpy(top_to, top, size_t(p.hidden) * sizeof(float));
    }
    void load_row(const float* from, float rest, float* to) const {
        std::fill(to, to + wide, rest);
        memcpy(to, from, size_t(p.hidden) * sizeof(float));
    }
    static constexpr float LEAST = -8e37f;  // of a gain where nothing has been written

    // Tokens [first, first + rows) of a tensor, in float32.
    void load_block(const void* from, const int64_t* stride, int64_t head, int64_t first, int64_t rows, int64_t width,
                    float factor, float* to) const {
        const int64_t room = round_up(width, LANES);
        for (int64_t r = 0; r < rows; r++) {
            read_row(from, p.at(stride, head, first + r), Type(p.type), width, factor, to + r * room);
            std::fill(to + r * room + width, to + (r + 1) * room, 0.0f);
        }
    }

    // c = the products of `rows` rows of a with panels: [rows][wide].
    void multiply(const float* rows_of, int64_t rows, int64_t depth, const float* with, float* to) {
        for (int64_t r = 0; r < rows; r++) a[r] = rows_of + r * depth;
        for (int64_t j = 0; j < m; j += PANEL) {
            int width = int(std::min<int64_t>(WIDE, (m - j) / LANES));
            for (int64_t r = 0; r < rows; r++) c[r] = to + r * wide + j;
            dot_panel(int(rows), width, a, with + j * depth, depth, c);
        }
    }

    // drive and half of the tokens in x.
    void excite(int64_t rows) {
        multiply(x, rows, dim, panels, drive);
        for (int64_t r = 0; r < rows; r++) {
            vec square = {};
            for (int64_t d = 0; d < dim; d += LANES) square += load(x + r * dim + d) * load(x + r * dim + d);
            half[r] = sum(square) / 2;
        }
    }

    // gain, and in phi the base; neurons that only fill a vector up have a gain of -inf.
    template <Activation A>
    void respond_all(int64_t rows) {
        for (int64_t r = 0; r < rows; r++) {
            for (int64_t j = 0; j < m; j += LANES) {
                Response response = respond<A>(load(drive + r * wide + j), spread(half[r]), load(phase + j), shift);
                store(gain + r * wide + j, response.gain);
                store(phi + r * wide + j, response.base);
            }
            std::fill(gain + r * wide + p.hidden, gain + r * wide + m, -INFINITY);
        }
    }

    // From dots, the gradient of phi times exp(gain): drive becomes its own gradient, half the sum of its gradients.
    template <Activation A>
    void differentiate_all(int64_t rows) {
        for (int64_t r = 0; r < rows; r++) {
            vec total = {};
            for (int64_t j = 0; j < m; j += LANES) {
                int64_t at = r * wide + j;
                vec d_base = load(dots + at);  // gain holds the base by now
                Slope slope = differentiate<A>(load(drive + at), load(phase + j), d_base * load(gain + at), d_base);
                store(drive + at, slope.drive);
                total += slope.half;
            }
            half[r] = sum(total);
        }
    }

    using Step = void (LinearRoom::*)(int64_t);
    template <int... A>
    static Step pick(int64_t activation, bool slope, std::integer_sequence<int, A...>) {
        const Step responses[] = {&LinearRoom::respond_all<Activation(A)>...};
        const Step slopes[] = {&LinearRoom::differentiate_all<Activation(A)>...};
        return slope ? slopes[activation] : responses[activation];
    }
    void respond_to(int64_t rows) {
        excite(rows);
        (this->*pick(p.activation, false, std::make_integer_sequence<int, ACTIVATION_COUNT>()))(rows);
    }
    void slope_of(int64_t rows) {
        (this->*pick(p.activation, true, std::make_integer_sequence<int, ACTIVATION_COUNT>()))(rows);
    }

    // ---- forward ----

    // Keys and values of tokens [first, last): the partial state kv, z, top.
    void write(int64_t head, int64_t first, int64_t last) {
        std::fill(kv, kv + wide * value_dim, 0.0f);
        std::fill(z, z + wide, 0.0f);
        std::fill(top, top + wide, LEAST);
        for (int64_t from = first; from < last; from += ROWS) {
            int64_t rows = load_keys(head, from, std::min(ROWS, last - from));
            if (rows == 0) continue;
            respond_to(rows);
            for (int64_t j = 0; j < m; j += LANES) {
                vec high = load(top + j), old = high, sums = {};
                for (int64_t r = 0; r < rows; r++) high = larger(load(gain + r * wide + j), high);
                for (int64_t r = 0; r < rows; r++) {
                    vec response = exponential(load(gain + r * wide + j) - high) * load(phi + r * wide + j);
                    store(phi + r * wide + j, response);
                    sums += response;
                }
                vec fade = exponential(old - high);
                store(top + j, high);
                store(z + j, load(z + j) * fade + sums);
                for (int i = 0; i < LANES; i++)
                    if (fade[i] != 1)
                        for (int64_t d = 0; d < value_dim; d += LANES) {
                            float* at = kv + (j + i) * value_dim + d;
                            store(at, load(at) * fade[i]);
                        }
            }
            outer(phi, y, rows, value_dim, kv);
        }
    }

    // The real ones of some keys and their values, closed up; how many, and in `places` where they were.
    int64_t load_keys(int64_t head, int64_t first, int64_t rows, int64_t* places = nullptr) const {
        const bool* real = t.key_mask ? t.key_mask + head / p.heads * p.keys : nullptr;
        int64_t count = 0;
        for (int64_t n = first; n < first + rows; n++) {
            if (real && !real[n]) continue;
            load_block(t.key, p.key_stride, head, n, 1, p.dim, float(p.scale_root), x + count * dim);
            load_block(t.value, p.value_stride, head, n, 1, p.value_dim, 1, y + count * value_dim);
            if (places) places[count] = n;
            count++;
        }
        return count;
    }

    // to[j] += sum_r c[r][j] rows[r]
    void outer(const float* c_of, const float* rows_of, int64_t rows, int64_t width, float* to) const {
        const float *coefficients[ROWS], *values[ROWS];
        for (int64_t r = 0; r < rows; r++) {
            coefficients[r] = c_of + r * wide;
            values[r] = rows_of + r * width;
        }
        add_outer(int(rows), coefficients, values, p.hidden, width, to);
    }

    // phi of the queries in x, each measured from its own largest; their process and the log of its measure.
    void read_features(int64_t rows, float* process, float* best) {
        respond_to(rows);
        for (int64_t r = 0; r < rows; r++) {
            float *gains = gain + r * wide, *responses = phi + r * wide;
            vec high = spread(-INFINITY), total = {};
            for (int64_t j = 0; j < m; j += LANES) {
                store(gains + j, load(gains + j) + load(top + j));
                high = larger(load(gains + j), high);
            }
            best[r] = std::max(largest(high), -3e38f);
            for (int64_t j = 0; j < m; j += LANES) {
                vec base = load(responses + j), power = exponential(load(gains + j) - best[r]);
                store(responses + j, power * base);
                store(dots + r * wide + j, power);
                store(gains + j, base);
                total += power * base * load(z + j);
            }
            process[r] = sum(total);
        }
    }

    void read(int64_t head, int64_t first, int64_t last) {
        float process[ROWS], best[ROWS];
        for (int64_t from = first; from < last; from += ROWS) {
            int64_t rows = std::min(ROWS, last - from);
            load_block(t.query, p.query_stride, head, from, rows, p.dim, float(p.scale_root), x);
            read_features(rows, process, best);
            combine(phi, kv, rows, value_dim, rows_out);
            for (int64_t r = 0; r < rows; r++) {
                float* row = rows_out + r * value_dim;
                const bool empty = process[r] == 0;
                for (int64_t d = 0; d < value_dim; d++) row[d] = empty ? 0 : row[d] / process[r];
                t.log_p[head * p.queries + from + r] = empty ? -INFINITY : std::log(process[r]) + best[r];
                write_row(t.out, p.at(p.out_stride, head, from + r), Type(p.type), p.value_dim, row);
            }
        }
    }

    // to[r] = sum_j c[r][j] rows[j]
    void combine(const float* c_of, const float* rows_of, int64_t rows, int64_t width, float* to) {
        std::fill(to, to + rows * width, 0.0f);
        for (int64_t r = 0; r < rows; r++) {
            a[r] = c_of + r * wide;
            c[r] = to + r * width;
        }
        add_rows(int(rows), a, rows_of, width, width, p.hidden, c);
    }

    // ---- backward: partial gradients of kv and z (queries), and of W ----

    void read_backward(const LinearGradients& g, int64_t head, int64_t first, int64_t last) {
        std::fill(d_kv, d_kv + wide * value_dim, 0.0f);
        std::fill(d_z, d_z + wide, 0.0f);
        std::fill(d_weight, d_weight + wide * dim, 0.0f);
        float process[ROWS], best[ROWS];
        for (int64_t from = first; from < last; from += ROWS) {
            int64_t rows = std::min(ROWS, last - from);
            load_block(t.query, p.query_stride, head, from, rows, p.dim, float(p.scale_root), x);
            load_block(g.d_out, g.d_out_stride, head, from, rows, p.value_dim, 1, y);
            multiply(y, rows, value_dim, kv_panels, given);  // d_out.kv
            read_features(rows, process, best);              // dots: exp(gain), from the best on; gain: the base
            for (int64_t r = 0; r < rows; r++) {
                const float factor = process[r] == 0 ? 0 : 1 / process[r];
                float *shares = phi + r * wide, *of_kv = given + r * wide;
                vec dot = {};
                for (int64_t j = 0; j < m; j += LANES) {
                    store(shares + j, load(shares + j) * factor);
                    dot += load(shares + j) * load(of_kv + j);  // sums to d_out.out, before it was rounded
                }
                const float delta = sum(dot) - g.d_log_p[head * p.queries + from + r];
                for (int64_t j = 0; j < m; j += LANES) {
                    float* at = dots + r * wide + j;
                    store(at, load(at) * factor * (load(of_kv + j) - delta * load(z + j)));
                    store(d_z + j, load(d_z + j) - load(shares + j) * delta);
                }
            }
            outer(phi, y, rows, value_dim, d_kv);
            finish_rows(rows, g.d_weight);
            for (int64_t r = 0; r < rows; r++)
                write_row(g.d_query, p.at(g.d_query_stride, head, from + r), Type(p.type), p.dim, rows_out + r * dim);
        }
    }

    // Gradients of the keys and values of tokens [first, last); here kv and z hold their own gradients.
    void write_backward(const LinearGradients& g, int64_t head, int64_t first, int64_t last) {
        std::fill(d_weight, d_weight + wide * dim, 0.0f);
        int64_t places[ROWS];
        for (int64_t from = first; from < last; from += ROWS) {
            int64_t all = std::min(ROWS, last - from), rows = load_keys(head, from, all, places);
            std::fill(rows_out, rows_out + std::max(dim, value_dim), 0.0f);
            for (int64_t n = from; rows < all && n < from + all; n++) {  // padding has none
                write_row(g.d_key, p.at(g.d_key_stride, head, n), Type(p.type), p.dim, rows_out);
                write_row(g.d_value, p.at(g.d_value_stride, head, n), Type(p.type), p.value_dim, rows_out);
            }
            if (rows == 0) continue;
            respond_to(rows);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < m; j += LANES) {
                    int64_t at = r * wide + j;
                    vec base = load(phi + at), power = exponential(load(gain + at) - load(top + j));
                    store(phi + at, power * base);
                    store(dots + at, power);
                    store(gain + at, base);
                }
            combine(phi, kv, rows, value_dim, rows_out);
            for (int64_t r = 0; r < rows; r++)
                write_row(g.d_value, p.at(g.d_value_stride, head, places[r]), Type(p.type), p.value_dim,
                          rows_out + r * value_dim);
            multiply(y, rows, value_dim, kv_panels, phi);
            for (int64_t r = 0; r < rows; r++)
                for (int64_t j = 0; j < m; j += LANES) {
                    float* at = dots + r * wide + j;
                    store(at, load(at) * (load(phi + r * wide + j) + load(z + j)));
                }
            finish_rows(rows, g.d_weight);
            for (int64_t r = 0; r < rows; r++)
                write_row(g.d_key, p.at(g.d_key_stride, head, places[r]), Type(p.type), p.dim, rows_out + r * dim);
        }
    }

    // From dots to the gradients of x (into rows_out) and of W.
    void finish_rows(int64_t rows, bool with_weight) {
        slope_of(rows);
        if (with_weight) outer(drive, x, rows, dim, d_weight);
        combine(drive, weight, rows, dim, rows_out);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t d = 0; d < dim; d += LANES) {
                float* at = rows_out + r * dim + d;
                store(at, (load(at) + half[r] * load(x + r * dim + d)) * float(p.scale_root));
            }
    }
};
