// Vectors of the widest kind that the target has, and the two small matrix products that everything else is made of.
// Plain GNU C++ vector extensions: the same source serves AVX-512, AVX2, SSE and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16, WIDE = 4, TALL = 6;  // 24 of 32 registers accumulate
#elif defined(__AVX2__)
constexpr int LANES = 8, WIDE = 2, TALL = 6;  // 12 of 16
#else
constexpr int LANES = 4, WIDE = 2, TALL = 4;  // 8 of 16 (SSE) or 32 (NEON)
#endif
constexpr int PANEL = LANES * WIDE;  // columns that one step of a product holds in registers

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

static inline vec load(const float* p) {
    vec x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void store(float* p, vec x) { memcpy(p, &x, sizeof x); }
static inline void store(int32_t* p, ivec x) { memcpy(p, &x, sizeof x); }
static inline vec spread(float x) { return x - vec{}; }
static inline ivec spread(int32_t x) { return x - ivec{}; }
static inline vec larger(vec a, vec b) { return a > b ? a : b; }
static inline vec smaller(vec a, vec b) { return a < b ? a : b; }
// One bit for each lane of a comparison's result.
static inline uint32_t bits_of(ivec x) {
#if defined(__AVX512F__)
    __m512i bits;
    memcpy(&bits, &x, sizeof bits);
    return _mm512_test_epi32_mask(bits, bits);
#elif defined(__AVX2__)
    __m256 bits;
    memcpy(&bits, &x, sizeof bits);
    return uint32_t(_mm256_movemask_ps(bits));
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits |= uint32_t(x[i] & 1) << i;
    return bits;
#endif
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// The set bits of every byte, side by side.
struct SetBits {
    uint8_t of[256][8];
    SetBits() : of{} {
        for (int byte = 0; byte < 256; byte++)
            for (int bit = 0, n = 0; bit < 8; bit++)
                if (byte >> bit & 1) of[byte][n++] = uint8_t(bit);
    }
};
inline const SetBits set_bits;
#endif
// Writes `first` + the lanes of a comparison's result that are set, side by side, and perhaps more behind them, a whole
// vector at most; returns how many are set.
static inline int list_lanes(ivec x, int32_t first, int32_t* to) {
    const uint32_t bits = bits_of(x);
#if defined(__AVX512F__)
    ivec lanes;
    for (int i = 0; i < LANES; i++) lanes[i] = i;
    lanes += first;
    __m512i all;
    memcpy(&all, &lanes, sizeof all);
    all = _mm512_maskz_compress_epi32(__mmask16(bits), all);
    memcpy(to, &all, sizeof all);
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(set_bits.of[bits]));
    __m256i all = _mm256_add_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(first));
    memcpy(to, &all, sizeof all);
#else
    for (int i = 0, n = 0; i < LANES; i++) {
        to[n] = first + i;
        n += bits >> i & 1;
    }
#endif
    return __builtin_popcount(bits);
}
static inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Lane i is lane index(i) of the vectors a and b put one behind the other.
template <typename Vector, typename Index>
static inline Vector shuffle(Vector a, Vector b, Index index) {
#if defined(__clang__)
    Vector out;
    for (int i = 0; i < LANES; i++) out[i] = index(i) < LANES ? a[index(i)] : b[index(i) - LANES];
    return out;
#else
    ivec mask;
    for (int i = 0; i < LANES; i++) mask[i] = index(i);
    return __builtin_shuffle(a, b, mask);
#endif
}
template <int HALF = LANES / 2, typename Vector>
static inline Vector sum_everywhere(Vector x) {
    if constexpr (HALF == 0) return x;
    else return sum_everywhere<HALF / 2>(x + shuffle(x, x, [](int i) { return i ^ HALF; }));
}
template <int HALF = LANES / 2>
static inline vec largest_everywhere(vec x) {
    if constexpr (HALF == 0) return x;
    else return largest_everywhere<HALF / 2>(larger(x, shuffle(x, x, [](int i) { return i ^ HALF; })));
}
static inline float sum(vec x) { return sum_everywhere(x)[0]; }
static inline float largest(vec x) { return largest_everywhere(x)[0]; }

