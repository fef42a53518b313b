#include "power_sums.h"

#include <algorithm>
#include <numeric>

#include "parallel.h"
#include "scratch.h"

namespace corrsteer {
namespace {

// Rows at a time: few enough that a block of their weights stays in the L2 cache while a panel's features take it.
constexpr int64_t MAX_ROWS = 256;

// Columns that are summed together: those of one power, as many as there are registers for, or fewer at the end.
struct ColumnBlock {
    int64_t column, width, power;
};

std::vector<ColumnBlock> column_blocks(const std::vector<int64_t>& powers, int64_t max_width) {
    std::vector<ColumnBlock> blocks;
    int64_t column = 0;
    for (size_t at = 0; at < powers.size(); at++) {
        const int64_t end = column + powers[at];
        for (; column < end; column += std::min(max_width, end - column))
            blocks.push_back({column, std::min(max_width, end - column), int64_t(at) + 1});
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
    const int64_t max_rows = std::min(MAX_ROWS, pooled.n), nr = kernels.nr, block_width = kernels.sum_columns;
    const std::vector<ColumnBlock> blocks = column_blocks(powers, block_width);
    // Block after block, so that every row of one begins where a cache line does; padded with 0.
    const auto packed = scratch<double>(int64_t(blocks.size()) * max_rows * block_width);
    const auto panel_rows = scratch<float>(threads * nr);
    const auto nonzero_rows = scratch<int32_t>(threads * nr * max_rows);
    const auto nonzero_values = scratch<double>(threads * (nr + 1) * max_rows);
    for (int64_t first = 0; first < pooled.n; first += max_rows) {
        const int64_t n = std::min(max_rows, pooled.n - first);
        parallel_for(threads, int64_t(blocks.size()), [&](int64_t b, int) {
            const ColumnBlock& block = blocks[b];
            double* to = &packed[b * max_rows * block_width];
            for (int64_t j = 0; j < n; j++, to += block_width) {
                std::copy_n(weights + (first + j) * columns + block.column, block.width, to);
                std::fill(to + block.width, to + block_width, 0.0);
            }
        });
        parallel_for(threads, (features + nr - 1) / nr, [&](int64_t panel, int worker) {
            const int64_t feature = panel * nr, width = std::min(nr, features - feature);
            // Each feature as a sparse column: the rows in which it is not 0, and its values there. NaN is not 0.
            int32_t* rows = &nonzero_rows[worker * nr * max_rows];
            double* values = &nonzero_values[worker * (nr + 1) * max_rows];
            double* raised = values + nr * max_rows;
            float* panel_row = &panel_rows[worker * nr];
            int64_t nonzero[MAX_NR] = {};
            std::fill(panel_row + width, panel_row + nr, 0.0f);
            for (int64_t j = 0; j < n; j++) {
                pooled.widen(first + j, feature, width, panel_row);
                for (uint64_t mask = kernels.nonzero_mask(panel_row); mask; mask &= mask - 1) {
                    const int i = __builtin_ctzll(mask);
                    rows[i * max_rows + nonzero[i]] = int32_t(j);
                    values[i * max_rows + nonzero[i]++] = panel_row[i];
                }
            }
            for (size_t b = 0; b < blocks.size(); b++) {
                const ColumnBlock& block = blocks[b];
                for (int64_t i = 0; i < width; i++) {
                    const double* z = values + i * max_rows;
                    if (block.power > 1) {
                        raise(z, nonzero[i], block.power, raised);
                        z = raised;
                    }
                    kernels.weighted_column_sums(z, rows + i * max_rows, nonzero[i],
                                                 &packed[int64_t(b) * max_rows * block_width], block_width,
                                                 sums + (feature + i) * stride + block.column, block.width);
                }
            }
        });
    }
}

}  // namespace corrsteer
