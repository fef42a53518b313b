// The k features of each token that rank highest, found while panels of features come in any order.
#pragma once

#include <cstdint>

#include "kernels.h"
#include "scratch.h"

namespace corrsteer {

// Each worker keeps a buffer of candidates a token, which it cuts to the k highest whenever it is full; the buffers are
// merged at the end.
//
// A candidate is a sort key: in its upper half the activation's bits, turned into an integer that orders as activations
// do with NaN above everything, and in the lower half the feature, complemented, so that of equal activations the first
// is kept. All keys differ, so that the k highest do not depend on who found them, or when.
class TopK {
public:
    TopK(int64_t k, bool absolute, int64_t tokens, int workers);

    void clear(int64_t tokens);
    // Insert W x + b of a panel's first `width` features, a tile [tokens, NR].
    void insert(const Kernels&, const float* tile, int64_t tokens, int64_t feature, int64_t width, int worker);
    // Merge a token's buffers into its k highest, once all panels have been inserted.
    void merge(int64_t token);
    // Write a panel's activations, a tile [tokens, NR]: 0 but for features kept.
    void write(float* tile, int64_t tokens, int64_t nr, int64_t feature) const;

private:
    struct Buffer {  // of one token and worker
        uint64_t cutoff;  // key that a candidate has to exceed
        float threshold;  // the least activation, or magnitude, that may
        int64_t n;
    };

    uint64_t* keys(int worker, int64_t token) const { return keys_.get() + (worker * tokens_ + token) * capacity_; }

    int64_t k_, tokens_, capacity_;
    bool absolute_;
    int workers_;
    Scratch<uint64_t> keys_;   // [workers, tokens, capacity]; at the end worker 0's are the k kept, by feature
    Scratch<Buffer> buffers_;  // [workers, tokens]
};

}  // namespace corrsteer
