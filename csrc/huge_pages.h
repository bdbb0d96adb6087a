// Large pages for results that are about to be written for the first time.
#pragma once

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ecore {

// Has the kernel back these bytes with pages of 2 MiB, where it has not handed them out yet: an allocator that has
// nothing kept gets fresh memory, 4 KiB a fault, which on real masks takes longer than the arithmetic. Only advice:
// where it is refused, nothing changes. All results of a call are to be advised before any is written, since those that
// lie side by side may have a large page in common.
inline void advise_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{2} << 20;
  if (data == nullptr || bytes < kHugePage) return;  // less seldom holds a whole one
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  const auto is_there = [](uintptr_t address) {
    unsigned char there = 0;
    return mincore(reinterpret_cast<void*>(address), 1, &there) == 0 && (there & 1) != 0;
  };
  if (is_there(begin) && is_there(end - page)) return;  // memory that was kept: advice would only take its time
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace ecore
