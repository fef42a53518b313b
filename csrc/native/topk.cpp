#include "topk.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "dtypes.h"

namespace corrsteer {
namespace {

uint64_t candidate(float value, int64_t feature, bool absolute) {
    uint32_t rank = bits_of(value);
    if (value != value) rank = 0xffffffff;
    else if (absolute) rank = rank << 1 | rank >> 31;  // the size, and then the sign, which has to be kept somewhere
    else rank ^= rank >> 31 ? 0xffffffff : 0x80000000;
    return uint64_t(rank) << 32 | ~uint32_t(feature);
}

int64_t feature_of(uint64_t candidate) { return ~uint32_t(candidate); }

float value_of(uint64_t candidate, bool absolute) {
    const uint32_t rank = uint32_t(candidate >> 32);
    if (rank == 0xffffffff) return std::numeric_limits<float>::quiet_NaN();
    if (absolute) return float_of(rank >> 1 | rank << 31);
    return float_of(rank ^ (rank >> 31 ? 0x80000000 : 0xffffffff));
}

}  // namespace

TopK::TopK(int64_t k, bool absolute, int64_t tokens, int workers)
    : k_(k), tokens_(tokens), room_(k + std::max<int64_t>(k / 2, WIDEST_PANEL)), absolute_(absolute), workers_(workers),
      candidates_(scratch<uint64_t>(workers * tokens * room_)), leaders_(scratch<Leaders>(workers * tokens)) {}

void TopK::clear(int64_t tokens) {
    for (int64_t worker = 0; worker < workers_; worker++)
        std::fill_n(&leaders_[worker * tokens_], tokens, Leaders{0, -std::numeric_limits<float>::infinity(), 0});
}

void TopK::offer(const Kernels& kernels, const float* tile, int64_t tokens, int64_t feature, int64_t width, int worker) {
    for (int64_t t = 0; t < tokens; t++) {
        const float* row = tile + t * kernels.panel;
        Leaders& leaders = leaders_[worker * tokens_ + t];
        if (!kernels.reaches(row, leaders.least, absolute_)) continue;
        uint64_t* found = candidates(worker, t);
        for (int64_t i = 0; i < width; i++) {
            const uint64_t one = candidate(row[i], feature + i, absolute_);
            if (one <= leaders.last) continue;
            found[leaders.n++] = one;
            if (leaders.n < room_) continue;
            std::nth_element(found, found + k_ - 1, found + leaders.n, std::greater<>());
            leaders.n = k_, leaders.last = found[k_ - 1];
            const float last = value_of(leaders.last, absolute_);
            // where k are NaN already, another NaN may still come before them
            leaders.least = last != last ? std::numeric_limits<float>::infinity() : absolute_ && last < 0 ? -last : last;
        }
    }
}

void TopK::settle(int64_t token) {
    uint64_t* kept = candidates(0, token);
    int64_t n = leaders_[token].n;
    const auto cut = [&] {
        std::nth_element(kept, kept + k_ - 1, kept + n, std::greater<>());
        n = k_;
    };
    for (int worker = 1; worker < workers_; worker++) {
        const uint64_t* found = candidates(worker, token);
        for (int64_t i = 0; i < leaders_[worker * tokens_ + token].n; i++) {
            if (n == room_) cut();
            kept[n++] = found[i];
        }
    }
    cut();  // n is at least k, as there are at least k features
    std::sort(kept, kept + k_, [](uint64_t a, uint64_t b) { return feature_of(a) < feature_of(b); });
}

void TopK::write(float* tile, int64_t tokens, int64_t panel, int64_t feature) const {
    std::fill_n(tile, tokens * panel, 0.0f);
    for (int64_t t = 0; t < tokens; t++) {
        const uint64_t *kept = candidates(0, t), *end = kept + k_;
        kept = std::partition_point(kept, end, [&](uint64_t one) { return feature_of(one) < feature; });
        for (; kept < end && feature_of(*kept) < feature + panel; kept++) {
            const float value = value_of(*kept, absolute_);
            tile[t * panel + feature_of(*kept) - feature] = absolute_ || !(value <= 0) ? value : 0.0f;
        }
    }
}

}  // namespace corrsteer
