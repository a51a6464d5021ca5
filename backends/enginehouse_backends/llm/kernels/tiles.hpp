// Products of bf16 with the processor's tiles (Intel AMX): an instruction multiplies 16 rows of 32 inputs with 16
// outputs. Packed weights are what its second operand wants: 16 pairs of inputs of 16 outputs, a pair's outputs of the
// whole group side by side; so are the keys and the values of a block.
//
// A row's sums are built alike whatever the number of rows, but not as the other kernels build them: where there are
// tiles all products of bf16 go through here, those of a single row too.
#pragma once
#include "linear.hpp"

#if defined(__AMX_BF16__) && defined(__AMX_TILE__) && defined(__AVX512BF16__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define EH_TILES

namespace eh {

constexpr bool kBuiltForTiles = true;
constexpr int kTileSide = 16;  // rows of x, and outputs
constexpr int kTileInputs = 32;
constexpr int kTilePairs = kTileInputs / 2;

// The kernel gives a process its tiles' registers when asked; a sandbox may refuse.
inline bool has_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

constexpr long kAheadElements = 4096;  // weights that are brought before they are needed

struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Gives tile i rows_of(i) rows of 64 bytes.
template <class RowsOf>
inline void shape_by(RowsOf rows_of) {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.rows[i] = uint8_t(rows_of(i));
    shapes.row_bytes[i] = 64;
  }
  // GCC's headers say less than the instruction reads
  asm volatile("" : : "r"(&shapes) : "memory");
  _tile_loadconfig(&shapes);
  asm volatile("" : : "r"(&shapes) : "memory");
}

// Tiles 0 to 5: sums, three vectors of outputs of the first rows and of the second ones; 6: rows of x; 7: weights. With
// one tile of rows 3 to 5 are the weights.
inline void shape_tiles(int rows) {
  const bool two = rows == 2 * kTileSide;
  shape_by([=](int i) { return two || (i >= 3 && i != 6) ? kTileSide : rows; });
}

// Brings the weights of a step to a cache.
template <int kVecs, int kCache>
inline void prefetch_step(const bf16* b) {
  for (int line = 0; line < kVecs * kTileSide; ++line) __builtin_prefetch(b + line * 32, 0, kCache);
}

// Up to 16 rows with kVecs vectors of outputs. Strides in elements.
template <int kVecs>
inline void tiles_one(const bf16* x, long lda, const bf16* b, long b_stride, long steps) {
  for (long i = 0; i < steps; ++i, x += kTileInputs, b += kTilePairs * b_stride) {
    prefetch_step<kVecs, 3>(b + kTilePairs * b_stride);
    _tile_loadd(6, x, lda * 2);
    _tile_loadd(3, b, b_stride * 2);
    _tile_dpbf16ps(0, 6, 3);
    if constexpr (kVecs > 1) {
      _tile_loadd(4, b + 2 * kTileSide, b_stride * 2);
      _tile_dpbf16ps(1, 6, 4);
    }
    if constexpr (kVecs > 2) {
      _tile_loadd(5, b + 4 * kTileSide, b_stride * 2);
      _tile_dpbf16ps(2, 6, 5);
    }
  }
}

// 32 rows: each half passes the weights that the other one has just used. With kAhead it brings those that come so
// much later.
template <int kVecs, long kAhead>
inline void tiles_two(const bf16* x, long lda, const bf16* b, long b_stride, long steps) {
  const bf16* y = x + kTileSide * lda;
  for (long i = 0; i < steps; ++i, x += kTileInputs, y += kTileInputs, b += kTilePairs * b_stride) {
    if constexpr (kAhead) prefetch_step<kVecs, 2>(b + kAhead);
    _tile_loadd(7, b, b_stride * 2);
    _tile_loadd(6, x, lda * 2);
    _tile_dpbf16ps(0, 6, 7);
    if constexpr (kVecs == 1) {
      _tile_loadd(6, y, lda * 2);
      _tile_dpbf16ps(3, 6, 7);
    } else {
      _tile_loadd(6, y, lda * 2);
      _tile_dpbf16ps(3, 6, 7);
      _tile_loadd(7, b + 2 * kTileSide, b_stride * 2);
      _tile_dpbf16ps(4, 6, 7);
      _tile_loadd(6, x, lda * 2);
      _tile_dpbf16ps(1, 6, 7);
    }
    if constexpr (kVecs > 2) {
      _tile_loadd(7, b + 4 * kTileSide, b_stride * 2);
      _tile_dpbf16ps(2, 6, 7);
      _tile_loadd(6, y, lda * 2);
      _tile_dpbf16ps(5, 6, 7);
    }
  }
}

// The inputs that fill no step, with zeros behind them.
struct LastInputs {
  alignas(64) bf16 x[2 * kTileSide * kTileInputs], b[kTilePairs * kGroup * 2];
  LastInputs(const bf16* from, long lda, int rows, const bf16* weights, long b_stride, int inputs) {
    std::memset(x, 0, sizeof x);
    std::memset(b, 0, sizeof b);
    for (int r = 0; r < rows; ++r) std::memcpy(x + r * kTileInputs, from + r * lda, size_t(inputs) * 2);
    for (int pair = 0; pair < inputs / 2; ++pair)
      std::memcpy(b + pair * b_stride, weights + pair * b_stride, size_t(b_stride) * 2);
  }
};

