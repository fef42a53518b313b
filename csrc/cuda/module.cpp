// corrsteer._cuda: steering for decode steps, where what matters is the time that a launch takes from Python. So the
// arguments are plain numbers, and what cannot be a tensor's is refused before it reaches the GPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "steer_add.h"

namespace py = pybind11;

namespace {

using namespace corrsteer;

void refuse(const std::string& message) { throw std::invalid_argument(message); }

template <size_t N>
bool sizes(const std::array<int64_t, N>& numbers) {
    for (int64_t number : numbers)
        if (number < 0) return false;
    return true;
}

void steer_add(int number, uintptr_t h, std::array<int64_t, 3> shape, std::array<int64_t, 3> strides,
               uintptr_t vectors, std::array<int64_t, 2> vectors_shape, std::array<int64_t, 2> vectors_strides,
               uintptr_t row_vector, int64_t row_vector_stride, uintptr_t positions,
               std::array<int64_t, 2> positions_strides, uintptr_t stream) {
    const auto [B, S, d] = shape;
    if (number < 0 || number > 2) refuse("number must be 0 (float32), 1 (float16) or 2 (bfloat16)");
    if (!sizes(shape) || !sizes(strides) || !sizes(vectors_shape) || !sizes(vectors_strides) || row_vector_stride < 0 ||
        !sizes(positions_strides))
        refuse("shapes and strides must not be negative");
    for (size_t i = 0; i < 3; i++)
        if (strides[i] == 0 && shape[i] > 1) refuse("h must not hold the same number twice; use .contiguous()");
    if (vectors_shape[1] != d)
        refuse("vectors must be [V, d=" + std::to_string(d) + "], got a width of " + std::to_string(vectors_shape[1]));
    if (B == 0 || S == 0 || d == 0) return;
    if (B > INT32_MAX / S || d > 65535 * 128)  // as many blocks as a launch may have
        refuse("h must have at most 2147483647 rows times positions and 8388480 dimensions, got " + std::to_string(B) +
               " x " + std::to_string(S) + " and " + std::to_string(d));
    if (!h || (!vectors && vectors_shape[0]) || !row_vector) refuse("h, vectors and row_vector must have memory");
    const int64_t size = number == 0 ? 4 : 2;
    if (h % size || vectors % 4 || row_vector % 4) refuse("addresses must be multiples of the size of a number");
    const Steering steering{reinterpret_cast<void*>(h), reinterpret_cast<const float*>(vectors),
                            reinterpret_cast<const int32_t*>(row_vector), reinterpret_cast<const bool*>(positions),
                            B, S, d, vectors_shape[0], strides[0], strides[1], strides[2], vectors_strides[0],
                            vectors_strides[1], row_vector_stride, positions_strides[0], positions_strides[1]};
    const char* words;
    {
        py::gil_scoped_release released;  // a full queue keeps the launch waiting
        words = launch(steering, Number(number), reinterpret_cast<void*>(stream));
    }
    if (words) throw std::runtime_error(std::string("steer_add could not be launched: ") + words);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "corrsteer on NVIDIA GPUs; see corrsteer/cuda_backend.py, which calls it";
    module.def("problem", &problem, "Why nothing can be launched on this machine; None if it can.");
    module.def("steer_add", &steer_add, "See corrsteer.ops.steer_add; strides in numbers, positions 0 for all.");
}
