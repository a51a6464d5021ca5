// y = x W^T with packed weights. Groups of 3 * kLanes outputs lie together: [group][k][outputs of the group]
// (bf16: pairs of k side by side), so that a group is one stream of memory, read once for all rows.
// Every output is summed over k in order, whatever the number of rows: results don't depend on the batch.
#pragma once
#include <algorithm>
#include <type_traits>

#include "simd.hpp"

namespace eh {

constexpr int kGroup = 3 * kLanes;

inline long padded(long n) { return (n + kLanes - 1) / kLanes * kLanes; }
inline long num_groups(long n) { return (padded(n) + kGroup - 1) / kGroup; }
inline int group_width(long n, long group) {
  const long rest = padded(n) - group * kGroup;
  return int(rest < kGroup ? rest : kGroup);
}
inline long padded_depth(long k) { return (k + 1) / 2 * 2; }

// Element (output n, input k) of packed weights.
template <class W>
inline long packed_index(long n_total, long k_total, long n, long k) {
  const long group = n / kGroup, lane = n % kGroup;
  const long width = group_width(n_total, group), start = group * kGroup * padded_depth(k_total);
  if (sizeof(W) == 4) return start + k * width + lane;
  return start + (k / 2) * width * 2 + lane * 2 + k % 2;
}

// What a tile brings to the cache meanwhile: its own weights, some way ahead, or a share of what comes after them.
struct Ahead {
  const char* from = nullptr;
  long step = 0;  // bytes for each iteration
};

template <int kBytes, bool kOwn>
inline void prefetch(const void* weights, const Ahead& ahead, long iteration) {
  if constexpr (kOwn)
    for (int line = 0; line < kBytes; line += 64)
      __builtin_prefetch(static_cast<const char*>(weights) + 16 * kBytes + line);
  else
    __builtin_prefetch(ahead.from + iteration * ahead.step, 0, 2);
}

// Sums of kRows rows of x with kVecs vectors of outputs over k inputs, continued from c unless it is the first part.
template <int kRows, int kVecs, bool kOwn>
inline void tile(const float* a, long lda, const float* b, long k, float* c, long ldc, bool first, Ahead ahead) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = first ? Vec{} : load(c + r * ldc + v * kLanes);
  for (long i = 0; i < k; ++i, b += kVecs * kLanes) {
    Vec w[kVecs];
    for (int v = 0; v < kVecs; ++v) w[v] = held(load(b + v * kLanes));
    prefetch<kVecs * kLanes * 4, kOwn>(b, ahead, i);
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(a[r * lda + i]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, w[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

// The two values of each pair of bf16, as floats.
inline Vec low_half(VecBits pairs) { return (Vec)(pairs << 16); }
inline Vec high_half(VecBits pairs) { return (Vec)(pairs & 0xffff0000u); }

#if defined(__AVX512BF16__)
inline Vec add_pairs(Vec acc, VecBits weights, const bf16* x) {
  uint32_t pair;
  std::memcpy(&pair, x, 4);
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int(pair)));
}
#endif

template <int kRows, int kVecs, bool kOwn, class A>
inline void tile(const A* a, long lda, const bf16* b, long k, float* c, long ldc, bool first, Ahead ahead) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = first ? Vec{} : load(c + r * ldc + v * kLanes);
  for (long i = 0; i < k; i += 2, b += 2 * kVecs * kLanes) {
    prefetch<kVecs * kLanes * 4, kOwn>(b, ahead, i / 2);
    if constexpr (std::is_same_v<A, float>) {
      Vec half[kVecs];
      for (int v = 0; v < kVecs; ++v) half[v] = held(low_half(load_bits(b + 2 * v * kLanes)));
      for (int r = 0; r < kRows; ++r) {
        const Vec x = splat(a[r * lda + i]);
        for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, half[v], acc[r][v]);
      }
      for (int v = 0; v < kVecs; ++v) half[v] = held(high_half(load_bits(b + 2 * v * kLanes)));
      for (int r = 0; r < kRows; ++r) {
        const Vec x = splat(a[r * lda + i + 1]);
        for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, half[v], acc[r][v]);
      }
    } else {
      VecBits w[kVecs];
      for (int v = 0; v < kVecs; ++v) w[v] = load_bits(b + 2 * v * kLanes);
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVecs; ++v) acc[r][v] = add_pairs(acc[r][v], w[v], a + r * lda + i);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <int kVecs, bool kOwn, int kRows = kTileRows, class A, class W>
inline void tile_rows(int rows, const A* a, long lda, const W* b, long k, float* c, long ldc, bool first,
                      Ahead ahead) {
  if constexpr (kRows > 1)
    if (rows < kRows) return tile_rows<kVecs, kOwn, kRows - 1>(rows, a, lda, b, k, c, ldc, first, ahead);
  tile<kRows, kVecs, kOwn>(a, lda, b, k, c, ldc, first, ahead);
}

// All rows with one part of a group's weights, which stay in the nearest cache. Of `next`, the part that follows,
// each tile brings its share to the second cache.
template <int kVecs, class A, class W>
inline void pass_rows(const A* a, long lda, const W* b, long k, long rows, float* c, long ldc, bool first,
                      const void* next, long next_bytes) {
  const long iterations = (rows + kTileRows - 1) / kTileRows * (sizeof(W) == 4 ? k : k / 2);
  Ahead ahead{static_cast<const char*>(next), next_bytes / iterations + 1};
  for (long row = 0; row < rows; row += kTileRows, ahead.from += ahead.step * (sizeof(W) == 4 ? k : k / 2))
    tile_rows<kVecs, false>(int(rows - row < kTileRows ? rows - row : kTileRows), a + row * lda, lda, b, k,
                            c + row * ldc, ldc, first, ahead);
}

// bf16 weights as floats.
template <int kVecs>
inline void spread(const bf16* b, long k, float* out) {
  for (long i = 0; i < k; i += 2, b += 2 * kVecs * kLanes, out += 2 * kVecs * kLanes)
    for (int v = 0; v < kVecs; ++v) {
      const VecBits pairs = load_bits(b + 2 * v * kLanes);
      store(out + v * kLanes, low_half(pairs));
      store(out + (kVecs + v) * kLanes, high_half(pairs));
    }
}

// Inputs of a group whose weights stay in the nearest cache while all rows pass.
constexpr long kDepth = kLanes == 8 ? 192 : 512;
constexpr long kInputBytes = 192 << 10;  // of x, to stay in the second cache while groups pass

template <int kVecs, class A, class W>
inline void linear_vecs(const A* x, long lda, const W* b, long depth, long rows, float* y, long ldy, bool first,
                        const W* next) {
  if (rows <= kTileRows) return tile_rows<kVecs, true>(int(rows), x, lda, b, depth, y, ldy, first, Ahead{});
  for (long start = 0; start < depth; start += kDepth, first = false) {
    const long count = start + kDepth < depth ? kDepth : depth - start;
    const W *part = b + start * kVecs * kLanes, *after = start + kDepth < depth ? part + count * kVecs * kLanes : next;
    const long bytes = kDepth * kVecs * kLanes * sizeof(W);
    if constexpr (sizeof(W) < sizeof(A)) {
      // spread out once for all rows
      alignas(64) static thread_local float room[kDepth * kGroup];
      spread<kVecs>(part, count, room);
      pass_rows<kVecs>(x + start, lda, static_cast<const float*>(room), count, rows, y, ldy, first, after, bytes);
    } else {
      pass_rows<kVecs>(x + start, lda, part, count, rows, y, ldy, first, after, bytes);
    }
  }
}

// Groups first … stop - 1 of the outputs for `rows` rows. x: [rows, lda], y: [rows, ldy].
template <class A, class W>
inline void linear_groups(const A* x, long lda, const W* weights, long n, long k, long first, long stop, long rows,
                          float* y, long ldy) {
  const long depth = padded_depth(k);
  const long fitting = kInputBytes / (rows * long(sizeof(A))) / kDepth * kDepth;
  const long slice = rows <= kTileRows ? depth : std::max(fitting, kDepth);
  for (long start = 0; start < depth; start += slice) {
    const long count = start + slice < depth ? slice : depth - start;
    for (long g = first; g < stop; ++g) {
      const int width = group_width(n, g);
      const W* b = weights + g * kGroup * depth + start * width;
      const W* next = g + 1 < stop ? weights + (g + 1) * kGroup * depth + start * group_width(n, g + 1)
                                   : weights + first * kGroup * depth + (start + slice) * group_width(n, first);
      float* out = y + g * kGroup;
      if (width == 3 * kLanes)
        linear_vecs<3>(x + start, lda, b, count, rows, out, ldy, start == 0, next);
      else if (width == 2 * kLanes)
        linear_vecs<2>(x + start, lda, b, count, rows, out, ldy, start == 0, next);
      else
        linear_vecs<1>(x + start, lda, b, count, rows, out, ldy, start == 0, next);
    }
  }
}

inline void add_bias(const float* bias, long n, long first, long stop, long rows, float* y, long ldy) {
  const long last = std::min(stop * kGroup, padded(n));
  for (long row = 0; row < rows; ++row)
    for (long i = first * kGroup; i < last; i += kLanes)
      store(y + row * ldy + i, load(y + row * ldy + i) + load(bias + i));
}

}  // namespace eh
