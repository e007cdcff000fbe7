// Buffers out of one block of memory, one after the other, each aligned for any vector.
//
// Built with the address sanitizer (tests/native), each buffer ends in a guard: whoever reads or writes a byte of it is
// stopped there, as if that byte did not exist.
#pragma once

#include "simd.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

IFND_BEGIN

#ifdef __SANITIZE_ADDRESS__
constexpr size_t kGuardBytes = 4096;  // more than most strides: a row too many ends in it, not beyond
IFND_INLINE void guard(const char* buffer, size_t bytes, size_t room) {
  ASAN_UNPOISON_MEMORY_REGION(buffer, bytes);  // the block may have been carved otherwise before
  ASAN_POISON_MEMORY_REGION(buffer + bytes, room - bytes);
}
#else
constexpr size_t kGuardBytes = 0;
IFND_INLINE void guard(const char*, size_t, size_t) {}
#endif

// On a null block it only counts.
struct Carver {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(size_t count) {
    const size_t bytes = count * sizeof(T), room = size_t(round_up<64>(int64_t(bytes))) + kGuardBytes;
    char* buffer = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(base) + used);
    if (base) guard(buffer, bytes, room);
    used += room;
    return reinterpret_cast<T*>(buffer);
  }
};

IFND_END
