// What is computed on a panel of NR features, once for each instruction set.
//
// The product W x is tiled for registers and caches as in BLIS (Van Zee & van de Geijn 2015), whose names these are: a
// micro-kernel multiplies MR tokens by a packed micro-panel of NR features, KC of d_in at a time. In a packed panel KR
// neighbours along d_in lie side by side (as in XNNPACK): [d_in / KR, NR, KR], with KR = 2 for bfloat16 and 1 for
// float32.
//
// A panel's features lie in the lanes of a few vector registers: whatever is one number a feature (a bias, a threshold,
// a sum over tokens) is one register then, and no kernel adds across lanes. A tile is [tokens, NR] float32, the panel's
// activations of a chunk of tokens, and stays in the L1 or L2 cache.
#pragma once

#include <cstdint>

namespace corrsteer {

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define COMPILES_AVX512_BF16
#endif

constexpr int64_t MAX_NR = 48, MAX_F64_VECTORS = 8;

enum class Activation { relu, jumprelu, gated, topk, abstopk };

inline bool is_topk(Activation one) { return one == Activation::topk || one == Activation::abstopk; }

// Dtypes of weight and x. The packed bfloat16 weight serves both instructions that multiply pairs and those that have
// to widen them.
enum class Operands { f32_by_f32, bf16_by_f32, bf16_by_bf16 };

// A panel's part of an encoder's vectors, 0 for features that do not exist.
struct PanelVectors {
    float bias[MAX_NR] = {}, threshold[MAX_NR] = {}, magnitude_scale[MAX_NR] = {}, magnitude_bias[MAX_NR] = {};
};

// The tokens [token, token_end), and the samples [sample, sample_end) that end among them. The first sample may have
// begun before, and one more may go on after them.
struct Chunk {
    int64_t token = 0, token_end = 0, sample = 0, sample_end = 0;
};

// The carry from chunk to chunk of a sample that lies in several, for the panel at hand.
struct Carry {
    double* sum;     // [NR]
    float* maximum;  // [NR]
};

// Rows of pooled activations [samples, NR] that are not all 0, for each float64 register of the panel. Most are, as
// most features are active in few samples; what those add to moments follows from their number.
struct NonzeroRows {
    int32_t* rows;  // [f64_vectors, samples]
    int64_t n[MAX_F64_VECTORS] = {};
};

// Moments of a panel's pooled activations of a chunk's samples, in float64 as in `Moments`.
struct PanelMoments {
    double mean[MAX_NR], m2[MAX_NR], active_count[MAX_NR];
};

// What they have with one label: the centred cross moment, and sums over samples with y > 0 and with y <= 0.
struct PanelLabelMoments {
    double cross[MAX_NR];
    double positive_sum[MAX_NR], positive_active_sum[MAX_NR], positive_active_count[MAX_NR];
    double negative_sum[MAX_NR], negative_active_sum[MAX_NR];
};

struct Kernels {
    const char* name;
    int64_t nr;           // features in a panel
    int64_t f64_vectors;  // float64 registers in a panel
    int64_t sum_columns;  // that weighted_column_sums adds up at a time
    bool bf16_dot;        // whether there is an instruction for bf16_by_bf16; otherwise x is widened

    // tile[t, f] (+)= sum over k of weight[k, f] * x[t, k]. `weight` is the packed panel from the k at which it
    // begins; `tile` is added to where `accumulate`, and written otherwise.
    void (*multiply)(Operands, const void* weight, const void* x, int64_t x_stride, int64_t tokens, int64_t k,
                     float* tile, bool accumulate);
    // W x, in place, to activations; to W x + b for topk and abstopk.
    void (*activate)(Activation, const PanelVectors&, int64_t tokens, float* tile);
    // Whether any of a token's features is at least `threshold`, or NaN; for abstopk whether its magnitude is.
    bool (*any_at_least)(const float* row, float threshold, bool absolute);
    // Segment reduction: means and maxima over each sample's tokens, [samples, NR] each, null if not wanted.
    void (*pool)(const float* tile, const Chunk&, const int32_t* cu_seqlens, float* mean, float* maximum, Carry);
    // A bit for each of a panel's features that is not 0, NaN being one that is not.
    uint64_t (*nonzero_mask)(const float* row);
    void (*find_nonzero_rows)(const float* pooled, int64_t samples, NonzeroRows&);
    void (*moments)(const float* pooled, int64_t samples, const NonzeroRows&, PanelMoments&);
    // `deviation` is y less its mean over the chunk, `positive` is 1 or 0, of each sample.
    void (*label_moments)(const float* pooled, int64_t samples, const NonzeroRows&, const double* mean,
                          const double* deviation, const double* positive, PanelLabelMoments&);
    // sums[c] += sum over i of values[i] * weights[rows[i], c], for `width` of `sum_columns` columns: a sparse row
    // times a dense matrix, whose rows lie `stride` apart. Columns lie in the lanes, so that zeros cost nothing,
    // feature by feature: they need not be among the values. Of each row whole registers are read.
    void (*weighted_column_sums)(const double* values, const int32_t* rows, int64_t n, const double* weights,
                                 int64_t stride, double* sums, int64_t width);
};

extern const Kernels portable;
#if defined(__x86_64__)
extern const Kernels avx2, avx512;
#endif
#if defined(COMPILES_AVX512_BF16)
extern const Kernels avx512_bf16;
#endif

}  // namespace corrsteer
