// From residuals to dense activations, pooled activations or moments.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "moments.h"
#include "dtypes.h"

namespace corrsteer {

enum class InputNorm { none, layer_norm, constant_norm_rescale };

// A `corrsteer.SparseEncoder` with its weight packed.
struct Encoder {
    const Kernels* kernels;
    int64_t d_in, d_sae, k;
    Activation activation;
    InputNorm input_norm;
    bool bf16;  // what the weight is packed as, float32 otherwise
    const void* weight;
    const float *bias, *threshold, *magnitude_scale, *magnitude_bias;  // [d_sae], null where not used
};

// Rows [n, d] float32, float16 or bfloat16, `stride` numbers apart.
struct Rows {
    const void* data;
    Dtype dtype;
    int64_t n, stride;

    const void* row(int64_t at) const { return static_cast<const char*>(data) + at * stride * size_of(dtype); }
};

// Numbers in a packed weight: [panels, d_in, panel], and where bfloat16 [panels, d_in / 2, panel, 2], padded with 0.
int64_t packed_size(const Kernels&, int64_t d_sae, int64_t d_in, bool bf16);

// Pack a weight of rows [d_sae, d_in], float32, float16 (as float32) or bfloat16.
void pack(const Kernels&, const Rows& weight, int64_t d_in, bool bf16, void* packed, int threads);

// Where results go, null for what is not wanted.
struct Wanted {
    float* dense = nullptr;                              // [tokens, d_sae]
    float *mean = nullptr, *maximum = nullptr;           // [samples, d_sae]
    const State *mean_state = nullptr, *maximum_state = nullptr;
    const double* y = nullptr;                           // [samples, labels], for the states

    bool mean_too() const { return mean || mean_state; }
    bool maximum_too() const { return maximum || maximum_state; }
    const State* any_state() const { return mean_state ? mean_state : maximum_state; }
};

// Encode x, and pool it by cu_seqlens [samples + 1], which must begin at 0, not decrease, and end at x.n.
void encode(const Encoder&, const Rows& x, const int32_t* cu_seqlens, int64_t samples, const Wanted&, int threads);

// Fold pooled activations and y [pooled.n, labels] into a state.
void update_moments(const Kernels&, const Rows& pooled, const double* y, const State&, int threads);

}  // namespace corrsteer
