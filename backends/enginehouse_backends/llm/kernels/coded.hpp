// y = x W^T with weights as codes of 4 or 8 bits: value = (code - zero) * scale, a scale for each group of inputs.
// Rows of x are rounded to 8 bits with a scale for each 32 inputs, products are summed in whole numbers, and the
// scales are applied to the sums: what is rounded is x alone, to half a step of 1/127 of its largest neighbour.
// Every output is summed in one order, whatever the number of rows.
#pragma once
#include <algorithm>
#include <cmath>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "simd.hpp"

namespace eh {

constexpr int kUnit = 32;         // inputs that share a scale of x
constexpr int kCodedBlock = 64;   // outputs that lie together
constexpr int kSixteens = 4;      // vectors of 16 outputs in a block

struct Unit {
  int8_t values[kUnit];
  float scale;
  float group_sum;  // in the first unit of a group of the weights: the sum of all inputs of the group
};

// Mirrored in native_coded.py. codes: [block][group][sixteen][unit][step][16 outputs][4 inputs], where a step is 4
// inputs (8 bits) or 8 (4 bits: inputs 4 to 7 in the high halves); inputs are padded to whole groups. scales (half
// precision), zeros: [block][group][64].
struct CodedWeights {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;    // null: default_zero is everyone's
  const float* bias;       // [outputs] or null
  const int32_t* order;    // [inputs] which input of x a column multiplies, or null
  int64_t outputs, inputs;
  float multiplier;        // of all scales
  int32_t bits, units_in_group, default_zero;
};

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef Bytes BytesLoose __attribute__((aligned(1), may_alias));
typedef Floats FloatsLoose __attribute__((aligned(4), may_alias));

inline long num_groups_of(const CodedWeights& w) {
  const long size = w.units_in_group * kUnit;
  return (w.inputs + size - 1) / size;
}
inline long num_units(const CodedWeights& w) { return num_groups_of(w) * w.units_in_group; }
inline long num_blocks(long outputs) { return (outputs + kCodedBlock - 1) / kCodedBlock; }

// sums[i] += the products of 4 codes (unsigned) with 4 inputs (signed, the same for all outputs)
inline Ints add_products(Ints sums, Bytes codes, const int8_t* four) {
#if defined(__AVX512VNNI__)
  // In assembly, as compilers broadcast ahead for all outputs at once, run out of registers and spill.
  struct Four {
    int8_t values[4];
  };
  __m512i out = (__m512i)sums;
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(out) : "v"((__m512i)codes), "m"(*reinterpret_cast<const Four*>(four)));
  return (Ints)out;
#elif defined(__AVX2__)
  int32_t inputs;
  std::memcpy(&inputs, four, 4);
  // pairs of products saturate at 16 bits, so a code's halves are multiplied one after the other
  const __m256i x = _mm256_set1_epi32(inputs), ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  __m256i part[2], out[2];
  std::memcpy(part, &codes, 64);
  std::memcpy(out, &sums, 64);
  for (int i = 0; i < 2; ++i) {
    const __m256i below = _mm256_maddubs_epi16(_mm256_and_si256(part[i], low), x);
    const __m256i above = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(part[i], 4), low), x);
    const __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(below, ones),
                                         _mm256_slli_epi32(_mm256_madd_epi16(above, ones), 4));
    out[i] = _mm256_add_epi32(out[i], sum);
  }
  std::memcpy(&sums, out, 64);
  return sums;
#else
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sums[i] += int32_t(codes[4 * i + j]) * four[j];
  return sums;
#endif
}

inline Floats half_scales(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#else
  Floats out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t exponent = p[i] >> 10 & 31, fraction = p[i] & 1023;
    const float size = exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    out[i] = p[i] & 0x8000 ? -size : size;
  }
  return out;
#endif
}

inline Ints zeros_of(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  Ints out;
  for (int i = 0; i < 16; ++i) out[i] = p[i];
  return out;
#endif
}

// One row of inputs, in the order and the groups of these weights.
template <class A>
void round_row(const A* x, const CodedWeights& w, Unit* out) {
  float group_sum = 0.0f;
  for (long u = num_units(w) - 1; u >= 0; --u) {
    float values[kUnit] = {};
    const long start = u * kUnit, count = std::min<long>(kUnit, w.inputs - start);
    for (long i = 0; i < count; ++i) values[i] = get(x + (w.order ? w.order[start + i] : start + i));
    Vec largest{};
    for (int i = 0; i < kUnit; i += kLanes) largest = max(largest, max(load(values + i), -load(values + i)));
    const float most = max_lane(largest), inverse = most > 0.0f ? 127.0f / most : 0.0f;
    int32_t sum = 0;
    for (int i = 0; i < kUnit; ++i) {
      // adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits
      const float shifted = values[i] * inverse + 12582912.0f;
      int32_t bits;
      std::memcpy(&bits, &shifted, 4);
      out[u].values[i] = int8_t(bits - 0x4b400000);
      sum += bits - 0x4b400000;
    }
    out[u].scale = most / 127.0f;
    group_sum += out[u].scale * float(sum);
    out[u].group_sum = group_sum;
    if (u % w.units_in_group == 0) group_sum = 0.0f;
  }
}

