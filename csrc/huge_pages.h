// Large pages for results that are about to be written for the first time.
#pragma once

#include <cstdint>
#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace ecore {

// Advises the kernel to back these bytes with pages of 2 MiB, if they have no pages yet: memory that an allocator did
// not keep from earlier is fresh, with a fault for every 4 KiB, which on real masks takes longer than the arithmetic.
// If the advice is refused, nothing changes. All results of a call must be advised before any is written, since
// neighbouring ones may share a large page.
inline void advise_huge_pages(const void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t{2} << 20;
  if (data == nullptr || bytes < kHugePage) return;  // fewer bytes seldom hold a whole one
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (first + page - 1) / page * page, end = (first + static_cast<uintptr_t>(bytes)) / page * page;
  const auto is_there = [](uintptr_t address) {
    unsigned char there = 0;
    return mincore(reinterpret_cast<void*>(address), 1, &there) == 0 && (there & 1) != 0;
  };
  if (is_there(begin) && is_there(end - page)) return;  // memory that was kept: advice would only cost time
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data);
  static_cast<void>(bytes);
#endif
}

}  // namespace ecore
