#include "steer_add.h"

namespace corrsteer {
namespace {

template <class T>
T* at(const Strided& tensor, int64_t i, int64_t j = 0) {
    return static_cast<T*>(tensor.data) + i * tensor.stride[0] + j * tensor.stride[1];
}

// The sum is rounded once. Where numbers follow each other the strides are constants, so that registers can be used.
template <class T, class Read, class Write>
void add(T* __restrict h, int64_t h_stride, const float* __restrict vector, int64_t vector_stride, int64_t d, Read read, Write write) {
    if (h_stride == 1 && vector_stride == 1)
        for (int64_t i = 0; i < d; i++) h[i] = write(read(h[i]) + vector[i]);
    else
        for (int64_t i = 0; i < d; i++) h[i * h_stride] = write(read(h[i * h_stride]) + vector[i * vector_stride]);
}

}  // namespace

void steer_add(const Strided& h, const Strided& vectors, const Strided& row_vector, const Strided* positions) {
    const auto [B, S, d] = h.shape;
    for (int64_t b = 0; b < B; b++) {
        const int32_t which = *at<int32_t>(row_vector, b);
        if (which < 0) continue;
        const float* vector = at<float>(vectors, which);
        for (int64_t s = 0; s < S; s++) {
            if (positions && !*at<bool>(*positions, b, s)) continue;
            const auto into = [&](auto* row, auto read, auto write) {
                add(row, h.stride[2], vector, vectors.stride[1], d, read, write);
            };
            // lambdas, as functions would be called by their addresses, one number at a time
            const auto same = [](float v) { return v; };
            if (h.dtype == Dtype::bf16)
                into(at<uint16_t>(h, b, s), [](uint16_t v) { return from_bf16(v); }, [](float v) { return to_bf16(v); });
            else if (h.dtype == Dtype::f16)
                into(at<uint16_t>(h, b, s), [](uint16_t v) { return from_f16(v); }, [](float v) { return to_f16(v); });
            else
                into(at<float>(h, b, s), same, same);
        }
    }
}

}  // namespace corrsteer
