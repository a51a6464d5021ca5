// Runs a model's recorded step (program.py) in one call, and packs weights for it. A plain C interface: loaded
// with ctypes by library.py, whose structures mirror those below.
#include <sys/mman.h>

#include <cstdlib>

#include "attention.hpp"
#include "coded.hpp"
#include "threads.hpp"

namespace eh {

enum Kind : int32_t {
  kEmbed, kNorm, kAddNorm, kLinear, kTurn, kAttend, kGated, kAdd, kSelect, kScale, kSoftcap, kCast, kArgmax,
  kRound, kCoded
};
enum Type : int32_t { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// Strides are in elements. F buffers hold float, A buffers what the program's
// weights (W) are multiplied with. Unused fields are zero.
struct Operation {
  int32_t kind, wanted_rows;
  int64_t n, k;
  const void* input;
  int64_t input_stride;
  const void* second;
  int64_t second_stride;
  void* output;
  int64_t output_stride;
  void* sum;
  int64_t sum_stride;
  const void* weight;
  const float* bias;
  const float *rope, *q_norm, *k_norm;
  float number, epsilon, softcap;
  int32_t layer, heads, kv_heads, dim, rotary_dim, window, choice;
};

struct Step {
  Sequences sequences;
  const int32_t* wanted_rows;
  int64_t num_tokens, num_sequences, num_wanted;
  const int32_t* items;  // attention work: [num_items, 3] sequence, first row, queries
  int64_t num_items;
};

struct Program {
  std::vector<Operation> operations;
  Type type;
};

inline Team*& team() {
  static Team* shared = nullptr;
  return shared;
}

// How an operation is cut: `chunks` pieces that any thread may do.
struct Cut {
  long rows, chunks, groups_each, row_blocks, rows_each;
};

// Tiles are done with weights faster than memory brings them: all rows whose inputs the second cache holds pass a
// group together.
inline Cut cut_tiles(const Operation& o, long rows, int threads) {
  constexpr long kInputs = 1 << 19;  // a mebibyte
  Cut cut{rows, 0, 1, 1, rows};
  const long groups = num_groups(o.n), fitting = std::max(64L, kInputs / padded_depth(o.k) / 32 * 32);
  if (rows > fitting) {
    cut.row_blocks = (rows + fitting - 1) / fitting;
    cut.rows_each = ((rows + cut.row_blocks - 1) / cut.row_blocks + 31) / 32 * 32;
    cut.row_blocks = (rows + cut.rows_each - 1) / cut.rows_each;
  }
  if (rows <= 32) cut.groups_each = std::clamp(groups / (8L * threads), 1L, groups);
  return cut;
}

inline Cut cut_plain(const Operation& o, long rows, int threads) {
  Cut cut{rows, 0, 1, 1, rows};
  const long groups = num_groups(o.n);
  if (rows > 64) {
    cut.rows_each = 64;
    cut.row_blocks = (rows + 63) / 64;
  }
  cut.groups_each = std::clamp(groups * cut.row_blocks / (8L * threads), 1L, groups);
  return cut;
}

template <class A>
inline Cut cut_linear(const Operation& o, long rows, int threads) {
  Cut cut = tiles_for<A>(kTileInputs) ? cut_tiles(o, rows, threads) : cut_plain(o, rows, threads);
  if (o.choice) cut.groups_each = (cut.groups_each + 1) / 2 * 2;  // vectors that belong together, three in a group
  cut.chunks = (num_groups(o.n) + cut.groups_each - 1) / cut.groups_each * cut.row_blocks;
  return cut;
}

// Attention's pieces of an item: all kv heads at once where items are many, each one alone otherwise.
inline int head_parts(const Operation& o, const Step& step, int threads) {
  const bool many = step.num_items >= 4L * threads && step.num_items == step.num_sequences;
  return many ? 1 : o.kv_heads;
}

inline const CodedWeights& coded_weights(const Operation& o) { return *static_cast<const CodedWeights*>(o.weight); }

inline Cut cut_coded(const Operation& o, long rows, int threads) {
  Cut cut{rows, 0, 1, 1, rows};
  if (rows > 64) {
    cut.rows_each = 64;
    cut.row_blocks = (rows + 63) / 64;
  } else {
    cut.groups_each = std::max(1L, num_blocks(o.n) / (8L * threads));
  }
  cut.chunks = (num_blocks(o.n) + cut.groups_each - 1) / cut.groups_each * cut.row_blocks;
  return cut;
}

template <class A>
inline Cut cut_of(const Operation& o, const Step& step, int threads) {
  const long rows = o.wanted_rows ? step.num_wanted : step.num_tokens;
  if (o.kind == kLinear) return cut_linear<A>(o, rows, threads);
  if (o.kind == kCoded) return cut_coded(o, rows, threads);
  if (o.kind == kAttend) return {rows, step.num_items * head_parts(o, step, threads), 1, 1, 1};
  const long each = std::max(1L, rows / (4L * threads));
  return {rows, (rows + each - 1) / each, 1, 1, each};
}

template <class A, class W>
void multiply_groups(const A* x, long lda, const W* weights, long n, long k, long first, long stop, long rows, float* y,
                     long ldy) {
#if defined(EH_TILES)
  if constexpr (std::is_same_v<A, bf16>)
    if (tiles_for<A>(kTileInputs)) return tile_groups(x, lda, weights, n, k, first, stop, rows, y, ldy);
#endif
  linear_groups(x, lda, weights, n, k, first, stop, rows, y, ldy);
}

// A linear whose outputs alternate by vectors, gates and what they gate, and the gated activation of them. The sums
// don't leave the nearest caches.
template <class A, class W>
void gated_groups(const Operation& o, const A* x, const W* weights, long first, long stop, long rows, A* out) {
  constexpr long kRows = 64, kWidth = 2 * kGroup;
  alignas(64) static thread_local float sums[kRows * kWidth];
  const Activation kind = Activation(o.choice - 1);
  for (long g = first; g < stop; g += 2) {
    const long end = std::min(stop, g + 2), width = std::min(padded(o.n) - g * kGroup, kWidth);
    for (long row = 0; row < rows; row += kRows) {
      const long some = std::min(kRows, rows - row);
      float* y = sums - g * kGroup;  // where output 0 would be
      multiply_groups(x + row * o.input_stride, o.input_stride, weights, o.n, o.k, g, end, some, y, kWidth);
      if (o.bias) add_bias(o.bias, o.n, g, end, some, y, kWidth);
      for (long r = 0; r < some; ++r) {
        const float* pairs = sums + r * kWidth;
        A* to = out + (row + r) * o.output_stride + g * kGroup / 2;
        for (long i = 0; i < width; i += 2 * kLanes)
          store_as(to + i / 2, activate(kind, load(pairs + i)) * load(pairs + i + kLanes));
      }
    }
  }
}

template <class A, class W>
void linear_chunk(const Operation& o, const Cut& cut, long chunk) {
  const long first = chunk / cut.row_blocks * cut.groups_each, row = chunk % cut.row_blocks * cut.rows_each;
  const long stop = std::min(num_groups(o.n), first + cut.groups_each);
  const long rows = std::min(cut.rows_each, cut.rows - row);
  const A* x = static_cast<const A*>(o.input) + row * o.input_stride;
  const W* weights = static_cast<const W*>(o.weight);
  if (o.choice)
    return gated_groups(o, x, weights, first, stop, rows, static_cast<A*>(o.output) + row * o.output_stride);
  float* y = static_cast<float*>(o.output) + row * o.output_stride;
  multiply_groups(x, o.input_stride, weights, o.n, o.k, first, stop, rows, y, o.output_stride);
  if (o.bias) add_bias(o.bias, o.n, first, stop, rows, y, o.output_stride);
}

inline void coded_chunk(const Operation& o, const Cut& cut, long chunk) {
  const long first = chunk / cut.row_blocks * cut.groups_each, row = chunk % cut.row_blocks * cut.rows_each;
  const long stop = std::min(num_blocks(o.n), first + cut.groups_each);
  for (long block = first; block < stop; ++block)
    coded_linear(coded_weights(o), static_cast<const Unit*>(o.input) + row * o.input_stride, o.input_stride, block,
                 std::min(cut.rows_each, cut.rows - row), static_cast<float*>(o.output) + row * o.output_stride,
                 o.output_stride);
}

template <class A>
void round_chunk(const Operation& o, long row) {
  Unit* out = static_cast<Unit*>(o.output) + row * o.output_stride;
  if (o.choice) return round_row(static_cast<const float*>(o.input) + row * o.input_stride, coded_weights(o), out);
  round_row(static_cast<const A*>(o.input) + row * o.input_stride, coded_weights(o), out);
}

inline AttentionShape shape_of(const Operation& o) {
  return {o.layer, o.heads, o.kv_heads, o.dim, o.rotary_dim, o.window, o.number, o.softcap, o.epsilon,
          o.rope,  o.q_norm, o.k_norm};
}

template <class A, class W>
void attend_chunk(const Operation& o, const Step& step, int parts, long chunk) {
  const int32_t* item = step.items + chunk / parts * 3;
  const int slot = step.sequences.slots[item[0]], group = o.heads / o.kv_heads;
  const int each = o.kv_heads / parts, first_head = int(chunk % parts) * each;
  const AttentionShape shape = shape_of(o);
  Attention<A, W> work(step.sequences, shape, static_cast<const A*>(o.input), static_cast<A*>(o.output),
                       o.output_stride);
  for (int head = 0; head < group; head += kRowTile) {
    const int some = std::min(kRowTile, group - head), queries = kRowTile / some;
    for (int done = 0; done < item[2]; done += queries)
      for (int kv_head = first_head; kv_head < first_head + each; ++kv_head) {
        work.add_tile(kv_head, item[1] + done, std::min(queries, item[2] - done), head, some);
        if (work.num_tiles == kItemTiles) work.walk(slot);
      }
  }
  if (work.num_tiles) work.walk(slot);
}

template <class A, class W>
void row_operation(const Operation& o, const Step& step, long row) {
  const float* x = static_cast<const float*>(o.input) + row * o.input_stride;
  float* f = static_cast<float*>(o.output) + row * o.output_stride;
  A* a = static_cast<A*>(o.output) + row * o.output_stride;
  const float* y = static_cast<const float*>(o.second) + row * o.second_stride;
  switch (o.kind) {
    case kEmbed: {
      const long token = step.sequences.tokens[row];
      const W* table = static_cast<const W*>(o.weight);
      if (o.choice) return embed_packed(table, o.k, o.n, token, o.number, f);
      return embed_plain(table, o.n, token, o.number, f);
    }
    case kAddNorm:
      add_rows(x, y, o.n, static_cast<float*>(o.sum) + row * o.sum_stride);
      x = static_cast<float*>(o.sum) + row * o.sum_stride;
      [[fallthrough]];
    case kNorm: {
      const float* weight = static_cast<const float*>(o.weight);
      return o.choice ? rms_norm(x, weight, o.epsilon, o.n, f) : rms_norm(x, weight, o.epsilon, o.n, a);
    }
    case kTurn: return turn_and_write<W>(step.sequences, shape_of(o), row, x, static_cast<A*>(o.output));
    case kGated: return gated(Activation(o.choice), x, o.n, a);
    case kAdd: return add_rows(x, y, o.n, f);
    case kSelect: {
      const float* from = static_cast<const float*>(o.input) + step.wanted_rows[row] * o.input_stride;
      std::copy(from, from + o.n, f);
      return;
    }
    case kScale:
      for (long i = 0; i < o.n; ++i) f[i] = x[i] * o.number;
      return;
    case kSoftcap:
      for (long i = 0; i < o.n; i += kLanes) store(f + i, tanh(load(x + i) / o.number) * o.number);
      return;
    case kCast:
      for (long i = 0; i < o.n; ++i) put(a + i, x[i]);
      return;
    case kRound: return round_chunk<A>(o, row);
    case kArgmax:
      static_cast<int32_t*>(o.output)[row] = int32_t(argmax(x, o.n));
      return;
  }
}

template <class A, class W>
void run_chunk(const Operation& o, const Step& step, const Cut& cut, long chunk) {
  if (o.kind == kLinear) return linear_chunk<A, W>(o, cut, chunk);
  if (o.kind == kCoded) return coded_chunk(o, cut, chunk);
  if (o.kind == kAttend) return attend_chunk<A, W>(o, step, int(cut.chunks / std::max<long>(1, step.num_items)), chunk);
  const long stop = std::min(cut.rows, (chunk + 1) * cut.rows_each);
  for (long row = chunk * cut.rows_each; row < stop; ++row) row_operation<A, W>(o, step, row);
}

// A step of a program as a team's job: an operation is a stage.
template <class A, class W>
struct StepJob {
  const Program* program;
  Step step;
  int threads;
  long chunks(long i) const { return cut_of<A>(program->operations[i], step, threads).chunks; }
  void work(long i, long chunk) const {
    const Operation& o = program->operations[i];
    run_chunk<A, W>(o, step, cut_of<A>(o, step, threads), chunk);
  }
};

// Where an output is packed: the halves of paired ones alternate by vectors.
inline long packed_place(long output, long n, bool paired) {
  if (!paired) return output;
  const long within = output % (n / 2);
  return within / kLanes * 2 * kLanes + output / (n / 2) * kLanes + within % kLanes;
}

template <class W, class S>
void pack(const S* source, long source_stride, long first_output, long outputs, long n, long k, bool paired,
          W* packed) {
  // depth by depth, so that the lines that a group's outputs share stay in the cache
  for (long start = 0; start < k; start += 64)
    for (long output = 0; output < outputs; ++output)
      for (long i = start; i < std::min(k, start + 64); ++i)
        put(packed + packed_index<W>(n, k, packed_place(first_output + output, n, paired), i),
            get(source + output * source_stride + i));
}

// Packs some outputs, a group a chunk.
template <class S>
struct PackJob {
  int type;
  const S* source;
  long stride, first, outputs, n, k;
  bool paired;
  void* packed;
  long chunks(long) const { return (outputs + kGroup - 1) / kGroup; }
  void work(long, long group) const {
    const long from = group * kGroup, some = std::min<long>(kGroup, outputs - from);
    if (type == kFloat32)
      pack(source + from * stride, stride, first + from, some, n, k, paired, static_cast<float*>(packed));
    else
      pack(source + from * stride, stride, first + from, some, n, k, paired, static_cast<bf16*>(packed));
  }
};

template <class S>
void pack_as(int type, const S* source, long stride, long first, long outputs, long n, long k, bool paired,
             void* packed) {
  team()->run(team()->size(), 1, PackJob<S>{type, source, stride, first, outputs, n, k, paired, packed});
}

// Rows are rounded, then blocks of outputs multiplied.
struct CodedJob {
  const CodedWeights* weights;
  const void* x;
  int x_type;
  long x_stride, rows;
  Unit* units;
  float* y;
  long y_stride;
  long chunks(long stage) const { return stage == 0 ? rows : num_blocks(weights->outputs); }
  void work(long stage, long chunk) const {
    const long each = num_units(*weights);
    if (stage == 1) return coded_linear(*weights, units, each, chunk, rows, y, y_stride);
    if (x_type == kFloat32) round_row(static_cast<const float*>(x) + chunk * x_stride, *weights, units + chunk * each);
    else round_row(static_cast<const bf16*>(x) + chunk * x_stride, *weights, units + chunk * each);
  }
};

struct Half {
  uint16_t bits;
};
inline float get(const Half* p) {
  const uint32_t sign = uint32_t(p->bits & 0x8000) << 16, exponent = p->bits >> 10 & 31, fraction = p->bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
  const uint32_t bits = sign | (exponent == 31 ? 255u : exponent + 112) << 23 | fraction << 13;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

}  // namespace eh

using namespace eh;

extern "C" {

int eh_version() { return 5; }
int eh_lanes() { return kLanes; }
int eh_block_size() { return kBlock; }
int eh_max_dim() { return kMaxDim; }
// Whether bf16 weights are multiplied with floats: A is float in every program.
int eh_float_inputs() { return sizeof(BesideBf16) == sizeof(float); }

// Whether bf16 is multiplied by the processor's tiles: 1, or 0 as it has none, or -1 as the system refuses them.
int eh_tiles() {
#if defined(EH_TILES)
  return has_tiles() ? 1 : -1;
#else
  return 0;
#endif
}

// Threads of all programs of the process. Call again to change the number, never while a program runs.
void eh_start(int num_threads) {
  delete team();
  team() = new Team(num_threads);
}
void eh_stop() {
  delete team();
  team() = nullptr;
}

// Zeroed memory that isn't there until it is touched; huge pages where the system has them.
void* eh_allocate(int64_t bytes) {
  void* p = mmap(nullptr, size_t(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(p, size_t(bytes), MADV_HUGEPAGE);
#endif
  return p;
}
void eh_free(void* p, int64_t bytes) { munmap(p, size_t(bytes)); }

int64_t eh_packed_elements(int64_t n, int64_t k) { return padded(n) * padded_depth(k); }

// Outputs first … first + outputs - 1 of packed weights [n, k] from rows of `source`. paired: see packed_place.
void eh_pack(int type, int source_type, const void* source, int64_t stride, int64_t first, int64_t outputs, int64_t n,
             int64_t k, void* packed, int paired) {
  const auto from = [&](const auto* rows) { pack_as(type, rows, stride, first, outputs, n, k, paired != 0, packed); };
  if (source_type == kFloat32) from(static_cast<const float*>(source));
  if (source_type == kBfloat16) from(static_cast<const bf16*>(source));
  if (source_type == kFloat16) from(static_cast<const Half*>(source));
}

// y: [rows, outputs] = x W^T for weights as codes, outside of a program. `units`: room for rows * units a row.
void eh_coded_linear(const CodedWeights* weights, const void* x, int x_type, int64_t x_stride, int64_t rows, void* units,
                     float* y, int64_t y_stride, int threads) {
  const CodedJob job{weights, x, x_type, x_stride, rows, static_cast<Unit*>(units), y, y_stride};
  team()->run(std::min(threads, team()->size()), 2, job);
  team()->forget();  // `weights` are the caller's
}

void* eh_program(const Operation* operations, int64_t count, int type) {
  auto* program = new Program;
  program->operations.assign(operations, operations + count);
  program->type = Type(type);
  return program;
}
void eh_program_free(void* program) {
  if (team()) team()->forget();
  delete static_cast<Program*>(program);
}

void eh_program_run(void* pointer, const Step* step, int threads) {
  const auto& program = *static_cast<const Program*>(pointer);
  const int some = std::min(threads, team()->size());
  const long count = long(program.operations.size());
  if (program.type == kFloat32)
    team()->run(some, count, StepJob<float, float>{&program, *step, some});
  else
    team()->run(some, count, StepJob<BesideBf16, bf16>{&program, *step, some});
}
}