// Rows become columns: each of log2(LANES) rounds deals the rows' lanes like two halves of a pack of cards.
static inline void transpose(vec* x) {
    vec y[LANES];
    for (int round = 1; round < LANES; round *= 2) {
        for (int i = 0; i < LANES / 2; i++) {
            y[2 * i] = shuffle(x[i], x[i + LANES / 2], [](int l) { return l / 2 + l % 2 * LANES; });
            y[2 * i + 1] = shuffle(x[i], x[i + LANES / 2], [](int l) { return LANES / 2 + l / 2 + l % 2 * LANES; });
        }
        for (int i = 0; i < LANES; i++) x[i] = y[i];
    }
}

// exp to 2 units in the last place; 0 below -87; NaN stays NaN. Arguments are never above 88: a maximum was subtracted.
static inline vec exponential(vec x) {
    const vec shifter = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec shifted = x * 1.44269504f + shifter;  // x / log 2
    vec whole = shifted - shifter;
    vec rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec poly = spread(1.9875691500e-4f);
    poly = poly * rest + 1.3981999507e-3f;
    poly = poly * rest + 8.3334519073e-3f;
    poly = poly * rest + 4.1665795894e-2f;
    poly = poly * rest + 1.6666665459e-1f;
    poly = poly * rest + 5.0000001201e-1f;
    poly = poly * rest * rest + rest + 1.0f;
    ivec bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3f800000;  // 2^whole; the shifter's own bits fall off at the top
    vec power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? vec{} : poly * power;
}

// tanh; NaN stays NaN. Near 0, where 1 - exp would lose digits, its series to x^9.
static inline vec hyperbolic_tangent(vec x) {
    vec square = x * x, rest = exponential(-2.0f * larger(x, -x)), away = (1.0f - rest) / (1.0f + rest);
    vec series = spread(62.0f / 2835);
    series = series * square - 17.0f / 315;
    series = series * square + 2.0f / 15;
    series = series * square - 1.0f / 3;
    return square < 0.04f ? x + x * square * series : x < 0.0f ? -away : away;
}

// log to 2 units in the last place; -infinity for 0; NaN stays NaN, and so do negative numbers. No denormals.
static inline vec logarithm(vec x) {
    ivec bits;
    memcpy(&bits, &x, sizeof bits);
    ivec exponent = ((bits - 0x3f3504f3) >> 23);  // so that the mantissa is in [sqrt(1/2), sqrt(2))
    bits -= exponent << 23;
    vec m, power = __builtin_convertvector(exponent, vec);
    memcpy(&m, &bits, sizeof m);
    m -= 1.0f;
    vec poly = spread(7.0376836292e-2f);
    poly = poly * m - 1.1514610310e-1f;
    poly = poly * m + 1.1676998740e-1f;
    poly = poly * m - 1.2420140846e-1f;
    poly = poly * m + 1.4249322787e-1f;
    poly = poly * m - 1.6668057665e-1f;
    poly = poly * m + 2.0000714765e-1f;
    poly = poly * m - 2.4999993993e-1f;
    poly = poly * m + 3.3333331174e-1f;
    vec result = m + m * m * (poly * m - 0.5f) - power * 2.12194440e-4f + power * 0.693359375f;
    const vec infinite = spread(__builtin_inff()), nothing = spread(__builtin_nanf(""));
    result = x == 0 ? -infinite : result;
    result = x == infinite ? infinite : result;
    return x >= 0 ? result : nothing;
}

// log to 0.05, of normal numbers: for a choice.
static inline vec rough_logarithm(vec x) {
    ivec bits;
    memcpy(&bits, &x, sizeof bits);
    return (__builtin_convertvector(bits, vec) - 1064866805.0f) * 8.2629582e-8f;  // log 2 / 2^23
}

// c[r][0 .. PANEL) = a[r] . b, b a panel [depth][PANEL], for `rows` rows; only the first `width` vectors are computed.
template <int ROWS, int WIDTH>
static inline void dot_panel(const float* const* a, const float* b, int64_t depth, float* const* c) {
    vec sums[ROWS][WIDTH] = {};
    for (int64_t d = 0; d < depth; d++) {
        vec column[WIDTH];
        for (int w = 0; w < WIDTH; w++) column[w] = load(b + d * PANEL + w * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WIDTH; w++) sums[r][w] += a[r][d] * column[w];
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) store(c[r] + w * LANES, sums[r][w]);
}

