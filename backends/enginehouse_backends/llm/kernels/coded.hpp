// y = x W^T with weights as codes of 4 or 8 bits: value = (code - zero) * scale, a scale for each group of inputs.
// Rows of x are rounded to 8 bits with a scale for each 32 inputs, products are summed in whole numbers, and the
// scales are applied to the sums: what is rounded is x alone, to half a step of 1/127 of its largest neighbour.
// Every output is summed in one order, whatever the number of rows.
#pragma once
#include <algorithm>
#include <cmath>

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

typedef uint8_t Bytes __attribute__((vector_size(kLanes * 4)));
typedef Bytes BytesLoose __attribute__((aligned(1), may_alias));

// Codes are multiplied less this much, which is added to their zeros again.
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
template <int kBits>
constexpr int kCodesLess = kBits == 8 ? 128 : 0;
#else
template <int kBits>
constexpr int kCodesLess = 0;
#endif

inline long num_groups_of(const CodedWeights& w) {
  const long size = w.units_in_group * kUnit;
  return (w.inputs + size - 1) / size;
}
inline long num_units(const CodedWeights& w) { return num_groups_of(w) * w.units_in_group; }
inline long num_blocks(long outputs) { return (outputs + kCodedBlock - 1) / kCodedBlock; }

inline Vec half_scales(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && defined(__AVX__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t exponent = p[i] >> 10 & 31, fraction = p[i] & 1023;
    const float size = exponent ? std::ldexp(float(1024 + fraction), int(exponent) - 25) : std::ldexp(float(fraction), -24);
    out[i] = p[i] & 0x8000 ? -size : size;
  }
  return out;
#endif
}

inline Vec zeros_of(const uint8_t* p) {
  typedef uint8_t Narrow __attribute__((vector_size(kLanes), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const Narrow*>(p), Vec);
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

inline Bytes load_bytes(const uint8_t* p) { return *reinterpret_cast<const BytesLoose*>(p); }
inline Bytes high_halves(Bytes codes) {
  typedef uint16_t Words __attribute__((vector_size(kLanes * 4)));
  return (Bytes)((Words)codes >> 4) & 15;
}

// A unit's whole-number sums of kLanes outputs for kRows rows. `codes`: the outputs' 4 inputs of the first step.
#if defined(__AVX512VNNI__)
// sums[i] += the products of 4 codes (unsigned) with 4 inputs (signed, the same for all outputs)
inline VecInt add_products(VecInt sums, Bytes codes, const int8_t* four) {
  // In assembly, as compilers broadcast ahead for all outputs at once, run out of registers and spill.
  struct Four {
    int8_t values[4];
  };
  __m512i out = (__m512i)sums;
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(out) : "v"((__m512i)codes), "m"(*reinterpret_cast<const Four*>(four)));
  return (VecInt)out;
}
#elif !defined(__AVX2__)
inline VecInt add_products(VecInt sums, Bytes codes, const int8_t* four) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < 4; ++j) sums[i] += int32_t(codes[4 * i + j]) * four[j];
  return sums;
}
#endif

template <int kBits, int kRows>
inline void unit_sums(VecInt* sums, const uint8_t* codes, const Unit* x, long x_stride) {
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  const auto four = [&](int row, int start) {
    int32_t values;
    std::memcpy(&values, x[row * x_stride].values + start, 4);
    return _mm256_set1_epi32(values);
  };
  const __m256i ones = _mm256_set1_epi16(1);
  const auto half_unit = [&](int half) {
    __m256i found[kRows];
    for (int r = 0; r < kRows; ++r) found[r] = _mm256_setzero_si256();
    if constexpr (kBits == 4) {
      // the eight sums of two products of a unit are below 2^15 together: 8 * 2 * 15 * 127
      const __m256i low = _mm256_set1_epi8(15);
      for (int s = 0; s < 4; ++s) {
        const __m256i packed = _mm256_loadu_si256((const __m256i*)(codes + s * 64 + half * 32));
        const __m256i below = _mm256_and_si256(packed, low), above = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
        for (int r = 0; r < kRows; ++r)
          found[r] = held(_mm256_add_epi16(found[r], _mm256_maddubs_epi16(below, four(r, s * 8))));
        for (int r = 0; r < kRows; ++r)
          found[r] = held(_mm256_add_epi16(found[r], _mm256_maddubs_epi16(above, four(r, s * 8 + 4))));
      }
      for (int r = 0; r < kRows; ++r) found[r] = _mm256_madd_epi16(found[r], ones);
    } else {
      // two products of a size up to 128 with inputs up to 127, given its sign, are below 2^15 together
      for (int s = 0; s < 8; ++s) {
        const __m256i less = _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(codes + s * 64 + half * 32)),
                                              _mm256_set1_epi8(-128));
        const __m256i size = _mm256_abs_epi8(less);
        for (int r = 0; r < kRows; ++r) {
          const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(four(r, s * 4), less));
          found[r] = held(_mm256_add_epi32(found[r], _mm256_madd_epi16(pairs, ones)));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
#if defined(__AVX512F__)
      sums[r] = (VecInt)(half ? _mm512_inserti64x4((__m512i)sums[r], found[r], 1) : _mm512_castsi256_si512(found[r]));
#else
      sums[r] = (VecInt)found[r];
#endif
    }
  };
  half_unit(0);
  if constexpr (kLanes == 16) half_unit(1);
