// Attention to a memory of fixed size: the mathematics of streaming.py, one key head of one sequence, token by token.
//
// The memory is copied to where it grows: into the new tensors if they are large enough all the time, else into a room
// of its own, and out when the tokens are done. Every sum goes over entries and tokens in one order, so the bits do not
// depend on how a text is cut. The query heads that share a key head are read four at a time (a quad), their logits
// side by side: c[4 n + r].
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>

#include "memory.h"
#include "numbers.h"

// Field order is the order of `_Problem` in streaming.py.
struct StreamProblem {
    int64_t batch, heads, groups, tokens, dim, value_dim, entries, newest, block, sinks, old_width, new_width, threads;
    int64_t query_stride[3], key_stride[3], value_stride[3], out_stride[3];
    double fast, slow, second_order, least_mass, soft_cap;  // soft_cap: 0 where there is none

    int64_t at(const int64_t* stride, int64_t sequence, int64_t head, int64_t token) const {
        return sequence * stride[0] + head * stride[1] + token * stride[2];
    }
};

// `Memory` in ops/streaming.py.
struct StreamMemory {
    float *key, *value, *log_weight, *attention, *age, *block_attention, *query, *square, *output, *block_query,
        *block_square, *block_output, *weight;
    int64_t* counts;
};

struct StreamTensors {
    const float *query, *key, *value;
    float *out, *log_p;      // log_p [batch, heads, groups, tokens]
    const int64_t* lengths;  // [batch] or null: all tokens are real
    StreamMemory before, after;
};

class Stream {
    const StreamProblem& p;
    const StreamTensors& t;
    const int64_t dim, columns, quads, room;  // room: four numbers for each entry, whole vectors
    int64_t stored = 0, written = 0;          // entries, and tokens of the block
    float *own_key, *own_value, *key, *value, *attention, *age, *heard;  // heard: block_attention
    float* log_weight;                                                   // [quads][room]
    float *query, *square, *output, *block_query, *block_square, *block_output, weight = 0;
    float *q, *o, *logits, *shares, *zeros;                                              // of a token
    float *centre, *drive, *turned, *norms, *sizes, *off, *mass, *worst, *costs, *root;  // of a merger
    float *products, *panel, *whole, *parts;
    int32_t *lanes, *gone, *into, *members;

public:
    Stream(const StreamProblem& problem, const StreamTensors& tensors, Arena& arena)
        : p(problem),
          t(tensors),
          dim(round_up(p.dim, LANES)),
          columns(round_up(p.value_dim, LANES)),
          quads((p.groups + 3) / 4),
          room(round_up(4 * p.entries, 4 * LANES)) {
        const int64_t all = round_up(p.entries, PANEL);
        for (auto list : {&own_key, &turned}) arena.take(*list, p.entries * dim);
        arena.take(own_value, p.entries * columns);
        for (auto list : {&log_weight, &drive}) arena.take(*list, quads * room);
        for (auto list : {&logits, &shares}) arena.take(*list, room);
        for (auto list : {&attention, &age, &heard, &norms, &sizes, &off, &mass, &worst}) arena.take(*list, all);
        for (auto list : {&query, &block_query, &q, &centre}) arena.take(*list, p.groups * dim);
        for (auto list : {&square, &block_square, &root}) arena.take(*list, dim);
        for (auto list : {&output, &block_output, &zeros}) arena.take(*list, columns);
        arena.take(o, 4 * quads * columns);
        arena.take(costs, p.entries * all);
        arena.take(products, 2 * p.entries * PANEL);
        arena.take(panel, std::max(dim, columns) * PANEL);
        arena.take(whole, 4 * quads);
        for (auto list : {&lanes, &gone, &into, &members}) arena.take(*list, all);
        arena.take(parts, all);
    }

    // All tokens of a key head.
    void run(int64_t sequence, int64_t head) {
        const int64_t length = t.lengths ? t.lengths[sequence] : p.tokens, *counts = t.before.counts + 3 * sequence;
        const int64_t first = (sequence * p.heads + head) * p.new_width;
        std::fill(zeros, zeros + columns, 0.0f);
        for (int i = 0; i < LANES; i++) lanes[i] = i;
        stored = counts[0];
        written = counts[1];
        const bool fits = stored + length <= p.new_width;
        key = fits && dim == p.dim ? t.after.key + first * dim : own_key;
        value = fits && columns == p.value_dim ? t.after.value + first * columns : own_value;
        move<false>(t.before, sequence, head, p.old_width);
        for (int64_t n = 0; n < length; n++) {
            insert(sequence, head, n);
            read(sequence, head, n);
            if (++written == p.block) end_block();
        }
        for (int64_t g = head * p.groups; g < (head + 1) * p.groups; g++)
            for (int64_t n = length; n < p.tokens; n++) put(sequence, g, n, zeros, -INFINITY);
        move<true>(t.after, sequence, head, p.new_width);
        if (head > 0) return;
        const int64_t now[] = {stored, written, counts[2] + length};
        memcpy(t.after.counts + 3 * sequence, now, sizeof now);
    }

private:
    // ---- in and out ----

