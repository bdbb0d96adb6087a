// Otsu's split of each row of a matrix into relevant (high) and irrelevant (low) values: Eqs. 14, 20 and 21.
//
// A row is sorted descending; S_n is the sum of its n largest values, added in that order in double, and mu = S_P / P.
// The split after n values scores (S_n - n mu)^2 / (n (P - n)), which orders splits as the between-class variance does.
// The best n in 1 ... min(max_relevant, P - 1) wins, the smallest on a tie; `threshold` is the n-th largest value,
// `mask` is value >= threshold, `count` is the mask's sum. A row of one value is all relevant.
//
// Doubles are multiplied by a power of two first, so that no sum or square leaves their range: that is exact, and
// changes no comparison of scores.
//
// T is float or double. Memory is the caller's: values [rows, columns] with unit column stride and row_stride in
// elements, mask [rows, columns], count [rows] and threshold [rows] contiguous. max_relevant <= 0 tries every split.
#pragma once

#include <cstdint>
#include <string>

namespace ecore {

// Returns the first row with a value that is not finite (the outputs of that row are then unspecified), else -1.
template <typename T>
int64_t otsu_cpu(const T* values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant,
                 uint8_t* mask, int64_t* count, T* threshold, int threads);

constexpr int64_t kOtsuCudaMaxColumns = 1024;  // a row has to fit one thread block

// Queues the work on `stream` (a cudaStream_t) of `device` and returns at once. A row with a value that is not finite
// gets an empty mask, count 0 and threshold NaN. Throws std::runtime_error with CUDA's message if the launch fails.
template <typename T>
void otsu_cuda(const T* values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant, uint8_t* mask,
               int64_t* count, T* threshold, int device, void* stream);

// The reason against the kernels on `device` (an older driver, an architecture not compiled for), or "" if they run.
std::string otsu_cuda_refusal(int device);

}  // namespace ecore
