#include "encode.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#if defined(__unix__)
#include <unistd.h>
#endif

#include "scratch.h"
#include "topk.h"
#include "parallel.h"

namespace corrsteer {
namespace {

// Tokens in a chunk: enough that reading the weights once for each takes no time beside the product, few enough that
// their residuals stay in a cache that all processors share. Fewer where each takes more memory.
constexpr int64_t CHUNK = 512, SMALL_CHUNK = 256;
constexpr double LAYER_NORM_EPS = 1e-5;  // SAELens' own, added to the standard deviation

int64_t panels_of(const Kernels& kernels, int64_t features) { return (features + kernels.panel - 1) / kernels.panel; }

int64_t padded(int64_t d_in, bool bf16) { return bf16 ? (d_in + 1) / 2 * 2 : d_in; }

// How much of d_in to multiply at a time: blocks of equal size, of which a panel's weights fill about 40 % of the L2
// cache (measured at 64 to 4096 tokens). Even, so that no pair of bfloat16 is cut.
int64_t block_of(const Encoder& encoder) {
    int64_t cache = 0;
#if defined(_SC_LEVEL2_CACHE_SIZE)
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (cache <= 0) cache = 1 << 20;
    const int64_t whole = encoder.kernels->panel * encoder.d_in * (encoder.bf16 ? 2 : 4);
    const int64_t blocks = std::max<int64_t>(1, (whole * 5 + 2 * cache - 1) / (2 * cache));
    return ((encoder.d_in + blocks - 1) / blocks + 1) / 2 * 2;
}

Features features_of(const Encoder& encoder, int64_t feature, int64_t width) {
    Features out;
    std::fill_n(reinterpret_cast<float*>(&out), sizeof out / sizeof(float), 0.0f);
    std::copy_n(encoder.bias + feature, width, out.bias);
    if (encoder.activation == Activation::jumprelu)
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

// One call of `encode`.
class Encoding {
public:
    Encoding(const Encoder& encoder, const Rows& x, const int32_t* cu_seqlens, int64_t samples, const Wanted& wanted,
             int threads)
        : encoder_(encoder), kernels_(*encoder.kernels), x_(x), cu_seqlens_(cu_seqlens), samples_(samples),
          wanted_(wanted), threads_(threads), panels_(panels_of(kernels_, encoder.d_sae)), block_(block_of(encoder)) {
        const bool normed = encoder.input_norm != InputNorm::none;
        const bool pairs = encoder.bf16 && x.dtype == Dtype::bf16 && kernels_.bf16_by_bf16 && !normed;
        operands_ = pairs          ? Operands::bf16_by_bf16
                    : encoder.bf16 ? Operands::bf16_by_f32
                                   : Operands::f32_by_f32;
        copied_ = !pairs && (x.dtype != Dtype::f32 || normed);
        const bool sparse = encoder.activation == Activation::topk || encoder.activation == Activation::abstopk;
        const int64_t most = copied_ || sparse ? SMALL_CHUNK : CHUNK, chunks = (x.n + most - 1) / most;
        const int64_t tokens = chunks ? (x.n + chunks - 1) / chunks : 1;  // of equal size: few would read all weights
        const int64_t rows = std::min(most, samples);                     // pooled in a chunk
        chunk_tokens_ = tokens, chunk_samples_ = rows;
        if (copied_) copy_ = scratch<float>(tokens * encoder.d_in);
        if (sparse)
            top_ = std::make_unique<TopK>(encoder.k, encoder.activation == Activation::abstopk, tokens, threads);
        tiles_ = scratch<float>(threads * tokens * kernels_.panel);
        if (wanted.mean_too()) means_ = scratch<float>(threads * rows * kernels_.panel);
        if (wanted.maximum_too()) maxima_ = scratch<float>(threads * rows * kernels_.panel);
        if (wanted.any_state()) rows_ = scratch<int32_t>(threads * kernels_.parts * rows);
        if (x.n > tokens) {  // samples may be cut
            if (wanted.mean_too()) carried_sum_ = scratch<double>(panels_ * kernels_.panel);
            if (wanted.maximum_too()) carried_maximum_ = scratch<float>(panels_ * kernels_.panel);
        }
    }

    void run() {
        Chunk chunk{0, 0, 0, 0};
        do {
            chunk = next(chunk);
            encode(chunk);
        } while (chunk.last_token < x_.n || chunk.last < samples_);
    }

private:
    // Tokens up to the most that there is room for, and of the samples that end by then as many as there is room for.
    Chunk next(const Chunk& before) const {
        Chunk chunk{before.last_token, std::min(before.last_token + chunk_tokens_, x_.n), before.last, before.last};
        while (chunk.last < samples_ && chunk.last - chunk.first < chunk_samples_ &&
               cu_seqlens_[chunk.last + 1] <= chunk.last_token)
            chunk.last++;
        if (chunk.last < samples_ && chunk.last - chunk.first == chunk_samples_)
            chunk.last_token = std::min<int64_t>(chunk.last_token, cu_seqlens_[chunk.last]);
        return chunk;
    }

    void encode(const Chunk& chunk) {
        const int64_t tokens = chunk.last_token - chunk.first_token;
        prepare(chunk);
        if (top_) {
            top_->clear(tokens);
            share(threads_, panels_, [&](int64_t panel, int worker) {
                float* tile = tile_of(worker);
                multiply(panel, tokens, tile);
                top_->offer(kernels_, tile, tokens, panel * kernels_.panel, width_of(panel), worker);
            });
            share(threads_, tokens, [&](int64_t token, int) { top_->settle(token); });
        }
        std::unique_ptr<Rewards> y;
        if (const State* state = wanted_.any_state())
            y = std::make_unique<Rewards>(wanted_.y + chunk.first * state->labels, chunk.last - chunk.first,
                                          state->labels);
        share(threads_, panels_, [&](int64_t panel, int worker) {
            float* tile = tile_of(worker);
            if (wanted_.mean_state) fetch(*wanted_.mean_state, panel * kernels_.panel, width_of(panel));
            if (wanted_.maximum_state) fetch(*wanted_.maximum_state, panel * kernels_.panel, width_of(panel));
            if (top_) top_->write(tile, tokens, kernels_.panel, panel * kernels_.panel);
            else multiply(panel, tokens, tile);
            if (wanted_.dense) copy(tile, tokens, panel, wanted_.dense + chunk.first_token * encoder_.d_sae);
            else reduce(chunk, tile, panel, worker, y.get());
        });
        if (wanted_.mean_state) finish(*y, *wanted_.mean_state);
        if (wanted_.maximum_state) finish(*y, *wanted_.maximum_state);
    }

    // The chunk's residuals as the product takes them.
    void prepare(const Chunk& chunk) {
        current_ = {x_.row(chunk.first_token), x_.dtype, chunk.last_token - chunk.first_token, x_.stride};
        if (!copied_) return;
        current_ = {copy_.get(), Dtype::f32, current_.n, encoder_.d_in};
        share(threads_, current_.n, [&](int64_t t, int) {
            float* row = &copy_[t * encoder_.d_in];
            widen(x_.dtype, x_.row(chunk.first_token + t), encoder_.d_in, row);
            if (encoder_.input_norm != InputNorm::none) normalise(encoder_.input_norm, row, encoder_.d_in);
        });
    }

    void multiply(int64_t panel, int64_t tokens, float* tile) const {
        const int64_t bytes = encoder_.bf16 ? 2 : 4;
        const char* weight = static_cast<const char*>(encoder_.weight) +
                             panel * kernels_.panel * padded(encoder_.d_in, encoder_.bf16) * bytes;
        for (int64_t k = 0; k < encoder_.d_in; k += block_)
            kernels_.multiply(operands_, weight + k * kernels_.panel * bytes,
                              static_cast<const char*>(current_.data) + k * size_of(current_.dtype), current_.stride,
                              tokens, std::min(block_, encoder_.d_in - k), tile, k == 0);
        kernels_.activate(encoder_.activation, features_of(encoder_, panel * kernels_.panel, width_of(panel)),
                          tokens, tile);
    }

    void reduce(const Chunk& chunk, const float* tile, int64_t panel, int worker, const Rewards* y) {
        const int64_t samples = chunk.last - chunk.first, feature = panel * kernels_.panel;
        float* mean = means_ ? &means_[worker * chunk_samples_ * kernels_.panel] : nullptr;
        float* maximum = maxima_ ? &maxima_[worker * chunk_samples_ * kernels_.panel] : nullptr;
        kernels_.pool(tile, chunk, cu_seqlens_, mean, maximum,
                      {carried_sum_ ? &carried_sum_[feature] : nullptr,
                       carried_maximum_ ? &carried_maximum_[feature] : nullptr});
        if (wanted_.mean) copy(mean, samples, panel, wanted_.mean + chunk.first * encoder_.d_sae);
        if (wanted_.maximum) copy(maximum, samples, panel, wanted_.maximum + chunk.first * encoder_.d_sae);
        if (!y) return;
        int32_t* rows = &rows_[worker * kernels_.parts * chunk_samples_];
        if (wanted_.mean_state) fold(kernels_, mean, *y, feature, width_of(panel), rows, *wanted_.mean_state);
        if (wanted_.maximum_state) fold(kernels_, maximum, *y, feature, width_of(panel), rows, *wanted_.maximum_state);
    }

    void copy(const float* tile, int64_t rows, int64_t panel, float* out) const {
        for (int64_t row = 0; row < rows; row++)
            std::copy_n(tile + row * kernels_.panel, width_of(panel),
                        out + row * encoder_.d_sae + panel * kernels_.panel);
    }

    int64_t width_of(int64_t panel) const {
        return std::min(kernels_.panel, encoder_.d_sae - panel * kernels_.panel);
    }

    float* tile_of(int worker) const { return &tiles_[worker * chunk_tokens_ * kernels_.panel]; }

    const Encoder& encoder_;
    const Kernels& kernels_;
    const Rows& x_;
    const int32_t* cu_seqlens_;
    const int64_t samples_;
    const Wanted& wanted_;
    const int threads_;
    const int64_t panels_, block_;
    Operands operands_;
    bool copied_;  // whether residuals are widened or normalised first
    int64_t chunk_tokens_, chunk_samples_;  // the most there are in a chunk
    Rows current_{};                        // the chunk's residuals

    std::unique_ptr<TopK> top_;
    Scratch<float> tiles_, means_, maxima_;  // [workers, chunk's tokens or samples, panel]
    Scratch<int32_t> rows_;                  // [workers, parts, chunk's samples]
    Scratch<float> copy_;                    // [chunk's tokens, d_in], of residuals
    Scratch<double> carried_sum_;            // [panels, panel], of a sample that a chunk has cut
    Scratch<float> carried_maximum_;
};

}  // namespace

int64_t packed_size(const Kernels& kernels, int64_t d_sae, int64_t d_in, bool bf16) {
    return panels_of(kernels, d_sae) * kernels.panel * padded(d_in, bf16);
}

void pack(const Kernels& kernels, const Rows& weight, int64_t d_in, bool bf16, void* packed, int threads) {
    const int64_t panel = kernels.panel, rows = padded(d_in, bf16), pair = bf16 ? 2 : 1;
    const auto put = [&](auto* out, int64_t first, auto read) {
        for (int64_t i = 0; i < panel; i++) {
            const bool exists = first + i < weight.n;
            const void* row = exists ? weight.row(first + i) : nullptr;
            for (int64_t k = 0; k < rows; k++)
                out[(k / pair * panel + i) * pair + k % pair] = exists && k < d_in ? read(row, k) : 0;
        }
    };
    share(threads, panels_of(kernels, weight.n), [&](int64_t at, int) {
        const int64_t first = at * panel;
        if (bf16) {
            put(static_cast<uint16_t*>(packed) + first * rows, first,
                [](const void* row, int64_t k) { return static_cast<const uint16_t*>(row)[k]; });
        } else {
            put(static_cast<float*>(packed) + first * rows, first, [&](const void* row, int64_t k) {
                float value;
                widen(weight.dtype, static_cast<const char*>(row) + k * size_of(weight.dtype), 1, &value);
                return value;
            });
        }
    });
}

void encode(const Encoder& encoder, const Rows& x, const int32_t* cu_seqlens, int64_t samples, const Wanted& wanted,
            int threads) {
    Encoding(encoder, x, cu_seqlens, samples, wanted, threads).run();
}

void update_moments(const Kernels& kernels, const Rows& pooled, const double* y, const State& state, int threads) {
    const int64_t panels = panels_of(kernels, state.features), most = std::min(CHUNK, pooled.n);
    const Scratch<float> tiles = scratch<float>(threads * most * kernels.panel);
    const Scratch<int32_t> rows = scratch<int32_t>(threads * kernels.parts * most);
    for (int64_t first = 0; first < pooled.n; first += most) {
        const Rewards rewards(y + first * state.labels, std::min(most, pooled.n - first), state.labels);
        share(threads, panels, [&](int64_t panel, int worker) {
            const int64_t feature = panel * kernels.panel, width = std::min(kernels.panel, state.features - feature);
            float* tile = &tiles[worker * most * kernels.panel];
            std::fill_n(tile, rewards.samples * kernels.panel, 0.0f);
            for (int64_t j = 0; j < rewards.samples; j++) {
                const char* row = static_cast<const char*>(pooled.row(first + j)) + feature * size_of(pooled.dtype);
                widen(pooled.dtype, row, width, tile + j * kernels.panel);
            }
            fold(kernels, tile, rewards, feature, width, &rows[worker * kernels.parts * most], state);
        });
        finish(rewards, state);
    }
}

}  // namespace corrsteer
