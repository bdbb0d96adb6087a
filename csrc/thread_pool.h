// A small pool of worker threads shared by every CPU kernel of the extension.
//
// Why not OpenMP: torch already brings a runtime of its own. A second one beside it oversubscribes the cores, and an
// OpenMP region entered after fork() hangs.
#pragma once

#include <cstdint>
#include <functional>

namespace ecore {

// Calls body(begin, end) on disjoint ranges that cover [0, size), from at most `threads` threads, the caller included,
// and returns when all are done. A range holds at least `grain` items, the last one excepted, so that little work stays
// on the caller. How the work is cut never depends on timing; which thread runs a range does.
//
// Safe to call from several threads at once and from inside a body. In a process forked from one that had a pool the
// call is serial, since fork() copies the pool's locks but not its threads. An exception in a body is rethrown here.
void parallel_for(int64_t size, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace ecore
