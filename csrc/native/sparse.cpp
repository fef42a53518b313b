#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "scratch.h"

namespace corrsteer {
namespace {

// Call body(panel_values, first_feature, mask) for each panel of a row that is not all 0.
template <class Body>
void each_panel(const Kernels& kernels, const Rows& pooled, int64_t row, int64_t features, const Body& body) {
    const int64_t nr = kernels.nr, whole = pooled.dtype == Dtype::float32 ? features / nr * nr : 0;
    const auto* values = static_cast<const float*>(pooled.at(row));
    for (int64_t feature = 0; feature < whole; feature += nr)
        if (const uint64_t mask = kernels.nonzero_mask(values + feature)) body(values + feature, feature, mask);
    float panel[MAX_NR];
    for (int64_t feature = whole; feature < features; feature += nr) {
        const int64_t width = std::min(nr, features - feature);
        std::fill(panel, panel + nr, 0.0f);
        pooled.widen(row, feature, width, panel);
        if (const uint64_t mask = kernels.nonzero_mask(panel)) body(panel, feature, mask);
    }
}

template <class Place>
void list_row(const Kernels& kernels, const Rows& pooled, int64_t row, int64_t features, int64_t at, int64_t end,
              float* values, Place* places) {
    each_panel(kernels, pooled, row, features, [&](const float* panel, int64_t feature, uint64_t mask) {
        for (; mask && at < end; mask &= mask - 1, at++) {
            const int i = __builtin_ctzll(mask);
            values[at] = panel[i];
            places[at] = Place(feature + i);
        }
    });
}

// Samples at a time: few enough that their weights of one block of columns stay in the L2 cache.
constexpr int64_t MAX_SAMPLES = 1024;
// Features at a time that take a block of columns while it is there.
constexpr int64_t MIN_GROUP = 16, MAX_GROUP = 256;

}  // namespace

void count_nonzeros(const Kernels& kernels, const Rows& pooled, int64_t features, int64_t* counts, int threads) {
    parallel_for(threads, pooled.n, [&](int64_t row, int) {
        int64_t count = 0;
        each_panel(kernels, pooled, row, features,
                   [&](const float*, int64_t, uint64_t mask) { count += __builtin_popcountll(mask); });
        counts[row] = count;
    });
}

void list_nonzeros(const Kernels& kernels, const Rows& pooled, int64_t features, const int64_t* offsets, float* values,
                   void* places, bool narrow, int threads) {
    parallel_for(threads, pooled.n, [&](int64_t row, int) {
        const int64_t at = offsets[row], end = offsets[row + 1];
        if (narrow) list_row(kernels, pooled, row, features, at, end, values, static_cast<uint16_t*>(places));
        else list_row(kernels, pooled, row, features, at, end, values, static_cast<int32_t*>(places));
    });
}

void update_sparse_sums(const Kernels& kernels, const SparseColumns& z, const int64_t* features, int64_t n_features,
                        const double* weights, int64_t samples, int64_t columns, int64_t first, int64_t power,
                        double* sums, int64_t stride, int threads) {
    const int64_t width = kernels.sum_columns, blocks = (columns + width - 1) / width;
    const int64_t tile = std::min(MAX_SAMPLES, samples);
    int64_t nonzeros = 0;
    for (int64_t f = 0; f < n_features; f++) nonzeros += z.offsets[features[f] + 1] - z.offsets[features[f]];
    // Of few activations most weights are read once at most, so they stay where they lie, but for the last block of
    // columns, which may end within a register. The sums are the same either way.
    const int64_t from = nonzeros > 4 * samples ? 0 : columns / width, n_packed = blocks - from;
    const auto packed = scratch<double>(n_packed * tile * width);
    const int64_t group = std::clamp(n_features / (4 * threads), MIN_GROUP, MAX_GROUP);
    const int64_t groups = (n_features + group - 1) / group;
    const auto rows_of = scratch<int32_t>(threads * group * tile);
    const auto values_of = scratch<double>(threads * group * tile);
    std::vector<int64_t> next(n_features);  // of each feature's activations
    for (int64_t f = 0; f < n_features; f++) next[f] = z.offsets[features[f]];
    for (int64_t begin = 0; begin < samples; begin += tile) {
        const int64_t n = std::min(tile, samples - begin);
        parallel_for(threads, n_packed, [&](int64_t b, int) {
            const int64_t column = (from + b) * width, wide = std::min(width, columns - column);
            double* to = &packed[b * tile * width];
            for (int64_t j = 0; j < n; j++, to += width) {
                std::copy_n(weights + (begin + j) * columns + column, wide, to);
                std::fill(to + wide, to + width, 0.0);
            }
        });
        parallel_for(threads, groups, [&](int64_t g, int worker) {
            const int64_t feature = g * group, of_group = std::min(group, n_features - feature);
            int32_t* rows = &rows_of[worker * group * tile];
            double* values = &values_of[worker * group * tile];
            int64_t counts[MAX_GROUP];
            for (int64_t f = 0; f < of_group; f++) {
                int64_t& at = next[feature + f];
                const int64_t end = z.offsets[features[feature + f] + 1], low = first + begin;
                int32_t* row = rows + f * tile;
                double* value = values + f * tile;
                int64_t count = 0;
                for (; at < end && z.samples[at] < low + n && count < tile; at++) {
                    if (z.samples[at] < low) continue;
                    row[count] = int32_t(z.samples[at] - low);
                    value[count] = z.values[at];
                    for (int64_t times = 1; times < power; times++) value[count] *= z.values[at];
                    count++;
                }
                counts[f] = count;
            }
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t column = b * width, wide = std::min(width, columns - column);
                const bool here = b >= from;
                const double* block = here ? &packed[(b - from) * tile * width] : weights + begin * columns + column;
                for (int64_t f = 0; f < of_group; f++)
                    kernels.weighted_column_sums(values + f * tile, rows + f * tile, counts[f], block,
                                                 here ? width : columns, sums + (feature + f) * stride + column, wide);
            }
        });
    }
}

}  // namespace corrsteer
