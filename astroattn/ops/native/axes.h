// Points in a few dimensions: the coordinates of queries and keys that matter to their products.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "vectors.h"

constexpr int AXES = 8, SAMPLES = 64, POWER_STEPS = 2, TRIALS = 16;  // as in order.py
constexpr float NEIGHBOURS = 0.8f;
constexpr float RIDGE = 1e-5f;                  // of a Cholesky factor, relative to the mean of the diagonal
constexpr float ROOT_OF_TINY = 1.0842022e-19f;  // of the smallest normal float

typedef float Axes __attribute__((vector_size(4 * AXES)));
typedef float Moment[AXES][AXES];

static inline void get(Axes& x, const float* from) { memcpy(&x, from, sizeof x); }
static inline void put(float* to, const Axes& x) { memcpy(to, &x, sizeof x); }

// to[i] = x[i] . basis of ROWS rows, basis [dim][AXES].
template <int ROWS>
static inline void project(const float* x, int64_t stride, int64_t dim, const float* basis, float* to) {
    Axes sums[ROWS] = {}, axis;
    for (int64_t d = 0; d < dim; d++) {
        get(axis, basis + d * AXES);
        for (int r = 0; r < ROWS; r++) sums[r] += x[r * stride + d] * axis;
    }
    for (int r = 0; r < ROWS; r++) put(to + r * AXES, sums[r]);
}
static inline void project(const float* x, int64_t stride, int64_t count, int64_t dim, const float* basis, float* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) project<8>(x + i * stride, stride, dim, basis, to + i * AXES);
    for (; i < count; i++) project<1>(x + i * stride, stride, dim, basis, to + i * AXES);
}

// to = x' y: [dim][AXES] of x [count][dim] and y [count][AXES]; dim a multiple of 4.
template <int COLUMNS>
static inline void collect(const float* x, int64_t count, int64_t dim, const float* y, float* to) {
    Axes sums[COLUMNS] = {}, axes;
    for (int64_t i = 0; i < count; i++) {
        get(axes, y + i * AXES);
        for (int r = 0; r < COLUMNS; r++) sums[r] += x[i * dim + r] * axes;
    }
    for (int r = 0; r < COLUMNS; r++) put(to + r * AXES, sums[r]);
}
static inline void collect(const float* x, int64_t count, int64_t dim, const float* y, float* to) {
    int64_t d = 0;
    for (; d + 8 <= dim; d += 8) collect<8>(x + d, count, dim, y, to + d * AXES);
    for (; d < dim; d += 4) collect<4>(x + d, count, dim, y, to + d * AXES);
}

// The sum of x x' of some points, in registers.
struct Moments {
    Axes rows[AXES] = {};
    void add(const Axes& x) {
        for (int a = 0; a < AXES; a++) rows[a] += x[a] * x;
    }
    // Of the points at an index, about their mean.
    void add_spread(const float* points, const int32_t* index, int64_t count) {
        Axes mean = {}, x;
        for (int64_t i = 0; i < count; i++) {
            get(x, points + index[i] * AXES);
            mean += x;
        }
        mean /= float(count);
        for (int64_t i = 0; i < count; i++) {
            get(x, points + index[i] * AXES);
            add(x - mean);
        }
    }
    void give(float* to) const {
        for (int a = 0; a < AXES; a++) put(to + a * AXES, rows[a]);
    }
};

// The Cholesky factor L of second moments with a ridge, in place, for the first `used` axes; x L has the metric
// |x L|^2 = x' M x. A moment that has none, of NaN or infinity, gives NaN.
static inline void factorise(Moment& m, int used) {
    float ridge = 0;
    for (int i = 0; i < used; i++) ridge += m[i][i];
    ridge = RIDGE * ridge / float(used) + ROOT_OF_TINY;
    for (int j = 0; j < AXES; j++) {
        float rest = m[j][j] + ridge;
        for (int e = 0; e < j; e++) rest -= m[j][e] * m[j][e];
        m[j][j] = std::sqrt(rest);
        for (int i = j + 1; i < AXES; i++) {
            float dot = m[i][j];
            for (int e = 0; e < j; e++) dot -= m[i][e] * m[j][e];
            m[i][j] = dot / m[j][j];
            m[j][i] = 0;
        }
    }
}