// All outputs of a group, kVecs vectors, for up to 16 rows or for 32.
template <int kVecs, bool kTwo, long kAhead = 0>
inline void tile_outputs(const bf16* x, long lda, const bf16* b, long depth, int rows, float* y, long ldy) {
  constexpr long b_stride = 2 * kVecs * kTileSide;
  const auto add = [](const bf16* x, long lda, const bf16* b, long steps) {
    if constexpr (kTwo) tiles_two<kVecs, kAhead>(x, lda, b, b_stride, steps);
    else tiles_one<kVecs>(x, lda, b, b_stride, steps);
  };
  _tile_zero(0);
  if constexpr (kVecs > 1) _tile_zero(1);
  if constexpr (kVecs > 2) _tile_zero(2);
  if constexpr (kTwo) _tile_zero(3);
  if constexpr (kTwo && kVecs > 1) _tile_zero(4);
  if constexpr (kTwo && kVecs > 2) _tile_zero(5);
  const long steps = depth / kTileInputs, done = steps * kTileInputs;
  add(x, lda, b, steps);
  if (done < depth) {
    const LastInputs last(x + done, lda, rows, b + done / 2 * b_stride, b_stride, int(depth - done));
    asm volatile("" ::: "memory");  // compilers don't know what the instructions read
    add(last.x, kTileInputs, last.b, 1);
  }
  float* second = y + kTileSide * ldy;
  _tile_stored(0, y, ldy * 4);
  if constexpr (kVecs > 1) _tile_stored(1, y + kTileSide, ldy * 4);
  if constexpr (kVecs > 2) _tile_stored(2, y + 2 * kTileSide, ldy * 4);
  if constexpr (kTwo) _tile_stored(3, second, ldy * 4);
  if constexpr (kTwo && kVecs > 1) _tile_stored(4, second + kTileSide, ldy * 4);
  if constexpr (kTwo && kVecs > 2) _tile_stored(5, second + 2 * kTileSide, ldy * 4);
}

template <int kVecs>
inline void tile_group(const bf16* x, long lda, const bf16* b, long depth, long rows, float* y, long ldy, int& shaped) {
  for (long row = 0; row < rows;) {
    const int some = rows - row >= 2 * kTileSide ? 2 * kTileSide : int(std::min<long>(rows - row, kTileSide));
    if (some != shaped) shape_tiles(some);
    shaped = some;
    const bf16* from = x + row * lda;
    float* to = y + row * ldy;
    if (some <= kTileSide) tile_outputs<kVecs, false>(from, lda, b, depth, some, to, ldy);
    else if (rows == some) tile_outputs<kVecs, true, kAheadElements>(from, lda, b, depth, some, to, ldy);
    else tile_outputs<kVecs, true>(from, lda, b, depth, some, to, ldy);
    row += some;
  }
}

// As linear_groups.
inline void tile_groups(const bf16* x, long lda, const bf16* weights, long n, long k, long first, long stop, long rows,
                        float* y, long ldy) {
  const long depth = padded_depth(k);
  int shaped = 0;
  asm volatile("" ::: "memory");
  for (long g = first; g < stop; ++g) {
    const int width = group_width(n, g);
    const bf16* b = weights + g * kGroup * depth;
    float* out = y + g * kGroup;
    if (width == 3 * kLanes) tile_group<3>(x, lda, b, depth, rows, out, ldy, shaped);
    else if (width == 2 * kLanes) tile_group<2>(x, lda, b, depth, rows, out, ldy, shaped);
    else tile_group<1>(x, lda, b, depth, rows, out, ldy, shaped);
  }
  _tile_release();
  asm volatile("" ::: "memory");
}

// --- attention: rows of queries against a block. Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 keys or values.

inline void shape_row_tiles(int rows) {
  shape_by([=](int i) { return i < 6 ? rows : kTilePairs; });
}

// scores[row][token] for 32 tokens. queries: [rows, dim]; keys: pairs of dims [dim / 2][tokens][2].
inline void tile_scores(const bf16* queries, const bf16* keys, int dim, int tokens, float* scores) {
  asm volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  for (int d = 0; d < dim; d += kTileInputs, keys += kTilePairs * tokens * 2) {
    _tile_loadd(4, queries + d, dim * 2);
    _tile_loadd(6, keys, tokens * 4);
    _tile_loadd(7, keys + 2 * kTileSide, tokens * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, scores, tokens * 4);
  _tile_stored(1, scores + kTileSide, tokens * 4);
  asm volatile("" ::: "memory");
}

// out[row][dim] += weights · values over 32 tokens. weights: [rows, 32]; values: pairs of tokens [16][dim][2].
inline void add_tile_values(const bf16* weights, const bf16* values, int dim, float* out) {
  asm volatile("" ::: "memory");
  _tile_loadd(5, weights, kTileInputs * 2);
  for (int d = 0; d < dim; d += 2 * kTileSide, values += 4 * kTileSide, out += 2 * kTileSide) {
    _tile_loadd(2, out, dim * 4);
    _tile_loadd(3, out + kTileSide, dim * 4);
    _tile_loadd(6, values, dim * 4);
    _tile_loadd(7, values + 2 * kTileSide, dim * 4);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stored(2, out, dim * 4);
    _tile_stored(3, out + kTileSide, dim * 4);
  }
  asm volatile("" ::: "memory");
}

inline void release_tiles() { _tile_release(); }

// Whether A is multiplied by tiles, so many inputs of it.
template <class A>
inline bool tiles_for(int inputs) {
  return std::is_same_v<A, bf16> && inputs % kTileInputs == 0 && has_tiles();
}

}  // namespace eh
#else
namespace eh {
constexpr bool kBuiltForTiles = false;
constexpr int kTileInputs = 32;
template <class A>
inline bool tiles_for(int) {
  return false;
}
inline void release_tiles() {}
}  // namespace eh
#endif
