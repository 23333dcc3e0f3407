// CPU kernels for what bounds a training step: batch norm, activation, depthwise convolution, squeeze-excitation.
//
// All tensors are images in channels-last memory, so the channels of a pixel are consecutive and every kernel
// works on 16 channels at once; float or half storage, float arithmetic. Plain functions on raw pointers:
// nothing of PyTorch is included, fast.py compiles this in seconds and calls it by ctypes.
//
// Sums over the batch are taken in float inside an image and in double over the images, whichever thread an
// image falls to: any number of threads gives the same bits.
//
// What batch norm needs to know of a whole batch forces passes over memory; everything between two such barriers
// is done in one pass, row by row, in buffers that stay in a core's cache.

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
constexpr long RING = 8;  // rows kept of an image: at least the largest kernel's, a power of 2
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

// Of each channel: z = x * scale + shift before the activation, the statistics behind them, and what its
// gradient needs beside dz: dx = dz * scale + (x - mean) * slope + constant.
struct Affine {
  enum { SCALE, SHIFT, MEAN, INVERSE, SLOPE, CONSTANT, COUNT };
  float* data;
  long width;
  vec at(int which, long c) const { return load(data + which * width + c); }
  float& operator()(int which, long c) const { return data[which * width + c]; }
  vec z(vec x, long c) const { return x * at(SCALE, c) + at(SHIFT, c); }
};

// Sums over the pixels of an image, of each channel; a = act(z), x the input of the norm:
enum { DY_A, DY_GRAD, DY_GRAD_X, GRAD, GRAD_X, SUMS };  // dy a, dy act'(z), dy act'(z) (x - mean), act'(z), ...

// Adds to sums (3, width) of x - pivot, of its square, and the pivot, which keeps them small: the first pixel.
template <class T> void add_moments(const T* x, long pixels, long channels, float* sums, bool is_first) {
  const long width = padded(channels);
  float *sum = sums, *square = sums + width, *pivot = sums + 2 * width;
  for (long i = 0; i < pixels; i += 4) {
    const T* p = x + i * channels;
    const long more = std::min(4L, pixels - i);
    over_channels(channels, [&](auto full, long c, long n) {
      if (is_first && i == 0) store(pivot + c, load<full>(p + c, n));
      const vec shift = load(pivot + c);
      vec s = load(sum + c), q = load(square + c);
      for (long j = 0; j < more; j++) {
        const vec d = load<full>(p + j * channels + c, n) - shift;
        s += d;
        q += d * d;
      }
      store(sum + c, s);
      store(square + c, q);
    });
  }
}

// Mean and sum of squared deviations of the batch, from the sums of its images (count, 3, width).
void combine_moments(const float* sums, long count, long pixels, long channels, double* mean, double* squares) {
  const long width = padded(channels);
  std::fill(mean, mean + channels, 0.0);
  std::fill(squares, squares + channels, 0.0);
  for (long n = 0; n < count; n++) {  // Chan, Golub and LeVeque's pairwise update
    const float *sum = sums + n * 3 * width, *square = sum + width, *pivot = square + width;
    const double share = 1.0 / (n + 1), each = 1.0 / pixels, weight = double(n) * pixels / (n + 1);
    for (long c = 0; c < channels; c++) {
      const double delta = pivot[c] + sum[c] * each - mean[c];
      mean[c] += delta * share;
      squares[c] += square[c] - double(sum[c]) * sum[c] * each + delta * delta * weight;
    }
  }
}

template <class T>
void moments(const T* x, long count, long pixels, long channels, double* mean, double* squares, int threads) {
  const long width = padded(channels);
  std::vector<float> sums(count * 3 * width);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long n = 0; n < count; n++)
    add_moments(x + n * pixels * channels, pixels, channels, &sums[n * 3 * width], true);
  combine_moments(sums.data(), count, pixels, channels, mean, squares);
}

