// Folding a chunk's pooled activations, panel by panel, into the state of a `corrsteer.Moments`.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace corrsteer {

// The arrays of a `corrsteer.Moments` of D features and R labels, float64; shapes as there.
struct State {
    double *count, *z_mean, *z_m2, *y_mean, *y_m2, *cross, *n_positive, *n_active;
    double *group_sum, *group_active_sum, *group_active_count;
    int64_t features, labels;
};

// The rewards of a chunk's samples.
class Rewards {
public:
    // y: [samples, labels] float64.
    Rewards(const double* y, int64_t samples, int64_t labels);

    int64_t samples, labels;
    std::vector<double> mean, m2, n_positive;  // [labels]
    std::vector<double> deviation, positive;   // [labels, samples]: y - mean, and 1 where y > 0
};

// Fold pooled activations [samples, panel] of the features from `feature` on, `width` of which exist. `rows` is room
// for [parts, samples] numbers. Panels may be folded at the same time; `finish` comes after all of them.
void fold(const Kernels&, const float* pooled, const Rewards&, int64_t feature, int64_t width, int32_t* rows,
          const State&);

// Have these features' part of a state fetched into the cache, while there is something else to do.
void fetch(const State&, int64_t feature, int64_t width);

// Fold what does not depend on features.
void finish(const Rewards&, const State&);

}  // namespace corrsteer
