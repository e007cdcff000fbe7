// Uninitialised scratch memory, aligned for any vector. With the address sanitizer it starts as NaNs, so that what is
// read before it is written shows in the results.
#pragma once

#include <cstddef>
#include <cstring>
#include <new>

namespace ifnd {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {
#ifdef __SANITIZE_ADDRESS__
    std::memset(data_, 0xff, bytes);
#endif
  }
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* at(size_t offset) { return data_ + offset; }

 private:
  char* data_;
};

}  // namespace ifnd
