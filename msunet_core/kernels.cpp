// CPU kernels for what bounds a training step: batch norm with its activation, and depthwise convolution.
//
// All tensors are images in channels-last memory, so the channels of a pixel are consecutive and every kernel
// works on 16 channels at once; float or half storage, float arithmetic. Plain functions on raw pointers:
// nothing of PyTorch is included, fast.py compiles this in seconds and calls it by ctypes.
//
// Each sum over the batch is taken in a fixed number of parts, in float inside a part and in double over the
// parts. What belongs to which part depends on the shape alone: any number of threads gives the same bits.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "needs AVX2, FMA and F16C"
#endif

namespace {

constexpr long LANES = 16;
constexpr long PARTS = 64;  // of a sum over the batch
#ifdef __AVX512F__
constexpr int TILE = 8;  // output pixels kept in registers
#else
constexpr int TILE = 4;  // a vector is two registers here, and there are 16
#endif

typedef float vec __attribute__((vector_size(64)));
typedef float unaligned_vec __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(64)));
struct half { uint16_t bits; };

// --- loads and stores of up to 16 channels ---------------------------------------------------

// FULL: all 16. Otherwise the first n; the rest reads as 0 and is not written.
#ifdef __AVX512F__
inline __mmask16 first(long n) { return __mmask16((1u << n) - 1); }
inline vec widen(__m256i h) { return (vec)_mm512_cvtph_ps(h); }
inline __m256i narrow(vec v) { return _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#else
inline __m256i first(long n) {  // of 8
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(int(n)), lane);
}
union Halves { vec all; __m256 part[2]; };
inline vec widen(__m256i h) {
  Halves u;
  u.part[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(h));
  u.part[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
  return u.all;
}
inline __m256i narrow(vec v) {
  Halves u{v};
  return _mm256_set_m128i(_mm256_cvtps_ph(u.part[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(u.part[0], _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <bool FULL> inline vec load(const float* p, long n) {
  if (FULL) return *(const unaligned_vec*)p;
#ifdef __AVX512F__
  return (vec)_mm512_maskz_loadu_ps(first(n), p);
#else
  Halves u;
  u.part[0] = _mm256_maskload_ps(p, first(n));
  u.part[1] = _mm256_maskload_ps(p + 8, first(n - 8));
  return u.all;
#endif
}
template <bool FULL> inline void store(float* p, vec v, long n) {
  if (FULL) {
    *(unaligned_vec*)p = v;
    return;
  }
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(p, first(n), (__m512)v);
#else
  Halves u{v};
  _mm256_maskstore_ps(p, first(n), u.part[0]);
  _mm256_maskstore_ps(p + 8, first(n - 8), u.part[1]);
#endif
}
template <bool FULL> inline vec load(const half* p, long n) {
  if (FULL) return widen(_mm256_loadu_si256((const __m256i*)p));
  half some[LANES] = {};
  memcpy(some, p, n * sizeof(half));
  return widen(_mm256_loadu_si256((const __m256i*)some));
}
template <bool FULL> inline void store(half* p, vec v, long n) {
  if (FULL) {
    _mm256_storeu_si256((__m256i*)p, narrow(v));
    return;
  }
  half some[LANES];
  _mm256_storeu_si256((__m256i*)some, narrow(v));
  memcpy(p, some, n * sizeof(half));
}
// Buffers of our own are padded to whole vectors.
inline vec load(const float* p) { return load<true>(p, LANES); }
inline void store(float* p, vec v) { store<true>(p, v, LANES); }
inline long padded(long channels) { return (channels + LANES - 1) / LANES * LANES; }

inline vec rounded(vec v, const float*) { return v; }
inline vec rounded(vec v, const half*) { return widen(narrow(v)); }  // as if it had been stored

// body(true_type or false_type: all 16 lanes?, first channel, channels) for each 16 channels
template <class Body> inline void over_channels(long channels, Body body) {
  long c = 0;
  for (; c + LANES <= channels; c += LANES) body(std::true_type(), c, LANES);
  if (c < channels) body(std::false_type(), c, channels - c);
}

struct Part { long begin, end; };
inline Part part_of(long count, long part) { return {count * part / PARTS, count * (part + 1) / PARTS}; }

// --- activations -----------------------------------------------------------------------------

// exp to about 1 unit in the last place: 2^k times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
inline vec exponential(vec x) {
  x = x < -87.0f ? vec{} - 87.0f : x;
  x = x > 88.0f ? vec{} + 88.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vec shifted = x * 1.44269504f + magic;
  const vec k = shifted - magic;
  const vec r = x - k * 0.693359375f + k * 2.12194440e-4f;
  vec p = r * (1.0f / 720) + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  return p * (vec)(((ivec)shifted << 23) + 0x3f800000);  // the bits of magic are shifted out
}
inline vec sigmoid(vec z) { return 1.0f / (1.0f + exponential(-z)); }

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

// --- batch norm ------------------------------------------------------------------------------

struct Moments { std::vector<double> mean, squares; };  // squares: sum of squared deviations

template <class T> Moments moments(const T* x, long rows, long channels, int threads) {
  const long width = padded(channels);
  // Of each part the sums of x - pivot and of its square; the pivot, the part's first pixel, keeps them small.
  std::vector<float> sums(PARTS * 3 * width);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < PARTS; part++) {
    float *sum = &sums[part * 3 * width], *square = sum + width, *pivot = square + width;
    const auto [begin, end] = part_of(rows, part);
    if (begin < end)
      over_channels(channels, [&, at = x + begin * channels](auto full, long c, long n) {
        store(pivot + c, load<full>(at + c, n));
      });
    for (long row = begin; row < end; row += 4) {
      const T* p = x + row * channels;
      const long more = std::min(4L, end - row);
      over_channels(channels, [&](auto full, long c, long n) {
        const vec shift = load(pivot + c);
        vec s = load(sum + c), q = load(square + c);
        for (long i = 0; i < more; i++) {
          const vec d = load<full>(p + i * channels + c, n) - shift;
          s += d;
          q += d * d;
        }
        store(sum + c, s);
        store(square + c, q);
      });
    }
  }
  Moments total{std::vector<double>(channels), std::vector<double>(channels)};
  double seen = 0;
  for (long part = 0; part < PARTS; part++) {
    const auto [begin, end] = part_of(rows, part);
    const double count = end - begin;
    if (count == 0) continue;
    const float *sum = &sums[part * 3 * width], *square = sum + width, *pivot = square + width;
    for (long c = 0; c < channels; c++) {  // Chan, Golub and LeVeque's pairwise update
      const double delta = pivot[c] + sum[c] / count - total.mean[c];
      total.mean[c] += delta * count / (seen + count);
      total.squares[c] += square[c] - double(sum[c]) * sum[c] / count + delta * delta * seen * count / (seen + count);
    }
    seen += count;
  }
  return total;
}

// y = act((x - mean) / std * weight + bias) (+ skip); in training of the batch, which then enters the running ones.
template <class T, class Act>
void norm_forward(const T* x, const T* skip, T* y, long rows, long channels, const float* weight, const float* bias,
                  float* running_mean, float* running_var, float momentum, float eps, bool training, float* saved,
                  int threads) {
  std::vector<float> scale(padded(channels)), shift(padded(channels));
  Moments batch;
  if (training) batch = moments(x, rows, channels, threads);
  for (long c = 0; c < channels; c++) {
    const double mean = training ? batch.mean[c] : running_mean[c];
    const double var = training ? batch.squares[c] / rows : running_var[c];
    const double inverse = 1 / std::sqrt(var + eps);
    if (training) {
      running_mean[c] += momentum * (float(mean) - running_mean[c]);
      running_var[c] += momentum * (float(batch.squares[c] / (rows - 1)) - running_var[c]);
      saved[c] = float(mean);
      saved[channels + c] = float(inverse);
    }
    scale[c] = float(weight[c] * inverse);
    shift[c] = float(bias[c] - mean * weight[c] * inverse);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < PARTS; part++) {
    const auto [begin, end] = part_of(rows, part);
    for (long at = begin * channels; at < end * channels; at += channels)
      over_channels(channels, [&](auto full, long c, long n) {
        vec a = Act::value(rounded(load<full>(x + at + c, n) * load(&scale[c]) + load(&shift[c]), x));
        if (skip) a = rounded(a, x) + load<full>(skip + at + c, n);
        store<full>(y + at + c, a, n);
      });
  }
}

// From dy and the input x, with mean and 1/std of the batch in `saved`: dx and the gradients of weight and bias.
// With z the value before the activation, dz = dy * act'(z):
//   dx = weight / std * (dz - mean(dz) - (x - mean) / var * mean(dz * (x - mean)))
template <class T, class Act>
void norm_backward(const T* dy, const T* x, T* dx, long rows, long channels, const float* weight, const float* bias,
                   const float* saved, float* dweight, float* dbias, int threads) {
  const long width = padded(channels);
  std::vector<float> scale(width), shift(width), mean(width), slope(width), constant(width);
  for (long c = 0; c < channels; c++) {
    mean[c] = saved[c];
    scale[c] = float(double(weight[c]) * saved[channels + c]);
    shift[c] = float(bias[c] - double(mean[c]) * weight[c] * saved[channels + c]);
  }
  std::vector<float> sums(PARTS * 2 * width);  // of dz, and of dz * (x - mean)
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < PARTS; part++) {
    float *sum = &sums[part * 2 * width], *product = sum + width;
    const auto [begin, end] = part_of(rows, part);
    for (long row = begin; row < end; row += 4) {
      const T *p = x + row * channels, *g = dy + row * channels;
      const long more = std::min(4L, end - row);
      over_channels(channels, [&](auto full, long c, long n) {
        const vec a = load(&scale[c]), b = load(&shift[c]), m = load(&mean[c]);
        vec s = load(sum + c), q = load(product + c);
        for (long i = 0; i < more; i++) {
          const vec value = load<full>(p + i * channels + c, n);
          const vec dz = rounded(Act::grad(rounded(value * a + b, x), load<full>(g + i * channels + c, n)), x);
          s += dz;
          q += dz * (value - m);
        }
        store(sum + c, s);
        store(product + c, q);
      });
    }
  }
  std::vector<double> totals(2 * width);
  for (long part = 0; part < PARTS; part++)
    for (long i = 0; i < 2 * width; i++) totals[i] += sums[part * 2 * width + i];
  for (long c = 0; c < channels; c++) {
    const double sum = totals[c], product = totals[width + c], inverse = saved[channels + c];
    dbias[c] = float(sum);
    dweight[c] = float(product * inverse);
    slope[c] = float(-scale[c] * inverse * inverse * product / rows);
    constant[c] = float(-scale[c] * sum / rows);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < PARTS; part++) {
    const auto [begin, end] = part_of(rows, part);
    for (long at = begin * channels; at < end * channels; at += channels)
      over_channels(channels, [&](auto full, long c, long n) {
        const vec a = load(&scale[c]), value = load<full>(x + at + c, n);
        const vec dz = rounded(Act::grad(rounded(value * a + load(&shift[c]), x), load<full>(dy + at + c, n)), x);
        store<full>(dx + at + c, dz * a + ((value - load(&mean[c])) * load(&slope[c]) + load(&constant[c])), n);
      });
  }
}

// --- depthwise convolution -------------------------------------------------------------------

// A slice of the channels of images: `stride` elements from a pixel to the next.
template <class T> struct Images {
  T* data;
  long height, width, stride;
  T* pixel(long n, long y, long x) const { return data + ((n * height + y) * width + x) * stride; }
};

// Rows of the kernel that meet the input for output row oy.
template <int K, int S> inline Part kernel_rows(long oy, long height) {
  constexpr int PAD = (K - 1) / 2;
  return {std::max(0L, PAD - oy * S), std::min<long>(K, height + PAD - oy * S)};
}

// Output row oy of image n. weight: (K * K, padded channels).
template <int K, int S, class T>
void conv_row(Images<const T> in, Images<T> out, const float* weight, long channels, long n, long oy) {
  constexpr int PAD = (K - 1) / 2;
  const long width = padded(channels);
  const auto [from, to] = kernel_rows<K, S>(oy, in.height);
  for (long ox = 0; ox < out.width; ox += TILE)
    over_channels(channels, [&, from = from, to = to](auto full, long c, long lanes) {
      vec sum[TILE] = {};
      for (long ky = from; ky < to; ky++) {
        const float* w = weight + ky * K * width + c;
        const T* row = in.pixel(n, oy * S + ky - PAD, 0) + c;
#pragma GCC unroll 32
        for (int j = 0; j < (TILE - 1) * S + K; j++) {  // each input pixel is loaded once
          const long ix = ox * S + j - PAD;
          if (ix < 0 || ix >= in.width) continue;
          const vec value = load<full>(row + ix * in.stride, lanes);
#pragma GCC unroll 8
          for (int kx = 0; kx < K; kx++)
            if ((j - kx) % S == 0 && j >= kx && j - kx < TILE * S) sum[(j - kx) / S] += value * load(w + kx * width);
        }
      }
      T* target = out.pixel(n, oy, ox) + c;
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++)
        if (ox + t < out.width) store<full>(target + t * out.stride, sum[t], lanes);
    });
}

// Row iy of the input's gradient for stride 2: output pixel q reaches the pixels 2 q - PAD + kx.
template <int K, class T>
void grad_row(Images<const T> dy, Images<T> dx, const float* weight, long channels, long n, long iy) {
  constexpr int PAD = (K - 1) / 2, S = 2;
  const long width = padded(channels);
  for (long ix = 0; ix < dx.width; ix += TILE)
    over_channels(channels, [&](auto full, long c, long lanes) {
      vec sum[TILE] = {};
      for (long ky = (iy + PAD) % S; ky < K; ky += S) {
        const long oy = (iy + PAD - ky) / S;
        if (iy + PAD < ky || oy >= dy.height) continue;
        const float* w = weight + ky * K * width + c;
        const T* row = dy.pixel(n, oy, 0) + c;
#pragma GCC unroll 32
        for (int j = -(PAD / S); j <= (TILE - 1 + PAD) / S; j++) {
          const long q = ix / S + j;
          if (q < 0 || q >= dy.width) continue;
          const vec value = load<full>(row + q * dy.stride, lanes);
#pragma GCC unroll 8
          for (int kx = 0; kx < K; kx++) {
            const int t = S * j - PAD + kx;
            if (t >= 0 && t < TILE) sum[t] += value * load(w + kx * width);
          }
        }
      }
      T* target = dx.pixel(n, iy, ix) + c;
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++)
        if (ix + t < dx.width) store<full>(target + t * dx.stride, sum[t], lanes);
    });
}

// Adds what output row oy of image n gives to the weight's gradient (K * K, padded channels).
template <int K, int S, class T>
void weight_row(Images<const T> dy, Images<const T> x, float* dweight, long channels, long n, long oy) {
  constexpr int PAD = (K - 1) / 2;
  const long width = padded(channels);
  const auto [from, to] = kernel_rows<K, S>(oy, x.height);
  // Output pixels whose whole window lies inside the row.
  const long inner = std::min(dy.width, long((PAD + S - 1) / S));
  const long outer = x.width + PAD < K ? inner : std::clamp((x.width + PAD - K) / S + 1, inner, dy.width);
  over_channels(channels, [&, from = from, to = to](auto full, long c, long lanes) {
    constexpr bool FULL = decltype(full)::value;
    const T* out = dy.pixel(n, oy, 0) + c;
    for (long ky = from; ky < to; ky++) {
      const T* in = x.pixel(n, oy * S + ky - PAD, 0) + c;
      vec even[K] = {}, odd[K] = {};  // two chains of additions, to hide their latency
      const auto at_border = [&](long ox) {
        const vec g = load<FULL>(out + ox * dy.stride, lanes);
#pragma GCC unroll 8
        for (int kx = 0; kx < K; kx++) {
          const long ix = ox * S + kx - PAD;
          if (ix >= 0 && ix < x.width) even[kx] += g * load<FULL>(in + ix * x.stride, lanes);
        }
      };
      long ox = 0;
      for (; ox < inner; ox++) at_border(ox);
      for (; ox + 2 <= outer; ox += 2) {
        const vec g0 = load<FULL>(out + ox * dy.stride, lanes), g1 = load<FULL>(out + (ox + 1) * dy.stride, lanes);
        const T* window = in + (ox * S - PAD) * x.stride;
#pragma GCC unroll 8
        for (int kx = 0; kx < K; kx++) {
          even[kx] += g0 * load<FULL>(window + kx * x.stride, lanes);
          odd[kx] += g1 * load<FULL>(window + (kx + S) * x.stride, lanes);
        }
      }
      for (; ox < dy.width; ox++) at_border(ox);
#pragma GCC unroll 8
      for (int kx = 0; kx < K; kx++) {
        float* w = dweight + (ky * K + kx) * width + c;
        store(w, load(w) + (even[kx] + odd[kx]));
      }
    }
  });
}

// The parameter (channels, taps) as (taps, padded channels).
std::vector<float> by_tap(const float* weight, long channels, int taps, bool reversed) {
  const long width = padded(channels);
  std::vector<float> packed(taps * width);
  for (long c = 0; c < channels; c++)
    for (int k = 0; k < taps; k++) packed[(reversed ? taps - 1 - k : k) * width + c] = weight[c * taps + k];
  return packed;
}

template <int K, int S, class T>
void conv_forward(Images<const T> x, Images<T> y, const float* weight, long count, long channels, int threads) {
  const auto packed = by_tap(weight, channels, K * K, false);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long row = 0; row < count * y.height; row++)
    conv_row<K, S>(x, y, packed.data(), channels, row / y.height, row % y.height);
}

// dx and dweight may each be null. Image by image, so that its dy comes from memory once for both.
template <int K, int S, class T>
void conv_backward(Images<const T> dy, Images<const T> x, Images<T> dx, const float* weight, float* dweight, long count,
                   long channels, int threads) {
  const long width = padded(channels), size = dweight ? K * K * width : 0;
  // For stride 1 the input's gradient is a convolution with the reversed kernel.
  const auto packed = by_tap(weight, channels, K * K, S == 1);
  std::vector<float> sums(PARTS * size);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long part = 0; part < PARTS; part++) {
    const auto [begin, end] = part_of(count, part);
    for (long n = begin; n < end; n++) {
      if (dweight)
        for (long oy = 0; oy < dy.height; oy++) weight_row<K, S>(dy, x, &sums[part * size], channels, n, oy);
      if (dx.data)
        for (long iy = 0; iy < dx.height; iy++) {
          if constexpr (S == 1)
            conv_row<K, 1>(dy, dx, packed.data(), channels, n, iy);
          else
            grad_row<K>(dy, dx, packed.data(), channels, n, iy);
        }
    }
  }
  std::vector<double> totals(size);
  for (long part = 0; part < PARTS; part++)
    for (long i = 0; i < size; i++) totals[i] += sums[part * size + i];
  if (dweight)
    for (long c = 0; c < channels; c++)
      for (int k = 0; k < K * K; k++) dweight[c * K * K + k] = float(totals[k * width + c]);
}

