#include "moments.h"

namespace corrsteer {
namespace {

// The merge of two sets' moments, b's into a's in place: Chan, Golub & LeVeque (1983), Algorithms for computing the
// sample variance, The American Statistician 37(3). `reference.merge_centred` is the same.
class ChanMerge {
public:
    ChanMerge(double n_a, double n_b) : share_(n_b / (n_a + n_b)), weight_(n_a * n_b / (n_a + n_b)) {}

    // Returns the difference of the means, b - a, which the centred moments take.
    double mean(double& a, double b) const {
        const double delta = b - a;
        a += delta * share_;
        return delta;
    }

    // A centred cross moment of two variables whose means differ by these; of one with itself, its second moment.
    void cross_moment(double& a, double b, double delta_1, double delta_2) const {
        a += b + weight_ * delta_1 * delta_2;
    }

private:
    double share_, weight_;
};

}  // namespace

Rewards::Rewards(const double* y, int64_t samples, int64_t labels)
    : samples(samples), labels(labels), mean(labels), m2(labels), n_positive(labels),
      deviation(labels * samples), positive(labels * samples) {
    for (int64_t r = 0; r < labels; r++) {
        // about the first reward, so that the mean of a reward that is always the same is that reward, to the last bit
        for (int64_t j = 0; j < samples; j++) mean[r] += y[j * labels + r] - y[r];
        if (samples) mean[r] = y[r] + mean[r] / double(samples);
        for (int64_t j = 0; j < samples; j++) {
            const int64_t at = r * samples + j;
            deviation[at] = y[j * labels + r] - mean[r];
            positive[at] = y[j * labels + r] > 0;
            m2[r] += deviation[at] * deviation[at];
            n_positive[r] += positive[at];
        }
    }
}

void merge_panel(const Kernels& kernels, const float* pooled, const Rewards& y, int64_t feature, int64_t width,
                 int32_t* rows, const State& state) {
    if (y.samples == 0) return;
    PanelMoments panel;
    PanelLabelMoments label;
    double delta[MAX_NR];
    NonzeroRows nonzero{rows};
    kernels.find_nonzero_rows(pooled, y.samples, nonzero);
    kernels.moments(pooled, y.samples, nonzero, panel);
    const ChanMerge merge(*state.count, double(y.samples));
    for (int64_t i = 0; i < width; i++) {
        delta[i] = merge.mean(state.z_mean[feature + i], panel.mean[i]);
        merge.cross_moment(state.z_m2[feature + i], panel.m2[i], delta[i], delta[i]);
        state.n_active[feature + i] += panel.active_count[i];
    }
    for (int64_t r = 0; r < y.labels; r++) {
        kernels.label_moments(pooled, y.samples, nonzero, panel.mean, &y.deviation[r * y.samples],
                              &y.positive[r * y.samples], label);
        const double y_delta = y.mean[r] - state.y_mean[r];
        const int64_t positive = r * state.features + feature, negative = positive + state.labels * state.features;
        for (int64_t i = 0; i < width; i++) {
            merge.cross_moment(state.cross[positive + i], label.cross[i], y_delta, delta[i]);
            state.group_sum[positive + i] += label.positive_sum[i];
            state.group_sum[negative + i] += label.negative_sum[i];
            state.group_active_sum[positive + i] += label.positive_active_sum[i];
            state.group_active_sum[negative + i] += label.negative_active_sum[i];
            state.group_active_count[positive + i] += label.positive_active_count[i];
            state.group_active_count[negative + i] += panel.active_count[i] - label.positive_active_count[i];
        }
    }
}

void prefetch(const State& state, int64_t feature, int64_t width) {
    const double* arrays[] = {state.z_mean, state.z_m2, state.n_active, state.cross, state.group_sum,
                              state.group_active_sum, state.group_active_count};
    for (const double* array : arrays)
        for (int64_t i = 0; i < width; i += 8) __builtin_prefetch(array + feature + i, 1);
}

void merge_rewards(const Rewards& y, const State& state) {
    if (y.samples == 0) return;
    const ChanMerge merge(*state.count, double(y.samples));
    for (int64_t r = 0; r < y.labels; r++) {
        const double delta = merge.mean(state.y_mean[r], y.mean[r]);
        merge.cross_moment(state.y_m2[r], y.m2[r], delta, delta);
        state.n_positive[r] += y.n_positive[r];
    }
    *state.count += double(y.samples);
}

}  // namespace corrsteer