// to[i] = x[i] L.
static inline void transform(const float* x, int64_t count, const Moment& lower, float* to) {
    project(x, AXES, count, AXES, lower[0], to);
}

// About the direction of the largest variance; its length is of no account.
static inline void principal(const Moment& m, Axes& direction) {
    int largest = 0;
    for (int i = 1; i < AXES; i++)
        if (m[i][i] > m[largest][largest]) largest = i;
    get(direction, m[largest]);
    for (int step = 0; step < POWER_STEPS; step++) {
        Axes next = {}, row;
        float norm = 0;
        for (int i = 0; i < AXES; i++) {
            get(row, m[i]);
            next += direction[i] * row;
        }
        for (int i = 0; i < AXES; i++) norm += next[i] * next[i];
        direction = next / std::max(std::sqrt(norm), 1e-30f);
    }
}

// The starting directions of the iteration mix the sample by fixed numbers without a pattern.
struct Mixture {
    float weight[SAMPLES][AXES];
    Mixture() {
        for (int row = 0; row < SAMPLES; row++)
            for (int i = 0; i < AXES; i++) weight[row][i] = float(std::cos(double((row + 1) * (row + 1)) * (i + 1)));
    }
};

// The columns of basis [dim][AXES] become orthogonal and of length 1, twice over for the sake of rounding.
static inline void make_orthogonal(float* basis, int64_t dim) {
    for (int pass = 0; pass < 2; pass++)
        for (int i = 0; i < AXES; i++) {
            Axes dots = {}, row;
            for (int64_t d = 0; d < dim; d++) {
                get(row, basis + d * AXES);
                dots += row[i] * row;
            }
            // Earlier columns have length 1: what they share with this one leaves it.
            float norm = 0;
            for (int64_t d = 0; d < dim; d++) {
                float* x = basis + d * AXES;
                for (int e = 0; e < i; e++) x[i] -= dots[e] * x[e];
                norm += x[i] * x[i];
            }
            float scale = norm > 0 ? 1 / std::sqrt(norm) : 0;
            for (int64_t d = 0; d < dim; d++) basis[d * AXES + i] *= scale;
        }
}

// Samples of queries and keys [..][dim], less their means: the directions Y and P [dim][AXES] that matter to their
// products, q.k ~ (q Y).(k P). One subspace iteration y <- C_k C_q y, whitened so that Y' C_q Y = 1, and P = C_q Y.
// `seen` [SAMPLES][AXES] is working memory.
static inline void find_axes(const float* q, int64_t queries, const float* k, int64_t keys, int64_t dim, int used,
                             float* y, float* p, float* seen) {
    static const Mixture mixture;
    collect(k, keys, dim, mixture.weight[0], y);
    for (int64_t d = 0; d < dim; d++) std::fill(y + d * AXES + used, y + (d + 1) * AXES, 0.0f);  // and stay so
    project(q, dim, queries, dim, y, seen);
    collect(q, queries, dim, seen, y);
    project(k, dim, keys, dim, y, seen);
    collect(k, keys, dim, seen, y);
    make_orthogonal(y, dim);
    project(q, dim, queries, dim, y, seen);
    Moments sums;
    for (int64_t i = 0; i < queries; i++) {
        Axes x;
        get(x, seen + i * AXES);
        sums.add(x);
    }
    Moment m;
    sums.give(m[0]);
    factorise(m, used);
    for (int64_t d = 0; d < dim; d++) {  // y L^-T
        float* x = y + d * AXES;
        for (int j = 0; j < AXES; j++) {
            for (int i = 0; i < j; i++) x[j] -= x[i] * m[j][i];
            x[j] /= m[j][j];
        }
    }
    project(q, dim, queries, dim, y, seen);
    collect(q, queries, dim, seen, p);
}