// o[r][0 .. WIDTH * LANES) += sum_n p[r][n] v[n], v of rows.
template <int ROWS, int WIDTH>
static inline void add_rows(const float* const* p, const float* v, int64_t stride, int64_t count, float* const* o) {
    vec sums[ROWS][WIDTH];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) sums[r][w] = load(o[r] + w * LANES);
    for (int64_t n = 0; n < count; n++) {
        const float* row = v + n * stride;
        vec part[WIDTH];
        for (int w = 0; w < WIDTH; w++) part[w] = load(row + w * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < WIDTH; w++) sums[r][w] += p[r][n] * part[w];
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < WIDTH; w++) store(o[r] + w * LANES, sums[r][w]);
}

// The same for any number of rows and vectors.
template <int WIDTH>
static inline void dot_panel(int rows, const float* const* a, const float* b, int64_t depth, float* const* c) {
    for (; rows >= TALL; rows -= TALL, a += TALL, c += TALL) dot_panel<TALL, WIDTH>(a, b, depth, c);
    switch (rows) {
        case 5:
            if constexpr (TALL > 5) dot_panel<5, WIDTH>(a, b, depth, c);
            break;
        case 4:
            if constexpr (TALL > 4) dot_panel<4, WIDTH>(a, b, depth, c);
            break;
        case 3: dot_panel<3, WIDTH>(a, b, depth, c); break;
        case 2: dot_panel<2, WIDTH>(a, b, depth, c); break;
        case 1: dot_panel<1, WIDTH>(a, b, depth, c); break;
    }
}
// How many vectors of a panel hold something, where so many columns are left.
static inline int vectors_of(int64_t columns) { return int(columns < PANEL ? (columns + LANES - 1) / LANES : WIDE); }
static inline void dot_panel(int rows, int width, const float* const* a, const float* b, int64_t depth,
                             float* const* c) {
    if (width == 1) dot_panel<1>(rows, a, b, depth, c);
    else if (width == 2) dot_panel<2>(rows, a, b, depth, c);
    else if constexpr (WIDE > 2) width == 3 ? dot_panel<3>(rows, a, b, depth, c) : dot_panel<4>(rows, a, b, depth, c);
}

template <int WIDTH>
static inline void add_rows(int rows, const float* const* p, const float* v, int64_t stride, int64_t count,
                            float* const* o) {
    for (; rows >= TALL; rows -= TALL, p += TALL, o += TALL) add_rows<TALL, WIDTH>(p, v, stride, count, o);
    switch (rows) {
        case 5:
            if constexpr (TALL > 5) add_rows<5, WIDTH>(p, v, stride, count, o);
            break;
        case 4:
            if constexpr (TALL > 4) add_rows<4, WIDTH>(p, v, stride, count, o);
            break;
        case 3: add_rows<3, WIDTH>(p, v, stride, count, o); break;
        case 2: add_rows<2, WIDTH>(p, v, stride, count, o); break;
        case 1: add_rows<1, WIDTH>(p, v, stride, count, o); break;
    }
}

// o[r] += sum_n p[r][n] v[n] for `rows` rows of `dim` numbers, a multiple of LANES; rows of v are `stride` apart.
static inline void add_rows(int rows, const float* const* p, const float* v, int64_t stride, int64_t dim, int64_t count,
                            float** o) {
    for (int64_t start = 0; start < dim; start += PANEL) {
        int width = int(dim - start < PANEL ? (dim - start) / LANES : WIDE);
        const float* part = v + start;
        if (width == 1) add_rows<1>(rows, p, part, stride, count, o);
        else if (width == 2) add_rows<2>(rows, p, part, stride, count, o);
        else if constexpr (WIDE > 2) {
            if (width == 3) add_rows<3>(rows, p, part, stride, count, o);
            else add_rows<4>(rows, p, part, stride, count, o);
        }
        for (int r = 0; r < rows; r++) o[r] += PANEL;
    }
    int64_t steps = (dim + PANEL - 1) / PANEL;
    for (int r = 0; r < rows; r++) o[r] -= steps * PANEL;
}

