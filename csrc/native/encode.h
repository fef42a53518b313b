// From residuals to dense activations, pooled activations or moments.
#pragma once

#include <cstdint>
#include <optional>

#include "dtypes.h"
#include "kernels.h"
#include "moments.h"

namespace corrsteer {

enum class InputNorm { none, layer_norm, constant_norm_rescale };

// A `corrsteer.SparseEncoder` with its weight packed.
struct Encoder {
    const Kernels* kernels;
    int64_t d_in, d_sae, k;
    Activation activation;
    InputNorm input_norm;
    const void* weight;
    Dtype weight_dtype;                                                // float32 or bfloat16
    const float *bias, *threshold, *magnitude_scale, *magnitude_bias;  // [d_sae], null where not used
};

// Elements of a packed weight: [panels, d_in / KR, NR, KR], padded with 0; see kernels.h.
int64_t packed_size(const Kernels&, int64_t d_sae, int64_t d_in, Dtype packed_dtype);

// Pack a weight of rows [d_sae, d_in]: bfloat16 as it is, float16 and float32 as float32.
void pack(const Kernels&, const Rows& weight, int64_t d_in, void* packed, int threads);

// Where results go; null or empty for what is not wanted.
struct Outputs {
    float* dense = nullptr;                            // [tokens, d_sae]
    float *mean = nullptr, *maximum = nullptr;         // [samples, d_sae]
    std::optional<State> mean_state, maximum_state;
    const double* y = nullptr;                         // [samples, labels], for the states
    int64_t labels = 0;

    bool need_mean() const { return mean || mean_state; }
    bool need_maximum() const { return maximum || maximum_state; }
    bool need_moments() const { return mean_state || maximum_state; }
};

// Encode x, and pool it by cu_seqlens [samples + 1], which must begin at 0, not decrease, and end at x.n.
void encode(const Encoder&, const Rows& x, const int32_t* cu_seqlens, int64_t samples, const Outputs&, int threads);

// Merge pooled activations and y [pooled.n, labels] into a state.
void update_moments(const Kernels&, const Rows& pooled, const double* y, const State&, int threads);

}  // namespace corrsteer
