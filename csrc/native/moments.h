// Merging a chunk's pooled activations, panel by panel, into the state of a `corrsteer.Moments`.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace corrsteer {

// The arrays of a `corrsteer.Moments` of D features and R labels, float64; shapes as there.
struct State {
    int64_t features = 0, labels = 0;
    double *count = nullptr, *z_mean = nullptr, *z_m2 = nullptr, *y_mean = nullptr, *y_m2 = nullptr, *cross = nullptr;
    double *n_positive = nullptr, *n_active = nullptr;
    double *group_sum = nullptr, *group_active_sum = nullptr, *group_active_count = nullptr;
};

// The rewards of a chunk's samples, and what all features have in common of them.
class Rewards {
public:
    // y: [samples, labels] float64.
    Rewards(const double* y, int64_t samples, int64_t labels);

    int64_t samples, labels;
    std::vector<double> mean, m2, n_positive;  // [labels]
    std::vector<double> deviation, positive;   // [labels, samples]: y - mean, and 1 where y > 0
};

// Merge pooled activations [samples, NR] of the features from `feature` on, `width` of which exist. `rows` is scratch
// for [f64_vectors, samples] numbers. Panels may be merged at the same time; `merge_rewards` comes after all of them.
void merge_panel(const Kernels&, const float* pooled, const Rewards&, int64_t feature, int64_t width, int32_t* rows,
                 const State&);

// Prefetch these features' part of a state.
void prefetch(const State&, int64_t feature, int64_t width);

// Merge what does not depend on features.
void merge_rewards(const Rewards&, const State&);

}  // namespace corrsteer
