// What is done to one row at a time: norms, activations, embedding, argmax.
#pragma once
#include <cmath>
#include <limits>

#include "linear.hpp"

namespace eh {

// Sum of squares in lanes, so that the order is the same everywhere. n is a multiple of nothing.
inline float mean_square(const float* x, long n) {
  Vec acc{};
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i);
    acc = fma(v, v, acc);
  }
  float rest = 0;
  for (; i < n; ++i) rest += x[i] * x[i];
  return (sum(acc) + rest) / float(n);
}

template <class A>
inline void rms_norm(const float* x, const float* weight, float epsilon, long n, A* out) {
  const float scale = 1.0f / std::sqrt(mean_square(x, n) + epsilon);
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) store_as(out + i, load(x + i) * scale * load(weight + i));
  for (; i < n; ++i) put(out + i, x[i] * scale * weight[i]);
}

inline void add_rows(const float* x, const float* y, long n, float* out) {
  long i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) + load(y + i));
  for (; i < n; ++i) out[i] = x[i] + y[i];
}

enum class Activation : int { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

inline Vec activate(Activation kind, Vec x) {
  switch (kind) {
    case Activation::kSilu: return x / (1.0f + exp(-x));
    case Activation::kGeluTanh: return 0.5f * x * (1.0f + tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
    case Activation::kGelu: break;
  }
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
  return out;
}

// x: gate [n] then up [n]. Rows are padded to whole vectors, what is computed there is never read.
template <class A>
inline void gated(Activation kind, const float* x, long n, A* out) {
  float last[kLanes];
  for (long i = 0; i < n; i += kLanes) {
    const Vec value = activate(kind, load(x + i)) * load(x + n + i);
    if (i + kLanes <= n) {
      store_as(out + i, value);
      continue;
    }
    store(last, value);
    for (long j = i; j < n; ++j) put(out + j, last[j - i]);
  }
}

// Row `token` of an embedding: plain rows, or the packed weights of a tied head.
template <class W>
inline void embed_plain(const W* table, long width, long token, float scale, float* out) {
  for (long i = 0; i < width; ++i) out[i] = get(table + token * width + i) * scale;
}
template <class W>
inline void embed_packed(const W* packed, long vocab, long width, long token, float scale, float* out) {
  const W* from = packed + packed_index<W>(vocab, width, token, 0);
  const long row = group_width(vocab, token / kGroup);
  if constexpr (sizeof(W) == 4)
    for (long i = 0; i < width; ++i) out[i] = get(from + i * row) * scale;
  else
    for (long i = 0; i < width; ++i) out[i] = get(from + i / 2 * row * 2 + i % 2) * scale;
}

// Index of the largest of x[0:n], the first one among equals; the first not-a-number if there is one.
inline long argmax(const float* x, long n) {
  Vec best = splat(-std::numeric_limits<float>::infinity());
  VecInt where{}, at;
  for (int i = 0; i < kLanes; ++i) at[i] = i;
  long i = 0;
  for (; i + kLanes <= n; i += kLanes, at += kLanes) {
    const Vec v = load(x + i);
    const VecInt better = (v > best) | ((v != v) & (best == best));
    best = select(better, v, best);
    where = (at & better) | (where & ~better);
  }
  long found = 0;
  float highest = -std::numeric_limits<float>::infinity();
  auto consider = [&](float value, long index) {
    const bool broken = value != value, known_broken = highest != highest;
    if (broken ? (!known_broken || index < found)
               : !known_broken && (value > highest || (value == highest && index < found)))
      highest = value, found = index;
  };
  for (int lane = 0; lane < kLanes; ++lane) consider(best[lane], where[lane]);
  for (; i < n; ++i) consider(x[i], i);
  return found;
}

}  // namespace eh