// to = from + sum_n c[n] v[n] for WIDTH vectors; returns the sum of c.
template <int WIDTH>
static inline float add_row(const float* c, const float* v, int64_t stride, int64_t count, const float* from,
                            float* to) {
    vec sums[WIDTH], all = {};
    for (int w = 0; w < WIDTH; w++) sums[w] = load(from + w * LANES);
    for (int64_t n = 0; n < count; n++) {
        const float* row = v + n * stride;
        vec factor = spread(c[n]);
        all += factor;
        for (int w = 0; w < WIDTH; w++) sums[w] += factor * load(row + w * LANES);
    }
    for (int w = 0; w < WIDTH; w++) store(to + w * LANES, sums[w]);
    return all[0];
}
// The same for a row of `dim` numbers, a multiple of LANES.
static inline float add_row(const float* c, const float* v, int64_t stride, int64_t dim, int64_t count,
                            const float* from, float* to) {
    float all = 0;
    int64_t d = 0;
    for (; d + 8 * LANES <= dim; d += 8 * LANES) all = add_row<8>(c, v + d, stride, count, from + d, to + d);
    for (; d + 4 * LANES <= dim; d += 4 * LANES) all = add_row<4>(c, v + d, stride, count, from + d, to + d);
    for (; d < dim; d += LANES) all = add_row<1>(c, v + d, stride, count, from + d, to + d);
    return all;
}

// Four vectors become one that holds, in each of its fours, the sums of theirs: shuffles within fours are the cheapest.
static inline vec join_fours(const vec* x) {
    auto halves = [](vec a, vec b) {
        auto first = [](int i) { return i / 4 * 4 + i % 2 + (i % 4 < 2 ? 0 : LANES); };
        return shuffle(a, b, first) + shuffle(a, b, [&](int i) { return first(i) + 2; });
    };
    auto even = [](int i) { return i / 4 * 4 + i % 2 * 2 + (i % 4 < 2 ? 0 : LANES); };
    vec a = halves(x[0], x[1]), b = halves(x[2], x[3]);
    return shuffle(a, b, even) + shuffle(a, b, [&](int i) { return even(i) + 1; });
}
// ---- four rows at a time, their numbers side by side: c[4 n + r] ----

typedef float quad __attribute__((vector_size(16)));
constexpr int IN_STEP = LANES / 4;  // columns that a vector holds
static inline quad load_quad(const float* p) {
    quad x;
    memcpy(&x, p, sizeof x);
    return x;
}
static inline void store_quad(float* p, quad x) { memcpy(p, &x, sizeof x); }
// The four numbers over and over.
static inline vec repeat(quad x) {
    float lanes[LANES];
    for (int i = 0; i < LANES; i += 4) store_quad(lanes + i, x);
    return load(lanes);
}
// For each of the rows: its largest.
template <int HALF = LANES / 2>
static inline vec largest_of_each(vec x) {
    if constexpr (HALF < 4) return x;
    else return largest_of_each<HALF / 2>(larger(x, shuffle(x, x, [](int i) { return i ^ HALF; })));
}

// For each of the rows: their sum.
template <int HALF = LANES / 2>
static inline vec sum_of_each(vec x) {
    if constexpr (HALF < 4) return x;
    else return sum_of_each<HALF / 2>(x + shuffle(x, x, [](int i) { return i ^ HALF; }));
}

// Rows at an index lie anywhere; they are asked for this many before they are needed.
constexpr int64_t AHEAD = 8;
static inline void ask_for(const float* row, int64_t dim) {
    for (int64_t d = 0; d < dim; d += 16) __builtin_prefetch(row + d);
}

// Four numbers over and over.
static inline vec repeat_four(const float* p) {
#if defined(__AVX512F__)
    const __m512 all = _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX2__)
    const __m256 all = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#else
    const float* all = p;
    return load(all);
#endif
#if defined(__AVX2__)
    vec x;
    memcpy(&x, &all, sizeof x);
    return x;
#endif
}

constexpr int FOURS = 16 / LANES;             // vectors that hold four numbers of each of four rows
constexpr int AT_ONCE = LANES == 16 ? 8 : 4;  // columns, whose sums keep the multipliers busy
constexpr int64_t MOST_DEPTH = 256;           // of rows in fours

