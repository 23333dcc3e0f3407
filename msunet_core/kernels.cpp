// CPU kernels for what bounds a training step: batch norm, activation, depthwise convolution, squeeze-excitation;
// and for a whole inverted residual in eval mode, with its ternary 1x1 convolutions.
//
// All tensors are images in channels-last memory, so the channels of a pixel are consecutive and every kernel
// works on a vector of them; float or half storage, float arithmetic. Plain functions on raw pointers:
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
constexpr long RING = 8;    // rows kept of an image, a power of 2: at least the largest kernel's
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
inline vec inverse(vec x) {  // 14 bits, doubled by one of Newton's steps: a division takes as long as the rest
  const vec r = (vec)_mm512_rcp14_ps((__m512)x);
  return r + r * (1.0f - x * r);
}
#else
inline vec at_least(vec x, float bound) { return (vec)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x); }
inline vec at_most(vec x, float bound) { return (vec)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x); }
inline vec inverse(vec x) { return 1.0f / x; }
#endif

// exp to about 1 unit in the last place: 2^k times a polynomial on [-ln2/2, ln2/2]. NaN stays NaN.
inline vec exponential(vec x) {
  x = at_most(at_least(x, -87.0f), 87.0f);
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
  Buffer sums(count * 3 * width);
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

// The last `kept` rows of an image, a power of 2. `stride` elements from a pixel to the next.
struct Rows {
  float* data;
  long height, width, stride, kept;
  float* row(long y) const { return data + (y & (kept - 1)) * width * stride; }
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
  Buffer weight;  // (kernel * kernel, padded channels)
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
Rows ring(Buffer& memory, long height, long width, long channels, long kept = RING) {
  const long stride = padded(channels) + WIDTH;
  memory.resize(kept * width * stride);
  return {memory.data(), height, width, stride, kept};
}

// As many floats for each channel as an Affine has, of the norm that changes nothing.
Buffer identity_of(long width) {
  Buffer data(Affine::COUNT * width);
  std::fill(data.begin(), data.begin() + width, 1.0f);
  return data;
}

// y = conv(act(norm(x))) with the norm `before`, where it is there. With sums (count, 3, width): the moments of y.
template <class T, class Act>
void conv_forward(const T* x, T* y, Shape s, const Convs& convs, Affine before, float* sums, int threads) {
  const long width = padded(s.channels);
  auto same = identity_of(width);
  if (!before.data) before = {same.data(), width};
#pragma omp parallel num_threads(threads)
  {
    Buffer memory;
    const Rows in = ring(memory, s.height, s.width, s.channels);
    Buffer tile(TILE * in.stride);
#pragma omp for schedule(static)
    for (long n = 0; n < s.count; n++) {
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
          apply<T, Identity>((const float*)tile.data(), in.stride, (const T*)nullptr, out + ox * s.channels,
                             s.channels, std::min<long>(TILE, s.out_width - ox), s.channels, {same.data(), width},
                             nullptr, nullptr);
        }
        if (sums) add_moments(out, s.out_width, s.channels, sums + n * 3 * width, oy == 0);
      }
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
  Buffer all_dweights(s.count * convs.sizes);
#pragma omp parallel num_threads(threads)
  {
    Buffer memory, grad_memory;
    const Rows in = ring(memory, s.height, s.width, s.channels);
    const Rows grads = ring(grad_memory, s.out_height, s.out_width, s.channels);
    Buffer tile(TILE * in.stride);
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

// --- ternary 1x1 convolution -----------------------------------------------------------------

// Weights of -1, 0 and 1 leave only additions: three input channels have 27 possible sums. These are computed once
// for a block of pixels, and then each output channel adds one sum for every three inputs. Here a vector is of
// consecutive pixels, and a plane holds a channel of the block.
constexpr long BLOCK = 2 * LANES;      // pixels
constexpr long OUTPUTS = 4;            // at a time: 8 vectors, enough to hide the latency of an addition
constexpr long TRIPLES = 128 / LANES;  // at a time: their sums take 27 KB of the first cache

struct Ternary {
  long groups, in, out;           // channels of each group
  const float* scale;             // (groups * out)
  std::vector<long> chunks;       // triples before each chunk, and all
  std::vector<uint16_t> offsets;  // bytes into the sums: (group, chunk, out / OUTPUTS, triple, OUTPUTS)
  // signs: (groups * out, in); out is a multiple of OUTPUTS
  Ternary(const float* signs, const float* scale, long groups, long all_in, long all_out)
      : groups(groups), in(all_in / groups), out(all_out / groups), scale(scale) {
    const long triples = (in + 2) / 3, count = (triples + TRIPLES - 1) / TRIPLES;
    for (long k = 0; k <= count; k++) chunks.push_back(triples * k / count);
    offsets.reserve(groups * out * triples);
    for (long g = 0; g < groups; g++, signs += out * in)
      for (long k = 0; k < count; k++)
        for (long o = 0; o < out; o += OUTPUTS)
          for (long t = chunks[k]; t < chunks[k + 1]; t++)
            for (long j = o; j < o + OUTPUTS; j++) {
              long which = 0;
              for (long c = 3 * t; c < 3 * t + 3; c++) which = 3 * which + 1 + (c < in ? long(signs[j * in + c]) : 0);
              offsets.push_back(uint16_t(((t - chunks[k]) * 27 + which) * BLOCK * sizeof(float)));
            }
  }
  long all_in() const { return groups * in; }
  long all_out() const { return groups * out; }
};

// The 27 sums of each triple of planes.
void sum_triples(const float* planes, long triples, float* sums) {
  for (long i = 0; i < triples * BLOCK; i += LANES) {
    const long triple = i / BLOCK, pixel = i % BLOCK;
    const float* p = planes + triple * 3 * BLOCK + pixel;
    float* to = sums + triple * 27 * BLOCK + pixel;
    const vec a = load(p), b = load(p + BLOCK), c = load(p + 2 * BLOCK);
    const vec pairs[] = {-a - b, -a, b - a, -b, vec{}, b, a - b, a, a + b};
    for (int k = 0; k < 9; k++, to += 3 * BLOCK) {
      store(to, pairs[k] - c);
      store(to + BLOCK, pairs[k]);
      store(to + 2 * BLOCK, pairs[k] + c);
    }
  }
}

// Adds to planes of outputs, or writes them, what the sums of some triples give; returns the offsets behind its own.
const uint16_t* add_sums(const float* sums, const uint16_t* offsets, long triples, long outputs, float* planes,
                         bool is_first) {
  for (long o = 0; o < outputs; o += OUTPUTS, planes += OUTPUTS * BLOCK) {
    vec total[OUTPUTS][2];
    for (int j = 0; j < OUTPUTS; j++)
      for (int v = 0; v < 2; v++) total[j][v] = is_first ? vec{} : load(planes + j * BLOCK + v * LANES);
    for (long t = 0; t < triples; t++, offsets += OUTPUTS) {
      uint64_t four;
      memcpy(&four, offsets, sizeof(four));
#pragma GCC unroll 4
      for (int j = 0; j < OUTPUTS; j++) {
        const float* sum = (const float*)((const char*)sums + uint16_t(four >> 16 * j));
        total[j][0] += load(sum);
        total[j][1] += load(sum + LANES);
      }
    }
    for (int j = 0; j < OUTPUTS; j++)
      for (int v = 0; v < 2; v++) store(planes + j * BLOCK + v * LANES, total[j][v]);
  }
  return offsets;
}

// Planes of all inputs, and two more of any content, to planes of all outputs, without the scale.
void multiply(const Ternary& conv, const float* in, float* out, float* sums) {
  const uint16_t* offsets = conv.offsets.data();
  for (long g = 0; g < conv.groups; g++, in += conv.in * BLOCK, out += conv.out * BLOCK)
    for (size_t k = 0; k + 1 < conv.chunks.size(); k++) {
      const long triples = conv.chunks[k + 1] - conv.chunks[k];
      sum_triples(in + conv.chunks[k] * 3 * BLOCK, triples, sums);
      offsets = add_sums(sums, offsets, triples, conv.out, out, k == 0);
    }
}

// act(norm(scale * .)) of planes, each step rounded as if it had been stored as T.
template <class T, class Act> void finish(float* planes, const float* scale, Affine norm, long channels) {
  constexpr const T* as = nullptr;
  for (long c = 0; c < channels; c++)
    for (float* p = planes + c * BLOCK; p < planes + (c + 1) * BLOCK; p += LANES) {
      const vec value = rounded(rounded(load(p), as) * scale[c], as);
      const vec z = rounded(value * norm(Affine::SCALE, c) + norm(Affine::SHIFT, c), as);
      store(p, rounded(Act::value(z), as));
    }
}

inline __m256 load8(const float* p) { return _mm256_loadu_ps(p); }
inline __m256 load8(const half* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
// to[j * to_stride + i] = from[i * from_stride + j], 8 by 8
template <class X> inline void transpose8(const X* from, long from_stride, float* to, long to_stride) {
  __m256 r[8], q[8];
  for (int i = 0; i < 8; i++) r[i] = load8(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    q[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    q[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int k = 0; k < 2; k++) {
      r[i + 2 * k] = _mm256_shuffle_ps(q[i + k], q[i + 2 + k], 0x44);
      r[i + 2 * k + 1] = _mm256_shuffle_ps(q[i + k], q[i + 2 + k], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}
// Channels of consecutive pixels to planes.
template <class X> void to_planes(const X* from, long stride, long pixels, long channels, float* planes) {
  for (long c = 0; c < channels; c += 8)
    for (long p = 0; p < pixels; p += 8)
      if (p + 8 <= pixels && c + 8 <= channels)
        transpose8(from + p * stride + c, stride, planes + c * BLOCK + p, BLOCK);
      else
        for (long i = p; i < std::min(p + 8, pixels); i++)
          for (long j = c; j < std::min(c + 8, channels); j++)
            planes[j * BLOCK + i] = load<false>(from + i * stride + j, 1)[0];
}
// And back: to[p] are 8 pixels from pixel 8 p on.
inline void from_planes(const float* planes, long pixels, long channels, float* const* to, long stride) {
  for (long c = 0; c < channels; c += 8)
    for (long p = 0; p < pixels; p += 8)
      if (p + 8 <= pixels && c + 8 <= channels)
        transpose8(planes + c * BLOCK + p, BLOCK, to[p / 8] + c, stride);
      else
        for (long i = p; i < std::min(p + 8, pixels); i++)
          for (long j = c; j < std::min(c + 8, channels); j++)
            to[p / 8][(i - p) * stride + j] = planes[j * BLOCK + i];
}

// --- an inverted residual in eval mode -------------------------------------------------------

// reduce (reduced, channels), expand (reduced, channels): the second is transposed
struct SqueezeExcite {
  long reduced;
  const float *reduce, *reduce_bias, *expand, *expand_bias;
};

// From the mean of each channel to its gate.
template <class T> void excite(const SqueezeExcite& se, const float* pooled, float* gate, long channels) {
  constexpr const T* as = nullptr;
  Buffer inner(padded(se.reduced));
  for (long r = 0; r < se.reduced; r++) {
    vec sum{};
    over_channels(channels, [&](auto full, long c, long n) {
      sum += load<full>(pooled + c, n) * load<full>(se.reduce + r * channels + c, n);
    });
    inner[r] = se.reduce_bias[r];
    for (int i = 0; i < LANES; i++) inner[r] += sum[i];
  }
  for (long r = 0; r < se.reduced; r += LANES)
    store(&inner[r], rounded(Silu::value(rounded(load(&inner[r]), as)), as));
  over_channels(channels, [&](auto full, long c, long n) {
    vec sum = load<full>(se.expand_bias + c, n);
    for (long r = 0; r < se.reduced; r++) sum += inner[r] * load<full>(se.expand + r * channels + c, n);
    store(gate + c, rounded(sigmoid(rounded(sum, as)), as));
  });
}

// Everything between an image x and y: expand, norm and activation, depthwise, norm and activation,
// squeeze-excitation, project, norm, and skip x. What lies between stays in the core's caches.
template <class T, class Act>
void residual(const T* x, T* y, Shape s, const Ternary* expand, Affine norm1, const Convs& convs, Affine norm2,
              const SqueezeExcite* se, const Ternary& project, Affine norm3, bool has_skip, int threads) {
  constexpr const T* as = nullptr;
  const long in_channels = expand ? expand->all_in() : s.channels, out_channels = project.all_out();
  const long pixels = s.height * s.width, out_pixels = s.out_height * s.out_width;
  const long largest = std::max({in_channels, s.channels, out_channels});
  auto same = identity_of(padded(largest));
  const Affine identity{same.data(), padded(largest)};
  long kept = RING;  // rows a kernel needs, and those of a block of pixels that were computed ahead
  while (kept < 2 * convs.pad + 1 + (BLOCK + s.width - 1) / s.width) kept *= 2;
#pragma omp parallel num_threads(threads)
  {
    Buffer ring_memory, pool(padded(s.channels)), gate(padded(s.channels));
    const Rows rows = ring(ring_memory, s.height, s.width, s.channels, kept);
    Buffer in_planes((largest + 2) * BLOCK), out_planes(largest * BLOCK), sums(TRIPLES * 27 * BLOCK);
    Buffer tile(TILE * rows.stride), out_tile(BLOCK * padded(out_channels));
    float* to[BLOCK / 8];
    // Activations that wait for the gate or, without one, for a whole block of pixels.
    Buffer waiting((se ? out_pixels : s.out_width + BLOCK) * rows.stride);
#pragma omp for schedule(static)
    for (long n = 0; n < s.count; n++) {
      const T* image = x + n * pixels * in_channels;
      T* out = y + n * out_pixels * out_channels;
      std::fill(pool.begin(), pool.end(), 0.0f);
      for (long oy = 0, filled = 0, waits = 0; oy < s.out_height; oy++) {
        const long needed = std::min(s.height, oy * convs.stride + convs.pad + 1) * s.width;
        for (; expand && filled < needed; filled += BLOCK) {
          const long count = std::min(BLOCK, pixels - filled);
          to_planes(image + filled * in_channels, in_channels, count, in_channels, in_planes.data());
          multiply(*expand, in_planes.data(), out_planes.data(), sums.data());
          finish<T, Act>(out_planes.data(), expand->scale, norm1, s.channels);
          for (long p = 0; p < BLOCK; p += 8)
            to[p / 8] = rows.data + (filled + p) % (kept * s.width) * rows.stride;
          from_planes(out_planes.data(), count, s.channels, to, rows.stride);
        }
        for (; !expand && filled < needed; filled += s.width)
          apply<T, Identity>(image + filled * in_channels, in_channels, (const float*)nullptr,
                             rows.row(filled / s.width), rows.stride, s.width, s.channels, identity, nullptr, nullptr);
        for (long ox = 0; ox < s.out_width; ox += TILE) {
          for (const Group& g : convs.groups)
            with_kernel(g.kernel, convs.stride, [&](auto k, auto stride) {
              conv_tile<k, stride>(rows, tile.data(), g.weight.data(), g.first, g.channels, oy, ox);
            });
          const long count = std::min<long>(TILE, s.out_width - ox);
          apply<T, Act>((const float*)tile.data(), rows.stride, (const float*)nullptr,
                        &waiting[waits * rows.stride], rows.stride, count, s.channels, norm2, nullptr,
                        se ? pool.data() : nullptr);
          waits += count;
        }
        const bool is_last = oy + 1 == s.out_height;
        if (se && !is_last) continue;
        if (se) {
          for (long c = 0; c < s.channels; c += LANES) store(&pool[c], rounded(load(&pool[c]) / float(out_pixels), as));
          excite<T>(*se, pool.data(), gate.data(), s.channels);
        }
        long done = 0;
        for (; waits - done >= (is_last ? 1 : BLOCK); done += std::min(BLOCK, waits - done)) {
          const long count = std::min(BLOCK, waits - done), first = (oy + 1) * s.out_width - waits + done;
          to_planes(&waiting[done * rows.stride], rows.stride, count, s.channels, in_planes.data());
          for (long i = 0; se && i < s.channels * BLOCK; i += LANES)
            store(&in_planes[i], rounded(load(&in_planes[i]) * gate[i / BLOCK], as));
          multiply(project, in_planes.data(), out_planes.data(), sums.data());
          finish<T, Identity>(out_planes.data(), project.scale, norm3, out_channels);
          for (long p = 0; p < BLOCK; p += 8) to[p / 8] = &out_tile[p * out_channels];
          from_planes(out_planes.data(), count, out_channels, to, out_channels);
          apply<T, Identity>((const float*)out_tile.data(), out_channels,
                             has_skip ? image + first * out_channels : nullptr, out + first * out_channels,
                             out_channels, count, out_channels, identity, nullptr, nullptr);
        }
        waits -= done;
        std::copy_n(&waiting[done * rows.stride], waits * rows.stride, waiting.begin());
      }
    }
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
        Buffer pool(pooled ? affine.width : 0);
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

// See conv_forward. Each weight is (channels, kernel, kernel); moments_out are those of y.
void msunet_conv_forward(int is_half, int act, int stride, long groups, const long* kernels, const long* channels,
                         const float* const* weights, const void* x, void* y, long count, long height, long width,
                         long out_height, long out_width, long all, float* before /* or null */,
                         double* moments_out /* or null */, int threads) {
  const Convs convs(groups, kernels, channels, weights, stride, false);
  const long wide = padded(all);
  Buffer sums(moments_out ? count * 3 * wide : 0);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      conv_forward<T, decltype(a)>((const T*)x, (T*)y, {count, height, width, all, out_height, out_width}, convs,
                                   {before, wide}, moments_out ? sums.data() : nullptr, threads);
    });
  });
  if (moments_out)
    combine_moments(sums.data(), count, out_height * out_width, all, moments_out, moments_out + all);
}

// See residual. Signs are (outputs, inputs of a group), scales (outputs). se: weights and biases of reduce and expand,
// (reduced, all), (reduced), (reduced, all), (all).
void msunet_residual(int is_half, int act, int stride, long groups, const long* kernels, const long* channels,
                     const float* const* weights, const void* x, void* y, long count, long height, long width,
                     long out_height, long out_width, long in, long all, long out,
                     const float* expand_signs /* or null */, const float* expand_scale /* or null */,
                     long expand_groups, float* norm1 /* or null */, float* norm2, const float* const* se /* or null */,
                     long reduced, const float* project_signs, const float* project_scale, long project_groups,
                     float* norm3, int has_skip, int threads) {
  const Convs convs(groups, kernels, channels, weights, stride, false);
  std::vector<Ternary> expand;
  if (expand_signs) expand.emplace_back(expand_signs, expand_scale, expand_groups, in, all);
  const Ternary project(project_signs, project_scale, project_groups, all, out);
  SqueezeExcite excitation{reduced};
  if (se) excitation = {reduced, se[0], se[1], se[2], se[3]};
  const long wide = padded(all);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      residual<T, decltype(a)>((const T*)x, (T*)y, {count, height, width, all, out_height, out_width},
                               expand.empty() ? nullptr : expand.data(), {norm1, wide}, convs, {norm2, wide},
                               se ? &excitation : nullptr, project, {norm3, padded(out)}, has_skip, threads);
    });
  });
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
