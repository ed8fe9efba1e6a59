// The number types of tensors: everything is computed in float32.
#pragma once

#include <cstdint>
#include <cstring>

enum Type : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

inline float to_float(uint16_t bits, Type type) {
    if (type == BFLOAT16) {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        memcpy(&x, &wide, sizeof x);
        return x;
    }
    // float16: shift into place and scale the exponent's bias away, which is exact for denormals too.
    uint32_t wide = uint32_t(bits & 0x7fff) << 13;
    float x;
    if ((bits & 0x7c00) == 0x7c00) {
        wide |= 0x7f800000;
        memcpy(&x, &wide, sizeof x);
    } else {
        memcpy(&x, &wide, sizeof x);
        x *= 0x1p112f;
    }
    return bits & 0x8000 ? -x : x;
}

inline uint16_t from_float(float x, Type type) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (type == BFLOAT16) {
        if (magnitude > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
        return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
    if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
    if (magnitude < 0x38800000) {                                 // denormal: adding 0.5 rounds to a multiple of 2^-24
        float shifted;
        memcpy(&shifted, &magnitude, sizeof shifted);
        shifted += 0.5f;
        memcpy(&magnitude, &shifted, sizeof magnitude);
        return uint16_t(sign | (magnitude - 0x3f000000));
    }
    magnitude += 0xc8000fff + (magnitude >> 13 & 1);
    return uint16_t(sign | magnitude >> 13);
}

inline void read_row(const void* from, int64_t offset, Type type, int64_t count, float factor, float* to) {
    if (type == FLOAT32) {
        const float* x = static_cast<const float*>(from) + offset;
        for (int64_t i = 0; i < count; i++) to[i] = x[i] * factor;
        return;
    }
    const uint16_t* x = static_cast<const uint16_t*>(from) + offset;
    if (type == BFLOAT16)
        for (int64_t i = 0; i < count; i++) to[i] = to_float(x[i], BFLOAT16) * factor;
    else
        for (int64_t i = 0; i < count; i++) to[i] = to_float(x[i], FLOAT16) * factor;
}

inline void write_row(void* to, int64_t offset, Type type, int64_t count, const float* from) {
    if (type == FLOAT32) {
        memcpy(static_cast<float*>(to) + offset, from, size_t(count) * sizeof *from);
        return;
    }
    uint16_t* x = static_cast<uint16_t*>(to) + offset;
    for (int64_t i = 0; i < count; i++) x[i] = from_float(from[i], type);
}
