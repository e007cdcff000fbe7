// Uninitialised scratch memory, aligned for any vector.
#pragma once

#include <cstddef>
#include <new>

namespace ifnd {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : data_(static_cast<char*>(::operator new(bytes, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  char* at(size_t offset) { return data_ + offset; }

 private:
  char* data_;
};

}  // namespace ifnd
