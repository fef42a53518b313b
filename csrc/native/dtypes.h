// Dtypes, the 16-bit ones to and from float32, and matrices of them.
#pragma once

#include <cstdint>
#include <cstring>

namespace corrsteer {

enum class Dtype { float32, bfloat16, float16, float64, int32, int64, uint16, boolean };

inline int64_t size_of(Dtype dtype) {
    if (dtype == Dtype::boolean) return 1;
    if (dtype == Dtype::bfloat16 || dtype == Dtype::float16 || dtype == Dtype::uint16) return 2;
    return dtype == Dtype::float64 || dtype == Dtype::int64 ? 8 : 4;
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
    uint32_t magnitude = rest + 0x38000000;                                      // the exponents' difference
    if (rest >= 0x0f800000) magnitude += 0x38000000;                             // infinity and NaN
    if (rest < 0x00800000) magnitude = bits_of(float(bits & 0x3ff) * 0x1p-24f);  // subnormal, exact in float32
    return float_of(magnitude | sign);
}

inline uint16_t to_f16(float value) {  // to nearest, ties to even
    const uint32_t sign = bits_of(value) >> 16 & 0x8000, magnitude = bits_of(value) & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) half = 0x7e00;        // NaN
    else if (magnitude >= 0x477ff000) half = 0x7c00;  // rounds to infinity
    else if (magnitude < 0x38800000) half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // the sum rounds
    else half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return uint16_t(sign | half);
}

// A matrix [n, d] of float32, float16 or bfloat16 with contiguous rows, `stride` elements apart.
struct Rows {
    const void* data;
    Dtype dtype;
    int64_t n, stride;

    const void* at(int64_t row, int64_t column = 0) const {
        return static_cast<const char*>(data) + (row * stride + column) * size_of(dtype);
    }

    // Elements [column, column + width) of a row, as float32.
    void widen(int64_t row, int64_t column, int64_t width, float* out) const {
        const void* from = at(row, column);
        const auto* bits = static_cast<const uint16_t*>(from);
        if (dtype == Dtype::float32) std::memcpy(out, from, size_t(width) * 4);
        else if (dtype == Dtype::bfloat16)
            for (int64_t i = 0; i < width; i++) out[i] = from_bf16(bits[i]);
        else
            for (int64_t i = 0; i < width; i++) out[i] = from_f16(bits[i]);
    }
};

}  // namespace corrsteer
