// The launch of corrsteer._cuda with a CPU for a GPU: the same kernel, block by block and thread by thread. It shows that
// the kernel adds what it should where it should, and that the boundary lets through what it should; nothing else.
#include <cuda_runtime_api.h>

namespace {
thread_local uint3 blockIdx, threadIdx;
thread_local dim3 blockDim;
}  // namespace

#include "steer_add.cuh"

namespace corrsteer {
namespace {

template <class T, int N>
void run(const Steering& a) {
    const Blocks blocks = blocks_of(a, N);
    blockDim = dim3(THREADS);
    for (blockIdx.x = 0; blockIdx.x < blocks.x; blockIdx.x++)
        for (blockIdx.y = 0; blockIdx.y < blocks.y; blockIdx.y++)
            for (threadIdx.x = 0; threadIdx.x < unsigned(THREADS); threadIdx.x++) steer_add_kernel<T, N>(a);
}

template <class T>
void run_as(const Steering& a) {
    if (pack_of<T>(a) == 1) run<T, 1>(a);
    else run<T, 16 / sizeof(T)>(a);
}

}  // namespace

const char* launch(const Steering& a, Number number, void* stream) {
    if (stream) return "invalid resource handle";
    if (number == Number::float32) run_as<float>(a);
    if (number == Number::float16) run_as<__half>(a);
    if (number == Number::bfloat16) run_as<__nv_bfloat16>(a);
    return nullptr;
}

const char* problem() { return nullptr; }

}  // namespace corrsteer