// y = act(z) (* gate) (+ skip) over consecutive pixels, each rounded as if it had been stored as T; y may be null.
// Adds act(z) to pooled, unless null.
template <class T, class Act, class X, class Y>
void apply(const X* x, long x_stride, const Y* skip, Y* y, long y_stride, long pixels, long channels, Affine norm,
           const float* gate, float* pooled) {
  constexpr const T* as = nullptr;
  for (long i = 0; i < pixels; i++)
    over_channels(channels, [&](auto full, long c, long n) {
      vec value = load<full>(x + i * x_stride + c, n);
      if (!std::is_same_v<X, T>) value = rounded(value, as);
      vec a = rounded(Act::value(rounded(norm.z(value, c), as)), as);
      if (pooled) store(pooled + c, load(pooled + c) + a);
      if (gate) a = rounded(a * load<full>(gate + c, n), as);
      if (skip) a += load<full>(skip + i * y_stride + c, n);
      if (y) store<full>(y + i * y_stride + c, a, n);
    });
}

// The gradient of a pixel before the activation, from dy, and before the norm. With squeeze-excitation the gradient
// of act(z) is dy * gate, and what reaches it through the mean.
template <class T, class Act> struct Gradient {
  Affine norm;
  const float *gate, *dpooled;  // of the image, or both null
  template <bool FULL> vec dz(vec dy, vec x, long c, long n) const {
    constexpr const T* as = nullptr;
    if (gate) dy = dy * load<FULL>(gate + c, n) + load<FULL>(dpooled + c, n);
    return rounded(Act::grad(rounded(norm.z(x, c), as), dy), as);
  }
  template <bool FULL> vec dx(vec dy, vec x, long c, long n) const {
    const vec rest = (x - norm.at(Affine::MEAN, c)) * norm.at(Affine::SLOPE, c) + norm.at(Affine::CONSTANT, c);
    return dz<FULL>(dy, x, c, n) * norm.at(Affine::SCALE, c) + rest;
  }
};

// Over consecutive pixels; out may be dy.
template <class T, class Act, class Y>
void norm_gradient(const T* dy, const T* x, Y* out, long out_stride, long pixels, long channels,
                   Gradient<T, Act> gradient) {
  for (long i = 0; i < pixels; i++)
    over_channels(channels, [&](auto full, long c, long n) {
      const vec out_grad = load<full>(dy + i * channels + c, n), value = load<full>(x + i * channels + c, n);
      store<full>(out + i * out_stride + c, gradient.template dx<full>(out_grad, value, c, n), n);
    });
}

// The sums of one image, (SUMS, width).
template <class T, class Act>
void add_sums(const T* dy, const T* x, long pixels, long channels, Affine norm, bool is_gated, float* sums) {
  const long width = padded(channels);
  for (long i = 0; i < pixels; i += 4) {
    const T *p = x + i * channels, *g = dy + i * channels;
    const long more = std::min(4L, pixels - i);
    over_channels(channels, [&](auto full, long c, long n) {
      const vec mean = norm.at(Affine::MEAN, c);
      vec sum[SUMS];
      for (int k = 0; k < SUMS; k++) sum[k] = load(sums + k * width + c);
      for (long j = 0; j < more; j++) {
        const vec value = load<full>(p + j * channels + c, n), out = load<full>(g + j * channels + c, n);
        const vec z = rounded(norm.z(value, c), x);
        if (is_gated) {
          const vec slope = Act::grad(z, vec{} + 1.0f);
          sum[DY_A] += out * rounded(Act::value(z), x);
          sum[DY_GRAD] += out * slope;
          sum[DY_GRAD_X] += out * slope * (value - mean);
          sum[GRAD] += slope;
          sum[GRAD_X] += slope * (value - mean);
        } else {
          const vec dz = rounded(Act::grad(z, out), x);
          sum[DY_GRAD] += dz;
          sum[DY_GRAD_X] += dz * (value - mean);
        }
      }
      for (int k = 0; k < SUMS; k++) store(sums + k * width + c, sum[k]);
    });
  }
}

// --- depthwise convolution, from a ring of rows --------------------------------------------------

// Rows of an image or, with a mask, the last RING of them. `stride` elements from a pixel to the next.
struct Rows {
  float* data;
  long height, width, stride;
  float* row(long y) const { return data + (y & (RING - 1)) * width * stride; }
};

struct Span { long begin, end; };
// Rows of the kernel that meet the input for output row oy.
template <int K, int S> inline Span kernel_rows(long oy, long height) {
  constexpr int PAD = (K - 1) / 2;
  return {std::max(0L, PAD - oy * S), std::min<long>(K, height + PAD - oy * S)};
}