// c[4 n + r] (+)= rows[r] . k[index[n]], of rows in fours: number d of row r lies at 16 (d / 4) + 4 r + d % 4. The last
// k is repeated to fill four.
template <bool MORE>
static inline void dot_fours(const float* rows, const float* k, int64_t stride, int64_t dim, const int32_t* index,
                             int64_t count, float* c) {
    for (int64_t n = 0; n < count; n += AT_ONCE) {
        vec sums[FOURS][AT_ONCE] = {};
        const float* key[AT_ONCE];
        for (int i = 0; i < AT_ONCE; i++) {
            const int64_t at = n + i < count ? n + i : count - 1;
            key[i] = k + (index ? index[at] : at) * stride;
            if (index && at + AHEAD < count) ask_for(k + index[at + AHEAD] * stride, dim);
        }
        for (int64_t d = 0; d < dim; d += 4) {
            vec part[FOURS];
            for (int w = 0; w < FOURS; w++) part[w] = load(rows + 4 * d + w * LANES);
            for (int i = 0; i < AT_ONCE; i++) {
                const vec x = repeat_four(key[i] + d);
                for (int w = 0; w < FOURS; w++) sums[w][i] += part[w] * x;
            }
        }
        for (int64_t i = 0; i < AT_ONCE && n + i < count; i += 4) {
            vec dots[FOURS];  // row after row, of four columns each
            for (int w = 0; w < FOURS; w++) dots[w] = join_fours(sums[w] + i);
            if constexpr (FOURS == 4) {
                transpose(dots);
            } else {
                const vec first = dots[0], last = dots[FOURS - 1];
                for (int w = 0; w < FOURS; w++)
                    dots[w] = shuffle(first, last, [&](int l) { return 4 * (l % 4) + (w * LANES + l) / 4; });
            }
            for (int w = 0; w < FOURS; w++) {
                float* to = c + 4 * (n + i) + w * LANES;
                store(to, MORE ? load(to) + dots[w] : dots[w]);
            }
        }
    }
}

// c[4 n + r] = a[r] . k[index[n]], k[n] without an index, for n up to the next multiple of four; dim a multiple of
// LANES. A vector that holds four numbers of several rows is summed up with fewer shuffles than one of a single row.
static inline void dot_quad(const float* const* a, const float* k, int64_t stride, int64_t dim, const int32_t* index,
                            int64_t count, float* c) {
    float rows[4 * MOST_DEPTH];
    for (int64_t from = 0; from < dim; from += MOST_DEPTH) {
        const int64_t depth = dim - from < MOST_DEPTH ? dim - from : MOST_DEPTH;
        for (int64_t d = 0; d < depth; d += 4)
            for (int r = 0; r < 4; r++) store_quad(rows + 4 * d + 4 * r, load_quad(a[r] + from + d));
        if (from) dot_fours<true>(rows, k + from, stride, depth, index, count, c);
        else dot_fours<false>(rows, k, stride, depth, index, count, c);
    }
}

// to[r] = from[r] + sum_n c[4 n + r] v[index[n]] for WIDTH vectors.
template <int WIDTH, bool INDEXED>
static inline void add_quad(const float* c, const float* v, int64_t stride, const int32_t* index, int64_t count,
                            const float* const* from, float* const* to, int64_t d, int64_t dim) {
    vec sums[4][WIDTH];
    for (int r = 0; r < 4; r++)
        for (int w = 0; w < WIDTH; w++) sums[r][w] = load(from[r] + d + w * LANES);
    for (int64_t n = 0; n < count; n++) {
        const float* row = v + (INDEXED ? index[n] : n) * stride + d;
        if (INDEXED && d == 0 && n + AHEAD < count) ask_for(v + index[n + AHEAD] * stride, dim);
        vec part[WIDTH];
        for (int w = 0; w < WIDTH; w++) part[w] = load(row + w * LANES);
        for (int r = 0; r < 4; r++)
            for (int w = 0; w < WIDTH; w++) sums[r][w] += c[4 * n + r] * part[w];
    }
    for (int r = 0; r < 4; r++)
        for (int w = 0; w < WIDTH; w++) store(to[r] + d + w * LANES, sums[r][w]);
}
// The same for rows of `dim` numbers, a multiple of LANES; v[n] without an index.
template <bool INDEXED>
static inline void add_quad(const float* c, const float* v, int64_t stride, int64_t dim, const int32_t* index,
                            int64_t count, const float* const* from, float* const* to) {
    constexpr int WIDEST = 3;  // 12 sums keep the multipliers busy
    int64_t d = 0;
    for (; d + (WIDEST + 2) * LANES <= dim || d + WIDEST * LANES == dim; d += WIDEST * LANES)
        add_quad<WIDEST, INDEXED>(c, v, stride, index, count, from, to, d, dim);
    for (; d + 2 * LANES <= dim; d += 2 * LANES) add_quad<2, INDEXED>(c, v, stride, index, count, from, to, d, dim);
    for (; d < dim; d += LANES) add_quad<1, INDEXED>(c, v, stride, index, count, from, to, d, dim);
}
static inline void add_quad(const float* c, const float* v, int64_t stride, int64_t dim, const int32_t* index,
                            int64_t count, const float* const* from, float* const* to) {
    if (index) add_quad<true>(c, v, stride, dim, index, count, from, to);
    else add_quad<false>(c, v, stride, dim, index, count, from, to);
}

