// The widest float vector that the compiler's target has, and the few functions that the kernels need on it.
// GCC and Clang vector extensions: the same code for AVX-512, AVX2 and NEON.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace eh {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// How many rows of sums, three vectors each, the registers hold beside what is multiplied.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
#else
constexpr int kTileRows = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));
typedef Vec VecLoose __attribute__((aligned(4), may_alias));
typedef VecBits VecBitsLoose __attribute__((aligned(4), may_alias));
typedef uint16_t bf16;

// What bf16 weights, keys and values are multiplied with: bf16 where the processor multiplies pairs of them, else
// float, which costs nothing to read and isn't rounded.
#if defined(__AVX512BF16__)
typedef bf16 BesideBf16;
#else
typedef float BesideBf16;
#endif

inline Vec load(const float* p) { return *reinterpret_cast<const VecLoose*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<VecLoose*>(p) = v; }
// a * b + c, rounded once where the processor can. The build forbids compilers to join products and sums by themselves:
// they do so here and not there, and then a row's result depends on how many rows there are.
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
inline VecBits load_bits(const void* p) { return *reinterpret_cast<const VecBitsLoose*>(p); }
// Not Vec{} + x: what adding changes in -0 costs an instruction.
inline Vec splat(float x) {
#if defined(__AVX512F__)
  return (Vec)_mm512_set1_ps(x);
#elif defined(__AVX__)
  return (Vec)_mm256_set1_ps(x);
#else
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = x;
  return out;
#endif
}
// A vector that stays in a register, computed here: compilers would read it from memory again for each use, or put off
// sums until they run out of registers.
template <class V>
inline V held(V v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__AVX__)
  asm("" : "+x"(v));
#endif
  return v;
}
inline Vec select(VecInt mask, Vec yes, Vec no) {
  return (Vec)(((VecInt)yes & mask) | ((VecInt)no & ~mask));
}
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }

inline float to_float(bf16 x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
// Round to nearest even; not-a-number stays not-a-number.
inline bf16 to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16(bits >> 16 | 0x40);
  return bf16((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) { *p = to_bf16(x); }
inline float get(const float* p) { return *p; }
inline float get(const bf16* p) { return to_float(*p); }
inline void store_as(float* p, Vec v) { store(p, v); }
inline void store_as(bf16* p, Vec v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = to_bf16(v[i]);
#endif
}

inline float sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#endif
  float lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}
inline float max_lane(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x with about one unit in the last place; 0 below -87.3, finite above 88.
inline Vec exp(Vec x) {
  const VecInt tiny = x < splat(-87.3f);
  x = select(x > splat(88.3f), splat(88.3f), x);
  x = select(tiny, splat(0.0f), x);
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec n = fma(x, splat(1.44269504f), magic) - magic;
  Vec r = fma(n, splat(-0.693145752f), x);
  r = fma(n, splat(-1.42860677e-6f), r);
  Vec p = splat(1.98756915e-4f);
  for (const float c : {1.39819995e-3f, 8.33345200e-3f, 4.16657962e-2f, 1.66666657e-1f, 0.5f}) p = fma(p, r, splat(c));
  p = fma(p, r * r, r) + 1.0f;
  const VecInt exponent = (__builtin_convertvector(n, VecInt) + 127) << 23;
  return select(tiny, splat(0.0f), p * (Vec)exponent);
}
inline Vec tanh(Vec x) {
  const Vec e = exp(x * 2.0f);
  return 1.0f - 2.0f / (e + 1.0f);
}

}  // namespace eh
