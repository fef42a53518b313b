#include "moments.h"

namespace corrsteer {

Rewards::Rewards(const double* y, int64_t samples, int64_t labels)
    : samples(samples), labels(labels), mean(labels), m2(labels), n_positive(labels),
      deviation(labels * samples), positive(labels * samples) {
    for (int64_t r = 0; r < labels; r++) {
        // about the first reward, so that the mean of a reward that is always the same is that reward, to the last bit
        for (int64_t j = 0; j < samples; j++) mean[r] += y[j * labels + r] - y[r];
        if (samples) mean[r] = y[r] + mean[r] / double(samples);
        for (int64_t j = 0; j < samples; j++) {
            const double apart = y[j * labels + r] - mean[r];
            deviation[r * samples + j] = apart;
            positive[r * samples + j] = y[j * labels + r] > 0;
            m2[r] += apart * apart;
            n_positive[r] += positive[r * samples + j];
        }
    }
}

// Merging as in Chan, Golub & LeVeque (1979), eq. 1.5, as `reference.merge_centred` does.

void fold(const Kernels& kernels, const float* pooled, const Rewards& y, int64_t feature, int64_t width, int32_t* rows,
          const State& state) {
    if (y.samples == 0) return;
    PanelMoments panel;
    LabelMoments label;
    double delta[WIDEST_PANEL];
    Occupied occupied{rows, {}};
    kernels.occupied(pooled, y.samples, occupied);
    kernels.moments(pooled, y.samples, occupied, panel);
    const double n = double(y.samples), total = *state.count + n, weight = *state.count * n / total;
    for (int64_t i = 0; i < width; i++) {
        delta[i] = panel.mean[i] - state.z_mean[feature + i];
        state.z_mean[feature + i] += delta[i] * (n / total);
        state.z_m2[feature + i] += panel.m2[i] + weight * delta[i] * delta[i];
        state.n_active[feature + i] += panel.active[i];
    }
    for (int64_t r = 0; r < y.labels; r++) {
        kernels.moments_with_label(pooled, y.samples, occupied, panel.mean, &y.deviation[r * y.samples],
                                   &y.positive[r * y.samples], label);
        const double apart = weight * (y.mean[r] - state.y_mean[r]);
        const int64_t with = r * state.features + feature, others = with + state.labels * state.features;
        for (int64_t i = 0; i < width; i++) {
            state.cross[with + i] += label.cross[i] + apart * delta[i];
            state.group_sum[with + i] += label.sum[i];
            state.group_sum[others + i] += label.others_sum[i];
            state.group_active_sum[with + i] += label.active_sum[i];
            state.group_active_sum[others + i] += label.others_active_sum[i];
            state.group_active_count[with + i] += label.active[i];
            state.group_active_count[others + i] += panel.active[i] - label.active[i];
        }
    }
}

void fetch(const State& state, int64_t feature, int64_t width) {
    const double* arrays[] = {state.z_mean, state.z_m2, state.n_active, state.cross, state.group_sum,
                              state.group_active_sum, state.group_active_count};
    for (const double* array : arrays)
        for (int64_t i = 0; i < width; i += 8) __builtin_prefetch(array + feature + i, 1);
}

void finish(const Rewards& y, const State& state) {
    if (y.samples == 0) return;
    const double n = double(y.samples), total = *state.count + n, weight = *state.count * n / total;
    for (int64_t r = 0; r < y.labels; r++) {
        const double delta = y.mean[r] - state.y_mean[r];
        state.y_m2[r] += y.m2[r] + weight * delta * delta;
        state.y_mean[r] += delta * (n / total);
        state.n_positive[r] += y.n_positive[r];
    }
    *state.count = total;
}

}  // namespace corrsteer
