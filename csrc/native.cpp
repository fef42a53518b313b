// corrsteer._native: what runs on the CPU. So far it says which instruction sets this processor offers, which
// is what a kernel is chosen by at run time. No torch headers: one build serves every torch version.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace {

// Names of the instruction sets that matter for a matrix product, widest first; "portable" is always there.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> sets;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16")) sets.emplace_back("avx512_bf16");
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) sets.emplace_back("avx512");
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) sets.emplace_back("avx2");
#elif defined(__aarch64__)
    sets.emplace_back("neon");
#endif
    sets.emplace_back("portable");
    return sets;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "corrsteer on the CPU";
    module.def("instruction_sets", &instruction_sets, "Instruction sets of this processor, widest first.");
}
