// Driver of csrc/simd/edge_attention.h for sequences: a head of a sequence is a graph without edges.
#include "varlen_attention_cpu.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "parts.h"
#include "simd/choice.h"
#include "thread_pool.h"
#include "workspace.h"

namespace ecore {
namespace {

template <typename T>
const EdgeAttentionKernels<T>& kernels() {
  if constexpr (std::is_same_v<T, float>) {
    return simd().edge_attention_float;
  } else {
    return simd().edge_attention_double;
  }
}

template <typename T>
Rows<T> from(const PerHead<T>& tensor, int64_t row, int64_t head) {
  return {tensor.at(row, head), tensor.row};
}

// One head of keys of one sequence, and the heads that hear it.
template <typename T>
struct Piece {
  int64_t row, key_row;     // its first rows
  int64_t key_head, first;  // its number, and that of the first head that hears it
  EdgeHead<T> head;         // without queries
};

template <typename T>
class Pieces {
 public:
  explicit Pieces(const VarlenAttention<T>& call)
      : call_(call),
        sharing(call.heads / std::max<int64_t>(call.key_heads, 1)),
        count(call.sequences * call.key_heads) {
    for (int64_t s = 0; s < call.sequences; ++s) {
      longest_ = std::max(longest_, call.begin[s + 1] - call.begin[s]);
      longest_keys_ = std::max(longest_keys_, call.key_begin[s + 1] - call.key_begin[s]);
    }
    order_.resize(static_cast<size_t>(std::max(longest_, longest_keys_)));
    std::iota(order_.begin(), order_.end(), 0);
  }
  Piece<T> of(int64_t index) const {
    const int64_t s = index / call_.key_heads, h = index % call_.key_heads;
    const int64_t row = call_.begin[s], key_row = call_.key_begin[s];
    EdgeHead<T> head = sized(call_.begin[s + 1] - row, call_.key_begin[s + 1] - key_row);
    head.key = from(call_.key, key_row, h);
    head.value = from(call_.value, key_row, h);
    return {row, key_row, h, h * sharing, head};
  }
  EdgeHead<T> largest() const { return sized(longest_, longest_keys_); }
  // Where the maximum and the inverse of a head's first row lie.
  int64_t statistics(const Piece<T>& piece, int64_t head) const { return head * call_.rows + piece.row; }

 private:
  EdgeHead<T> sized(int64_t receivers, int64_t senders) const {
    EdgeHead<T> head = {};
    head.receivers = receivers;
    head.senders = senders;
    head.dim = call_.dim;
    head.value_dim = call_.value_dim;
    head.order = order_.data();
    head.scale = call_.scale;
    head.more.plain = true;
    head.causal = call_.causal;
    return head;
  }

  const VarlenAttention<T>& call_;
  int64_t longest_ = 0, longest_keys_ = 0;
  std::vector<int32_t> order_;

