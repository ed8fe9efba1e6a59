// The activations of features.py: phi = exp(gain) base, by drive = W x (+ phase) and half = |x|^2 / 2, and their
// slopes.
#pragma once

#include <cmath>

#include "vectors.h"

// Order is the order of ACTIVATIONS in features.py.
enum Activation : int64_t {
    POSITIVE_EXP,
    COSINE,
    POSITIVE_COSINE,
    CLIPPED_SINE,
    LINEAR,
    TRUNCATED_EXP,
    ELU1,
    CONSTANT,
    EXP,
    ACTIVATION_COUNT
};
constexpr float LOG_150 = 5.0106353f;

// A constant of each activation for m neurons: part of the gain, for LINEAR of the base.
static inline float shift_of(int64_t activation, double m) {
    if (activation == COSINE) return float(std::log(2 / m) / 2);
    if (activation == POSITIVE_COSINE) return float(std::log(2 / (M_PI * m)) / 2);
    return float(-std::log(m) / 2);
}

// Sine and cosine to 1e-6 for arguments up to thousands: a quarter turn is subtracted in three parts.
static inline void turn(vec x, vec& sine, vec& cosine) {
    const vec shifter = spread(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    vec shifted = x * 0.636619772f + shifter;
    vec quarters = shifted - shifter;
    vec r = x - quarters * 1.5703125f - quarters * 4.83751296997e-4f - quarters * 7.54978995489e-8f;
    vec s = r * r;
    vec odd = ((-1.9515295891e-4f * s + 8.3321608736e-3f) * s - 1.6666654611e-1f) * s * r + r;
    vec even = ((2.443315711809948e-5f * s - 1.388731625493765e-3f) * s + 4.166664568298827e-2f) * s * s - 0.5f * s + 1;
    ivec number;
    memcpy(&number, &shifted, sizeof number);
    vec first = (number & 1) != 0 ? even : odd, second = (number & 1) != 0 ? odd : even;
    sine = (number & 2) != 0 ? -first : first;
    cosine = ((number + 1) & 2) != 0 ? -second : second;
}

struct Response {
    vec gain, base;
};

template <Activation A>
static inline Response respond(vec drive, vec half, vec phase, float shift) {
    const vec one = spread(1.0f), none = {};
    if constexpr (A == POSITIVE_EXP) return {drive - half + shift, one};
    if constexpr (A == TRUNCATED_EXP) return {(drive > LOG_150 ? spread(LOG_150) : drive) + shift, one};
    if constexpr (A == EXP) return {drive + phase + shift, one};
    if constexpr (A == CONSTANT) return {spread(shift), one};
    if constexpr (A == LINEAR) return {none, drive - half + (1 + shift)};
    if constexpr (A == ELU1) return {spread(shift), drive > 0 ? drive + 1 : exponential(drive > 0 ? none : drive)};
    vec sine, cosine;
    turn(drive + phase, sine, cosine);
    if constexpr (A == COSINE) return {half + shift, cosine};
    if constexpr (A == POSITIVE_COSINE) return {half + shift, cosine < 0 ? none : cosine};
    return {spread(shift), sine < 0 ? none : sine};
}

struct Slope {
    vec drive, half;
};

// The gradient of drive and of half, from that of gain and base.
template <Activation A>
static inline Slope differentiate(vec drive, vec phase, vec d_gain, vec d_base) {
    const vec none = {};
    if constexpr (A == POSITIVE_EXP) return {d_gain, -d_gain};
    if constexpr (A == TRUNCATED_EXP) return {drive > LOG_150 ? none : d_gain, none};
    if constexpr (A == EXP) return {d_gain, none};
    if constexpr (A == CONSTANT) return {none, none};
    if constexpr (A == LINEAR) return {d_base, -d_base};
    if constexpr (A == ELU1) return {drive > 0 ? d_base : d_base * exponential(drive > 0 ? none : drive), none};
    vec sine, cosine;
    turn(drive + phase, sine, cosine);
    if constexpr (A == COSINE) return {-sine * d_base, d_gain};
    if constexpr (A == POSITIVE_COSINE) return {cosine > 0 ? -sine * d_base : none, d_gain};
    return {sine > 0 ? cosine * d_base : none, none};
}