// --- from numbers to template arguments ------------------------------------------------------

template <class Body> void with_type(int is_half, Body body) {
  if (is_half) body(half());
  else body(0.0f);
}
template <class Body> void with_act(int act, Body body) {
  if (act == 0) body(Identity());
  if (act == 1) body(Relu());
  if (act == 2) body(Silu());
}
template <class Body> void with_kernel(int kernel, int stride, Body body) {
  const auto strided = [&](auto k) {
    if (stride == 1) body(k, std::integral_constant<int, 1>());
    if (stride == 2) body(k, std::integral_constant<int, 2>());
  };
  if (kernel == 3) strided(std::integral_constant<int, 3>());
  if (kernel == 5) strided(std::integral_constant<int, 5>());
  if (kernel == 7) strided(std::integral_constant<int, 7>());
}

}  // namespace

extern "C" {

// x, skip (or null), y: (rows, channels); saved: mean and 1/std. act: 0 none, 1 ReLU, 2 SiLU.
void msunet_norm_forward(int is_half, int act, int training, const void* x, const void* skip, void* y, long rows,
                         long channels, const float* weight, const float* bias, float* running_mean,
                         float* running_var, float momentum, float eps, float* saved, int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      norm_forward<T, decltype(a)>((const T*)x, (const T*)skip, (T*)y, rows, channels, weight, bias, running_mean,
                                   running_var, momentum, eps, training, saved, threads);
    });
  });
}

