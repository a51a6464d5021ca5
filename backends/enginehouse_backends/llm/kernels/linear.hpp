// y = x W^T with packed weights. Groups of 3 * kLanes outputs lie together: [group][k][outputs of the group]
// (bf16: pairs of k side by side), so that a group is one stream of memory, read once for all rows.
// Every output is summed over k in order, whatever the number of rows: results don't depend on the batch.
#pragma once
#include "simd.hpp"

namespace eh {

constexpr int kGroup = 3 * kLanes;
constexpr long kDepth = 512;  // k values of a group that stay in the cache while all rows pass

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

template <int kRows, int kVecs>
inline void tile(const float* a, long lda, const float* b, long k, float* c, long ldc, bool first) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = first ? Vec{} : load(c + r * ldc + v * kLanes);
  for (long i = 0; i < k; ++i, b += kVecs * kLanes) {
    Vec w[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      w[v] = load(b + v * kLanes);
      __builtin_prefetch(b + v * kLanes + 16 * kVecs * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(a[r * lda + i]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] += x * w[v];
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

inline Vec add_pairs(Vec acc, VecBits weights, uint32_t pair) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)weights, (__m512bh)_mm512_set1_epi32(int(pair)));
#else
  acc += (Vec)(weights << 16) * to_float(bf16(pair));
  return acc + (Vec)(weights & 0xffff0000u) * to_float(bf16(pair >> 16));
#endif
}

template <int kRows, int kVecs>
inline void tile(const bf16* a, long lda, const bf16* b, long k, float* c, long ldc, bool first) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = first ? Vec{} : load(c + r * ldc + v * kLanes);
  for (long i = 0; i < k; i += 2, b += 2 * kVecs * kLanes) {
    VecBits w[kVecs];
    for (int v = 0; v < kVecs; ++v) {
      w[v] = load_bits(b + 2 * v * kLanes);
      __builtin_prefetch(b + 2 * v * kLanes + 32 * kVecs * kLanes);
    }
    for (int r = 0; r < kRows; ++r) {
      uint32_t pair;
      std::memcpy(&pair, a + r * lda + i, 4);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = add_pairs(acc[r][v], w[v], pair);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <class W, int kVecs>
inline void tile_rows(int rows, const W* a, long lda, const W* b, long k, float* c, long ldc, bool first) {
  switch (rows) {
    case 1: return tile<1, kVecs>(a, lda, b, k, c, ldc, first);
    case 2: return tile<2, kVecs>(a, lda, b, k, c, ldc, first);
    case 3: return tile<3, kVecs>(a, lda, b, k, c, ldc, first);
    case 4: return tile<4, kVecs>(a, lda, b, k, c, ldc, first);
    case 5: return tile<5, kVecs>(a, lda, b, k, c, ldc, first);
    case 6: return tile<6, kVecs>(a, lda, b, k, c, ldc, first);
    case 7: return tile<7, kVecs>(a, lda, b, k, c, ldc, first);
    default: return tile<8, kVecs>(a, lda, b, k, c, ldc, first);
  }
}

// One group of outputs for `rows` rows. x: [rows, lda], y: [rows, ldy] at the group's first output.
template <class W>
inline void linear_group(const W* x, long lda, const W* weights, long n, long k, long group, long rows, float* y,
                         long ldy, const float* bias) {
  const int width = group_width(n, group);
  const long depth = padded_depth(k);
  const W* b = weights + group * kGroup * depth;
  const long step = rows <= 8 ? depth : kDepth;
  for (long start = 0; start < depth; start += step) {
    const long count = start + step < depth ? step : depth - start;
    for (long row = 0; row < rows; row += 8) {
      const int some = int(rows - row < 8 ? rows - row : 8);
      const W *a = x + row * lda + start, *w = b + start * width;
      float* c = y + row * ldy;
      if (width == 3 * kLanes)
        tile_rows<W, 3>(some, a, lda, w, count, c, ldy, start == 0);
      else if (width == 2 * kLanes)
        tile_rows<W, 2>(some, a, lda, w, count, c, ldy, start == 0);
      else
        tile_rows<W, 1>(some, a, lda, w, count, c, ldy, start == 0);
    }
  }
  if (!bias) return;
  for (long row = 0; row < rows; ++row)
    for (int i = 0; i < width; i += kLanes) store(y + row * ldy + i, load(y + row * ldy + i) + load(bias + i));
}

}  // namespace eh
