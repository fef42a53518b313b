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

template <class T, int WIDTH>
void run_width(const SteerAddArgs& args) {
    const Grid grid = grid_of(args, WIDTH);
    blockDim = dim3(THREADS);
    for (blockIdx.x = 0; blockIdx.x < grid.x; blockIdx.x++)
        for (blockIdx.y = 0; blockIdx.y < grid.y; blockIdx.y++)
            for (threadIdx.x = 0; threadIdx.x < unsigned(THREADS); threadIdx.x++) steer_add_kernel<T, WIDTH>(args);
}

template <class T>
void run_dtype(const SteerAddArgs& args) {
    if (vector_width<T>(args) == 1) run_width<T, 1>(args);
    else run_width<T, MAX_WIDTH<T>>(args);
}

}  // namespace

const char* launch(const SteerAddArgs& args, Dtype dtype, void* stream) {
    if (stream) return "invalid resource handle";
    switch (dtype) {
        case Dtype::float32: run_dtype<float>(args); break;
        case Dtype::float16: run_dtype<__half>(args); break;
        case Dtype::bfloat16: run_dtype<__nv_bfloat16>(args); break;
    }
    return nullptr;
}

const char* problem() { return nullptr; }

}  // namespace corrsteer
