#include "steer_add.h"

#include "steer_add.cuh"

namespace corrsteer {
namespace {

template <class T, int N>
void launch_pack(const Steering& a, cudaStream_t stream) {
    const Blocks blocks = blocks_of(a, N);
    steer_add_kernel<T, N><<<dim3(blocks.x, blocks.y), THREADS, 0, stream>>>(a);
}

template <class T>
void launch_as(const Steering& a, cudaStream_t stream) {
    if (pack_of<T>(a) == 1) launch_pack<T, 1>(a, stream);
    else launch_pack<T, 16 / sizeof(T)>(a, stream);
}

}  // namespace

const char* launch(const Steering& steering, Number number, void* stream) {
    const auto on = static_cast<cudaStream_t>(stream);
    if (number == Number::float32) launch_as<float>(steering, on);
    if (number == Number::float16) launch_as<__half>(steering, on);
    if (number == Number::bfloat16) launch_as<__nv_bfloat16>(steering, on);
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* problem() {
    int devices = 0;
    const cudaError_t error = cudaGetDeviceCount(&devices);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace corrsteer
