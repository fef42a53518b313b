// Sixteen-bit floating-point numbers to and from float32, and rows of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace corrsteer {

enum class Dtype { f32, bf16, f16, f64, i32, boolean };

inline int64_t size_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::f64: return 8;
        case Dtype::f32:
        case Dtype::i32: return 4;
        case Dtype::bf16:
        case Dtype::f16: return 2;
        default: return 1;
    }
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float from_bf16(uint16_t bits) { return float_of(uint32_t(bits) << 16); }

inline uint16_t to_bf16(float value) {  // to nearest, ties to even
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return uint16_t(value != value ? bits >> 16 | 0x40 : rounded);
}

inline float from_f16(uint16_t bits) {
    const uint32_t sign = uint32_t(bits & 0x8000) << 16, rest = uint32_t(bits & 0x7fff) << 13;
    uint32_t size = rest + 0x38000000;                                                 // the exponents' difference
    if (rest >= 0x0f800000) size += 0x38000000;                                        // infinity and NaN
    if (rest < 0x00800000) size = bits_of(float(bits & 0x3ff) * 0x1p-24f);             // subnormal, exact in float32
    return float_of(size | sign);
}

inline uint16_t to_f16(float value) {  // to nearest, ties to even
    const uint32_t sign = bits_of(value) >> 16 & 0x8000, size = bits_of(value) & 0x7fffffff;
    uint32_t half;
    if (size > 0x7f800000) half = 0x7e00;        // NaN
    else if (size >= 0x477ff000) half = 0x7c00;  // rounds to infinity
    else if (size < 0x38800000) half = bits_of(float_of(size) + 0.5f) - 0x3f000000;  // subnormal: the sum rounds
    else half = (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13;
    return uint16_t(sign | half);
}

// `n` numbers of a floating-point dtype of at most 32 bits, as float32.
inline void widen(Dtype dtype, const void* from, int64_t n, float* to) {
    if (dtype == Dtype::f32) std::memcpy(to, from, size_t(n) * 4);
    const auto* halves = static_cast<const uint16_t*>(from);
    if (dtype == Dtype::bf16)
        for (int64_t i = 0; i < n; i++) to[i] = from_bf16(halves[i]);
    if (dtype == Dtype::f16)
        for (int64_t i = 0; i < n; i++) to[i] = from_f16(halves[i]);
}

}  // namespace corrsteer
