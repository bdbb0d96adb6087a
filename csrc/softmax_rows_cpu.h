// Passes over the logits of a linear layer for its cross entropy: sums over every row, then the rows' errors in place.
//
// Rows are contiguous. Smoothing spreads `base` over all classes but `hole` (-1 for none) and adds `extra` at the
// target.
#pragma once

#include <cstdint>

namespace ecore {

template <typename T>
struct LogitRows {
  T* logits;  // [rows, classes]
  int64_t rows, classes;
  int64_t hole;
};

// Adds `offset` [classes] to every row, unless it is null: a product that began with it would write the logits once
// more. Then for each row its maximum, one over the sum of exp(logit - maximum), and, unless `mean` is null, the mean
// of the logits but the hole's.
template <typename T>
void softmax_row_sums(const LogitRows<T>& of, const T* offset, T* maximum, T* inverse, T* mean, int threads);

// logits <- factor * softmax - goal, with the sums from above; factor [rows], target [rows].
template <typename T>
void softmax_row_errors(const LogitRows<T>& of, const T* maximum, const T* inverse, const T* factor,
                        const int64_t* target, double base, double extra, int threads);

}  // namespace ecore
