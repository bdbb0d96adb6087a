// Shared parts of the bindings: how tensors arrive, and forwards that are bound to a layout.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <tuple>
#include <vector>

#include "../emotion_graph.h"

namespace py = pybind11;

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// A [B, K, N, d] tensor: its address, and its strides over B, K and N in elements. Address 0: not wanted.
using HeadsTuple = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;
template <typename T>
ecore::Heads<T> heads(const HeadsTuple& tensor) {
  const auto [address, batch, head, row] = tensor;
  return {pointer<T>(address), batch, head, row};
}

template <typename T>
std::vector<ecore::Heads<T>> heads(const std::vector<HeadsTuple>& tensors) {
  std::vector<ecore::Heads<T>> result;
  for (const HeadsTuple& tensor : tensors) result.push_back(heads<T>(tensor));
  return result;
}

// A forward bound to a layout is a function of addresses: sizes and strides, most of the arguments, arrive once.
// Results are in the order of the registered operator; those for the backward only may have address 0.
using Unlocked = py::call_guard<py::gil_scoped_release>;
using Addresses = std::vector<uintptr_t>;

// Planes that a forward saves for the backward, [planes, size]: at the caller's address, or for address 0 in memory of
// their own.
template <typename T>
struct Planes {
  Planes(uintptr_t address, int64_t planes, int64_t plane_size)
      : own(address == 0 ? new T[planes * plane_size] : nullptr),
        first(address == 0 ? own.get() : pointer<T>(address)),
        size(plane_size) {}
  T* operator[](int64_t plane) const { return first + plane * size; }

  std::unique_ptr<T[]> own;  // uninitialised
  T* first;
  int64_t size;
};

// r = prod_m gate^m edge_scale^m, [size], or null. Addresses of gates, then of edge scales. A gate with address 0 is
// left out; an edge scale with address 0 is 1.
template <typename T>
class RowFactor {
 public:
  RowFactor(const Addresses& gates_and_scales, int64_t size) {
    const size_t layers = gates_and_scales.size() / 2;
    for (size_t layer = 0; layer < layers; ++layer) {
      const T* gate = pointer<const T>(gates_and_scales[layer]);
      const T* scale = pointer<const T>(gates_and_scales[layers + layer]);
      if (gate == nullptr) continue;
      if (data == nullptr && scale == nullptr) {
        data = gate;
        continue;
      }
      const T* before = data;
      const T one = scale == nullptr ? T{1} : *scale;
      product_.resize(size);
      // In PyTorch's order, so that results are the same bits with a gradient and without.
      for (int64_t i = 0; i < size; ++i) product_[i] = before == nullptr ? gate[i] * one : before[i] * (gate[i] * one);
      data = product_.data();
    }
  }

  const T* data = nullptr;

 private:
  std::vector<T> product_;
};

// The files of bindings, one for each family of operators.
void bind_emotion_graph(py::module_& module);  // graph_attention, edge_readout
void bind_attention(py::module_& module);      // edge_attention, sparse_attention
void bind_training(py::module_& module);       // linear_cross_entropy's rows, dropout_add_layer_norm
void bind_quantized_linear(py::module_& module);