    // `rows` rows of a tensor, from it or to it, if they are not there; our own are padded with zeros.
    template <bool OUT>
    static void copy(float* tensor, float* own, int64_t rows, int64_t width, int64_t padded) {
        if (tensor == own) return;
        if (width == padded) {
            width = padded = rows * width;
            rows = 1;
        }
        for (int64_t i = 0; i < rows; i++, tensor += width, own += padded) {
            memcpy(OUT ? tensor : own, OUT ? own : tensor, size_t(width) * sizeof(float));
            if (!OUT) std::fill(own + width, own + padded, 0.0f);
        }
    }
    template <bool OUT>
    void move(const StreamMemory& m, int64_t sequence, int64_t head, int64_t width) {
        const int64_t z = sequence * p.heads + head, g = z * p.groups, entry = z * width;
        // What a sequence has beyond its entries is never read, but chance numbers do not belong into a file.
        auto entries = [&](float* tensor, float* own, int64_t size, int64_t padded) {
            copy<OUT>(tensor + entry * size, own, stored, size, padded);
            if (OUT) std::fill(tensor + (entry + stored) * size, tensor + (entry + width) * size, 0.0f);
        };
        entries(m.key, key, p.dim, dim);
        entries(m.value, value, p.value_dim, columns);
        entries(m.attention, attention, 1, 1);
        entries(m.age, age, 1, 1);
        entries(m.block_attention, heard, 1, 1);
        if (!OUT) std::fill_n(log_weight, quads * room, 0.0f);  // a quad reads four rows, also where it has fewer
        float* b = m.log_weight + entry * p.groups;
        for (int64_t n = 0; n < width; n++)
            for (int64_t i = 0; i < p.groups; i++, b++) {
                float& own = log_weight[i / 4 * room + 4 * n + i % 4];
                if (OUT) *b = n < stored ? own : 0;
                else own = *b;
            }
        copy<OUT>(m.query + g * p.dim, query, p.groups, p.dim, dim);
        copy<OUT>(m.block_query + g * p.dim, block_query, p.groups, p.dim, dim);
        copy<OUT>(m.square + z * p.dim, square, 1, p.dim, dim);
        copy<OUT>(m.block_square + z * p.dim, block_square, 1, p.dim, dim);
        copy<OUT>(m.output + z * p.value_dim, output, 1, p.value_dim, columns);
        copy<OUT>(m.block_output + z * p.value_dim, block_output, 1, p.value_dim, columns);
        if (!OUT) weight = m.weight[sequence];
        else if (head == 0) m.weight[sequence] = weight;  // that of all heads
    }

    void put(int64_t sequence, int64_t g, int64_t n, const float* row, float log_p) const {
        memcpy(t.out + p.at(p.out_stride, sequence, g, n), row, size_t(p.value_dim) * sizeof(float));
        t.log_p[(sequence * p.heads * p.groups + g) * p.tokens + n] = log_p;
    }

    // ---- a token ----

    void insert(int64_t sequence, int64_t head, int64_t n) {
        auto take = [&](const float* from, int64_t width, float* to, int64_t padded) {
            memcpy(to, from, size_t(width) * sizeof(float));
            std::fill(to + width, to + padded, 0.0f);
        };
        take(t.key + p.at(p.key_stride, sequence, head, n), p.dim, key + stored * dim, dim);
        take(t.value + p.at(p.value_stride, sequence, head, n), p.value_dim, value + stored * columns, columns);
        for (int64_t i = 0; i < quads; i++) std::fill_n(log_weight + i * room + 4 * stored, 4, 0.0f);
        attention[stored] = age[stored] = heard[stored] = 0;
        stored++;
        for (int64_t g = 0; g < p.groups; g++)
            take(t.query + p.at(p.query_stride, sequence, head * p.groups + g, n), p.dim, q + g * dim, dim);
    }

