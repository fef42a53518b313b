#include "topk.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "dtypes.h"

namespace corrsteer {
namespace {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

uint64_t key_of(float value, int64_t feature, bool absolute) {
    uint32_t rank = bits_of(value);
    if (value != value) rank = 0xffffffff;
    else if (absolute) rank = rank << 1 | rank >> 31;  // the sign has to be kept somewhere
    else rank ^= rank >> 31 ? 0xffffffff : 0x80000000;
    return uint64_t(rank) << 32 | ~uint32_t(feature);
}

int64_t feature_of(uint64_t key) { return ~uint32_t(key); }

float value_of(uint64_t key, bool absolute) {
    const uint32_t rank = uint32_t(key >> 32);
    if (rank == 0xffffffff) return std::numeric_limits<float>::quiet_NaN();
    if (absolute) return float_of(rank >> 1 | rank << 31);
    return float_of(rank ^ (rank >> 31 ? 0x80000000 : 0xffffffff));
}

void move_highest_first(uint64_t* keys, int64_t k, int64_t n) {
    std::nth_element(keys, keys + k - 1, keys + n, std::greater<>());
}

}  // namespace

TopK::TopK(int64_t k, bool absolute, int64_t tokens, int workers)
    : k_(k), tokens_(tokens), capacity_(k + std::max<int64_t>(k / 2, MAX_NR)), absolute_(absolute), workers_(workers),
      keys_(scratch<uint64_t>(workers * tokens * capacity_)), buffers_(scratch<Buffer>(workers * tokens)) {}

void TopK::clear(int64_t tokens) {
    for (int64_t worker = 0; worker < workers_; worker++)
        std::fill_n(&buffers_[worker * tokens_], tokens, Buffer{0, -INFINITE, 0});
}

void TopK::insert(const Kernels& kernels, const float* tile, int64_t tokens, int64_t feature, int64_t width,
                  int worker) {
    for (int64_t t = 0; t < tokens; t++) {
        const float* row = tile + t * kernels.nr;
        Buffer& buffer = buffers_[worker * tokens_ + t];
        if (!kernels.any_at_least(row, buffer.threshold, absolute_)) continue;
        uint64_t* found = keys(worker, t);
        for (int64_t i = 0; i < width; i++) {
            const uint64_t key = key_of(row[i], feature + i, absolute_);
            if (key <= buffer.cutoff) continue;
            found[buffer.n++] = key;
            if (buffer.n < capacity_) continue;
            move_highest_first(found, k_, buffer.n);
            buffer.n = k_, buffer.cutoff = found[k_ - 1];
            const float last = value_of(buffer.cutoff, absolute_);
            // where k are NaN already, another NaN may still come before them
            buffer.threshold = last != last ? INFINITE : absolute_ && last < 0 ? -last : last;
        }
    }
}

void TopK::merge(int64_t token) {
    uint64_t* kept = keys(0, token);
    int64_t n = buffers_[token].n;
    for (int worker = 1; worker < workers_; worker++) {
        const uint64_t* found = keys(worker, token);
        for (int64_t i = 0; i < buffers_[worker * tokens_ + token].n; i++) {
            if (n == capacity_) move_highest_first(kept, k_, n), n = k_;
            kept[n++] = found[i];
        }
    }
    move_highest_first(kept, k_, n);  // n is at least k, as there are at least k features
    std::sort(kept, kept + k_, [](uint64_t a, uint64_t b) { return feature_of(a) < feature_of(b); });
}

void TopK::write(float* tile, int64_t tokens, int64_t nr, int64_t feature) const {
    std::fill_n(tile, tokens * nr, 0.0f);
    for (int64_t t = 0; t < tokens; t++) {
        const uint64_t *kept = keys(0, t), *end = kept + k_;
        kept = std::partition_point(kept, end, [&](uint64_t key) { return feature_of(key) < feature; });
        for (; kept < end && feature_of(*kept) < feature + nr; kept++) {
            const float value = value_of(*kept, absolute_);
            tile[t * nr + feature_of(*kept) - feature] = absolute_ || !(value <= 0) ? value : 0.0f;
        }
    }
}

}  // namespace corrsteer
