// Sums have the same order as on the CPU and multiplications are not fused with additions (--fmad=false), so that the
// split is the same bit for bit.
#include <climits>
#include <cmath>
#include <stdexcept>
#include <string>

#include "otsu.h"

namespace ecore {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 8;

struct Split {
  double score;
  int n;
};

__device__ inline Split better(Split a, Split b) {
  return b.score > a.score || (b.score == a.score && b.n < a.n) ? b : a;
}

// The split after n values; if it is no candidate, it scores below every real one.
__device__ inline Split score_split(double prefix, double total, int n, int columns, int last_split) {
  if (n > last_split) return {-1, n};
  const double size = n;
  const double deviation = prefix - size * (total / columns);
  const double score = deviation * deviation / (size * static_cast<double>(columns - n));
  return {score >= 0 ? score : -1, n};
}

// A power of two that brings the largest magnitude of a row near 1, for doubles that might leave their range; floats
// never do. It is a normal number.
__device__ inline double range_factor(double first, double last) {
  const double largest = max(fabs(first), fabs(last));
  return largest > 0 ? ldexp(1.0, max(-1022, min(1023, -ilogb(largest)))) : 1.0;
}
__device__ inline double range_factor(float, float) { return 1.0; }

// In a bitonic sort's step, whether this position keeps the larger of the pair: `size` is the run being merged
// (descending where position & size is 0), `stride` the distance to the partner.
__device__ inline bool keeps_larger(int position, int size, int stride) {
  return ((position & size) == 0) == ((position & stride) == 0);
}

// A warp for each row, a value for each lane: everything stays in registers.
template <typename T>
__global__ void otsu_warp(const T* values, int64_t rows, int columns, int64_t row_stride, int last_split, uint8_t* mask,
                          int64_t* count, T* threshold) {
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarp;
  if (row >= rows) return;  // whole warps return together
  const bool inside = lane < columns;
  const T value = inside ? values[row * row_stride + lane] : -static_cast<T>(INFINITY);
  if (!__all_sync(kAllLanes, !inside || isfinite(value))) {
    if (inside) mask[row * columns + lane] = 0;
    if (lane == 0) {
      count[row] = 0;
      threshold[row] = static_cast<T>(NAN);
    }
    return;
  }

  T sorted = value;
  for (int size = 2; size <= kWarp; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const T other = __shfl_xor_sync(kAllLanes, sorted, stride);
      sorted = keeps_larger(lane, size, stride) ? max(sorted, other) : min(sorted, other);
    }
  }

  const double factor = range_factor(__shfl_sync(kAllLanes, sorted, 0), __shfl_sync(kAllLanes, sorted, columns - 1));
  double total = 0, prefix = 0;
  for (int j = 0; j < columns; ++j) {
    total += static_cast<double>(__shfl_sync(kAllLanes, sorted, j)) * factor;
    if (j == lane) prefix = total;
  }
  Split best = score_split(prefix, total, lane + 1, columns, last_split);
  for (int stride = kWarp / 2; stride > 0; stride /= 2) {
    best = better(best, {__shfl_xor_sync(kAllLanes, best.score, stride), __shfl_xor_sync(kAllLanes, best.n, stride)});
  }

  const T least = __shfl_sync(kAllLanes, sorted, best.n - 1);
  const bool relevant = inside && value >= least;
  const unsigned votes = __ballot_sync(kAllLanes, relevant);
  if (inside) mask[row * columns + lane] = relevant;
  if (lane == 0) {
    count[row] = __popc(votes);
    threshold[row] = least;
  }
}

// A block for each row, a value for each thread; blockDim.x is a power of two, at least the row's length.
template <typename T>
__global__ void otsu_block(const T* values, int columns, int64_t row_stride, int last_split, uint8_t* mask,
                           int64_t* count, T* threshold) {
  __shared__ T sorted[kOtsuCudaMaxColumns];
  __shared__ double prefix[kOtsuCudaMaxColumns];
  __shared__ Split splits[kOtsuCudaMaxColumns];
  const int position = static_cast<int>(threadIdx.x), width = static_cast<int>(blockDim.x);
  const int64_t row = blockIdx.x;
  const bool inside = position < columns;
  const T value = inside ? values[row * row_stride + position] : -static_cast<T>(INFINITY);
  if (!__syncthreads_and(!inside || isfinite(value))) {
    if (inside) mask[row * columns + position] = 0;
    if (position == 0) {
      count[row] = 0;
      threshold[row] = static_cast<T>(NAN);
    }
    return;
  }

  sorted[position] = value;
  __syncthreads();
  for (int size = 2; size <= width; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const T own = sorted[position], other = sorted[position ^ stride];
      __syncthreads();
      sorted[position] = keeps_larger(position, size, stride) ? max(own, other) : min(own, other);
      __syncthreads();
    }
  }

  if (position == 0) {
    const double factor = range_factor(sorted[0], sorted[columns - 1]);
    double total = 0;
    for (int j = 0; j < columns; ++j) prefix[j] = total += static_cast<double>(sorted[j]) * factor;
  }
  __syncthreads();
  splits[position] = score_split(inside ? prefix[position] : 0, prefix[columns - 1], position + 1, columns, last_split);
  __syncthreads();
  for (int stride = width / 2; stride > 0; stride /= 2) {
    if (position < stride) splits[position] = better(splits[position], splits[position + stride]);
    __syncthreads();
  }

  const T least = sorted[splits[0].n - 1];
  const bool relevant = inside && value >= least;
  const int size = __syncthreads_count(relevant);
  if (inside) mask[row * columns + position] = relevant;
  if (position == 0) {
    count[row] = size;
    threshold[row] = least;
  }
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // otherwise the next caller would get this error
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

// Makes `device` the current one during its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_));
    if (device != previous_) {
      check(cudaSetDevice(device));
      changed_ = true;
    }
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

}  // namespace

template <typename T>
void otsu_cuda(const T* values, int64_t rows, int64_t columns, int64_t row_stride, int64_t max_relevant, uint8_t* mask,
               int64_t* count, T* threshold, int device, void* stream) {
  if (rows <= 0) return;
  if (columns < 1 || columns > kOtsuCudaMaxColumns || rows > INT_MAX) {
    throw std::invalid_argument("otsu: CUDA takes 1 to 1024 columns and fewer than 2^31 rows");
  }
  const DeviceGuard guard(device);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int width = static_cast<int>(columns);
  const int last_split = max_relevant > 0 && max_relevant < columns ? static_cast<int>(max_relevant) : width - 1;
  if (width <= kWarp) {
    const auto blocks = static_cast<unsigned>((rows + kWarpsPerBlock - 1) / kWarpsPerBlock);
    otsu_warp<<<blocks, kWarpsPerBlock * kWarp, 0, queue>>>(values, rows, width, row_stride, last_split, mask, count,
                                                            threshold);
  } else {
    unsigned threads = 2 * kWarp;
    while (threads < static_cast<unsigned>(width)) threads *= 2;
    otsu_block<<<static_cast<unsigned>(rows), threads, 0, queue>>>(values, width, row_stride, last_split, mask, count,
                                                                   threshold);
  }
  check(cudaGetLastError());
}

std::string otsu_cuda_refusal(int device) {
  try {
    const DeviceGuard guard(device);
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, otsu_warp<float>));
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

template void otsu_cuda(const float*, int64_t, int64_t, int64_t, int64_t, uint8_t*, int64_t*, float*, int, void*);
template void otsu_cuda(const double*, int64_t, int64_t, int64_t, int64_t, uint8_t*, int64_t*, double*, int, void*);

}  // namespace ecore
