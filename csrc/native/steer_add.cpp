#include "steer_add.h"

namespace corrsteer {
namespace {

// The sum is rounded once. Where elements are contiguous the strides are constants, so that registers can be used.
template <class T, class Read, class Write>
void add(T* __restrict h, int64_t h_stride, const float* __restrict vector, int64_t vector_stride, int64_t d, Read read,
         Write write) {
    if (h_stride == 1 && vector_stride == 1)
        for (int64_t i = 0; i < d; i++) h[i] = write(read(h[i]) + vector[i]);
    else
        for (int64_t i = 0; i < d; i++) h[i * h_stride] = write(read(h[i * h_stride]) + vector[i * vector_stride]);
}

}  // namespace

void steer_add(const Strided& h, const Strided& vectors, const Strided& row_vector, const Strided* positions) {
    const auto [B, S, d] = h.shape;
    for (int64_t b = 0; b < B; b++) {
        const int32_t v = *row_vector.at<int32_t>(b);
        if (v < 0) continue;
        const float* vector = vectors.at<float>(v);
        for (int64_t s = 0; s < S; s++) {
            if (positions && !*positions->at<bool>(b, s)) continue;
            const auto add_to = [&](auto* row, auto read, auto write) {
                add(row, h.stride[2], vector, vectors.stride[1], d, read, write);
            };
            // lambdas, as functions would be called by their addresses, element by element
            const auto same = [](float x) { return x; };
            if (h.dtype == Dtype::bfloat16)
                add_to(h.at<uint16_t>(b, s), [](auto x) { return from_bf16(x); }, [](float x) { return to_bf16(x); });
            else if (h.dtype == Dtype::float16)
                add_to(h.at<uint16_t>(b, s), [](auto x) { return from_f16(x); }, [](float x) { return to_f16(x); });
            else
                add_to(h.at<float>(b, s), same, same);
        }
    }
}

}  // namespace corrsteer
