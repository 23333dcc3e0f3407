// What the kernels of this folder share: vectors of floats, loads and stores of them, activations.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "needs AVX2, FMA and F16C"
#endif

namespace {

#ifdef __AVX512F__
constexpr long LANES = 16;  // of a vector
typedef __m256i halves;
typedef __mmask16 mask;
#else
constexpr long LANES = 8;
typedef __m128i halves;
typedef __m256i mask;
#endif
constexpr long WIDTH = 16;  // buffers are padded to so many channels, whatever a vector holds
constexpr int TILE = 8;     // output pixels kept in registers

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
struct half { uint16_t bits; };

// --- loads and stores of up to LANES channels ------------------------------------------------

// FULL: all of them. Otherwise the first n; the rest reads as 0 and is not written.
#ifdef __AVX512F__
inline mask first(long n) { return mask((1u << n) - 1); }
inline vec widen(halves h) { return (vec)_mm512_cvtph_ps(h); }
inline halves narrow(vec v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
inline vec load_some(const float* p, long n) { return (vec)_mm512_maskz_loadu_ps(first(n), p); }
inline void store_some(float* p, vec v, long n) { _mm512_mask_storeu_ps(p, first(n), (__m512)v); }
#else
inline mask first(long n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline vec widen(halves h) { return (vec)_mm256_cvtph_ps(h); }
inline halves narrow(vec v) { return _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
inline vec load_some(const float* p, long n) { return (vec)_mm256_maskload_ps(p, first(n)); }
inline void store_some(float* p, vec v, long n) { _mm256_maskstore_ps(p, first(n), (__m256)v); }
#endif

template <bool FULL> inline vec load(const float* p, long n) {
  return FULL ? *(const unaligned_vec*)p : load_some(p, n);
}
template <bool FULL> inline void store(float* p, vec v, long n) {
  if (FULL) *(unaligned_vec*)p = v;
  else store_some(p, v, n);
}
template <bool FULL> inline vec load(const half* p, long n) {
  halves some = {};
  memcpy(&some, p, FULL ? sizeof(some) : n * sizeof(half));
  return widen(some);
}
template <bool FULL> inline void store(half* p, vec v, long n) {
  const halves some = narrow(v);
  memcpy(p, &some, FULL ? sizeof(some) : n * sizeof(half));
}
// Buffers of our own are padded to whole vectors, which start where lines of the cache do.
template <class T> struct Aligned {
  typedef T value_type;
  T* allocate(size_t n) { return (T*)::operator new(n * sizeof(T), std::align_val_t(64)); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
typedef std::vector<float, Aligned<float>> Buffer;
inline vec load(const float* p) { return load<true>(p, LANES); }
inline void store(float* p, vec v) { store<true>(p, v, LANES); }
inline long padded(long channels) { return (channels + WIDTH - 1) / WIDTH * WIDTH; }

inline vec rounded(vec v, const float*) { return v; }
inline vec rounded(vec v, const half*) { return widen(narrow(v)); }  // as if it had been stored

// body(true_type or false_type: all lanes?, first channel, channels) for each LANES channels
template <class Body> inline void over_channels(long channels, Body body) {
  long c = 0;
  for (; c + LANES <= channels; c += LANES) body(std::true_type(), c, LANES);
  if (c < channels) body(std::false_type(), c, channels - c);
}

// --- activations -----------------------------------------------------------------------------

#ifdef __AVX512F__
inline vec at_least(vec x, float bound) { return (vec)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x); }
inline vec at_most(vec x, float bound) { return (vec)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x); }
// p * 2^k, of shifted = k + magic.
inline vec scaled(vec p, vec shifted, float magic) {
  return (vec)_mm512_scalef_ps((__m512)p, (__m512)(shifted - magic));
}
inline vec inverse(vec x) {  // 14 bits, doubled by one of Newton's steps: a division takes as long as the rest
  const vec r = (vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
}
#else
inline vec at_least(vec x, float bound) { return (vec)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x); }
inline vec at_most(vec x, float bound) { return (vec)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x); }
inline vec scaled(vec p, vec shifted, float) {
  return p * (vec)(((ivec)shifted << 23) + 0x3f800000);  // the bits of magic are shifted out
}
inline vec inverse(vec x) { return 1.0f / x; }
#endif

// exp to about 1 unit in the last place: 2^k times a polynomial for 2^f, k whole and f in [-1/2, 1/2], minimax with
// a relative error of 2e-9. NaN stays NaN.
inline vec exponential(vec x) {
  x = at_most(at_least(x, -87.0f), 87.0f);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const float log2e = 1.44269504f;
  const vec shifted = x * log2e + magic;
  const vec f = x * log2e - (shifted - magic);
  vec p = f * 1.53458107e-4f + 1.33999315e-3f;
  p = p * f + 9.61848896e-3f;
  p = p * f + 5.55032878e-2f;
  p = p * f + 2.40226469e-1f;
  p = p * f + 6.93147206e-1f;
  p = p * f + 1.0f;
  return scaled(p, shifted, magic);
}
inline vec sigmoid(vec z) { return inverse(1.0f + exponential(-z)); }

// Comparisons are such that NaN passes through, as it does in PyTorch.
struct Identity {
  static vec value(vec z) { return z; }
  static vec grad(vec, vec g) { return g; }
};
struct Relu {
  static vec value(vec z) { return z < 0.0f ? vec{} : z; }
  static vec grad(vec z, vec g) { return z <= 0.0f ? vec{} : g; }
};
struct Silu {
  static vec value(vec z) { return z * sigmoid(z); }
  static vec grad(vec z, vec g) {
    const vec s = sigmoid(z);
    return g * (s + z * s * (1.0f - s));
  }
};

}  // namespace
