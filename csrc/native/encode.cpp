#include "encode.h"

#include <algorithm>
#include <cmath>
#include <optional>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "parallel.h"
#include "scratch.h"
#include "topk.h"

namespace corrsteer {
namespace {

// Tokens in a chunk: enough that reading the weights once for each takes no time beside the product, few enough that
// their residuals stay in a cache that all processors share. Fewer where each takes more memory.
constexpr int64_t CHUNK = 512, SMALL_CHUNK = 256;
constexpr double LAYER_NORM_EPS = 1e-5;  // SAELens' own, added to the standard deviation

int64_t panel_count(const Kernels& kernels, int64_t features) { return (features + kernels.nr - 1) / kernels.nr; }

int64_t kr_of(Dtype packed_dtype) { return packed_dtype == Dtype::bfloat16 ? 2 : 1; }

int64_t padded_d_in(int64_t d_in, Dtype packed_dtype) {
    const int64_t kr = kr_of(packed_dtype);
    return (d_in + kr - 1) / kr * kr;
}

// KC: blocks of equal size, of which a micro-panel fills about 40 % of the L2 cache (measured at 64 to 4096 tokens).
// Even, so that no pair of bfloat16 is cut.
int64_t choose_kc(const Encoder& encoder) {
    int64_t cache = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (cache <= 0) cache = 1 << 20;
    const int64_t panel = encoder.kernels->nr * encoder.d_in * size_of(encoder.weight_dtype);
    const int64_t blocks = std::max<int64_t>(1, (panel * 5 + 2 * cache - 1) / (2 * cache));
    return ((encoder.d_in + blocks - 1) / blocks + 1) / 2 * 2;
}

PanelVectors panel_vectors(const Encoder& encoder, int64_t feature, int64_t width) {
    PanelVectors out;
    std::copy_n(encoder.bias + feature, width, out.bias);
    if (encoder.threshold)
        for (int64_t i = 0; i < width; i++) out.threshold[i] = std::max(0.0f, encoder.threshold[feature + i]);
    if (encoder.magnitude_scale) std::copy_n(encoder.magnitude_scale + feature, width, out.magnitude_scale);
    if (encoder.magnitude_bias) std::copy_n(encoder.magnitude_bias + feature, width, out.magnitude_bias);
    return out;
}

// SAELens' input norm of a token, in place, as `reference.normalised` does it. Before the product rather than after,
// where a mean that is much larger than what is left without it would have cost digits.
void normalise(InputNorm norm, float* x, int64_t d_in) {
    double mean = 0, squares = 0;
    if (norm == InputNorm::layer_norm) {
        for (int64_t i = 0; i < d_in; i++) mean += x[i];
        mean /= double(d_in);
    }
    for (int64_t i = 0; i < d_in; i++) squares += (x[i] - mean) * (x[i] - mean);
    const double scale = norm == InputNorm::layer_norm ? 1 / (std::sqrt(squares / double(d_in - 1)) + LAYER_NORM_EPS)
                                                       : std::sqrt(double(d_in) / squares);
    for (int64_t i = 0; i < d_in; i++) x[i] = float((x[i] - mean) * scale);
}

// One call of `encode`: chunk after chunk of tokens, and within each all panels of features, spread over threads.
class Encoding {
public:
    Encoding(const Encoder& encoder, const Rows& x, const int32_t* cu_seqlens, int64_t samples, const Outputs& outputs,
             int threads)
        : encoder_(encoder), kernels_(*encoder.kernels), x_(x), cu_seqlens_(cu_seqlens), samples_(samples),
          outputs_(outputs), threads_(threads), nr_(kernels_.nr), panels_(panel_count(kernels_, encoder.d_sae)),
          kc_(choose_kc(encoder)) {
        const bool normed = encoder.input_norm != InputNorm::none, bf16 = encoder.weight_dtype == Dtype::bfloat16;
        const bool bf16_dot = bf16 && x.dtype == Dtype::bfloat16 && kernels_.bf16_dot && !normed;
        operands_ = bf16_dot ? Operands::bf16_by_bf16 : bf16 ? Operands::bf16_by_f32 : Operands::f32_by_f32;
        const bool convert = !bf16_dot && (x.dtype != Dtype::float32 || normed), topk = is_topk(encoder.activation);
        const int64_t room = convert || topk ? SMALL_CHUNK : CHUNK, chunks = (x.n + room - 1) / room;
        chunk_tokens_ = chunks ? (x.n + chunks - 1) / chunks : 1;  // of equal size: few would read all weights
        chunk_samples_ = std::min(room, samples);
        if (convert) converted_ = scratch<float>(chunk_tokens_ * encoder.d_in);
        if (topk) topk_.emplace(encoder.k, encoder.activation == Activation::abstopk, chunk_tokens_, threads);
        tiles_ = scratch<float>(threads * chunk_tokens_ * nr_);
        if (outputs.need_mean()) means_ = scratch<float>(threads * chunk_samples_ * nr_);
        if (outputs.need_maximum()) maxima_ = scratch<float>(threads * chunk_samples_ * nr_);
        if (outputs.need_moments()) nonzero_rows_ = scratch<int32_t>(threads * kernels_.f64_vectors * chunk_samples_);
        if (x.n > chunk_tokens_) {  // samples may lie in several chunks
            if (outputs.need_mean()) carried_sum_ = scratch<double>(panels_ * nr_);
            if (outputs.need_maximum()) carried_maximum_ = scratch<float>(panels_ * nr_);
        }
    }