// TILE output pixels from (oy, ox) on; those beyond the row are of no use. weight: (K * K, padded channels).
// Channels [first, first + channels).
template <int K, int S>
void conv_tile(Rows in, float* out, const float* weight, long first, long channels, long oy, long ox) {
  constexpr int PAD = (K - 1) / 2;
  const long width = padded(channels);
  const auto [from, to] = kernel_rows<K, S>(oy, in.height);
  over_channels(channels, [&, from = from, to = to](auto full, long c, long n) {
      vec sum[TILE] = {};
      for (long ky = from; ky < to; ky++) {
        const float* w = weight + ky * K * width + c;
        const float* row = in.row(oy * S + ky - PAD) + first + c;
#pragma GCC unroll 32
        for (int j = 0; j < (TILE - 1) * S + K; j++) {  // each input pixel is loaded once
          const long ix = ox * S + j - PAD;
          if (ix < 0 || ix >= in.width) continue;
          const vec value = load<full>(row + ix * in.stride, n);
#pragma GCC unroll 8
          for (int kx = 0; kx < K; kx++)
            if ((j - kx) % S == 0 && j >= kx && j - kx < TILE * S) sum[(j - kx) / S] += value * load(w + kx * width);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) store<full>(out + t * in.stride + first + c, sum[t], n);
    });
}

// TILE pixels of the input's gradient for stride 2: output pixel q reaches the pixels 2 q - PAD + kx.
template <int K>
void grad_tile(Rows dy, float* dx, const float* weight, long first, long channels, long iy, long ix) {
  constexpr int PAD = (K - 1) / 2, S = 2;
  const long width = padded(channels);
  over_channels(channels, [&](auto full, long c, long n) {
      vec sum[TILE] = {};
      for (long ky = (iy + PAD) % S; ky < K; ky += S) {
        const long oy = (iy + PAD - ky) / S;
        if (iy + PAD < ky || oy >= dy.height) continue;
        const float* w = weight + ky * K * width + c;
        const float* row = dy.row(oy) + first + c;
#pragma GCC unroll 32
        for (int j = -(PAD / S); j <= (TILE - 1 + PAD) / S; j++) {
          const long q = ix / S + j;
          if (q < 0 || q >= dy.width) continue;
          const vec value = load<full>(row + q * dy.stride, n);
#pragma GCC unroll 8
          for (int kx = 0; kx < K; kx++) {
            const int t = S * j - PAD + kx;
            if (t >= 0 && t < TILE) sum[t] += value * load(w + kx * width);
          }
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < TILE; t++) store<full>(dx + t * dy.stride + first + c, sum[t], n);
    });
}

// Adds what output row oy gives to the weight's gradient (K * K, padded channels).
template <int K, int S> void weight_row(Rows dy, Rows x, float* dweight, long first, long channels, long oy) {
  constexpr int PAD = (K - 1) / 2;
  const long width = padded(channels);
  const auto [from, to] = kernel_rows<K, S>(oy, x.height);
  // Output pixels whose whole window lies inside the row.
  const long inner = std::min(dy.width, long((PAD + S - 1) / S));
  const long outer = x.width + PAD < K ? inner : std::clamp((x.width + PAD - K) / S + 1, inner, dy.width);
  over_channels(channels, [&, from = from, to = to](auto full, long c, long n) {
    constexpr bool FULL = decltype(full)::value;
    const float* out = dy.row(oy) + first + c;
    for (long ky = from; ky < to; ky++) {
      const float* in = x.row(oy * S + ky - PAD) + first + c;
      vec even[K] = {}, odd[K] = {};  // two chains of additions, to hide their latency
      const auto at_border = [&](long ox) {
        const vec g = load<FULL>(out + ox * dy.stride, n);
#pragma GCC unroll 8
        for (int kx = 0; kx < K; kx++) {
          const long ix = ox * S + kx - PAD;
          if (ix >= 0 && ix < x.width) even[kx] += g * load<FULL>(in + ix * x.stride, n);
        }
      };
      long ox = 0;
      for (; ox < inner; ox++) at_border(ox);
      for (; ox + 2 <= outer; ox += 2) {
        const vec g0 = load<FULL>(out + ox * dy.stride, n), g1 = load<FULL>(out + (ox + 1) * dy.stride, n);
        const float* window = in + (ox * S - PAD) * x.stride;
#pragma GCC unroll 8
        for (int kx = 0; kx < K; kx++) {
          even[kx] += g0 * load<FULL>(window + kx * x.stride, n);
          odd[kx] += g1 * load<FULL>(window + (kx + S) * x.stride, n);
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

template <class Body> void with_kernel(int kernel, int stride, Body body) {
  const auto strided = [&](auto k) {
    if (stride == 1) body(k, std::integral_constant<int, 1>());
    if (stride == 2) body(k, std::integral_constant<int, 2>());
  };
  if (kernel == 3) strided(std::integral_constant<int, 3>());
  if (kernel == 5) strided(std::integral_constant<int, 5>());
  if (kernel == 7) strided(std::integral_constant<int, 7>());
}

// Convolutions of consecutive channel groups, all of one stride.
struct Group {
  int kernel;
  long first, channels;
  std::vector<float> weight;  // (kernel * kernel, padded channels)
  long size() const { return kernel * kernel * padded(channels); }
};
struct Convs {
  std::vector<Group> groups;
  int stride;
  long pad = 0, sizes = 0;
  // reversed: with a stride of 1 the input's gradient is a convolution with the reversed kernel
  Convs(long count, const long* kernels, const long* channels, const float* const* weights, int stride, bool reversed)
      : stride(stride) {
    long first = 0;
    for (long g = 0; g < count; g++) {
      Group group{int(kernels[g]), first, channels[g], {}};
      const long taps = kernels[g] * kernels[g], width = padded(channels[g]);
      group.weight.resize(group.size());
      for (long c = 0; c < channels[g]; c++)
        for (long k = 0; k < taps; k++)
          group.weight[(reversed ? taps - 1 - k : k) * width + c] = weights[g][c * taps + k];
      first += channels[g];
      pad = std::max(pad, (kernels[g] - 1) / 2);
      sizes += group.size();
      groups.push_back(std::move(group));
    }
  }
};

struct Shape { long count, height, width, channels, out_height, out_width; };

// Of the thread: a ring of rows. Its pixels are set apart by one vector more than they need, because powers of 2
// of bytes between them would put all into the same few places of the cache.
Rows ring(std::vector<float>& memory, long height, long width, long channels) {
  const long stride = padded(channels) + LANES;
  memory.resize(RING * width * stride);
  return {memory.data(), height, width, stride};
}

// As many floats for each channel as an Affine has, of the norm that changes nothing.
std::vector<float> identity_of(long width) {
  std::vector<float> data(Affine::COUNT * width);
  std::fill(data.begin(), data.begin() + width, 1.0f);
  return data;
}

// y = conv(act(norm(x))) with the norm `before`, and act(norm(.)) of that with the norm `after`, where they are
// there. With sums (count, 3, width): the moments of y. With pooled (count, channels): the mean of y over an image.
template <class T, class Act>
void conv_forward(const T* x, T* y, Shape s, const Convs& convs, Affine before, Affine after, float* sums,
                  float* pooled, int threads) {
  const long width = padded(s.channels), out_pixels = s.out_height * s.out_width;
  auto same = identity_of(width);
  if (!before.data) before = {same.data(), width};
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> memory, pool(width);
    const Rows in = ring(memory, s.height, s.width, s.channels);
    std::vector<float> tile(TILE * in.stride);
#pragma omp for schedule(static)
    for (long n = 0; n < s.count; n++) {
      std::fill(pool.begin(), pool.end(), 0.0f);
      for (long oy = 0, filled = 0; oy < s.out_height; oy++) {
        for (; filled < std::min(s.height, oy * convs.stride + convs.pad + 1); filled++)
          apply<T, Act>(x + (n * s.height + filled) * s.width * s.channels, s.channels, (const float*)nullptr,
                        in.row(filled), in.stride, s.width, s.channels, before, nullptr, nullptr);
        T* out = y + (n * s.out_height + oy) * s.out_width * s.channels;
        for (long ox = 0; ox < s.out_width; ox += TILE) {
          for (const Group& g : convs.groups)
            with_kernel(g.kernel, convs.stride, [&](auto k, auto stride) {
              conv_tile<k, stride>(in, tile.data(), g.weight.data(), g.first, g.channels, oy, ox);
            });
          const float* from = tile.data();
          const long pixels = std::min<long>(TILE, s.out_width - ox);
          T* to = out + ox * s.channels;
          if (after.data)
            apply<T, Act>(from, in.stride, (const T*)nullptr, to, s.channels, pixels, s.channels, after, nullptr,
                          pooled ? pool.data() : nullptr);
          else
            apply<T, Identity>(from, in.stride, (const T*)nullptr, to, s.channels, pixels, s.channels,
                               {same.data(), width}, nullptr, nullptr);
        }
        if (sums) add_moments(out, s.out_width, s.channels, sums + n * 3 * width, oy == 0);
      }
      if (pooled)
        for (long c = 0; c < s.channels; c++) pooled[n * s.channels + c] = pool[c] / out_pixels;
    }
  }
}

// From dy, the gradient of what `after` made of y (or of y itself), back through the convolutions and the activation
// before them: dx gets the gradient before that activation, whose sums over an image go to sums (count, SUMS, width).
// dx and each dweights[g] may be null.
template <class T, class Act>
void conv_backward(const T* dy, const T* y, const T* x, T* dx, Shape s, const Convs& convs, Affine before, Affine after,
                   const float* gate, const float* dpooled, float* sums, float* const* dweights, int threads) {
  const long width = padded(s.channels);
  const bool is_normed = before.data;
  auto same = identity_of(width);
  if (!is_normed) before = {same.data(), width};
  std::vector<float> all_dweights(s.count * convs.sizes);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> memory, grad_memory;
    const Rows in = ring(memory, s.height, s.width, s.channels);
    const Rows grads = ring(grad_memory, s.out_height, s.out_width, s.channels);
    std::vector<float> tile(TILE * in.stride);
#pragma omp for schedule(static)
    for (long n = 0; n < s.count; n++) {
      const Gradient<T, Act> gradient{after, gate ? gate + n * s.channels : nullptr,
                                      gate ? dpooled + n * s.channels : nullptr};
      long filled = 0, grads_filled = 0;
      for (long iy = 0; iy < s.height; iy++) {
        const long at = (n * s.height + iy) * s.width * s.channels;
        for (; filled < std::min(s.height, iy + convs.pad + 1); filled++)
          apply<T, Act>(x + (n * s.height + filled) * s.width * s.channels, s.channels, (const float*)nullptr,
                        in.row(filled), in.stride, s.width, s.channels, before, nullptr, nullptr);
        for (; grads_filled < std::min(s.out_height, (iy + convs.pad) / convs.stride + 1); grads_filled++) {
          const long out_at = (n * s.out_height + grads_filled) * s.out_width * s.channels;
          float* row = grads.row(grads_filled);
          if (after.data)
            norm_gradient(dy + out_at, y + out_at, row, grads.stride, s.out_width, s.channels, gradient);
          else
            apply<T, Identity>(dy + out_at, s.channels, (const float*)nullptr, row, grads.stride, s.out_width,
                               s.channels, {same.data(), width}, nullptr, nullptr);
        }
        float* dweight = &all_dweights[n * convs.sizes];
        for (size_t i = 0; i < convs.groups.size(); dweight += convs.groups[i++].size())
          if (dweights[i] && iy % convs.stride == 0)
            with_kernel(convs.groups[i].kernel, convs.stride, [&](auto k, auto stride) {
              weight_row<k, stride>(grads, in, dweight, convs.groups[i].first, convs.groups[i].channels, iy / stride);
            });
        float* sum = sums ? sums + n * SUMS * width : nullptr;
        const Gradient<T, Act> inner{before, nullptr, nullptr};
        for (long ix = 0; dx && ix < s.width; ix += TILE) {
          for (const Group& g : convs.groups)
            with_kernel(g.kernel, convs.stride, [&](auto k, auto stride) {
              if constexpr (stride == 1)
                conv_tile<k, 1>(grads, tile.data(), g.weight.data(), g.first, g.channels, iy, ix);
              else
                grad_tile<k>(grads, tile.data(), g.weight.data(), g.first, g.channels, iy, ix);
            });
          const long offset = at + ix * s.channels, pixels = std::min<long>(TILE, s.width - ix);
          over_channels(s.channels, [&](auto full, long c, long lanes) {
            constexpr bool FULL = decltype(full)::value;
            vec total{}, product{};
            for (long i = 0; i < pixels; i++) {
              const vec value = load<FULL>(x + offset + i * s.channels + c, lanes);
              const vec da = rounded(load(tile.data() + i * in.stride + c), x);
              const vec dz = inner.template dz<FULL>(da, value, c, lanes);
              store<FULL>(dx + offset + i * s.channels + c, dz, lanes);
              total += dz;
              product += dz * (value - before.at(Affine::MEAN, c));
            }
            if (!sum) return;
            float *totals = sum + DY_GRAD * width + c, *products = sum + DY_GRAD_X * width + c;
            store(totals, load(totals) + total);
            store(products, load(products) + product);
          });
        }
      }
    }
  }
  std::vector<double> totals(convs.sizes);
  for (long n = 0; n < s.count; n++)
    for (long i = 0; i < convs.sizes; i++) totals[i] += all_dweights[n * convs.sizes + i];
  const double* total = totals.data();
  for (size_t i = 0; i < convs.groups.size(); total += convs.groups[i++].size()) {
    const long taps = convs.groups[i].kernel * convs.groups[i].kernel, channels = convs.groups[i].channels;
    if (dweights[i])
      for (long c = 0; c < channels; c++)
        for (long k = 0; k < taps; k++) dweights[i][c * taps + k] = float(total[k * padded(channels) + c]);
  }
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

}  // namespace

// Pointers marked (or null) below; everything else is there. `pixels` are those of an image. A norm is an Affine of
// (6, padded channels) floats, moments are (2, channels) doubles, is_half says how images are stored.
extern "C" {

void msunet_moments(int is_half, const void* x, long count, long pixels, long channels, double* moments_out,
                    int threads) {
  with_type(is_half, [&](auto type) {
    moments((const decltype(type)*)x, count, pixels, channels, moments_out, moments_out + channels, threads);
  });
}

// The norm of a batch with these moments, which then enter the running ones; or, without, of the running ones.
void msunet_norm(const double* moments_in /* or null */, long rows, long channels, const float* weight,
                 const float* bias, float* running_mean, float* running_var, float momentum, float eps, float* norm,
                 int) {
  const Affine to{norm, padded(channels)};
  for (long c = 0; c < channels; c++) {
    const double mean = moments_in ? moments_in[c] : running_mean[c];
    const double var = moments_in ? moments_in[channels + c] / rows : running_var[c];
    const double inverse = 1 / std::sqrt(var + eps);
    if (moments_in) {
      running_mean[c] += momentum * (float(mean) - running_mean[c]);
      running_var[c] += momentum * (float(moments_in[channels + c] / (rows - 1)) - running_var[c]);
    }
    to(Affine::MEAN, c) = float(mean);
    to(Affine::INVERSE, c) = float(inverse);
    to(Affine::SCALE, c) = float(weight[c] * inverse);
    to(Affine::SHIFT, c) = float(bias[c] - mean * weight[c] * inverse);
  }
}

// y = act(norm(x)) * gate + skip; pooled = mean of act(norm(x)) over the image. gate and pooled: (count, channels).
void msunet_apply(int is_half, int act, const void* x, const void* skip /* or null */, const float* gate /* or null */,
                  void* y /* or null */, float* pooled /* or null */, long count, long pixels, long channels,
                  float* norm, int threads) {
  const Affine affine{norm, padded(channels)};
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (long n = 0; n < count; n++) {
        const long at = n * pixels * channels;
        std::vector<float> pool(pooled ? affine.width : 0);
        apply<T, decltype(a)>((const T*)x + at, channels, skip ? (const T*)skip + at : nullptr,
                              y ? (T*)y + at : nullptr, channels, pixels, channels, affine,
                              gate ? gate + n * channels : nullptr, pooled ? pool.data() : nullptr);
        if (pooled)
          for (long c = 0; c < channels; c++) pooled[n * channels + c] = pool[c] / pixels;
      }
    });
  });
}

// sums (count, 5, padded channels), zeros before: see SUMS.
void msunet_sums(int is_half, int act, const void* dy, const void* x, long count, long pixels, long channels,
                 float* norm, int is_gated, float* sums, int threads) {
  const Affine affine{norm, padded(channels)};
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (long n = 0; n < count; n++)
        add_sums<T, decltype(a)>((const T*)dy + n * pixels * channels, (const T*)x + n * pixels * channels, pixels,
                                 channels, affine, is_gated, sums + n * SUMS * affine.width);
    });
  });
}

