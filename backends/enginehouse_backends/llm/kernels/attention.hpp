// Rotary embedding, writing keys and values into blocks, and attention over blocks (flash attention by tiles).
//
// A block holds kBlock tokens of all layers: [layer][kv head]{ keys [dim][token], values [token][dim] }; bf16
// keeps pairs (of dims, of tokens) side by side. What lies together is read together: memory gives half its
// bandwidth to pieces under 16 KiB. Sums go block by block in the order of positions, so that a row's result
// doesn't depend on the others of its step.
#pragma once
#include <algorithm>
#include <limits>

#include "rows.hpp"
#include "tiles.hpp"

namespace eh {

constexpr int kBlock = 32;
constexpr int kBlockVecs = kBlock / kLanes;
constexpr int kRowTile = kBuiltForTiles ? 16 : 8;  // rows (query, head) that pass a block together
constexpr int kItemTiles = 8;                      // row tiles of a piece of work
constexpr long kPlaceBytes = 256;
constexpr int kMaxDim = 512;
template <class A>
constexpr int kGatheredDim = kBuiltForTiles && sizeof(A) == 2 ? kMaxDim : 1;

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
template <class W, class A>
inline void turn_and_write(const Sequences& s, const AttentionShape& a, long t, const float* qkv, A* queries) {
  float head[kMaxDim];
  const int position = s.positions[t], token = position % kBlock;
  for (int h = 0; h < a.heads; ++h) {
    turn_head(a, qkv + long(h) * a.dim, a.q_norm, position, head);
    A* out = queries + (t * a.heads + h) * a.dim;
    for (int d = 0; d < a.dim; d += kLanes) store_as(out + d, load(head + d));
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

// Vectors of sums that kRows rows keep in registers at once, of `most`.
constexpr int vectors_beside(int rows, int most) {
  int vectors = most;
  while (vectors > 1 && vectors * rows > 3 * kTileRows) vectors /= 2;
  return vectors;
}

// scores[r][t0 : t0 + kVecs * kLanes] of kRows query rows against one block of keys.
template <int kRows, int kVecs>
inline void score_part(const float* const* q, const float* keys, int dim, int t0, float (*scores)[kBlock]) {
  Vec acc[kRows][kVecs] = {};
  for (int d = 0; d < dim; ++d) {
    Vec key[kVecs];
    for (int v = 0; v < kVecs; ++v) key[v] = held(load(keys + d * kBlock + t0 + v * kLanes));
    for (int r = 0; r < kRows; ++r) {
      const Vec x = splat(q[r][d]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(x, key[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(scores[r] + t0 + v * kLanes, acc[r][v]);
}
template <int kRows, int kVecs, class A>
inline void score_part(const A* const* q, const bf16* keys, int dim, int t0, float (*scores)[kBlock]) {
  Vec acc[kRows][kVecs] = {};
  for (int d = 0; d < dim; d += 2)
    for (int v = 0; v < kVecs; ++v) {
      const VecBits key = load_bits(keys + d * kBlock + 2 * (t0 + v * kLanes));
      if constexpr (std::is_same_v<A, float>) {
        const Vec low = held(low_half(key)), high = held(high_half(key));
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(splat(q[r][d]), low, acc[r][v]);
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(splat(q[r][d + 1]), high, acc[r][v]);
      } else {
        for (int r = 0; r < kRows; ++r) acc[r][v] = add_pairs(acc[r][v], key, q[r] + d);
      }
    }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(scores[r] + t0 + v * kLanes, acc[r][v]);
}
template <int kRows, class A, class W>
inline void score_block(const A* const* q, const W* keys, int dim, float (*scores)[kBlock]) {
  if constexpr (kRows > kTileRows) {
    score_block<kTileRows>(q, keys, dim, scores);
    score_block<kRows - kTileRows>(q + kTileRows, keys, dim, scores + kTileRows);
  } else {
    constexpr int kVecs = vectors_beside(kRows, kBlockVecs);
    for (int t = 0; t < kBlock; t += kVecs * kLanes) score_part<kRows, kVecs>(q, keys, dim, t, scores);
  }
}

// out[r][d0 : d0 + kVecs * kLanes] += weights[r] · values over the first `count` tokens of a block.
template <int kRows, int kVecs>
inline void add_values(const float (*weights)[kBlock], const float* values, int dim, int d0, int count,
                       float* const* out) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = load(out[r] + d0 + v * kLanes);
  for (int t = 0; t < count; ++t) {
    Vec value[kVecs];
    for (int v = 0; v < kVecs; ++v) value[v] = held(load(values + t * dim + d0 + v * kLanes));
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = splat(weights[r][t]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = fma(weight, value[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(out[r] + d0 + v * kLanes, acc[r][v]);
}
template <int kRows, int kVecs, class A>
inline void add_values(const A (*weights)[kBlock], const bf16* values, int dim, int d0, int count, float* const* out) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = load(out[r] + d0 + v * kLanes);
  for (int t = 0; t < count; t += 2) {
    // the second of a last odd pair was never written: it may hold anything, not-a-number too
    const uint32_t keep = t + 1 < count ? 0xffffffffu : 0xffffu;
    for (int v = 0; v < kVecs; ++v) {
      const VecBits value = load_bits(values + t * dim + 2 * (d0 + v * kLanes)) & keep;
      if constexpr (std::is_same_v<A, float>) {
        const Vec low = held(low_half(value)), high = held(high_half(value));
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(splat(weights[r][t]), low, acc[r][v]);
        for (int r = 0; r < kRows; ++r) acc[r][v] = fma(splat(weights[r][t + 1]), high, acc[r][v]);
      } else {
        for (int r = 0; r < kRows; ++r) acc[r][v] = add_pairs(acc[r][v], value, weights[r] + t);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(out[r] + d0 + v * kLanes, acc[r][v]);
}
template <int kRows, class A, class W>
inline void add_block(const A (*weights)[kBlock], const W* values, int dim, int count, float* const* out) {
  if constexpr (kRows > kTileRows) {
    add_block<kTileRows>(weights, values, dim, count, out);
    add_block<kRows - kTileRows>(weights + kTileRows, values, dim, count, out + kTileRows);
  } else {
    constexpr int kVecs = vectors_beside(kRows, 4);
    int d = 0;
    for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes)
      add_values<kRows, kVecs>(weights, values, dim, d, count, out);
    for (; d < dim; d += kLanes) add_values<kRows, 1>(weights, values, dim, d, count, out);
  }
}

// Rows that pass the blocks of one kv head together, and what they have gathered so far.
template <class A>
struct RowTile {
  const A* q[kRowTile];
  int position[kRowTile];
  float* out[kRowTile];  // [dim] weighted sum so far
  float highest[kRowTile], total[kRowTile];
  int rows, kv_head, first_position, last_position;
};

// Scores to weights e^(score - highest), for one row and block. Gives what older sums shrink by.
template <class A>
inline float weigh(const AttentionShape& a, int position, int start, float* scores, A* weights, float* highest,
                   float* total) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const int newest = position - start, oldest = a.window ? newest - a.window + 1 : 0;
  Vec score[kBlockVecs], best = splat(kNever);
  for (int v = 0; v < kBlockVecs; ++v) {
    const int t = v * kLanes;
    score[v] = load(scores + t) * a.scale;
    if (a.softcap != 0) score[v] = tanh(score[v] / a.softcap) * a.softcap;
    if (t + kLanes - 1 > newest || t < oldest)
      for (int i = 0; i < kLanes; ++i)
        if (t + i > newest || t + i < oldest) score[v][i] = kNever;
    best = max(best, score[v]);
  }
  const float top = std::max(*highest, max_lane(best)), base = top == kNever ? 0.0f : top;
  const float shrink = top == *highest ? 1.0f : exp(splat(*highest - base))[0];
  Vec sums{};
  for (int v = 0; v < kBlockVecs; ++v) {
    const Vec weight = exp(score[v] - base);
    sums += weight;
    store_as(weights + v * kLanes, weight);
  }
  *highest = top;
  *total = *total * shrink + sum(sums);
  return shrink;
}

// Weights of a block for each row from its scores; what was summed before shrinks.
template <class A>
inline void weigh_rows(const AttentionShape& a, int start, RowTile<A>& rows, float (*scores)[kBlock],
                       A (*weights)[kBlock]) {
  for (int r = 0; r < rows.rows; ++r) {
    const float shrink =
        weigh(a, rows.position[r], start, scores[r], weights[r], &rows.highest[r], &rows.total[r]);
    if (shrink != 1.0f)
      for (int d = 0; d < a.dim; d += kLanes) store(rows.out[r] + d, load(rows.out[r] + d) * shrink);
  }
}

template <int kRows = kRowTile, class A, class W>
inline void pass_block(const AttentionShape& a, const W* keys, int start, RowTile<A>& rows) {
  if constexpr (kRows > 1)
    if (rows.rows < kRows) return pass_block<kRows - 1>(a, keys, start, rows);
  alignas(64) float scores[kRows][kBlock];
  alignas(64) A weights[kRows][kBlock];
  score_block<kRows>(rows.q, keys, a.dim, scores);
  weigh_rows(a, start, rows, scores, weights);
  const int count = std::min(kBlock, rows.last_position + 1 - start);
  add_block<kRows>(weights, keys + long(a.dim) * kBlock, a.dim, count, rows.out);
}

// The same by the processor's tiles. `queries`: the rows' queries one after the other.
#if defined(EH_TILES)
inline void pass_block_by_tiles(const AttentionShape& a, const bf16* keys, int start, RowTile<bf16>& rows,
                                const bf16* queries) {
  alignas(64) float scores[kRowTile][kBlock];
  alignas(64) bf16 weights[kRowTile][kBlock];
  alignas(64) bf16 room[kBlock * kMaxDim];
  tile_scores(queries, keys, a.dim, kBlock, scores[0]);
  weigh_rows(a, start, rows, scores, weights);
  const bf16* values = keys + long(a.dim) * kBlock;
  const int count = std::min(kBlock, rows.last_position + 1 - start);
  if (count < kBlock) {
    // what was never written may hold anything, not-a-number too
    const long written = count / 2 * 2L * a.dim;
    std::memcpy(room, values, size_t(written) * 2);
    std::memset(room + written, 0, size_t(kBlock * a.dim - written) * 2);
    if (count % 2)
      for (int d = 0; d < a.dim; ++d) room[written + 2 * d] = values[written + 2 * d];
    values = room;
  }
  add_tile_values(weights[0], values, a.dim, rows.out[0]);
}
#endif

// A piece of work: row tiles of one sequence that walk its blocks together. Either several kv heads of few
// queries, or one kv head and many queries: what they share is read once.
template <class A, class W>
struct Attention {
  const Sequences& s;
  const AttentionShape& a;
  const A* queries;  // [tokens, heads, dim]
  A* out;            // [tokens, out_stride]
  long out_stride;
  int num_tiles = 0;
  RowTile<A> tiles[kItemTiles];
  const bool by_tiles;
  alignas(64) A gathered[kItemTiles * kRowTile * kGatheredDim<A>];  // queries, where tiles read them
  alignas(64) float sums[kItemTiles * kRowTile * kMaxDim];

  Attention(const Sequences& sequences, const AttentionShape& shape, const A* from, A* to, long stride)
      : s(sequences), a(shape), queries(from), out(to), out_stride(stride), by_tiles(tiles_for<A>(shape.dim)) {}

  void add_tile(int kv_head, long first, int count, int head, int num_heads) {
    RowTile<A>& tile = tiles[num_tiles];
    tile.rows = 0;
    tile.kv_head = kv_head;
    const int group = a.heads / a.kv_heads;
    for (long t = first; t < first + count; ++t)
      for (int h = 0; h < num_heads; ++h) {
        const int r = tile.rows++;
        tile.q[r] = queries + (t * a.heads + kv_head * group + head + h) * a.dim;
        if (by_tiles) std::copy(tile.q[r], tile.q[r] + a.dim, gathered_of(num_tiles) + r * a.dim);
        tile.position[r] = s.positions[t];
        tile.out[r] = sums + (long(num_tiles) * kRowTile + r) * a.dim;
        tile.highest[r] = -std::numeric_limits<float>::infinity();
        tile.total[r] = 0;
        std::fill(tile.out[r], tile.out[r] + a.dim, 0.0f);
      }
    tile.first_position = s.positions[first];
    tile.last_position = s.positions[first + count - 1];
    ++num_tiles;
  }

  A* gathered_of(int tile) { return gathered + long(tile) * kRowTile * a.dim; }

  void pass(RowTile<A>& tile, const W* keys, int start, [[maybe_unused]] int& shaped) {
#if defined(EH_TILES)
    if constexpr (std::is_same_v<A, bf16>)
      if (by_tiles) {
        if (tile.rows != shaped) shape_row_tiles(tile.rows);
        shaped = tile.rows;
        return pass_block_by_tiles(a, keys, start, tile, gathered_of(int(&tile - tiles)));
      }
#endif
    pass_block(a, keys, start, tile);
  }

  void walk(int slot) {
    int shaped = 0;
    int begin = tiles[0].first_position, end = 0;
    for (int i = 0; i < num_tiles; ++i) {
      begin = std::min(begin, tiles[i].first_position);
      end = std::max(end, tiles[i].last_position);
    }
    begin = a.window ? std::max(0, begin - a.window + 1) / kBlock * kBlock : 0;
    for (int start = begin; start <= end; start += kBlock)
      for (int i = 0; i < num_tiles; ++i) {
        RowTile<A>& tile = tiles[i];
        const bool seen = start <= tile.last_position && (!a.window || start + kBlock > tile.first_position - a.window + 1);
        if (seen) pass(tile, block_of<W>(s, a, slot, start / kBlock, tile.kv_head), start, shaped);
      }
    if (by_tiles) release_tiles();
    write();
  }

  void write() {
    for (int i = 0; i < num_tiles; ++i)
      for (int r = 0; r < tiles[i].rows; ++r) {
        const long at = tiles[i].q[r] - queries, token = at / (long(a.heads) * a.dim);
        A* to = out + token * out_stride + at % (long(a.heads) * a.dim);
        const Vec scale = splat(1.0f / tiles[i].total[r]);
        for (int d = 0; d < a.dim; d += kLanes) store_as(to + d, load(tiles[i].out[r] + d) * scale);
      }
    num_tiles = 0;
  }
};

}  // namespace eh