    void run() {
        Chunk chunk;
        do {
            chunk = next(chunk);
            encode(chunk);
        } while (chunk.token_end < x_.n || chunk.sample_end < samples_);
    }

private:
    // Tokens up to the most that there is room for, and of the samples that end by then as many as there is room for.
    Chunk next(const Chunk& before) const {
        Chunk chunk{before.token_end, std::min(before.token_end + chunk_tokens_, x_.n), before.sample_end,
                    before.sample_end};
        while (chunk.sample_end < samples_ && chunk.sample_end - chunk.sample < chunk_samples_ &&
               cu_seqlens_[chunk.sample_end + 1] <= chunk.token_end)
            chunk.sample_end++;
        if (chunk.sample_end < samples_ && chunk.sample_end - chunk.sample == chunk_samples_)
            chunk.token_end = std::min<int64_t>(chunk.token_end, cu_seqlens_[chunk.sample_end]);
        return chunk;
    }

    void encode(const Chunk& chunk) {
        const int64_t tokens = chunk.token_end - chunk.token;
        const Rows x = operand(chunk);
        if (topk_) {
            topk_->clear(tokens);
            parallel_for(threads_, panels_, [&](int64_t panel, int worker) {
                float* tile = tile_of(worker);
                multiply(x, panel, tile);
                topk_->insert(kernels_, tile, tokens, panel * nr_, width_of(panel), worker);
            });
            parallel_for(threads_, tokens, [&](int64_t token, int) { topk_->merge(token); });
        }
        std::optional<Rewards> y;
        if (outputs_.need_moments())
            y.emplace(outputs_.y + chunk.sample * outputs_.labels, chunk.sample_end - chunk.sample, outputs_.labels);
        parallel_for(threads_, panels_, [&](int64_t panel, int worker) {
            float* tile = tile_of(worker);
            for (const auto& state : {outputs_.mean_state, outputs_.maximum_state})
                if (state) prefetch(*state, panel * nr_, width_of(panel));
            if (topk_) topk_->write(tile, tokens, nr_, panel * nr_);
            else multiply(x, panel, tile);
            if (outputs_.dense) copy(tile, tokens, panel, outputs_.dense + chunk.token * encoder_.d_sae);
            else reduce(chunk, tile, panel, worker, y ? &*y : nullptr);
        });
        for (const auto& state : {outputs_.mean_state, outputs_.maximum_state})
            if (state) merge_rewards(*y, *state);
    }

    // The chunk's residuals as the product takes them: widened or normalised, or as they are.
    Rows operand(const Chunk& chunk) {
        const int64_t tokens = chunk.token_end - chunk.token;
        if (!converted_) return {x_.at(chunk.token), x_.dtype, tokens, x_.stride};
        parallel_for(threads_, tokens, [&](int64_t t, int) {
            float* row = &converted_[t * encoder_.d_in];
            x_.widen(chunk.token + t, 0, encoder_.d_in, row);
            if (encoder_.input_norm != InputNorm::none) normalise(encoder_.input_norm, row, encoder_.d_in);
        });
        return {converted_.get(), Dtype::float32, tokens, encoder_.d_in};
    }

    void multiply(const Rows& x, int64_t panel, float* tile) const {
        const int64_t step = nr_ * size_of(encoder_.weight_dtype);
        const char* weight = static_cast<const char*>(encoder_.weight) +
                             panel * padded_d_in(encoder_.d_in, encoder_.weight_dtype) * step;
        for (int64_t k = 0; k < encoder_.d_in; k += kc_)
            kernels_.multiply(operands_, weight + k * step, x.at(0, k), x.stride, x.n, std::min(kc_, encoder_.d_in - k),
                              tile, k > 0);
        kernels_.activate(encoder_.activation, panel_vectors(encoder_, panel * nr_, width_of(panel)), x.n, tile);
    }

    // Pool a tile, and write the panel's pooled activations or merge them into the states.
    void reduce(const Chunk& chunk, const float* tile, int64_t panel, int worker, const Rewards* y) {
        const int64_t samples = chunk.sample_end - chunk.sample, feature = panel * nr_;
        const auto part = [](const auto& memory, int64_t at) { return memory ? &memory[at] : nullptr; };
        float* mean = part(means_, worker * chunk_samples_ * nr_);
        float* maximum = part(maxima_, worker * chunk_samples_ * nr_);
        kernels_.pool(tile, chunk, cu_seqlens_, mean, maximum,
                      {part(carried_sum_, feature), part(carried_maximum_, feature)});
        if (outputs_.mean) copy(mean, samples, panel, outputs_.mean + chunk.sample * encoder_.d_sae);
        if (outputs_.maximum) copy(maximum, samples, panel, outputs_.maximum + chunk.sample * encoder_.d_sae);
        if (!y) return;
        int32_t* rows = &nonzero_rows_[worker * kernels_.f64_vectors * chunk_samples_];
        const auto merge = [&](const float* pooled, const std::optional<State>& state) {
            if (state) merge_panel(kernels_, pooled, *y, feature, width_of(panel), rows, *state);
        };
        merge(mean, outputs_.mean_state);
        merge(maximum, outputs_.maximum_state);
    }