    // b + x.k of the first entries for the rows of a quad; a quad without a fourth row has its last one again.
    vec look(const float* x, int64_t quad, int64_t count, float* c) const {
        const float* rows[4];
        for (int64_t r = 0; r < 4; r++) rows[r] = x + std::min(4 * quad + r, p.groups - 1) * dim;
        dot_quad(rows, key, dim, dim, nullptr, count, c);
        const float* b = log_weight + quad * room;
        for (int64_t i = 0; i < 4 * count; i += LANES) store(c + i, capped(load(c + i)) + load(b + i));
        std::fill(c + 4 * count, c + round_up(4 * count, LANES), -INFINITY);
        vec high = spread(-INFINITY);
        for (int64_t i = 0; i < 4 * count; i += LANES) high = larger(load(c + i), high);
        return largest_of_each(high);
    }
    vec capped(vec x) const {
        const float cap = float(p.soft_cap);
        return cap > 0 ? cap * hyperbolic_tangent(x / cap) : x;
    }
    // to = exp(c - high); returns the sum of each row.
    static vec weigh(const float* c, vec high, int64_t count, float* to) {
        vec total = {};
        for (int64_t i = 0; i < 4 * count; i += LANES) {
            vec x = exponential(load(c + i) - high);
            store(to + i, x);
            total += x;
        }
        return sum_of_each(total);
    }

