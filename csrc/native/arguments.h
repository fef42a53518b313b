// Tensors as Python hands them over, by address, and the checks without which an address must not be followed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dtypes.h"

namespace corrsteer {

[[noreturn]] inline void refuse(const std::string& message) { throw std::invalid_argument(message); }

inline std::string text(const std::vector<int64_t>& numbers) {
    std::string out = "[";
    for (size_t i = 0; i < numbers.size(); i++) out += (i ? ", " : "") + std::to_string(numbers[i]);
    return out + "]";
}

inline const char* name_of(Dtype dtype) {
    switch (dtype) {
        case Dtype::f32: return "float32";
        case Dtype::bf16: return "bfloat16";
        case Dtype::f16: return "float16";
        case Dtype::f64: return "float64";
        case Dtype::i32: return "int32";
        case Dtype::boolean: return "bool";
    }
    return "";
}

inline Dtype dtype_named(const std::string& name) {
    for (Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::f64, Dtype::i32, Dtype::boolean})
        if (name == name_of(dtype)) return dtype;
    refuse("dtype must be float32, bfloat16, float16, float64, int32 or bool, got " + name);
}

// A tensor: address, shape, strides in numbers, dtype. Whoever makes one keeps its memory alive during the call.
class Array {
public:
    Array(uintptr_t address, std::vector<int64_t> shape, std::vector<int64_t> strides, const std::string& dtype)
        : dtype(dtype_named(dtype)), shape(std::move(shape)), strides(std::move(strides)),
          address_(reinterpret_cast<void*>(address)) {
        if (this->shape.size() != this->strides.size())
            refuse("strides must be as many as there are dimensions, got " + text(this->strides) + " for " +
                   text(this->shape));
        int64_t numbers = 1;
        for (int64_t size : this->shape)
            if (size < 0 || __builtin_mul_overflow(numbers, size, &numbers))
                refuse("shape must be that of a tensor, got " + text(this->shape));
        for (int64_t stride : this->strides)
            if (stride < 0) refuse("strides must not be negative, got " + text(this->strides));
        if (numbers && !address) refuse("address must be that of a tensor's memory, got 0");
        if (address % uintptr_t(size_of(this->dtype)))
            refuse("address must be a multiple of the size of a number, got " + std::to_string(address));
    }

    // Refuse any other dtype and shape; a size of -1 stands for any. `name` is the argument's.
    const Array& expect(const char* name, const std::vector<Dtype>& dtypes, const std::vector<int64_t>& sizes) const {
        bool fits = shape.size() == sizes.size(), known = false;
        for (size_t i = 0; fits && i < sizes.size(); i++) fits = sizes[i] == -1 || sizes[i] == shape[i];
        std::string names;
        for (Dtype one : dtypes) known |= one == dtype, names += (names.empty() ? "" : " or ") + std::string(name_of(one));
        if (!fits || !known)
            refuse(std::string(name) + " must be " + text(sizes) + " " + names + " (-1 for any size), got " + text(shape) +
                   " " + name_of(dtype));
        return *this;
    }

    // Refuse numbers that do not follow each other: from dimension `from` on, or at all.
    const Array& packed(const char* name, size_t from = 0) const {
        for (int64_t size : shape)
            if (size == 0) return *this;
        int64_t expected = 1;
        for (size_t i = shape.size(); i-- > from; expected *= shape[i])
            if (strides[i] != expected && shape[i] > 1)
                refuse(std::string(name) + " must be contiguous, got strides " + text(strides) + " for " + text(shape) +
                       "; use .contiguous()");
        return *this;
    }

    template <class T>
    T* data() const {
        return static_cast<T*>(address_);
    }

    const Dtype dtype;
    const std::vector<int64_t> shape, strides;

private:
    void* address_;
};

}  // namespace corrsteer