#else
  constexpr int kSteps = kBits == 4 ? 4 : 8;
  for (int r = 0; r < kRows; ++r) sums[r] = VecInt{};
  for (int s = 0; s < kSteps; ++s) {
    const Bytes packed = load_bytes(codes + s * 64);
    if (kBits == 4) {
      const Bytes below = packed & 15, above = high_halves(packed);
      for (int r = 0; r < kRows; ++r) sums[r] = add_products(sums[r], below, x[r * x_stride].values + s * 8);
      for (int r = 0; r < kRows; ++r) sums[r] = add_products(sums[r], above, x[r * x_stride].values + s * 8 + 4);
    } else {
      for (int r = 0; r < kRows; ++r) sums[r] = add_products(sums[r], packed, x[r * x_stride].values + s * 4);
    }
  }
#endif
}

// All outputs of a block for kRows rows: y[r][64].
template <int kBits, int kRows>
void coded_tile(const CodedWeights& w, const Unit* x, long x_stride, long block, float* y) {
  constexpr long kUnitBytes = kUnit * 16 * kBits / 8;
  constexpr int kVecs = kCodedBlock / kLanes, kVecsOfSixteen = 16 / kLanes;
  const long groups = num_groups_of(w), each = w.units_in_group;
  const uint8_t* codes = w.codes + block * groups * each * kSixteens * kUnitBytes;
  Vec total[kVecs][kRows] = {};
  for (long g = 0; g < groups; ++g, codes += each * kSixteens * kUnitBytes) {
    const Unit* units = x + g * each;
    for (int v = 0; v < kVecs; ++v) {
      const uint8_t* of_sixteen = codes + v / kVecsOfSixteen * each * kUnitBytes;
      const long place = (block * groups + g) * kCodedBlock + v * kLanes;
      const Vec scale = half_scales(w.scales + place);
      Vec inner[kRows] = {};
      for (long u = 0; u < each; ++u) {
        const uint8_t* unit = of_sixteen + u * kUnitBytes;
        if (v % kVecsOfSixteen == 0)
          for (int line = 0; line < kUnitBytes; line += 64) __builtin_prefetch(unit + 4096 + line);
        VecInt sums[kRows];
        unit_sums<kBits, kRows>(sums, unit + v % kVecsOfSixteen * kLanes * 4, units + u, x_stride);
        for (int r = 0; r < kRows; ++r)
          inner[r] = fma(__builtin_convertvector(sums[r], Vec), splat(units[r * x_stride + u].scale), inner[r]);
      }
      const Vec zeros = (w.zeros ? zeros_of(w.zeros + place) : splat(float(w.default_zero))) - kCodesLess<kBits>;
      // the group's zero times all its inputs, which the first unit of the group has summed up
      for (int r = 0; r < kRows; ++r)
        total[v][r] = fma(fma(-zeros, splat(units[r * x_stride].group_sum), inner[r]), scale, total[v][r]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) store(y + r * kCodedBlock + v * kLanes, total[v][r] * w.multiplier);
}

template <int kBits, int kRows = kTileRows>
inline void coded_rows(int rows, const CodedWeights& w, const Unit* x, long x_stride, long block, float* y) {
  if constexpr (kRows > 1)
    if (rows < kRows) return coded_rows<kBits, kRows - 1>(rows, w, x, x_stride, block, y);
  coded_tile<kBits, kRows>(w, x, x_stride, block, y);
}

// One block of outputs for `rows` rows. y: [rows, y_stride] at output 0 of the linear.
inline void coded_linear(const CodedWeights& w, const Unit* x, long x_stride, long block, long rows, float* y,
                         long y_stride) {
  const long first = block * kCodedBlock, width = w.outputs - first < kCodedBlock ? w.outputs - first : kCodedBlock;
  float found[kTileRows][kCodedBlock];
  for (long row = 0; row < rows; row += kTileRows) {
    const int some = int(rows - row < kTileRows ? rows - row : kTileRows);
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
