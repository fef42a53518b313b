// corrsteer._cuda: steering, where what matters for few residuals is the time that a launch takes from Python. So the
// arguments are plain numbers and the dtype's name, and what cannot be a tensor's is refused before it reaches the GPU.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>

#include "steer_add.h"

namespace py = pybind11;

namespace {

using namespace corrsteer;

constexpr int64_t MAX_GRID_X = INT32_MAX, MAX_D = 65535 * 128;  // as many blocks as a launch may have

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

Dtype parse_dtype(std::string_view name) {
    if (name == "float32") return Dtype::float32;
    if (name == "float16") return Dtype::float16;
    if (name == "bfloat16") return Dtype::bfloat16;
    refuse("dtype must be float32, float16 or bfloat16, got " + std::string(name) + "; convert h");
}

template <size_t N>
void check_not_negative(const char* name, const std::array<int64_t, N>& numbers) {
    for (int64_t number : numbers)
        if (number < 0) refuse(std::string(name) + " must not be negative, got " + std::to_string(number));
}

void check_address(const char* name, uintptr_t address, uintptr_t itemsize) {
    if (!address || address % itemsize)
        refuse("address of " + std::string(name) + " must be a multiple of " + std::to_string(itemsize) +
               ", the size of an element, and not 0, got " + std::to_string(address));
}

void steer_add(std::string_view dtype_name, uintptr_t h, std::array<int64_t, 3> shape, std::array<int64_t, 3> strides,
               uintptr_t vectors, std::array<int64_t, 2> vectors_shape, std::array<int64_t, 2> vectors_strides,
               uintptr_t row_vector, int64_t row_vector_stride, uintptr_t positions,
               std::array<int64_t, 2> positions_strides, uintptr_t stream) {
    const Dtype dtype = parse_dtype(dtype_name);
    const auto [B, S, d] = shape;
    check_not_negative("shape of h", shape);
    check_not_negative("strides of h", strides);
    check_not_negative("shape of vectors", vectors_shape);
    check_not_negative("strides of vectors", vectors_strides);
    check_not_negative("stride of row_vector", std::array{row_vector_stride});
    check_not_negative("strides of positions", positions_strides);
    for (size_t i = 0; i < 3; i++)
        if (strides[i] == 0 && shape[i] > 1)
            refuse("h must not hold the same element twice, got a stride of 0 for dimension " + std::to_string(i) +
                   "; use .contiguous()");
    if (vectors_shape[1] != d)
        refuse("vectors must be [V, d=" + std::to_string(d) + "], got a width of " + std::to_string(vectors_shape[1]));
    if (B == 0 || S == 0 || d == 0) return;
    if (B > MAX_GRID_X / S || d > MAX_D)
        refuse("h must have at most " + std::to_string(MAX_GRID_X) + " rows times positions and " +
               std::to_string(MAX_D) + " dimensions, got " + std::to_string(B) + " x " + std::to_string(S) + " and " +
               std::to_string(d) + "; split it");
    check_address("h", h, dtype == Dtype::float32 ? 4 : 2);
    if (vectors_shape[0]) check_address("vectors", vectors, 4);
    check_address("row_vector", row_vector, 4);
    const SteerAddArgs args{
        B, S, d, vectors_shape[0],
        reinterpret_cast<void*>(h), strides[0], strides[1], strides[2],
        reinterpret_cast<const float*>(vectors), vectors_strides[0], vectors_strides[1],
        reinterpret_cast<const int32_t*>(row_vector), row_vector_stride,
        reinterpret_cast<const bool*>(positions), positions_strides[0], positions_strides[1]};
    const char* error;
    {
        py::gil_scoped_release released;  // a full queue keeps the launch waiting
        error = launch(args, dtype, reinterpret_cast<void*>(stream));
    }
    if (error) throw std::runtime_error(std::string("steer_add could not be launched: ") + error);
}

}  // namespace

PYBIND11_MODULE(_cuda, module) {
    module.doc() = "corrsteer on NVIDIA GPUs; see corrsteer/cuda_backend.py, which calls it";
    module.def("problem", &problem, "Why nothing can be launched on this machine; None if it can.");
    module.def("steer_add", &steer_add, "See corrsteer.ops.steer_add; strides in elements, positions 0 for all.");
}
