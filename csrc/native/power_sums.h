// Weighted power sums of pooled activations.
#pragma once

#include <cstdint>
#include <vector>

#include "dtypes.h"
#include "kernels.h"

namespace corrsteer {

// sums[i, c] += sum over n of weights[n, c] * pooled[n, i]^p, with p = 1 for the first powers[0] columns, 2 for the
// next powers[1], and so on. `weights` is [pooled.n, columns], `sums` [features, columns] with rows `stride` elements
// apart, at least `columns` of them.
void update_sums(const Kernels&, const Rows& pooled, int64_t features, const double* weights,
                 const std::vector<int64_t>& powers, double* sums, int64_t stride, int threads);

}  // namespace corrsteer
