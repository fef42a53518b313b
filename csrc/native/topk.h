// The k features of each token that rank highest, found while panels of features come in any order.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "scratch.h"

namespace corrsteer {

// Candidates of a chunk's tokens, gathered by each worker for itself and put together at the end.
//
// A candidate is one number: the rank of an activation in its upper half, as an integer that orders as the rank does
// with NaN above everything, and in the lower half the feature, turned around, so that of equal activations the first
// is kept. All candidates differ, so that the k largest do not depend on who found them, or when.
class TopK {
public:
    TopK(int64_t k, bool absolute, int64_t tokens, int workers);

    void clear(int64_t tokens);
    // Consider W x + b of a panel's first `width` features, a tile [tokens, panel].
    void offer(const Kernels&, const float* tile, int64_t tokens, int64_t feature, int64_t width, int worker);
    // Put a token's candidates together, once all panels have been offered.
    void settle(int64_t token);
    // Write a panel's activations, a tile [tokens, panel]: 0 but for features kept.
    void write(float* tile, int64_t tokens, int64_t panel, int64_t feature) const;

private:
    struct Leaders {  // of one token, found by one worker
        uint64_t last;  // what a candidate has to exceed
        float least;    // its rank
        int64_t n;
    };

    uint64_t* candidates(int worker, int64_t token) const { return candidates_.get() + (worker * tokens_ + token) * room_; }

    int64_t k_, tokens_, room_;
    bool absolute_;
    int workers_;
    Scratch<uint64_t> candidates_;  // [workers, tokens, room]; at the end worker 0's are the k kept, by feature
    Scratch<Leaders> leaders_;      // [workers, tokens]
};

}  // namespace corrsteer