// A unit's whole-number sums of 16 outputs for kRows rows, added to `sums`.
template <int kBits, int kRows>
inline void add_unit(Ints* sums, const uint8_t* codes, const Unit* x, long x_stride) {
  constexpr int kSteps = kBits == 4 ? 4 : 8;
  for (int s = 0; s < kSteps; ++s) {
    const Bytes packed = *reinterpret_cast<const BytesLoose*>(codes + s * 64);
    if (kBits == 4) {
      typedef uint16_t Words __attribute__((vector_size(64)));
      const Bytes below = packed & 15, above = (Bytes)((Words)packed >> 4) & 15;
      for (int r = 0; r < kRows; ++r) sums[r] = add_products(sums[r], below, x[r * x_stride].values + s * 8);
      for (int r = 0; r < kRows; ++r) sums[r] = add_products(sums[r], above, x[r * x_stride].values + s * 8 + 4);
    } else {
      for (int r = 0; r < kRows; ++r) sums[r] = add_products(sums[r], packed, x[r * x_stride].values + s * 4);
    }
  }
}

// All outputs of a block for kRows rows: y[r][64].
template <int kBits, int kRows>
void coded_tile(const CodedWeights& w, const Unit* x, long x_stride, long block, float* y) {
  constexpr long kUnitBytes = kUnit * 16 * kBits / 8;
  const long groups = num_groups_of(w), each = w.units_in_group;
  const uint8_t* codes = w.codes + block * groups * each * kSixteens * kUnitBytes;
  Floats total[kSixteens][kRows] = {};
  for (long g = 0; g < groups; ++g) {
    const Unit* units = x + g * each;
    for (int v = 0; v < kSixteens; ++v) {
      const long place = (block * groups + g) * kCodedBlock + v * 16;
      const Floats scale = half_scales(w.scales + place);
      Floats inner[kRows] = {};
      for (long u = 0; u < each; ++u, codes += kUnitBytes) {
        for (int line = 0; line < kUnitBytes; line += 64) __builtin_prefetch(codes + 4096 + line);
        Ints sums[kRows] = {};
        add_unit<kBits, kRows>(sums, codes, units + u, x_stride);
        for (int r = 0; r < kRows; ++r)
          inner[r] += __builtin_convertvector(sums[r], Floats) * units[r * x_stride + u].scale;
      }
      for (int r = 0; r < kRows; ++r) {
        // the group's zero times all its inputs, which the first unit of the group has summed up
        const float all = units[r * x_stride].group_sum;
        inner[r] -= w.zeros ? __builtin_convertvector(zeros_of(w.zeros + place), Floats) * all
                            : Floats{} + w.default_zero * all;
        total[v][r] += inner[r] * scale;
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kSixteens; ++v)
      *reinterpret_cast<FloatsLoose*>(y + r * kCodedBlock + v * 16) = total[v][r] * w.multiplier;
}

template <int kBits>
inline void coded_rows(int rows, const CodedWeights& w, const Unit* x, long x_stride, long block, float* y) {
  switch (rows) {
    case 1: return coded_tile<kBits, 1>(w, x, x_stride, block, y);
    case 2: return coded_tile<kBits, 2>(w, x, x_stride, block, y);
    case 3: return coded_tile<kBits, 3>(w, x, x_stride, block, y);
    case 4: return coded_tile<kBits, 4>(w, x, x_stride, block, y);
    case 5: return coded_tile<kBits, 5>(w, x, x_stride, block, y);
    case 6: return coded_tile<kBits, 6>(w, x, x_stride, block, y);
    case 7: return coded_tile<kBits, 7>(w, x, x_stride, block, y);
    default: return coded_tile<kBits, 8>(w, x, x_stride, block, y);
  }
}

// One block of outputs for `rows` rows. y: [rows, y_stride] at output 0 of the linear.
inline void coded_linear(const CodedWeights& w, const Unit* x, long x_stride, long block, long rows, float* y,
                         long y_stride) {
  const long first = block * kCodedBlock, width = w.outputs - first < kCodedBlock ? w.outputs - first : kCodedBlock;
  float found[8][kCodedBlock];
  for (long row = 0; row < rows; row += 8) {
    const int some = int(rows - row < 8 ? rows - row : 8);
    if (w.bits == 4)
      coded_rows<4>(some, w, x + row * x_stride, x_stride, block, found[0]);
    else
      coded_rows<8>(some, w, x + row * x_stride, x_stride, block, found[0]);
    for (int r = 0; r < some; ++r)
      for (long i = 0; i < width; ++i)
        y[(row + r) * y_stride + first + i] = found[r][i] + (w.bias ? w.bias[first + i] : 0.0f);
  }
}

}  // namespace eh
