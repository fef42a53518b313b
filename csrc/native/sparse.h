// Pooled activations without their zeros.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "kernels.h"

namespace corrsteer {

// How many elements of each row are not 0, NaN being one that is not, and -0 one that is.
void count_nonzeros(const Kernels&, const Rows& pooled, int64_t features, int64_t* counts, int threads);

// Those of row j, in order, into values[offsets[j], offsets[j + 1]), and their places in the row beside them, as
// uint16_t where `narrow` and int32_t otherwise. What no longer fits, as it was written meanwhile, is left out.
void list_nonzeros(const Kernels&, const Rows& pooled, int64_t features, const int64_t* offsets, float* values,
                   void* places, bool narrow, int threads);

// Columns of a sparse matrix: those of feature i are [offsets[i], offsets[i + 1]) of `values` and of `samples`, which
// rise.
struct SparseColumns {
    const float* values;
    const int32_t* samples;
    const int64_t* offsets;
};

// sums[f, c] += sum over n of weights[n, c] * z[first + n, features[f]]^power, z being the columns' matrix. `weights` is
// [samples, columns], `sums` [n_features, columns] with rows `stride` elements apart.
void update_sparse_sums(const Kernels&, const SparseColumns&, const int64_t* features, int64_t n_features,
                        const double* weights, int64_t samples, int64_t columns, int64_t first, int64_t power,
                        double* sums, int64_t stride, int threads);

}  // namespace corrsteer