// Gradients of the norm's weight and bias from the sums of the images, and the rest of `norm`.
void msunet_combine(const float* sums, const float* gate /* or null */, const float* dpooled /* or null */, long count,
                    long pixels, long channels, float* norm, float* dweight, float* dbias, int) {
  const Affine to{norm, padded(channels)};
  std::vector<double> totals(channels), products(channels);
  for (long n = 0; n < count; n++) {
    const float* of = sums + n * SUMS * to.width;
    for (long c = 0; c < channels; c++) {
      const double g = gate ? gate[n * channels + c] : 1, d = gate ? dpooled[n * channels + c] : 0;
      totals[c] += g * of[DY_GRAD * to.width + c] + d * of[GRAD * to.width + c];
      products[c] += g * of[DY_GRAD_X * to.width + c] + d * of[GRAD_X * to.width + c];
    }
  }
  const double rows = double(count) * pixels;
  for (long c = 0; c < channels; c++) {
    const double scale = to(Affine::SCALE, c), inverse = to(Affine::INVERSE, c);
    dbias[c] = float(totals[c]);
    dweight[c] = float(products[c] * inverse);
    to(Affine::SLOPE, c) = float(-scale * inverse * inverse * products[c] / rows);
    to(Affine::CONSTANT, c) = float(-scale * totals[c] / rows);
  }
}

