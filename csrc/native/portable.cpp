// Registers of four float32, which every processor has or the compiler takes apart; NEON on 64-bit Arm.
#include "kernels.h"

namespace corrsteer {
namespace in_portable {
constexpr int LANES = 4;
#if defined(__aarch64__)
constexpr int VECTORS = 4, MR = 6, WIDENING_MR = 6;  // of 32 registers
#else
constexpr int VECTORS = 2, MR = 6, WIDENING_MR = 6;  // of 16
#endif
#include "kernels.inc"
}  // namespace in_portable

const Kernels portable = in_portable::kernels("portable");
}  // namespace corrsteer