 public:
  const int64_t sharing, count;
};

template <typename T>
void clear(const Rows<T>& rows, int64_t count, int64_t width) {
  for (int64_t i = 0; rows.data != nullptr && i < count; ++i) {
    std::fill_n(rows.data + i * rows.stride, width, static_cast<T>(0));
  }
}

void check_begins(const char* name, const int64_t* begin, int64_t sequences, int64_t rows) {
  bool fits = begin[0] == 0 && begin[sequences] == rows;
  for (int64_t s = 0; s < sequences; ++s) fits &= begin[s] <= begin[s + 1];
  if (!fits) {
    throw std::invalid_argument(std::string("varlen_attention: ") + name + ": expected ascending numbers from 0 to " +
                                std::to_string(rows) + ", the number of rows");
  }
}

}  // namespace

template <typename T>
void check_sequences(const VarlenAttention<T>& call) {
  check_begins("offsets", call.begin, call.sequences, call.rows);
  check_begins("key_offsets", call.key_begin, call.sequences, call.key_rows);
}

template <typename T>
void varlen_attention_forward(const VarlenAttention<T>& call, PerHead<T> output, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const Pieces<T> pieces(call);
  parallel_tasks(pieces.count, threads, [&](Tasks& tasks) {
    const Workspace<T> packed(kernel.packed_size(pieces.largest(), false));
    const Workspace<T> scratch(kernel.scratch(pieces.largest(), false));
    for (int64_t index; tasks.next(&index);) {
      const Piece<T> piece = pieces.of(index);
      EdgeHead<T> head = piece.head;
      if (head.receivers == 0) continue;
      if (head.senders > 0) kernel.pack(head, false, 0, head.senders, packed.get());
      for (int64_t h = piece.first; h < piece.first + pieces.sharing; ++h) {
        head.query = from(call.query, piece.row, h);
        const int64_t at = pieces.statistics(piece, h);
        kernel.forward(head, packed.get(), 0, head.receivers, scratch.get(), from(output, piece.row, h), nullptr,
                       call.maximum + at, call.inverse + at);
      }
    }
  });
}

template <typename T>
void varlen_attention_backward(const VarlenAttention<T>& call, PerHead<const T> output, PerHead<const T> grad_output,
                               PerHead<T> grad_query, PerHead<T> grad_key, PerHead<T> grad_value, int threads) {
  const EdgeAttentionKernels<T>& kernel = kernels<T>();
  const Pieces<T> pieces(call);
  const int64_t most_parts = pieces.sharing * parts_of(pieces.largest().receivers);
  parallel_tasks(pieces.count, threads, [&](Tasks& tasks) {
    const Workspace<T> packed(kernel.packed_size(pieces.largest(), true));
    const Workspace<T> scratch(kernel.scratch(pieces.largest(), true));
    const Workspace<T> sums(most_parts * kernel.sums_size(pieces.largest()));
    for (int64_t index; tasks.next(&index);) {
      const Piece<T> piece = pieces.of(index);
      EdgeHead<T> head = piece.head;
      const int64_t receivers = head.receivers, senders = head.senders;
      EdgeGradients<T> to = {};
      to.key = from(grad_key, piece.key_row, piece.key_head);
      to.value = from(grad_value, piece.key_row, piece.key_head);
      if (receivers == 0) {
        clear(to.key, senders, call.dim);
        clear(to.value, senders, call.value_dim);
        continue;
      }
      if (senders > 0) kernel.pack(head, true, 0, senders, packed.get());
      // Every head that shares the keys adds its own parts to their gradients.
      const int64_t parts = parts_of(receivers), all_parts = pieces.sharing * parts, size = kernel.sums_size(head);
      T* own = sums.get();
      for (int64_t h = piece.first; h < piece.first + pieces.sharing; ++h) {
        head.query = from(call.query, piece.row, h);
        to.query = from(grad_query, piece.row, h);
        if (senders == 0) {
          clear(to.query, receivers, call.dim);
          continue;
        }
        const int64_t at = pieces.statistics(piece, h);
        for (int64_t part = 0; part < parts; ++part, own += size) {
          kernel.backward(head, packed.get(), receivers * part / parts, receivers * (part + 1) / parts, scratch.get(),
                          from(output, piece.row, h), from(grad_output, piece.row, h), {}, nullptr, call.maximum + at,
                          call.inverse + at, to, all_parts == 1, own);
        }
      }
      if (senders > 0) kernel.finish(head, sums.get(), all_parts, 0, senders, to);
    }
  });
}

template void check_sequences(const VarlenAttention<float>&);
template void check_sequences(const VarlenAttention<double>&);
template void varlen_attention_forward(const VarlenAttention<float>&, PerHead<float>, int);
template void varlen_attention_forward(const VarlenAttention<double>&, PerHead<double>, int);
template void varlen_attention_backward(const VarlenAttention<float>&, PerHead<const float>, PerHead<const float>,
                                        PerHead<float>, PerHead<float>, PerHead<float>, int);
template void varlen_attention_backward(const VarlenAttention<double>&, PerHead<const double>, PerHead<const double>,
                                        PerHead<double>, PerHead<double>, PerHead<double>, int);

}  // namespace ecore
