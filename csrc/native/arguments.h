// Arguments as Python hands them over, tensors by address and choices by name, and the checks without which an address
// must not be followed.
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

inline std::string alternatives(const std::vector<std::string>& names) {  // "a, b or c"
    std::string out;
    for (size_t i = 0; i < names.size(); i++) out += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
    return out;
}

template <class T>
struct Named {
    const char* name;
    T value;
};

template <class T, size_t N>
T parse(const char* argument, const Named<T> (&choices)[N], const std::string& name) {
    for (const auto& choice : choices)
        if (name == choice.name) return choice.value;
    std::vector<std::string> names;
    for (const auto& choice : choices) names.emplace_back(choice.name);
    refuse(std::string(argument) + " must be " + alternatives(names) + ", got " + name);
}

constexpr Named<Dtype> DTYPES[] = {{"float32", Dtype::float32}, {"bfloat16", Dtype::bfloat16},
                                   {"float16", Dtype::float16}, {"float64", Dtype::float64},
                                   {"int32", Dtype::int32},     {"int64", Dtype::int64},
                                   {"uint16", Dtype::uint16},   {"bool", Dtype::boolean}};

inline std::string name_of(Dtype dtype) {
    for (const auto& one : DTYPES)
        if (one.value == dtype) return one.name;
    return "";
}

// A tensor: address, shape, strides in elements, dtype. Whoever makes one keeps its memory alive during the call.
class Array {
public:
    Array(uintptr_t address, std::vector<int64_t> shape, std::vector<int64_t> strides, const std::string& dtype)
        : dtype(parse("dtype", DTYPES, dtype)), shape(std::move(shape)), strides(std::move(strides)),
          address_(reinterpret_cast<void*>(address)) {
        if (this->shape.size() != this->strides.size())
            refuse("strides must be as many as there are dimensions, got " + text(this->strides) + " for " +
                   text(this->shape));
        int64_t elements = 1;
        for (int64_t size : this->shape)
            if (size < 0 || __builtin_mul_overflow(elements, size, &elements))
                refuse("shape must be that of a tensor, got " + text(this->shape));
        for (int64_t stride : this->strides)
            if (stride < 0) refuse("strides must not be negative, got " + text(this->strides));
        if (elements && !address) refuse("address must be that of a tensor's memory, got 0");
        if (address % uintptr_t(size_of(this->dtype)))
            refuse("address must be a multiple of the size of an element, got " + std::to_string(address));
    }

    // Refuse any other dtype and shape; a size of -1 stands for any. `name` is the argument's.
    const Array& expect(const std::string& name, const std::vector<Dtype>& dtypes,
                        const std::vector<int64_t>& sizes) const {
        bool fits = shape.size() == sizes.size(), known = false;
        for (size_t i = 0; fits && i < sizes.size(); i++) fits = sizes[i] == -1 || sizes[i] == shape[i];
        for (Dtype one : dtypes) known |= one == dtype;
        if (fits && known) return *this;
        std::vector<std::string> names;
        for (Dtype one : dtypes) names.push_back(name_of(one));
        refuse(name + " must be " + text(sizes) + " " + alternatives(names) + " (-1 for any size), got " +
               text(shape) + " " + name_of(dtype));
    }

    // Refuse elements that do not follow each other: from dimension `from` on, or at all.
    const Array& contiguous(const std::string& name, size_t from = 0) const {
        for (int64_t size : shape)
            if (size == 0) return *this;
        int64_t expected = 1;
        for (size_t i = shape.size(); i-- > from; expected *= shape[i])
            if (strides[i] != expected && shape[i] > 1)
                refuse(name + " must be contiguous, got strides " + text(strides) + " for " + text(shape) +
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
