// The largest of many numbers, by trying limits: each is a pass over integers that are ordered as the numbers are.
#pragma once

#include <algorithm>
#include <climits>

#include "vectors.h"

constexpr int32_t NEVER = INT32_MIN;  // the rank of what must not be taken

// Integers in the order of the floats; NaN has its place too, so every order is a total one.
static inline ivec rank_of(vec x) {
    ivec bits;
    memcpy(&bits, &x, sizeof bits);
    return bits ^ ((bits >> 31) & INT32_MAX);
}
static inline ivec load_ranks(const int32_t* p) {
    ivec x;
    memcpy(&x, p, sizeof x);
    return x;
}

// All ranks above `limit` are taken, and of those equal to it the first `ties`.
struct Cut {
    int32_t limit;
    int64_t ties;

    bool takes(int32_t rank) {  // in their order; without a branch
        const bool equal = rank == limit, tie = equal & (ties > 0);
        ties -= equal;
        return (rank > limit) | tie;
    }
};

// Arrays of ranks end with a whole vector, filled up with NEVER.
static inline void fill_ranks(int32_t* ranks, int64_t count) {
    std::fill(ranks + count, ranks + round_up(count, LANES), NEVER);
}

static inline int64_t count_above(const int32_t* ranks, int64_t count, int32_t limit) {
    ivec number = {};
    for (int64_t n = 0; n < count; n += LANES) number -= load_ranks(ranks + n) > limit;
    return sum_everywhere(number)[0];
}

static inline float value_of(int64_t rank) {  // as `rank_of` has it
    const int32_t bits = int32_t(rank) ^ ((int32_t(rank) >> 31) & INT32_MAX);
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// A limit between two, by the share of the numbers' distance; where there is none, or one of them is no number, half of
// the ranks'.
static inline int64_t between(int64_t low, int64_t high, float share) {
    const float a = value_of(low), b = value_of(high), x = a + (b - a) * share;
    return a < x && x < b ? rank_of(spread(x))[0] : low + (high - low) / 2;
}

// The `most` largest above a limit.
static inline Cut cut_largest(const int32_t* ranks, int64_t count, int64_t most, int32_t limit = NEVER) {
    ivec top = spread(NEVER), bottom = spread(INT32_MAX);
    for (int64_t n = 0; n < count; n += LANES) {
        ivec x = load_ranks(ranks + n), there = x == NEVER ? spread(INT32_MAX) : x;
        top = x > top ? x : top;
        bottom = there < bottom ? there : bottom;
    }
    int64_t high = NEVER, low = INT32_MAX, above_high = 0, above_low = count_above(ranks, count, limit);
    for (int i = 0; i < LANES; i++) {
        high = std::max<int64_t>(high, top[i]);
        low = std::min<int64_t>(low, bottom[i]);
    }
    if (above_low <= most) return {limit, 0};
    low = std::max<int64_t>(low - 1, limit);  // more than `most` ranks are above low, and at most as many above high
    for (int pass = 0; high - low > 1; pass++) {
        // As if the numbers were spread evenly, now and then in the middle, and by ranks where neither comes to an end.
        const float even = float(above_low - most) / float(above_low - above_high);
        const float share = pass % 3 == 2 ? 0.5f : std::min(std::max(even, 0.05f), 0.95f);
        const int64_t middle = pass < 12 ? between(low, high, share) : low + (high - low) / 2;
        const int64_t number = count_above(ranks, count, int32_t(middle));
        if (number == most) return {int32_t(middle), 0};
        if (number > most) low = middle, above_low = number;
        else high = middle, above_high = number;
    }
    return {int32_t(high), most - above_high};
}

// The places of what the cut takes, in order; returns how many there are. `found` has room for a whole vector more.
static inline int64_t list_taken(const int32_t* ranks, int64_t count, Cut cut, int32_t* found) {
    int64_t size = 0;
    if (cut.ties == 0)
        for (int64_t n = 0; n < count; n += LANES)
            size += list_lanes(load_ranks(ranks + n) > cut.limit, int32_t(n), found + size);
    else
        for (int64_t n = 0; n < count; n++) {
            found[size] = int32_t(n);
            size += cut.takes(ranks[n]);
        }
    return size;
}

// The places of the `most` largest above a limit, in order; returns how many there are. Of every bucket of ranks the
// largest are a sample whose own `most` largest lie below as many ranks; only those above the least of them are looked
// at again. `few` and `found` hold as many as `ranks` and a vector more.
static inline int64_t take_largest(const int32_t* ranks, int64_t count, int64_t most, int32_t limit, int32_t* few,
                                   int32_t* found) {
    const int64_t buckets = round_up(2 * most, LANES);
    if (2 * buckets > count) return list_taken(ranks, count, cut_largest(ranks, count, most, limit), found);
    std::fill(few, few + buckets, NEVER);
    for (int64_t from = 0; from < count; from += buckets)
        for (int64_t n = from; n < std::min(from + buckets, count); n += LANES) {
            ivec x = load_ranks(ranks + n), y = load_ranks(few + n - from);
            store(few + n - from, x > y ? x : y);
        }
    Cut cut = cut_largest(few, buckets, most, limit);
    if (cut.ties > 0) cut = {cut.limit - 1, 0};
    const int64_t size = list_taken(ranks, count, cut, found);
    for (int64_t i = 0; i < size; i++) few[i] = ranks[found[i]];
    fill_ranks(few, size);
    cut = cut_largest(few, size, most, limit);
    int64_t number = 0;
    for (int64_t i = 0; i < size; i++) {
        found[number] = found[i];
        number += cut.takes(few[i]);
    }
    return number;
}