void msunet_norm_backward(int is_half, int act, const void* dy, const void* x, void* dx, long rows, long channels,
                          const float* weight, const float* bias, const float* saved, float* dweight, float* dbias,
                          int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      norm_backward<T, decltype(a)>((const T*)dy, (const T*)x, (T*)dx, rows, channels, weight, bias, saved, dweight,
                                    dbias, threads);
    });
  });
}

// Channels [first, first + channels) of images with `all` channels; weight (channels, kernel, kernel).
void msunet_conv_forward(int is_half, int kernel, int stride, const void* x, void* y, const float* weight, long count,
                         long height, long width, long out_height, long out_width, long all, long first, long channels,
                         int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_kernel(kernel, stride, [&](auto k, auto s) {
      conv_forward<k, s, T>({(const T*)x + first, height, width, all}, {(T*)y + first, out_height, out_width, all},
                            weight, count, channels, threads);
    });
  });
}

void msunet_conv_backward(int is_half, int kernel, int stride, const void* dy, const void* x, void* dx,
                          const float* weight, float* dweight, long count, long height, long width, long out_height,
                          long out_width, long all, long first, long channels, int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_kernel(kernel, stride, [&](auto k, auto s) {
      conv_backward<k, s, T>({(const T*)dy + first, out_height, out_width, all},
                             {(const T*)x + first, height, width, all},
                             {dx ? (T*)dx + first : nullptr, height, width, all}, weight, dweight, count, channels,
                             threads);
    });
  });
}
}