// to[index[n]] += sum_r c[4 n + r] x[r] for WIDTH vectors.
template <int WIDTH>
static inline void outer_quad(const float* c, const float* const* x, const int32_t* index, int64_t count, int64_t d,
                              int64_t dim, float* to) {
    vec rows[4][WIDTH];
    for (int r = 0; r < 4; r++)
        for (int w = 0; w < WIDTH; w++) rows[r][w] = load(x[r] + d + w * LANES);
    for (int64_t n = 0; n < count; n++) {
        float* at = to + (index ? index[n] : n) * dim + d;
        for (int w = 0; w < WIDTH; w++) {
            vec sum = load(at + w * LANES);
            for (int r = 0; r < 4; r++) sum += c[4 * n + r] * rows[r][w];
            store(at + w * LANES, sum);
        }
    }
}
// The same for rows of `dim` numbers, a multiple of LANES; to[n] without an index. No index twice.
static inline void outer_quad(const float* c, const float* const* x, const int32_t* index, int64_t count, int64_t dim,
                              float* to) {
    int64_t d = 0;
    for (; d + PANEL <= dim; d += PANEL) outer_quad<WIDE>(c, x, index, count, d, dim, to);
    for (; d < dim; d += LANES) outer_quad<1>(c, x, index, count, d, dim, to);
}

// ---- any number of rows ----

// to[n] += sum_r c[r][n] x[r] for NOW values of n and WIDTH vectors.
template <int NOW, int WIDTH>
static inline void add_outer(int rows, const float* const* c, const float* const* x, int64_t n, int64_t d, int64_t dim,
                             float* to) {
    vec sums[NOW][WIDTH];
    float* at[NOW];
    for (int i = 0; i < NOW; i++) {
        at[i] = to + (n + i) * dim + d;
        for (int w = 0; w < WIDTH; w++) sums[i][w] = load(at[i] + w * LANES);
    }
    for (int r = 0; r < rows; r++) {
        vec part[WIDTH];
        for (int w = 0; w < WIDTH; w++) part[w] = load(x[r] + d + w * LANES);
        for (int i = 0; i < NOW; i++)
            for (int w = 0; w < WIDTH; w++) sums[i][w] += c[r][n + i] * part[w];
    }
    for (int i = 0; i < NOW; i++)
        for (int w = 0; w < WIDTH; w++) store(at[i] + w * LANES, sums[i][w]);
}
// The same for n below count and rows of `dim` numbers, a multiple of LANES.
static inline void add_outer(int rows, const float* const* c, const float* const* x, int64_t count, int64_t dim,
                             float* to) {
    for (int64_t d = 0; d < dim; d += PANEL) {
        const bool whole = dim - d >= PANEL;
        int64_t n = 0;
        for (; whole && n + 4 <= count; n += 4) add_outer<4, WIDE>(rows, c, x, n, d, dim, to);
        for (; whole && n < count; n++) add_outer<1, WIDE>(rows, c, x, n, d, dim, to);
        for (int64_t e = d; !whole && e < dim; e += LANES)
            for (n = 0; n < count; n++) add_outer<1, 1>(rows, c, x, n, e, dim, to);
    }
}

// Rows [from, from + PANEL) of x, or so many vectors of them, transposed to [depth][PANEL]; zeros from row `end` on.
// depth a multiple of LANES.
static inline void fill_panel(const float* x, int64_t stride, int64_t depth, int64_t from, int64_t end, float* panel,
                              int width = WIDE) {
    for (int64_t i = 0; i < width * LANES; i += LANES)
        for (int64_t d = 0; d < depth; d += LANES) {
            vec rows[LANES];
            for (int64_t e = 0; e < LANES; e++)
                rows[e] = from + i + e < end ? load(x + (from + i + e) * stride + d) : vec{};
            transpose(rows);
            for (int64_t e = 0; e < LANES; e++) store(panel + (d + e) * PANEL + i, rows[e]);
        }
}
