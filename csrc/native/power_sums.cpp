#include "power_sums.h"

#include <algorithm>
#include <numeric>

#include "scratch.h"
#include "parallel.h"

namespace corrsteer {
namespace {

// Rows at a time: few enough that a block of their weights stays in the L2 cache while a panel's features take it.
constexpr int64_t ROWS = 256;

// Columns that are summed together: those of one power, as many as there are registers for, or fewer at the end.
struct Block {
    int64_t column, width, power;
};

std::vector<Block> blocks_of(const std::vector<int64_t>& powers, int64_t most) {
    std::vector<Block> blocks;
    int64_t column = 0;
    for (size_t at = 0; at < powers.size(); at++) {
        const int64_t end = column + powers[at];
        for (; column < end; column += std::min(most, end - column))
            blocks.push_back({column, std::min(most, end - column), int64_t(at) + 1});
    }
    return blocks;
}

void raise(const double* z, int64_t n, int64_t power, double* out) {
    std::copy_n(z, n, out);
    for (int64_t times = 1; times < power; times++)
        for (int64_t j = 0; j < n; j++) out[j] *= z[j];
}

}  // namespace

void update_sums(const Kernels& kernels, const Rows& pooled, int64_t features, const double* weights,
                 const std::vector<int64_t>& powers, double* sums, int64_t stride, int threads) {
    const int64_t columns = std::accumulate(powers.begin(), powers.end(), int64_t(0));
    const int64_t most = std::min(ROWS, pooled.n), panel = kernels.panel, wide = kernels.columns;
    const int64_t panels = (features + panel - 1) / panel;
    const std::vector<Block> blocks = blocks_of(powers, wide);
    // Block after block, so that every row of one begins where a cache line does; padded with 0.
    const Scratch<double> packed = scratch<double>(int64_t(blocks.size()) * most * wide);
    const Scratch<float> converted = scratch<float>(threads * panel);
    const Scratch<int32_t> rows = scratch<int32_t>(threads * panel * most);
    const Scratch<double> values = scratch<double>(threads * (panel + 1) * most);
    for (int64_t first = 0; first < pooled.n; first += most) {
        const int64_t n = std::min(most, pooled.n - first);
        share(threads, int64_t(blocks.size()), [&](int64_t at, int) {
            const Block& block = blocks[at];
            double* to = &packed[at * most * wide];
            for (int64_t j = 0; j < n; j++, to += wide) {
                std::copy_n(weights + (first + j) * columns + block.column, block.width, to);
                std::fill(to + block.width, to + wide, 0.0);
            }
        });
        share(threads, panels, [&](int64_t at, int worker) {
            const int64_t feature = at * panel, width = std::min(panel, features - feature);
            // The rows in which each feature is not 0, and what it is there. NaN is not 0.
            int32_t* row = &rows[worker * panel * most];
            double* z = &values[worker * (panel + 1) * most];
            double* raised = z + panel * most;
            float* line = &converted[worker * panel];
            int64_t found[WIDEST_PANEL] = {};
            std::fill(line + width, line + panel, 0.0f);
            for (int64_t j = 0; j < n; j++) {
                const char* from = static_cast<const char*>(pooled.row(first + j)) + feature * size_of(pooled.dtype);
                widen(pooled.dtype, from, width, line);
                for (uint64_t lanes = kernels.active(line); lanes; lanes &= lanes - 1) {
                    const int i = __builtin_ctzll(lanes);
                    row[i * most + found[i]] = int32_t(j);
                    z[i * most + found[i]++] = line[i];
                }
            }
            for (size_t b = 0; b < blocks.size(); b++) {
                const Block& block = blocks[b];
                for (int64_t i = 0; i < width; i++) {
                    const double* value = z + i * most;
                    if (block.power > 1) {
                        raise(value, found[i], block.power, raised);
                        value = raised;
                    }
                    kernels.weigh(value, row + i * most, found[i], &packed[int64_t(b) * most * wide],
                                  sums + (feature + i) * stride + block.column, block.width);
                }
            }
        });
    }
}

}  // namespace corrsteer
