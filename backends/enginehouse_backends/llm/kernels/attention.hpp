// Rotary embedding, writing keys and values into blocks, and attention over blocks (flash attention by tiles).
//
// A block holds kBlock tokens of all layers: [layer][kv head]{ keys [dim][token], values [token][dim] }; bf16
// keeps pairs (of dims, of tokens) side by side. Tiles start at multiples of kTile whatever the query, and sums
// go in the order of positions: a row's result doesn't depend on the others of its step.
#pragma once
#include <algorithm>
#include <limits>

#include "rows.hpp"

namespace eh {

constexpr int kBlock = 16;
constexpr int kTile = 128;
constexpr int kRowTile = 8;
constexpr long kPlaceBytes = 256;
constexpr int kMaxDim = 512;

// The step's sequences, as the runner's arrays (see runner.StepInput).
struct Sequences {
  const int32_t* tokens;
  const int32_t* positions;
  const int32_t* token_sequences;  // [tokens] which sequence a token belongs to
  const int32_t* query_starts;
  const int32_t* slots;         // [sequences] row of the block table
  const int32_t* block_table;   // [slots, table_stride] places
  int64_t table_stride;
  char* arena;
};

struct AttentionShape {
  int layer, heads, kv_heads, dim, rotary_dim, window;
  float scale, softcap, epsilon;
  const float *rope, *q_norm, *k_norm;
};

template <class W>
inline W* block_of(const Sequences& s, const AttentionShape& a, int slot, long block, int kv_head) {
  const int64_t place = s.block_table[slot * s.table_stride + block];
  const long head_elements = 2L * a.dim * kBlock;
  return reinterpret_cast<W*>(s.arena + place * kPlaceBytes) + (long(a.layer) * a.kv_heads + kv_head) * head_elements;
}

inline long key_index(const float*, int, int d, int token) { return long(d) * kBlock + token; }
inline long key_index(const bf16*, int, int d, int token) { return long(d / 2) * kBlock * 2 + token * 2 + d % 2; }
inline long value_index(const float*, int dim, int d, int token) { return long(token) * dim + d; }
inline long value_index(const bf16*, int dim, int d, int token) { return long(token / 2) * dim * 2 + d * 2 + token % 2; }

// One head of q or k: norm and rotation, into `out` [dim].
inline void turn_head(const AttentionShape& a, const float* x, const float* norm, int position, float* out) {
  if (norm)
    rms_norm(x, norm, a.epsilon, a.dim, out);
  else
    std::copy(x, x + a.dim, out);
  if (!a.rope) return;
  const int half = a.rotary_dim / 2;
  const float *cosines = a.rope + long(position) * a.rotary_dim, *sines = cosines + half;
  for (int i = 0; i < half; ++i) {
    const float first = out[i], second = out[i + half];
    out[i] = first * cosines[i] - second * sines[i];
    out[i + half] = second * cosines[i] + first * sines[i];
  }
}

// Token t's q to `queries` [tokens, heads, dim], its k and v into their block.
template <class W>
inline void turn_and_write(const Sequences& s, const AttentionShape& a, long t, const float* qkv, W* queries) {
  float head[kMaxDim];
  const int position = s.positions[t], token = position % kBlock;
  for (int h = 0; h < a.heads; ++h) {
    turn_head(a, qkv + long(h) * a.dim, a.q_norm, position, head);
    W* out = queries + (t * a.heads + h) * a.dim;
    for (int d = 0; d < a.dim; ++d) put(out + d, head[d]);
  }
  const float *keys = qkv + long(a.heads) * a.dim, *values = keys + long(a.kv_heads) * a.dim;
  for (int h = 0; h < a.kv_heads; ++h) {
    W* block = block_of<W>(s, a, s.slots[s.token_sequences[t]], position / kBlock, h);
    W* out = block + long(a.dim) * kBlock;
    turn_head(a, keys + long(h) * a.dim, a.k_norm, position, head);
    for (int d = 0; d < a.dim; ++d) put(block + key_index(block, a.dim, d, token), head[d]);
    for (int d = 0; d < a.dim; ++d) put(out + value_index(out, a.dim, d, token), values[long(h) * a.dim + d]);
  }
}

constexpr int kBlockVecs = kBlock / kLanes > 0 ? kBlock / kLanes : 1;

// scores[r][0:kBlock] of kRows query rows against one block of keys. Even and odd dims are summed apart.
template <int kRows>
inline void score_block(const float* const* q, const float* keys, const float* next, int dim, float (*scores)[kTile]) {
  Vec acc[2][kRows][kBlockVecs] = {};
  for (int d = 0; d < dim; d += 2)
    for (int odd = 0; odd < 2; ++odd) {
      __builtin_prefetch(next + (d + odd) * kBlock);
      for (int v = 0; v < kBlockVecs; ++v) {
        const Vec key = load(keys + (d + odd) * kBlock + v * kLanes);
        for (int r = 0; r < kRows; ++r) acc[odd][r][v] += q[r][d + odd] * key;
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kBlockVecs; ++v) store(scores[r] + v * kLanes, acc[0][r][v] + acc[1][r][v]);
}
template <int kRows>
inline void score_block(const bf16* const* q, const bf16* keys, const bf16* next, int dim, float (*scores)[kTile]) {
  Vec acc[2][kRows][kBlockVecs] = {};
  for (int d = 0; d < dim; d += 2) {
    const int odd = d / 2 % 2;
    __builtin_prefetch(next + d * kBlock);
    for (int v = 0; v < kBlockVecs; ++v) {
      const VecBits key = load_bits(keys + d * kBlock + 2 * v * kLanes);
      for (int r = 0; r < kRows; ++r) {
        uint32_t pair;
        std::memcpy(&pair, q[r] + d, 4);
        acc[odd][r][v] = add_pairs(acc[odd][r][v], key, pair);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kBlockVecs; ++v) store(scores[r] + v * kLanes, acc[0][r][v] + acc[1][r][v]);
}

// out[r][d0 : d0 + kVecs * kLanes] += weights[r] · values over the first `count` tokens of the tile.
template <int kRows, int kVecs>
inline void add_values(const float (*weights)[kTile], const float* const* values, int dim, int d0, int count,
                       float* const* out) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = load(out[r] + d0 + v * kLanes);
  for (int t = 0; t < count; ++t) {
    const float* row = values[t / kBlock] + value_index(values[0], dim, d0, t % kBlock);
    for (int v = 0; v < kVecs; ++v) {
      const Vec value = load(row + v * kLanes);
      for (int r = 0; r < kRows; ++r) acc[r][v] += weights[r][t] * value;
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(out[r] + d0 + v * kLanes, acc[r][v]);
}
template <int kRows, int kVecs>
inline void add_values(const bf16 (*weights)[kTile], const bf16* const* values, int dim, int d0, int count,
                       float* const* out) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = load(out[r] + d0 + v * kLanes);
  for (int t = 0; t < count; t += 2) {
    const bf16* row = values[t / kBlock] + value_index(values[0], dim, d0, t % kBlock);
    // the second of a last odd pair was never written: it may hold anything, not-a-number too
    const uint32_t keep = t + 1 < count ? 0xffffffffu : 0xffffu;
    for (int v = 0; v < kVecs; ++v) {
      const VecBits value = load_bits(row + 2 * v * kLanes) & keep;
      for (int r = 0; r < kRows; ++r) {
        uint32_t pair;
        std::memcpy(&pair, weights[r] + t, 4);
        acc[r][v] = add_pairs(acc[r][v], value, pair);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(out[r] + d0 + v * kLanes, acc[r][v]);
}

// The rows (query, head of one kv head's group) that are computed together.
template <class W>
struct RowTile {
  const W* q[kRowTile];
  int position[kRowTile];
  float* out[kRowTile];  // [dim] float, weighted sum so far
  float highest[kRowTile], total[kRowTile];
  int rows, first_position, last_position;
};

template <class W, int kRows>
inline void attend_rows(const Sequences& s, const AttentionShape& a, int slot, int kv_head, RowTile<W>& rows) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  alignas(64) float scores[kRows][kTile];
  alignas(64) W weights[kRows][kTile];
  const W *keys[kTile / kBlock + 1], *values[kTile / kBlock];
  const int begin = a.window ? std::max(0, rows.first_position - a.window + 1) / kTile * kTile : 0;
  for (int start = begin; start <= rows.last_position; start += kTile) {
    const int count = std::min(kTile, rows.last_position + 1 - start), blocks = (count + kBlock - 1) / kBlock;
    for (int b = 0; b < blocks; ++b) {
      keys[b] = block_of<W>(s, a, slot, start / kBlock + b, kv_head);
      values[b] = keys[b] + long(a.dim) * kBlock;
    }
    keys[blocks] = values[0];
    for (int b = 0; b < blocks; ++b) {
      float(*at)[kTile] = reinterpret_cast<float(*)[kTile]>(&scores[0][b * kBlock]);
      score_block<kRows>(rows.q, keys[b], keys[b + 1], a.dim, at);
    }
    for (int r = 0; r < kRows; ++r) {
      const int newest = rows.position[r] - start;  // tokens after it, and before the window, are not seen
      const int oldest = a.window ? newest - a.window + 1 : 0;
      Vec highest = splat(kNever);
      for (int t = 0; t < blocks * kBlock; t += kLanes) {
        Vec score = load(&scores[r][t]) * a.scale;
        if (a.softcap != 0) score = tanh(score / a.softcap) * a.softcap;
        if (t + kLanes - 1 > newest || t < oldest)
          for (int i = 0; i < kLanes; ++i)
            if (t + i > newest || t + i < oldest) score[i] = kNever;
        store(&scores[r][t], score);
        highest = max(highest, score);
      }
      const float top = std::max(rows.highest[r], max_lane(highest));
      const float base = top == kNever ? 0.0f : top;
      const float shrink = exp(splat(rows.highest[r] - base))[0];
      Vec total{};
      for (int t = 0; t < blocks * kBlock; t += kLanes) {
        const Vec weight = exp(load(&scores[r][t]) - base);
        total += weight;
        store_as(&weights[r][t], weight);
      }
      rows.highest[r] = top;
      rows.total[r] = rows.total[r] * shrink + sum(total);
      if (shrink != 1.0f)
        for (int d = 0; d < a.dim; d += kLanes) store(rows.out[r] + d, load(rows.out[r] + d) * shrink);
    }
    constexpr int kWide = kRows <= 4 ? 4 : 2;
    int d = 0;
    for (; d + kWide * kLanes <= a.dim; d += kWide * kLanes)
      add_values<kRows, kWide>(weights, values, a.dim, d, count, rows.out);
    for (; d < a.dim; d += kLanes) add_values<kRows, 1>(weights, values, a.dim, d, count, rows.out);
  }
}

template <class W>
inline void attend_tile(const Sequences& s, const AttentionShape& a, int slot, int kv_head, RowTile<W>& rows) {
  switch (rows.rows) {
    case 1: return attend_rows<W, 1>(s, a, slot, kv_head, rows);
    case 2: return attend_rows<W, 2>(s, a, slot, kv_head, rows);
    case 3: return attend_rows<W, 3>(s, a, slot, kv_head, rows);
    case 4: return attend_rows<W, 4>(s, a, slot, kv_head, rows);
    case 5: return attend_rows<W, 5>(s, a, slot, kv_head, rows);
    case 6: return attend_rows<W, 6>(s, a, slot, kv_head, rows);
    case 7: return attend_rows<W, 7>(s, a, slot, kv_head, rows);
    default: return attend_rows<W, 8>(s, a, slot, kv_head, rows);
  }
}

// Queries first … first + count - 1 (rows of the step) of one sequence, one kv head, heads of its group from
// `head` on; at most kRowTile rows. out: [tokens, out_stride].
template <class W>
inline void attend(const Sequences& s, const AttentionShape& a, int sequence, int kv_head, long first, int count,
                   int head, int num_heads, const W* queries, W* out, long out_stride) {
  alignas(64) float sums[kRowTile][kMaxDim];
  RowTile<W> rows;
  rows.rows = 0;
  const int group = a.heads / a.kv_heads;
  for (long t = first; t < first + count; ++t)
    for (int h = 0; h < num_heads; ++h) {
      const int r = rows.rows++;
      rows.q[r] = queries + (t * a.heads + kv_head * group + head + h) * a.dim;
      rows.position[r] = s.positions[t];
      rows.out[r] = sums[r];
      rows.highest[r] = -std::numeric_limits<float>::infinity();
      rows.total[r] = 0;
      std::fill(sums[r], sums[r] + a.dim, 0.0f);
    }
  rows.first_position = s.positions[first];
  rows.last_position = s.positions[first + count - 1];
  attend_tile(s, a, s.slots[sequence], kv_head, rows);
  for (int r = 0; r < rows.rows; ++r) {
    W* to = out + (first + r / num_heads) * out_stride + long(kv_head * group + head + r % num_heads) * a.dim;
    const Vec scale = splat(1.0f / rows.total[r]);
    for (int d = 0; d < a.dim; d += kLanes) store_as(to + d, load(sums[r] + d) * scale);
  }
}

}  // namespace eh
