// The launches of steer_add, one kernel for each dtype and vector width.
#include "steer_add.h"

#include "steer_add.cuh"

namespace corrsteer {
namespace {

template <class T, int WIDTH>
void launch_width(const SteerAddArgs& args, cudaStream_t stream) {
    const Grid grid = grid_of(args, WIDTH);
    steer_add_kernel<T, WIDTH><<<dim3(grid.x, grid.y), THREADS, 0, stream>>>(args);
}

template <class T>
void launch_dtype(const SteerAddArgs& args, cudaStream_t stream) {
    if (vector_width<T>(args) == 1) launch_width<T, 1>(args, stream);
    else launch_width<T, MAX_WIDTH<T>>(args, stream);
}

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* launch(const SteerAddArgs& args, Dtype dtype, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    switch (dtype) {
        case Dtype::float32: launch_dtype<float>(args, on); break;
        case Dtype::float16: launch_dtype<__half>(args, on); break;
        case Dtype::bfloat16: launch_dtype<__nv_bfloat16>(args, on); break;
    }
    return message(cudaGetLastError());
}

const char* problem() {
    int devices = 0;
    return message(cudaGetDeviceCount(&devices));
}

}  // namespace corrsteer