    void copy(const float* tile, int64_t rows, int64_t panel, float* out) const {
        for (int64_t row = 0; row < rows; row++)
            std::copy_n(tile + row * nr_, width_of(panel), out + row * encoder_.d_sae + panel * nr_);
    }

    int64_t width_of(int64_t panel) const { return std::min(nr_, encoder_.d_sae - panel * nr_); }

    float* tile_of(int worker) const { return &tiles_[worker * chunk_tokens_ * nr_]; }

    const Encoder& encoder_;
    const Kernels& kernels_;
    const Rows& x_;
    const int32_t* cu_seqlens_;
    const int64_t samples_;
    const Outputs& outputs_;
    const int threads_;
    const int64_t nr_, panels_, kc_;
    Operands operands_;
    int64_t chunk_tokens_, chunk_samples_;  // the most there are in a chunk

    std::optional<TopK> topk_;
    Scratch<float> converted_;               // [chunk's tokens, d_in], residuals where they are widened or normalised
    Scratch<float> tiles_, means_, maxima_;  // [workers, chunk's tokens or samples, NR]
    Scratch<int32_t> nonzero_rows_;          // [workers, f64_vectors, chunk's samples]
    Scratch<double> carried_sum_;            // [panels, NR]
    Scratch<float> carried_maximum_;         // [panels, NR]
};

}  // namespace

int64_t packed_size(const Kernels& kernels, int64_t d_sae, int64_t d_in, Dtype packed_dtype) {
    return panel_count(kernels, d_sae) * kernels.nr * padded_d_in(d_in, packed_dtype);
}

void pack(const Kernels& kernels, const Rows& weight, int64_t d_in, void* packed, int threads) {
    const bool bf16 = weight.dtype == Dtype::bfloat16;
    const int64_t nr = kernels.nr, kr = kr_of(weight.dtype), depth = padded_d_in(d_in, weight.dtype);
    const auto interleave = [&](const auto* row, int64_t i, auto* out) {  // row: [d_in]; out: [depth / KR, NR, KR]
        for (int64_t k = 0; k < depth; k++) out[(k / kr * nr + i) * kr + k % kr] = row && k < d_in ? row[k] : 0;
    };
    const auto rows = scratch<float>(threads * d_in);
    parallel_for(threads, panel_count(kernels, weight.n), [&](int64_t panel, int worker) {
        const int64_t first = panel * nr;
        for (int64_t i = 0; i < nr; i++) {
            const bool exists = first + i < weight.n;
            if (bf16) {
                const auto* row = exists ? static_cast<const uint16_t*>(weight.at(first + i)) : nullptr;
                interleave(row, i, static_cast<uint16_t*>(packed) + first * depth);
            } else {
                float* row = exists ? &rows[worker * d_in] : nullptr;
                if (exists) weight.widen(first + i, 0, d_in, row);
                interleave(row, i, static_cast<float*>(packed) + first * depth);
            }
        }
    });
}

void encode(const Encoder& encoder, const Rows& x, const int32_t* cu_seqlens, int64_t samples, const Outputs& outputs,
            int threads) {
    Encoding(encoder, x, cu_seqlens, samples, outputs, threads).run();
}

void update_moments(const Kernels& kernels, const Rows& pooled, const double* y, const State& state, int threads) {
    const int64_t nr = kernels.nr, room = std::min(CHUNK, pooled.n);
    const auto tiles = scratch<float>(threads * room * nr);
    const auto nonzero_rows = scratch<int32_t>(threads * kernels.f64_vectors * room);
    for (int64_t first = 0; first < pooled.n; first += room) {
        const Rewards rewards(y + first * state.labels, std::min(room, pooled.n - first), state.labels);
        parallel_for(threads, panel_count(kernels, state.features), [&](int64_t panel, int worker) {
            const int64_t feature = panel * nr, width = std::min(nr, state.features - feature);
            float* tile = &tiles[worker * room * nr];
            std::fill_n(tile, rewards.samples * nr, 0.0f);
            for (int64_t j = 0; j < rewards.samples; j++) pooled.widen(first + j, feature, width, tile + j * nr);
            int32_t* rows = &nonzero_rows[worker * kernels.f64_vectors * room];
            merge_panel(kernels, tile, rewards, feature, width, rows, state);
        });
        merge_rewards(rewards, state);
    }
}

}  // namespace corrsteer