// The gradient of act(norm(x)) (act: none where dy is already that of norm(x)) to that of x; dx may be dy.
void msunet_norm_gradient(int is_half, int act, const void* dy, const void* x, void* dx, long count, long pixels,
                          long channels, float* norm, int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (long n = 0; n < count; n++) {
        const long at = n * pixels * channels;
        norm_gradient((const T*)dy + at, (const T*)x + at, (T*)dx + at, channels, pixels, channels,
                      Gradient<T, decltype(a)>{{norm, padded(channels)}, nullptr, nullptr});
      }
    });
  });
}

// See conv_forward. Each weight is (channels, kernel, kernel); moments_out (or null) are those of y.
void msunet_conv_forward(int is_half, int act, int stride, long groups, const long* kernels, const long* channels,
                         const float* const* weights, const void* x, void* y, long count, long height, long width,
                         long out_height, long out_width, long all, float* before /* or null */,
                         float* after /* or null */, double* moments_out, float* pooled /* or null */, int threads) {
  const Convs convs(groups, kernels, channels, weights, stride, false);
  const long wide = padded(all);
  std::vector<float> sums(moments_out ? count * 3 * wide : 0);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      conv_forward<T, decltype(a)>((const T*)x, (T*)y, {count, height, width, all, out_height, out_width}, convs,
                                   {before, wide}, {after, wide}, moments_out ? sums.data() : nullptr, pooled, threads);
    });
  });
  if (moments_out)
    combine_moments(sums.data(), count, out_height * out_width, all, moments_out, moments_out + all);
}

// See conv_backward.
void msunet_conv_backward(int is_half, int act, int stride, long groups, const long* kernels, const long* channels,
                          const float* const* weights, const void* dy, const void* y, const void* x, void* dx,
                          long count, long height, long width, long out_height, long out_width, long all,
                          float* before /* or null */, float* after /* or null */, const float* gate /* or null */,
                          const float* dpooled /* or null */, float* sums /* or null */, float* const* dweights,
                          int threads) {
  const Convs convs(groups, kernels, channels, weights, stride, stride == 1);
  const long wide = padded(all);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      conv_backward<T, decltype(a)>((const T*)dy, (const T*)y, (const T*)x, (T*)dx,
                                    {count, height, width, all, out_height, out_width}, convs, {before, wide},
                                    {after, wide}, gate, dpooled, sums, dweights, threads);
    });
  });
}
}
