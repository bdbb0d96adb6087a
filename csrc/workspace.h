// Memory for one piece of work, on a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace ecore {

template <typename T>
class Workspace {
 public:
  explicit Workspace(int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<size_t>(size) * sizeof(T), std::align_val_t{64}))) {}
  ~Workspace() { ::operator delete(data_, std::align_val_t{64}); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* get() const { return data_; }

 private:
  T* const data_;
};

}  // namespace ecore
