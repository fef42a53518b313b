// What is computed on a panel of features, once for each instruction set.
//
// A panel is a fixed number of neighbouring features, which lie in the lanes of a few vector registers: whatever is
// one number a feature (a bias, a threshold, a sum over tokens) is one register then, and no kernel adds across lanes.
// A tile is [tokens, panel] float32, the panel's activations of a chunk of tokens, and stays in the L1 or L2 cache.
#pragma once

#include <cstdint>

namespace corrsteer {

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define WITH_AVX512_BF16  // what the compiler knows
#endif

constexpr int64_t WIDEST_PANEL = 48, MOST_PARTS = 8;

enum class Activation { relu, jumprelu, gated, topk, abstopk };

// What is multiplied by what. Two bfloat16 numbers that follow each other along d_in lie side by side in a packed
// weight, so that it serves both instructions that multiply such pairs and those that have to widen them.
enum class Operands { f32_by_f32, bf16_by_f32, bf16_by_bf16 };  // weight by x

// A panel's part of an encoder's vectors, padded with features that are never active.
struct Features {
    float bias[WIDEST_PANEL], threshold[WIDEST_PANEL];
    float magnitude_scale[WIDEST_PANEL], magnitude_bias[WIDEST_PANEL];
};

// The samples that end within a chunk of tokens [first_token, last_token), [first, last), and the one that goes on
// after it, if there is one. The first may have begun before.
struct Chunk {
    int64_t first_token, last_token, first, last;
};

// What a sample that a chunk has cut has so far, for the panel at hand.
struct Carry {
    double* sum;     // [panel]
    float* maximum;  // [panel]
};

// Rows of pooled activations [samples, panel] that are not all 0, for each part of the panel that fits a register of
// float64. Most are, as most features are active in few samples; what those add to moments follows from their number.
struct Occupied {
    int32_t* rows;  // [parts, samples]
    int64_t n[MOST_PARTS];
};

// Moments of a panel's pooled activations of a chunk's samples, in float64 as in `Moments`.
struct PanelMoments {
    double mean[WIDEST_PANEL], m2[WIDEST_PANEL], active[WIDEST_PANEL];
};

// The same with one label: sums over samples with y > 0, and over the others.
struct LabelMoments {
    double cross[WIDEST_PANEL], active[WIDEST_PANEL];
    double sum[WIDEST_PANEL], active_sum[WIDEST_PANEL], others_sum[WIDEST_PANEL], others_active_sum[WIDEST_PANEL];
};

struct Kernels {
    const char* name;
    int64_t panel;      // features
    int64_t parts;      // of a panel, see Occupied
    int64_t columns;    // of float64 that `weigh` sums together, and from row to row of its weights
    bool bf16_by_bf16;  // whether there is an instruction for it; otherwise x is widened

    // tile[t, f] (+)= sum over k of weight[k, f] * x[t, k]. `weight` is the packed panel from the k at which it
    // begins, `tile` is written where `first`, and added to otherwise.
    void (*multiply)(Operands, const void* weight, const void* x, int64_t x_stride, int64_t tokens, int64_t k,
                     float* tile, bool first);
    // W x, in place, to activations; to W x + b for topk and abstopk.
    void (*activate)(Activation, const Features&, int64_t tokens, float* tile);
    // Whether any of a token's features reaches `least`, or is NaN; for abstopk whether its size does.
    bool (*reaches)(const float* row, float least, bool absolute);
    // Means and maxima over each sample's tokens, [samples, panel] each, null if not wanted.
    void (*pool)(const float* tile, const Chunk&, const int32_t* cu_seqlens, float* mean, float* maximum, Carry);
    // A bit for each of a panel's features that is not 0, NaN being one that is not.
    uint64_t (*active)(const float* row);
    void (*occupied)(const float* pooled, int64_t samples, Occupied&);
    void (*moments)(const float* pooled, int64_t samples, const Occupied&, PanelMoments&);
    // `deviation` is y less its mean over the chunk, `positive` is 1 or 0, of each sample.
    void (*moments_with_label)(const float* pooled, int64_t samples, const Occupied&, const double* mean,
                               const double* deviation, const double* positive, LabelMoments&);
    // sums[c] += sum over i of values[i] * weights[rows[i], c], for the first `width` of `columns` columns. They lie in
    // the lanes, so that what is 0 costs nothing, feature by feature: it need not be among the values.
    void (*weigh)(const double* values, const int32_t* rows, int64_t n, const double* weights, double* sums,
                  int64_t width);
};

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512;
#endif
#if defined(WITH_AVX512_BF16)
extern const Kernels avx512_bf16;
#endif

}  // namespace corrsteer