    void read(int64_t sequence, int64_t head, int64_t n) {
        std::fill(shares, shares + round_up(4 * stored, 4 * LANES), 0.0f);
        for (int64_t quad = 0; quad < quads; quad++) {
            const int64_t first = 4 * quad, rows = std::min<int64_t>(4, p.groups - first);
            vec high = look(q, quad, stored, logits), total = weigh(logits, high, stored, logits), part = {};
            const float* from[4] = {zeros, zeros, zeros, zeros};
            float* to[4];
            for (int r = 0; r < 4; r++) to[r] = o + (first + r) * columns;
            add_quad(logits, value, columns, columns, nullptr, stored, from, to);
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t d = 0; d < columns; d += LANES) store(to[r] + d, load(to[r] + d) / total[r]);
                put(sequence, head * p.groups + first + r, n, to[r], high[r] + std::log(total[r]));
                for (int i = int(r); i < LANES; i += 4) part[i] = 1 / (total[r] * float(p.groups));
            }
            for (int64_t i = 0; i < 4 * stored; i += LANES)
                store(shares + i, load(shares + i) + part * load(logits + i));
        }
        for (int64_t i = 0; i < stored; i += LANES) {  // the rows of LANES entries
            vec parts[4];
            for (int v = 0; v < 4; v++) parts[v] = load(shares + 4 * i + v * LANES);
            vec sums = join_fours(parts);  // entry IN_STEP v + f is at 4 f + v
            sums = shuffle(sums, sums, [](int e) { return e % IN_STEP * 4 + e / IN_STEP; });
            store(heard + i, load(heard + i) + sums);
        }
        const float share = 1 / float(p.groups);
        for (int64_t g = 0; g < p.groups; g++) {
            for (int64_t d = 0; d < dim; d += LANES) {
                vec x = load(q + g * dim + d);
                store(block_query + g * dim + d, load(block_query + g * dim + d) + x);
                store(block_square + d, load(block_square + d) + share * x * x);
            }
            for (int64_t d = 0; d < columns; d += LANES)
                store(block_output + d, load(block_output + d) + share * load(o + g * columns + d));
        }
    }

    // ---- the end of a block ----

    static void blend(float* mean, float* sums, int64_t count, double rate, int64_t block) {
        const float keep = float(rate), add = float((1 - rate) / double(block));
        for (int64_t i = 0; i < count; i++) {
            mean[i] = keep * mean[i] + add * sums[i];
            sums[i] = 0;
        }
    }

    void end_block() {
        blend(attention, heard, stored, p.fast, p.block);
        for (int64_t i = 0; i < stored; i++) age[i] = float(p.fast) * age[i] + float(1 - p.fast);
        blend(query, block_query, p.groups * dim, p.slow, p.block);
        blend(square, block_square, dim, p.slow, p.block);
        blend(output, block_output, columns, p.slow, p.block);
        weight = float(p.slow) * weight + float(1 - p.slow);
        written = 0;
        if (stored == p.entries) merge();
    }

    // As many entries as a block has join others, of all but the newest.
    void merge() {
        const int64_t count = stored - std::max<int64_t>(p.newest - p.block, 0), block = p.block;
        measure(count);
        // Sinks stay, and so does the first entry after them, which has none older to join.
        for (int64_t i = p.sinks + 1; i < count; i++) gone[i - p.sinks - 1] = int32_t(i);
        auto before = [&](int32_t a, int32_t b) { return worst[a] < worst[b] || (worst[a] == worst[b] && a < b); };
        std::partial_sort(gone, gone + block, gone + count - p.sinks - 1, before);
        std::sort(gone, gone + block);
        for (int64_t i = 0; i < count; i++) into[i] = int32_t(i);
        for (int64_t k = 0; k < block; k++) into[gone[k]] = -1;
        for (int64_t k = 0; k < block; k++) members[k] = cheapest(gone[k], count);
        for (int64_t k = 0; k < block; k++) into[gone[k]] = members[k];
        join_all(count);
        close_up();
    }

    // Of those that stay, but for the sinks, the one with which joining costs least.
    int32_t cheapest(int64_t i, int64_t count) const {
        const int64_t width = round_up(p.entries, PANEL);
        float least = INFINITY;
        int64_t best = 0;
        for (int64_t j = p.sinks; j < count; j++) {
            if (into[j] < 0) continue;
            const float cost = j < i ? costs[i * width + j] : costs[j * width + i];
            if (cost < least) {
                least = cost;
                best = j;
            }
        }
        return int32_t(best);
    }

    // costs[i][j] for j < i, infinite for sinks j; worst: the least of each i. No number, or one that is too large,
    // costs as much as a number can.
    void measure(int64_t count) {
        const int64_t width = round_up(p.entries, PANEL), half = p.dim / 2;
        for (int64_t d = 0; d < dim; d++) root[d] = square[d] / weight;
        for (int64_t d = 0; d < half && p.dim % 2 == 0; d++)  // the two axes of a rotary plane, which turns
            root[d] = root[half + d] = 0.5f * (root[d] + root[half + d]);
        for (int64_t d = 0; d < dim; d++) root[d] = std::sqrt(root[d]);
        for (int64_t i = 0; i < count; i++) {
            vec norm = {}, size = {}, away = {};
            for (int64_t d = 0; d < dim; d += LANES) {
                vec x = load(key + i * dim + d) * load(root + d);
                store(turned + i * dim + d, x);
                norm += x * x;
            }
            for (int64_t d = 0; d < columns; d += LANES) {
                vec x = load(value + i * columns + d), y = x - load(output + d) / weight;
                size += x * x;
                away += y * y;
            }
            norms[i] = sum(norm);
            sizes[i] = sum(size);
            off[i] = sum(away);
            mass[i] = attention[i] / age[i] + float(p.least_mass);
            worst[i] = INFINITY;
        }
        for (int64_t i = count; i < round_up(count, LANES); i++) norms[i] = sizes[i] = off[i] = mass[i] = 0;
        for (int64_t first = 0; first < count; first += PANEL) {
            const int64_t ends = std::min<int64_t>(count - first, PANEL), wide = (ends + LANES - 1) / LANES;
            multiply(turned, dim, first, count, int(wide), products);
            multiply(value, columns, first, count, int(wide), products + p.entries * PANEL);
            for (int64_t i = std::max(first, p.sinks) + 1; i < count; i++) {
                vec least = spread(INFINITY);
                for (int64_t w = 0; w < wide && first + w * LANES < i; w++) {
                    vec x = price(i, first + w * LANES, products + i * PANEL + w * LANES);
                    store(costs + i * width + first + w * LANES, x);
                    least = smaller(x, least);
                }
                worst[i] = std::min(worst[i], -largest(-least));
            }
        }
    }

    // to[i] = the products of row i with rows [first, first + PANEL), for i > first.
    void multiply(const float* x, int64_t width, int64_t first, int64_t count, int wide, float* to) const {
        fill_panel(x, width, width, first, count, panel);
        for (int64_t i = first + 1; i < count; i += TALL) {
            const float* a[TALL];
            float* c[TALL];
            for (int r = 0; r < TALL; r++) {
                a[r] = x + (i + r) * width;
                c[r] = to + (i + r) * PANEL;
            }
            dot_panel(int(std::min<int64_t>(TALL, count - i)), wide, a, panel, width, c);
        }
    }

    // What joining i with each of [j, j + LANES) costs.
    vec price(int64_t i, int64_t j, const float* dots) const {
        const vec none = {}, theirs = load(mass + j), part = mass[i] / (mass[i] + theirs), both = part * theirs;
        // In this order a NaN stays one.
        vec turn = larger(none, norms[i] + load(norms + j) - 2 * load(dots));
        vec apart = larger(none, sizes[i] + load(sizes + j) - 2 * load(dots + p.entries * PANEL));
        vec lever = larger(none, part * off[i] + (1 - part) * load(off + j) - part * (1 - part) * apart);
        vec cost = both * both * turn * (apart + float(p.second_order) * turn * lever);
        cost = cost < FLT_MAX ? cost : spread(FLT_MAX);
        ivec at;
        memcpy(&at, lanes, sizeof at);
        at += int32_t(j);
        return (at < int32_t(i)) & (at >= int32_t(p.sinks)) ? cost : spread(INFINITY);
    }

    // The joint entries: means of keys and values with weights exp(b + u.k), and the b with which they have their mass.
    void join_all(int64_t count) {
        for (int64_t i = 0; i < p.groups * dim; i++) centre[i] = query[i] / weight;
        for (int64_t quad = 0; quad < quads; quad++) {
            float* c = drive + quad * room;
            vec high = look(centre, quad, count, c), total = weigh(c, high, count, logits);
            for (int r = 0; r < 4; r++) whole[4 * quad + r] = high[r] + std::log(total[r]);
        }
        for (int64_t k = 0; k < p.block; k++) {
            const int32_t target = into[gone[k]];
            if (std::any_of(gone, gone + k, [&](int32_t i) { return into[i] == target; })) continue;
            int64_t size = 0;
            members[size++] = target;
            for (int64_t i = k; i < p.block; i++)
                if (into[gone[i]] == target) members[size++] = gone[i];
            join(size);
        }
    }

    // The log of the sum of exp(get(i)).
    template <typename Get>
    static float log_sum(int64_t count, Get get) {
        float high = -INFINITY, total = 0;
        for (int64_t i = 0; i < count; i++) high = std::max(high, get(i));
        for (int64_t i = 0; i < count; i++) total += std::exp(get(i) - high);
        return high + std::log(total);
    }

    // The members join the first of them.
    void join(int64_t size) {
        auto place = [&](int64_t i, int64_t g) { return g / 4 * room + 4 * members[i] + g % 4; };
        // The heads share keys and values: an entry's part in theirs is the mean of its part in each head's mass.
        for (int64_t i = 0; i < size; i++)
            parts[i] = log_sum(p.groups, [&](int64_t g) { return drive[place(i, g)] - whole[g]; });
        const float all = log_sum(size, [&](int64_t i) { return parts[i]; });
        for (int64_t i = 0; i < size; i++) parts[i] = std::exp(parts[i] - all);
        mix(key, dim, size);
        mix(value, columns, size);
        const float* joint = key + members[0] * dim;
        for (int64_t g = 0; g < p.groups; g++) {
            vec drift = {};
            for (int64_t d = 0; d < dim; d += LANES) drift += load(joint + d) * load(centre + g * dim + d);
            log_weight[place(0, g)] =
                log_sum(size, [&](int64_t i) { return drive[place(i, g)]; }) - capped(spread(sum(drift)))[0];
        }
        for (int64_t i = 1; i < size; i++) {
            attention[members[0]] += attention[members[i]];
            age[members[0]] = std::max(age[members[0]], age[members[i]]);
        }
    }
    void mix(float* rows, int64_t width, int64_t size) const {
        for (int64_t d = 0; d < width; d += LANES) {
            vec total = {};
            for (int64_t i = 0; i < size; i++) total += parts[i] * load(rows + members[i] * width + d);
            store(rows + members[0] * width + d, total);
        }
    }

    // The entries that stay move up.
    void close_up() {
        int64_t to = gone[0];
        for (int64_t k = 0; k < p.block; k++) {
            const int64_t from = gone[k] + 1, count = (k + 1 < p.block ? gone[k + 1] : stored) - from;
            auto shift = [&](float* x, int64_t width) {
                memmove(x + to * width, x + from * width, size_t(count * width) * sizeof(float));
            };
            shift(key, dim);
            shift(value, columns);
            for (int64_t quad = 0; quad < quads; quad++) shift(log_weight + quad * room, 4);
            for (float* x : {attention, age, heard}) shift(x, 1);
            to += count;
        }
        stored = to;
    }
};
