// Scratch memory, aligned to cache lines.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace corrsteer {

constexpr std::align_val_t CACHE_LINE{64};

struct AlignedDelete {
    void operator()(void* memory) const { ::operator delete(memory, CACHE_LINE); }
};

template <class T>
using Scratch = std::unique_ptr<T[], AlignedDelete>;

// `n` elements, not initialised; throws std::bad_alloc.
template <class T>
Scratch<T> scratch(int64_t n) {
    return Scratch<T>(static_cast<T*>(::operator new(size_t(n) * sizeof(T), CACHE_LINE)));
}

}  // namespace corrsteer
