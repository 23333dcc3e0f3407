// CPU kernels for what bounds a training step: inverted residuals with ternary 1x1 convolutions, forward and backward;
// and batch norm, activation and depthwise convolution by themselves.
//
// All tensors are images in channels-last memory, so the channels of a pixel are consecutive and every kernel
// works on a vector of them; float or half storage, float arithmetic. Plain functions on raw pointers:
// nothing of PyTorch is included, ../compiler.py compiles this in seconds and library.py calls it by ctypes.
//
// Sums over the batch are taken in float inside an image, or of some (Chunks) for gradients of weights and products,
// and in double over these, whichever thread they fall to: any number of threads gives the same bits.
//
// What batch norm needs to know of a whole batch forces passes over memory; everything between two such barriers
// is done in one pass, row by row, in buffers that stay in a core's cache. Of the many channels inside a block only
// the depthwise output is stored; what else the backward pass needs it makes again.

#include "vectors.h"

namespace {

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

// y = act(z) (+ skip) over consecutive pixels, each rounded as if it had been stored as T. Adds act(z) to pooled,
// unless null.
template <class T, class Act, class X, class Y>
void apply(const X* x, long x_stride, const Y* skip, Y* y, long y_stride, long pixels, long channels, Affine norm,
           float* pooled) {
  constexpr const T* as = nullptr;
  for (long i = 0; i < pixels; i++)
    over_channels(channels, [&](auto full, long c, long n) {
      vec value = load<full>(x + i * x_stride + c, n);
      if (!std::is_same_v<X, T>) value = rounded(value, as);
      vec a = rounded(Act::value(rounded(norm.z(value, c), as)), as);
      if (pooled) store(pooled + c, load(pooled + c) + a);
      if (skip) a += load<full>(skip + i * y_stride + c, n);
      store<full>(y + i * y_stride + c, a, n);
    });
}

// Pixels from one storage to another.
template <class X, class Y>
void copy_pixels(const X* x, long x_stride, Y* y, long y_stride, long pixels, long channels) {
  for (long i = 0; i < pixels; i++)
    over_channels(channels, [&](auto full, long c, long n) {
      store<full>(y + i * y_stride + c, load<full>(x + i * x_stride + c, n), n);
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
template <class T, class Act, class D, class Y>
void norm_gradient(const D* dy, long dy_stride, const T* x, Y* out, long out_stride, long pixels, long channels,
                   Gradient<T, Act> gradient) {
  for (long i = 0; i < pixels; i++)
    over_channels(channels, [&](auto full, long c, long n) {
      const vec out_grad = load<full>(dy + i * dy_stride + c, n), value = load<full>(x + i * channels + c, n);
      store<full>(out + i * out_stride + c, gradient.template dx<full>(out_grad, value, c, n), n);
    });
}

// Adds the sums of consecutive pixels to those of an image, (SUMS, width); without a gate only DY_GRAD and DY_GRAD_X.
// With y, laid out as dy: act(z) (* gate).
template <class T, class Act, class D>
void add_sums(const D* dy, long dy_stride, const T* x, long pixels, long channels, Affine norm, const float* gate,
              float* sums, D* y = nullptr) {
  constexpr const T* as = nullptr;
  const long width = padded(channels);
  for (long i = 0; i < pixels; i += 4) {
    const T* p = x + i * channels;
    const D* g = dy + i * dy_stride;
    const long more = std::min(4L, pixels - i);
    over_channels(channels, [&](auto full, long c, long n) {
      const vec mean = norm.at(Affine::MEAN, c);
      vec sum[SUMS];
      for (int k = 0; k < SUMS; k++) sum[k] = load(sums + k * width + c);
      for (long j = 0; j < more; j++) {
        const vec value = load<full>(p + j * channels + c, n), out = load<full>(g + j * dy_stride + c, n);
        const vec z = rounded(norm.z(value, c), as);
        vec a{};
        if (gate || y) a = rounded(Act::value(z), as);
        if (gate) {
          const vec slope = Act::grad(z, vec{} + 1.0f);
          sum[DY_A] += out * a;
          sum[DY_GRAD] += out * slope;
          sum[DY_GRAD_X] += out * slope * (value - mean);
          sum[GRAD] += slope;
          sum[GRAD_X] += slope * (value - mean);
        } else {
          const vec dz = rounded(Act::grad(z, out), as);
          sum[DY_GRAD] += dz;
          sum[DY_GRAD_X] += dz * (value - mean);
        }
        if (y && gate) a = rounded(a * load<full>(gate + c, n), as);
        if (y) store<full>(y + (i + j) * dy_stride + c, a, n);
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

struct Shape {
  long count, height, width, channels, out_height, out_width;
  long pixels() const { return height * width; }
  long out_pixels() const { return out_height * out_width; }
};

// Of the thread: a ring of rows. Its pixels are set apart by one vector more than they need, because powers of 2
// of bytes between them would put all into the same few places of the cache.
inline long apart(long channels) { return padded(channels) + WIDTH; }
Rows ring(Buffer& memory, long height, long width, long channels, long kept) {
  memory.resize(kept * width * apart(channels));
  return {memory.data(), height, width, apart(channels), kept};
}

// As many floats for each channel as an Affine has, of the norm that changes nothing.
Buffer identity_of(long width) {
  Buffer data(Affine::COUNT * width);
  std::fill(data.begin(), data.begin() + width, 1.0f);
  return data;
}

// --- ternary 1x1 convolution -----------------------------------------------------------------

// Weights of -1, 0 and 1 leave only additions: three input channels have 27 possible sums. These are computed once
// for a block of pixels, and then each output channel adds one sum for every three inputs. Here a vector is of
// consecutive pixels, and a plane holds a channel of the block.
constexpr long BLOCK = 2 * LANES;      // pixels
constexpr long OUTPUTS = 4;            // at a time: 8 vectors, enough to hide the latency of an addition
constexpr long TRIPLES = 128 / LANES;  // at a time: their sums take 27 KB of the first cache

// As layers.py gives it: signs (out, in / groups), scale (out); `in` and `out` of all groups together.
struct GivenTernary {
  const float *signs, *scale;
  long groups, in, out;
};

struct Ternary {
  long groups, in, out;           // channels of each group
  const float* scale;             // (groups * out)
  std::vector<long> chunks;       // triples before each chunk, and all
  std::vector<uint16_t> offsets;  // bytes into the sums: (group, chunk, out / OUTPUTS, triple, OUTPUTS)
  Ternary(const GivenTernary& given, int threads)
      : groups(given.groups), in(given.in / groups), out(given.out / groups), scale(given.scale) {
    const long triples = (in + 2) / 3, count = (triples + TRIPLES - 1) / TRIPLES;
    for (long k = 0; k <= count; k++) chunks.push_back(triples * k / count);
    offsets.resize(groups * out * triples);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long o = 0; o < groups * out; o += OUTPUTS)
      for (long k = 0; k < count; k++) {
        const long some = chunks[k + 1] - chunks[k], group = o / out;
        uint16_t* to = &offsets[(group * triples + chunks[k]) * out + o % out * some];
        for (long t = chunks[k]; t < chunks[k + 1]; t++)
          for (long j = o; j < o + OUTPUTS; j++) {
            const float* of = given.signs + j * in + 3 * t;
            float which = 13 + 9 * of[0];
            if (3 * t + 1 < in) which += 3 * of[1];
            if (3 * t + 2 < in) which += of[2];
            *to++ = uint16_t(((t - chunks[k]) * 27 + long(which)) * BLOCK * sizeof(float));
          }
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

// act(norm(scale * .)) of planes, each step rounded as if it had been stored as T; the scale either folded into the
// weights or a step of its own.
template <class T, class Act, bool FOLDED> void finish(float* planes, const float* scale, Affine norm, long channels) {
  constexpr const T* as = nullptr;
  for (long c = 0; c < channels; c++)
    for (float* p = planes + c * BLOCK; p < planes + (c + 1) * BLOCK; p += LANES) {
      const vec sum = FOLDED ? load(p) : rounded(load(p), as);
      const vec value = rounded(sum * scale[c], as);
      const vec z = rounded(value * norm(Affine::SCALE, c) + norm(Affine::SHIFT, c), as);
      store(p, rounded(Act::value(z), as));
    }
}

// What a transposition is made of: 4 columns of every fourth row, then two steps inside each 4 by 4.
inline __m128 load4(const float* p) { return _mm_loadu_ps(p); }
inline __m128 load4(const half* p) { return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)); }
#ifdef __AVX512F__
template <class X> inline vec every_fourth(const X* p, long stride) {
  __m512 v = _mm512_castps128_ps512(load4(p));
  v = _mm512_insertf32x4(v, load4(p + 4 * stride), 1);
  v = _mm512_insertf32x4(v, load4(p + 8 * stride), 2);
  return (vec)_mm512_insertf32x4(v, load4(p + 12 * stride), 3);
}
inline vec low_pairs(vec a, vec b) { return (vec)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
inline vec high_pairs(vec a, vec b) { return (vec)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
inline vec low_halves(vec a, vec b) { return (vec)_mm512_shuffle_ps((__m512)a, (__m512)b, 0x44); }
inline vec high_halves(vec a, vec b) { return (vec)_mm512_shuffle_ps((__m512)a, (__m512)b, 0xee); }
#else
template <class X> inline vec every_fourth(const X* p, long stride) {
  return (vec)_mm256_insertf128_ps(_mm256_castps128_ps256(load4(p)), load4(p + 4 * stride), 1);
}
inline vec low_pairs(vec a, vec b) { return (vec)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
inline vec high_pairs(vec a, vec b) { return (vec)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
inline vec low_halves(vec a, vec b) { return (vec)_mm256_shuffle_ps((__m256)a, (__m256)b, 0x44); }
inline vec high_halves(vec a, vec b) { return (vec)_mm256_shuffle_ps((__m256)a, (__m256)b, 0xee); }
#endif
// to(j)[i] = from[i * stride + j], LANES by LANES
template <class X, class To> inline void transpose(const X* from, long stride, To to) {
#pragma GCC unroll 4
  for (int j = 0; j < LANES; j += 4) {
    vec r[4];
    for (int i = 0; i < 4; i++) r[i] = every_fourth(from + i * stride + j, stride);
    const vec a = low_pairs(r[0], r[1]), b = low_pairs(r[2], r[3]);
    const vec c = high_pairs(r[0], r[1]), d = high_pairs(r[2], r[3]);
    store(to(j), low_halves(a, b));
    store(to(j + 1), high_halves(a, b));
    store(to(j + 2), low_halves(c, d));
    store(to(j + 3), high_halves(c, d));
  }
}
// Channels of consecutive pixels to planes.
template <class X> void to_planes(const X* from, long stride, long pixels, long channels, float* planes) {
  for (long c = 0; c < channels; c += LANES)
    for (long p = 0; p < pixels; p += LANES)
      if (p + LANES <= pixels && c + LANES <= channels)
        transpose(from + p * stride + c, stride, [&](int j) { return planes + (c + j) * BLOCK + p; });
      else
        for (long i = p; i < std::min(p + LANES, pixels); i++)
          for (long j = c; j < std::min(c + LANES, channels); j++)
            planes[j * BLOCK + i] = load<false>(from + i * stride + j, 1)[0];
}
// And back: eights[p] are 8 pixels from pixel 8 p on.
inline void from_planes(const float* planes, long pixels, long channels, float* const* eights, long stride) {
  for (long c = 0; c < channels; c += LANES)
    for (long p = 0; p < pixels; p += LANES) {
      const auto at = [&](long i) { return eights[(p + i) / 8] + (p + i) % 8 * stride + c; };
      if (p + LANES <= pixels && c + LANES <= channels)
        transpose(planes + c * BLOCK + p, BLOCK, at);
      else
        for (long i = 0; i < std::min(LANES, pixels - p); i++)
          for (long j = 0; j < std::min(LANES, channels - c); j++) at(i)[j] = planes[(c + j) * BLOCK + p + i];
    }
}

// Channels of some pixels before and after a ternary convolution. Of the thread.
struct Planes {
  Buffer in, out, sums;
  explicit Planes(long largest) : in((largest + 2) * BLOCK), out(largest * BLOCK), sums(TRIPLES * 27 * BLOCK) {}
};

// All outputs, without the scale, of consecutive pixels, at most BLOCK of them.
template <class X> void convolve(const Ternary& conv, const X* x, long stride, long pixels, Planes& planes) {
  to_planes(x, stride, pixels, conv.all_in(), planes.in.data());
  multiply(conv, planes.in.data(), planes.out.data(), planes.sums.data());
}
// With the scale, one of each group, and rounded as if they had been stored as T; for few inputs and many outputs. The
// scale is applied before the sums and not, as in finish, behind them, so halves may differ in the last bit.
template <class T, class X>
void convolve_scaled(const Ternary& conv, const X* x, long stride, long pixels, Planes& planes) {
  to_planes(x, stride, pixels, conv.all_in(), planes.in.data());
  for (long i = 0; i < conv.all_in() * BLOCK; i += LANES)
    store(&planes.in[i], load(&planes.in[i]) * conv.scale[i / BLOCK / conv.in * conv.out]);
  multiply(conv, planes.in.data(), planes.out.data(), planes.sums.data());
  if (std::is_same_v<T, half>)
    for (long i = 0; i < conv.all_out() * BLOCK; i += LANES)
      store(&planes.out[i], rounded(load(&planes.out[i]), (const T*)nullptr));
}

// Planes to consecutive pixels of memory.
void to_pixels(const float* planes, long pixels, long channels, float* to, long stride) {
  float* eights[BLOCK / 8];
  for (long p = 0; p < BLOCK; p += 8) eights[p / 8] = to + p * stride;
  from_planes(planes, pixels, channels, eights, stride);
}

// Rows that a ring keeps for a kernel, with those that a block of pixels computes ahead; eights of pixels never wrap.
inline long kept_rows(long pad, long width) {
  long kept = 1;
  while (kept < 2 * pad + 1 + (BLOCK + width - 1) / width || kept * width % 8) kept *= 2;
  return kept;
}

// The gradient of the last norm's input, in `tile`, from that of its output, over consecutive pixels.
template <class T>
const float* last_gradient(const T* dy, const T* z, Affine norm, long pixels, long channels, float* tile) {
  norm_gradient(dy, channels, z, tile, channels, pixels, channels, Gradient<T, Identity>{norm, nullptr, nullptr});
  return tile;
}

// The rows of an image of act(norm(expand(x))), or with Raw of expand(x), or without a convolution of x itself, as far
// as they are needed. Raw with z: x is the gradient of norm(z).
struct Raw {};
template <class T, class Act, bool FOLDED> struct Source {
  const Ternary* expand;  // or null
  Affine norm;
  long channels;
  Rows rows;
  Planes& planes;
  float* tile = nullptr;
  long filled = 0;  // pixels
  void fill(const T* image, long count, const T* z = nullptr) {
    const long pixels = rows.height * rows.width, needed = std::min(rows.height, count) * rows.width;
    for (; expand && filled < needed; filled += BLOCK) {
      const long in = expand->all_in(), some = std::min(BLOCK, pixels - filled);
      if constexpr (std::is_same_v<Act, Raw>) {
        const T* x = image + filled * in;
        if (z) convolve_scaled<T>(*expand, last_gradient(x, z + filled * in, norm, some, in, tile), in, some, planes);
        else convolve_scaled<T>(*expand, x, in, some, planes);
      } else {
        convolve(*expand, image + filled * in, in, some, planes);
        finish<T, Act, FOLDED>(planes.out.data(), expand->scale, norm, channels);
      }
      float* eights[BLOCK / 8];
      for (long p = 0; p < BLOCK; p += 8)
        eights[p / 8] = rows.data + (filled + p) % (rows.kept * rows.width) * rows.stride;
      from_planes(planes.out.data(), some, channels, eights, rows.stride);
    }
    for (; !expand && filled < needed; filled += rows.width)
      copy_pixels(image + filled * channels, channels, rows.row(filled / rows.width), rows.stride, rows.width,
                  channels);
  }
};

// --- sums of outer products: gradients of 1x1 convolutions ------------------------------------------

// Adds a^T b, sums over pixels, to (ROWS, VECTORS * LANES) of `to`; all of it stays in registers meanwhile.
template <int ROWS, int VECTORS>
void outer_tile(const float* a, long a_stride, const float* b, long b_stride, long pixels, float* to, long to_stride) {
  vec sum[ROWS][VECTORS] = {};
  for (long p = 0; p < pixels; p++, a += a_stride, b += b_stride) {
    vec of_b[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) of_b[v] = load(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; v++) sum[r][v] += a[r] * of_b[v];
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) {
      float* at = to + r * to_stride + v * LANES;
      store(at, load(at) + sum[r][v]);
    }
}

// Adds a^T b to (rows, padded(columns)); rows are a multiple of OUTPUTS. Columns are read in whole vectors, so b has
// WIDTH floats of any content behind its last. `is_upper`: what lies below the diagonal is not wanted.
void add_outer(const float* a, long a_stride, const float* b, long b_stride, long pixels, long rows, long columns,
               float* to, bool is_upper = false) {
  constexpr int ROWS = LANES == 16 ? 8 : 4;  // times 3 vectors: as many as there are registers
  const long width = padded(columns);
  for (long c = 0; c < columns; c += 3 * LANES) {
    const long last = is_upper ? std::min(rows, c + 3 * LANES) : rows;
    const auto some = [&](auto vectors) {
      long r = 0;
      for (; r + ROWS <= last; r += ROWS)
        outer_tile<ROWS, vectors>(a + r, a_stride, b + c, b_stride, pixels, to + r * width + c, width);
      for (; r < last; r += OUTPUTS)
        outer_tile<OUTPUTS, vectors>(a + r, a_stride, b + c, b_stride, pixels, to + r * width + c, width);
    };
    const long left = (columns - c + LANES - 1) / LANES;
    if (left >= 3) some(std::integral_constant<int, 3>());
    else if (left == 2) some(std::integral_constant<int, 2>());
    else some(std::integral_constant<int, 1>());
  }
}

// Sums of some images in float, of all in double. How many images are some does not depend on the threads: few enough
// for as many threads as a usual batch has quarters, many enough that their sums are little beside their activations.
struct Chunks {
  static constexpr long IMAGES = 4;
  long images, size;
  std::unique_ptr<float[]> sums;
  Chunks(long images, long size) : images(images), size(size), sums(new float[count() * size]) {}
  long count() const { return (images + IMAGES - 1) / IMAGES; }
  long begin(long chunk) const { return chunk * IMAGES; }
  long end(long chunk) const { return std::min(images, (chunk + 1) * IMAGES); }
  // Of the thread that works on the chunk, which begins with this.
  float* start(long chunk) {
    std::fill_n(&sums[chunk * size], size, 0.0f);
    return &sums[chunk * size];
  }
  std::vector<double> total(int threads) const {
    constexpr long SOME = 1024;
    std::vector<double> total(size);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long from = 0; from < size; from += SOME)
      for (long chunk = 0; chunk < count(); chunk++)
        for (long i = from; i < std::min(size, from + SOME); i++) total[i] += sums[chunk * size + i];
    return total;
  }
};
// (groups, rows, padded(columns)) without the padding
template <class X> void unpad(const double* from, long groups, long rows, long columns, X* to) {
  for (long r = 0; r < groups * rows; r++)
    for (long c = 0; c < columns; c++) to[r * columns + c] = X(from[r * padded(columns) + c]);
}

// Sums of x - pivot and of its products within each group of channels; pivot is the first pixel.
// products (groups, inputs, inputs) from the diagonal on, totals (groups * inputs).
template <class T>
void products(const T* x, long count, long pixels, long groups, long inputs, double* products, double* totals,
              int threads) {
  const long channels = groups * inputs, size = inputs * padded(inputs);
  Buffer pivot(padded(channels));
  copy_pixels(x, channels, pivot.data(), pivot.size(), 1, channels);
  Chunks chunks(count, groups * size + pivot.size());
#pragma omp parallel num_threads(threads)
  {
    Buffer some(BLOCK * apart(channels));
#pragma omp for schedule(dynamic)
    for (long chunk = 0; chunk < chunks.count(); chunk++) {
      float *to = chunks.start(chunk), *total = to + groups * size;
      const T* const end = x + chunks.end(chunk) * pixels * channels;
      for (const T* at = x + chunks.begin(chunk) * pixels * channels; at < end; at += BLOCK * channels) {
        const long block = std::min(BLOCK, (end - at) / channels);
        for (long p = 0; p < block; p++)
          over_channels(channels, [&](auto full, long c, long n) {
            const vec d = load<full>(at + p * channels + c, n) - load(&pivot[c]);
            store<full>(&some[p * apart(channels) + c], d, n);
            store(total + c, load(total + c) + d);
          });
        for (long g = 0; g < groups; g++)
          add_outer(&some[g * inputs], apart(channels), &some[g * inputs], apart(channels), block, inputs, inputs,
                    to + g * size, true);
      }
    }
  }
  const auto sums = chunks.total(threads);
  unpad(sums.data(), groups, inputs, inputs, products);
  std::copy_n(&sums[groups * size], channels, totals);
}

// dx = du + u matrix + offset (+ skip), over pixels; matrix (groups, inputs, inputs), offset (groups * inputs).
template <class T>
void complete(const T* u, const float* du, const T* skip, T* dx, long pixels, long groups, long inputs,
              const float* matrix, const float* offset, int threads) {
  const long channels = groups * inputs, width = padded(inputs);
  Buffer wide(groups * inputs * width);
  for (long i = 0; i < groups * inputs; i++) std::copy_n(matrix + i * inputs, inputs, &wide[i * width]);
#pragma omp parallel num_threads(threads)
  {
    Buffer planes(channels * BLOCK), tile(BLOCK * width);
#pragma omp for schedule(static)
    for (long p = 0; p < pixels; p += BLOCK) {
      const long some = std::min(BLOCK, pixels - p);
      to_planes(u + p * channels, channels, some, channels, planes.data());
      for (long g = 0; g < groups; g++) {
        std::fill(tile.begin(), tile.end(), 0.0f);
        add_outer(&planes[g * inputs * BLOCK], BLOCK, &wide[g * inputs * width], width, inputs, BLOCK, inputs,
                  tile.data());
        for (long i = 0; i < some; i++)
          over_channels(inputs, [&](auto full, long c, long n) {
            const long at = (p + i) * channels + g * inputs + c;
            vec sum = load(&tile[i * width + c]) + load<full>(offset + g * inputs + c, n);
            if (skip) sum += load<full>(skip + at, n);
            store<full>(dx + at, load<full>(du + at, n) + sum, n);
          });
      }
    }
  }
}

// --- forward and backward through depthwise convolutions ---------------------------------------------

// y = conv(act(norm(expand(x)))), or without `expand` y = conv(x). With sums (count, 3, width): the moments of y.
template <class T, class Act>
void conv_forward(const T* x, T* y, Shape s, const Ternary* expand, Affine norm, const Convs& convs, float* sums,
                  int threads) {
  const long width = padded(s.channels), in = expand ? expand->all_in() : s.channels;
#pragma omp parallel num_threads(threads)
  {
    Buffer memory;
    Planes planes(expand ? std::max(in, s.channels) : 0);
    const Rows rows = ring(memory, s.height, s.width, s.channels, kept_rows(convs.pad, s.width));
    Buffer tile(TILE * rows.stride);
#pragma omp for schedule(dynamic)
    for (long n = 0; n < s.count; n++) {
      Source<T, Act, true> source{expand, norm, s.channels, rows, planes};
      for (long oy = 0; oy < s.out_height; oy++) {
        source.fill(x + n * s.pixels() * in, oy * convs.stride + convs.pad + 1);
        T* out = y + (n * s.out_height + oy) * s.out_width * s.channels;
        for (long ox = 0; ox < s.out_width; ox += TILE) {
          for (const Group& g : convs.groups)
            with_kernel(g.kernel, convs.stride, [&](auto k, auto stride) {
              conv_tile<k, stride>(rows, tile.data(), g.weight.data(), g.first, g.channels, oy, ox);
            });
          copy_pixels(tile.data(), rows.stride, out + ox * s.channels, s.channels,
                      std::min<long>(TILE, s.out_width - ox), s.channels);
        }
        if (sums) add_moments(out, s.out_width, s.channels, sums + n * 3 * width, oy == 0);
      }
    }
  }
}

// Where the gradient of the convolutions' output y comes from: dy itself or, with z = project(act(norm(y)) * gate), the
// gradient of last_norm(z).
template <class T> struct Behind {
  const T *dy, *z, *y;
  const Ternary* project;  // transposed, or null
  Affine last_norm, norm;
  const float *gate, *dpooled;
};
// Where the gradient of their input goes: to dx, or back through the activation and `norm` without its part that
// needs the whole batch, and `expand`, to du; sums (count, SUMS, width) are for the rest.
template <class T> struct Before {
  const T* x;
  T* dx;  // may be null
  const Ternary *expand, *transposed;  // or both null
  Affine norm;
  float *du, *sums;
  float* dexpand;  // or null: (groups, inputs, outputs), x^T times what goes to du before `expand` is transposed
};

// Numbers of a backward pass that follow from what is given.
struct Widths {
  long channels, in, out;  // channels padded; of the input of `expand`; of the output of `project`
  long inputs, outputs, groups, outer;  // of `expand`, where its gradient is wanted; floats of one group's
  template <class T> Widths(const Shape& s, const Behind<T>& behind, const Before<T>& before)
      : channels(padded(s.channels)),
        in(before.expand ? before.expand->all_in() : s.channels),
        out(behind.project ? behind.project->all_in() : s.channels),
        inputs(before.expand ? before.expand->in : 0),
        outputs(before.expand ? before.expand->out : 0),
        groups(before.expand && before.dexpand ? before.expand->groups : 0),
        outer(inputs * padded(outputs)) {}
};

// One thread's backward passes, image by image and row by row, each in the thread's own caches.
template <class T, class Act> struct BackwardPass {
  const Shape& s;
  const Behind<T>& behind;
  const Convs& convs;
  float* const* dweights;
  const Before<T>& before;
  const Widths& w;
  Affine identity;

  Buffer memory, raw_memory, grad_memory, tile, waiting, pixels_in, tile_out;
  Planes planes;
  Rows rows, raw, grads;  // of the convolutions' input, of that before its activation, of their output's gradient
  long n = 0, waits = 0;  // image; pixels in `waiting`, whose gradient has yet to go through `expand`

  BackwardPass(const Shape& s, const Behind<T>& behind, const Convs& convs, float* const* dweights,
               const Before<T>& before, const Widths& w, Affine identity)
      : s(s), behind(behind), convs(convs), dweights(dweights), before(before), w(w), identity(identity),
        planes(before.expand || behind.project ? std::max({w.in, s.channels, w.out}) : 0) {
    const long kept = kept_rows(convs.pad, s.width);
    rows = ring(memory, s.height, s.width, s.channels, kept);
    raw = before.expand ? ring(raw_memory, s.height, s.width, s.channels, kept) : rows;
    grads = ring(grad_memory, s.out_height, s.out_width, s.channels, kept_rows(convs.pad, s.out_width));
    tile = Buffer(TILE * rows.stride);
    tile_out = Buffer(BLOCK * w.out);
    if (before.expand) {
      waiting = Buffer((s.width + BLOCK) * rows.stride);
      pixels_in = Buffer(BLOCK * w.in);
    }
  }

  // Gradients of image `image`; those of weights are added to `of_chunk`.
  void run(long image, float* of_chunk) {
    n = image;
    waits = 0;
    Source<T, Raw, true> source{before.expand, {}, s.channels, raw, planes};
    Source<T, Raw, true> grad_source{behind.project, behind.last_norm, s.channels, grads, planes, tile_out.data()};
    long filled = 0, grads_filled = 0;
    for (long iy = 0; iy < s.height; iy++) {
      filled = fill_input(source, filled, std::min(s.height, iy + convs.pad + 1));
      grads_filled =
          fill_gradients(grad_source, grads_filled, std::min(s.out_height, (iy + convs.pad) / convs.stride + 1));
      if (iy % convs.stride == 0) add_weight_gradients(iy / convs.stride, of_chunk);
      if (before.expand || before.dx) input_gradients(iy);
      if (before.expand) through_expansion(iy, of_chunk + convs.sizes);
    }
  }

  long fill_input(Source<T, Raw, true>& source, long filled, long needed) {
    source.fill(before.x + n * s.pixels() * w.in, needed);
    for (; before.expand && filled < needed; filled++)
      apply<T, Act>((const float*)raw.row(filled), raw.stride, (const float*)nullptr, rows.row(filled), rows.stride,
                    s.width, s.channels, before.norm, nullptr);
    return filled;
  }

  long fill_gradients(Source<T, Raw, true>& source, long filled, long needed) {
    const long first = n * s.out_pixels() * w.out;
    source.fill(behind.dy + first, needed, behind.project ? behind.z + first : nullptr);
    const long at = n * s.channels;
    const Gradient<T, Act> gradient{behind.norm, behind.gate ? behind.gate + at : nullptr,
                                    behind.gate ? behind.dpooled + at : nullptr};
    for (; behind.norm.data && filled < needed; filled++) {
      const T* y = behind.y + (n * s.out_height + filled) * s.out_width * s.channels;
      float* row = grads.row(filled);
      norm_gradient((const float*)row, grads.stride, y, row, grads.stride, s.out_width, s.channels, gradient);
    }
    return filled;
  }

  void add_weight_gradients(long oy, float* dweight) {
    for (size_t i = 0; i < convs.groups.size(); dweight += convs.groups[i++].size())
      if (dweights[i])
        with_kernel(convs.groups[i].kernel, convs.stride, [&](auto k, auto stride) {
          weight_row<k, stride>(grads, rows, dweight, convs.groups[i].first, convs.groups[i].channels, oy);
        });
  }

  void input_gradients(long iy) {
    for (long ix = 0; ix < s.width; ix += TILE) {
      for (const Group& g : convs.groups)
        with_kernel(g.kernel, convs.stride, [&](auto k, auto stride) {
          if constexpr (stride == 1)
            conv_tile<k, 1>(grads, tile.data(), g.weight.data(), g.first, g.channels, iy, ix);
          else
            grad_tile<k>(grads, tile.data(), g.weight.data(), g.first, g.channels, iy, ix);
        });
      const long pixels = std::min<long>(TILE, s.width - ix);
      if (before.expand)
        through_activation(iy, ix, pixels);
      else
        copy_pixels(tile.data(), rows.stride, before.dx + ((n * s.height + iy) * s.width + ix) * s.channels,
                    s.channels, pixels, s.channels);
    }
  }

  // The tile's gradient goes through activation and norm to `waiting`, and into the sums of the norm.
  void through_activation(long iy, long ix, long pixels) {
    constexpr const T* as = nullptr;
    const Gradient<T, Act> inner{before.norm, nullptr, nullptr};
    float* sum = before.sums + n * SUMS * w.channels;
    over_channels(s.channels, [&](auto full, long c, long lanes) {
      constexpr bool FULL = decltype(full)::value;
      vec total{}, product{};
      for (long i = 0; i < pixels; i++) {
        const vec value = load<FULL>(raw.row(iy) + (ix + i) * raw.stride + c, lanes);
        const vec da = rounded(load(tile.data() + i * rows.stride + c), as);
        const vec dz = inner.template dz<FULL>(da, value, c, lanes);
        const vec scaled = dz * before.norm.at(Affine::SCALE, c);
        store<FULL>(&waiting[(waits + ix + i) * rows.stride + c], scaled, lanes);
        total += dz;
        product += dz * (value - before.norm.at(Affine::MEAN, c));
      }
      float *totals = sum + DY_GRAD * w.channels + c, *products = sum + DY_GRAD_X * w.channels + c;
      store(totals, load(totals) + total);
      store(products, load(products) + product);
    });
  }

  // Whole blocks of what waits after row iy go through `expand`, at the image's end the rest too.
  void through_expansion(long iy, float* dexpand) {
    const T* image = before.x + n * s.pixels() * w.in;
    waits += s.width;
    long done = 0;
    for (; waits - done >= (iy + 1 == s.height ? 1 : BLOCK); done += std::min(BLOCK, waits - done)) {
      const long count = std::min(BLOCK, waits - done), first = (iy + 1) * s.width - waits + done;
      const float* dz = &waiting[done * rows.stride];
      copy_pixels(image + first * w.in, w.in, pixels_in.data(), w.in, count, w.in);
      for (long g = 0; g < w.groups; g++)
        add_outer(&pixels_in[g * w.inputs], w.in, dz + g * w.outputs, rows.stride, count, w.inputs, w.outputs,
                  dexpand + g * w.outer);
      convolve(*before.transposed, dz, rows.stride, count, planes);
      finish<float, Identity, true>(planes.out.data(), before.transposed->scale, identity, w.in);
      to_pixels(planes.out.data(), count, w.in, before.du + (n * s.pixels() + first) * w.in, w.in);
    }
    waits -= done;
    std::copy_n(&waiting[done * rows.stride], waits * rows.stride, waiting.begin());
  }
};

// Sums (taps, padded channels) of each group, one after the other, to weights (channels, taps).
inline void write_weight_gradients(const Convs& convs, const double* total, float* const* dweights) {
  for (size_t i = 0; i < convs.groups.size(); total += convs.groups[i++].size()) {
    const long taps = convs.groups[i].kernel * convs.groups[i].kernel, channels = convs.groups[i].channels;
    if (dweights[i])
      for (long c = 0; c < channels; c++)
        for (long k = 0; k < taps; k++) dweights[i][c * taps + k] = float(total[k * padded(channels) + c]);
  }
}

template <class T, class Act>
void conv_backward(Shape s, Behind<T> behind, const Convs& convs, float* const* dweights, Before<T> before,
                   int threads) {
  const Widths w(s, behind, before);
  const long widest = std::max(w.channels, padded(w.in));
  auto same = identity_of(widest);
  // of a chunk: gradients of the depthwise weights, and those of `expand`
  Chunks chunks(s.count, convs.sizes + w.groups * w.outer);
#pragma omp parallel num_threads(threads)
  {
    BackwardPass<T, Act> pass(s, behind, convs, dweights, before, w, Affine{same.data(), widest});
#pragma omp for schedule(dynamic)
    for (long chunk = 0; chunk < chunks.count(); chunk++) {
      float* const of_chunk = chunks.start(chunk);
      for (long n = chunks.begin(chunk); n < chunks.end(chunk); n++) pass.run(n, of_chunk);
    }
  }
  const std::vector<double> totals = chunks.total(threads);
  write_weight_gradients(convs, totals.data(), dweights);
  if (w.groups) unpad(&totals[convs.sizes], w.groups, w.inputs, w.outputs, before.dexpand);
}

// --- the other half of a block: squeeze-excitation, the second 1x1 convolution -----------------------

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

// The last step of a block, of the activations (stride apart) of consecutive pixels, at most BLOCK: to planes, gate,
// ternary convolution, norm; then to pixels, as T, plus skip where there is one.
template <class T, bool FOLDED>
void project_pixels(const float* a, long stride, long pixels, const float* gate, const Ternary& project, Affine norm,
                    Affine identity, const T* skip, T* y, Planes& planes, float* tile) {
  constexpr const T* as = nullptr;
  const long out = project.all_out();
  to_planes(a, stride, pixels, project.all_in(), planes.in.data());
  for (long i = 0; gate && i < project.all_in() * BLOCK; i += LANES)
    store(&planes.in[i], rounded(load(&planes.in[i]) * gate[i / BLOCK], as));
  multiply(project, planes.in.data(), planes.out.data(), planes.sums.data());
  finish<T, Identity, FOLDED>(planes.out.data(), project.scale, norm, out);
  to_pixels(planes.out.data(), pixels, out, tile, out);
  apply<T, Identity>((const float*)tile, out, skip, y, out, pixels, out, identity, nullptr);
}

// From sums over an image's activations to its gate.
template <class T> void gate_of(const SqueezeExcite& se, float* pool, long pixels, float* gate, long channels) {
  for (long c = 0; c < channels; c += LANES)
    store(pool + c, rounded(load(pool + c) / float(pixels), (const T*)nullptr));
  excite<T>(se, pool, gate, channels);
}

// z = project(act(norm(y)) * gate); pooled and gate (count, channels) are written where there is `se`, and the moments
// of z to sums (count, 3, padded outputs).
template <class T, class Act>
void project(const T* y, T* z, long count, long pixels, const Ternary& project, Affine norm, const SqueezeExcite* se,
             float* pooled, float* gate, float* sums, int threads) {
  const long channels = project.all_in(), out = project.all_out();
  auto same = identity_of(padded(std::max(channels, out)));
  const Affine identity{same.data(), padded(std::max(channels, out))};
#pragma omp parallel num_threads(threads)
  {
    Planes planes(std::max(channels, out));
    const long stride = apart(channels);
    Buffer a((se ? pixels : BLOCK) * stride), tile(BLOCK * padded(out)), pool(padded(channels)), gates(pool);
#pragma omp for schedule(dynamic)
    for (long n = 0; n < count; n++) {
      const auto activate = [&](long first, long some) {
        apply<T, Act>(y + (n * pixels + first) * channels, channels, (const float*)nullptr,
                      a.data() + (se ? first * stride : 0), stride, some, channels, norm,
                      se ? pool.data() : nullptr);
      };
      if (se) {
        std::fill(pool.begin(), pool.end(), 0.0f);
        activate(0, pixels);
        gate_of<T>(*se, pool.data(), pixels, gates.data(), channels);
        std::copy_n(pool.begin(), channels, pooled + n * channels);
        std::copy_n(gates.begin(), channels, gate + n * channels);
      }
      for (long p = 0; p < pixels; p += BLOCK) {
        const long some = std::min(BLOCK, pixels - p);
        if (!se) activate(p, some);
        T* const to = z + (n * pixels + p) * out;
        project_pixels<T, true>(&a[se ? p * stride : 0], stride, some, se ? gates.data() : nullptr, project, identity,
                                identity, (const T*)nullptr, to, planes, tile.data());
        add_moments(to, some, out, sums + n * 3 * padded(out), p == 0);
      }
    }
  }
}

// From dy, the gradient of last_norm(z), back through `project`, which is transposed: the sums (count, SUMS, width)
// over its input's gradient, which is not kept, and the gradient of its weights as they run forward (groups, outputs,
// inputs), or null.
template <class T, class Act>
void project_backward(const T* dy, const T* z, const T* y, long count, long pixels, const Ternary& project,
                      Affine last_norm, Affine norm, const float* gate, float* sums, float* dproject, int threads) {
  const long out = project.all_in(), channels = project.all_out(), width = padded(channels), stride = apart(channels);
  const long size = project.in * padded(project.out);
  Chunks chunks(count, dproject ? project.groups * size : 0);
#pragma omp parallel num_threads(threads)
  {
    Planes planes(std::max(out, channels));
    Buffer gradient(BLOCK * stride), a(BLOCK * stride), tile(BLOCK * out);
#pragma omp for schedule(dynamic)
    for (long chunk = 0; chunk < chunks.count(); chunk++) {
      float* const of_chunk = chunks.start(chunk);
      for (long n = chunks.begin(chunk); n < chunks.end(chunk); n++)
        for (long p = 0; p < pixels; p += BLOCK) {
          const long some = std::min(BLOCK, pixels - p);
          const long at = (n * pixels + p) * out;
          last_gradient(dy + at, z + at, last_norm, some, out, tile.data());
          convolve_scaled<T>(project, tile.data(), out, some, planes);
          to_pixels(planes.out.data(), some, channels, gradient.data(), stride);
          add_sums<T, Act>((const float*)gradient.data(), stride, y + (n * pixels + p) * channels, some, channels,
                           norm, gate ? gate + n * channels : nullptr, sums + n * SUMS * width,
                           dproject ? a.data() : nullptr);
          if (!dproject) continue;
          for (long g = 0; g < project.groups; g++)
            add_outer(&tile[g * project.in], out, &a[g * project.out], stride, some, project.in, project.out,
                      of_chunk + g * size);
        }
    }
  }
  if (dproject) unpad(chunks.total(threads).data(), project.groups, project.in, project.out, dproject);
}

// --- a whole block in eval mode ----------------------------------------------------------------------

// Everything between an image x and y: expand, norm and activation, depthwise, norm and activation,
// squeeze-excitation, project, norm, and skip x. What lies between stays in the core's caches.
template <class T, class Act>
void residual(const T* x, T* y, Shape s, const Ternary* expand, Affine norm1, const Convs& convs, Affine norm2,
              const SqueezeExcite* se, const Ternary& project, Affine norm3, bool has_skip, int threads) {
  const long in = expand ? expand->all_in() : s.channels, out = project.all_out();
  const long largest = std::max({in, s.channels, out});
  auto same = identity_of(padded(largest));
  const Affine identity{same.data(), padded(largest)};
#pragma omp parallel num_threads(threads)
  {
    Buffer memory, pool(padded(s.channels)), gate(padded(s.channels));
    const Rows rows = ring(memory, s.height, s.width, s.channels, kept_rows(convs.pad, s.width));
    Planes planes(largest);
    Buffer tile(TILE * rows.stride), out_tile(BLOCK * padded(out));
    // Activations that wait for the gate or, without one, for a whole block of pixels.
    Buffer waiting((se ? s.out_pixels() : s.out_width + BLOCK) * rows.stride);
#pragma omp for schedule(dynamic)
    for (long n = 0; n < s.count; n++) {
      const T* image = x + n * s.pixels() * in;
      std::fill(pool.begin(), pool.end(), 0.0f);
      Source<T, Act, false> source{expand, norm1, s.channels, rows, planes};
      for (long oy = 0, waits = 0; oy < s.out_height; oy++) {
        source.fill(image, oy * convs.stride + convs.pad + 1);
        for (long ox = 0; ox < s.out_width; ox += TILE) {
          for (const Group& g : convs.groups)
            with_kernel(g.kernel, convs.stride, [&](auto k, auto stride) {
              conv_tile<k, stride>(rows, tile.data(), g.weight.data(), g.first, g.channels, oy, ox);
            });
          const long count = std::min<long>(TILE, s.out_width - ox);
          apply<T, Act>((const float*)tile.data(), rows.stride, (const float*)nullptr,
                        &waiting[waits * rows.stride], rows.stride, count, s.channels, norm2,
                        se ? pool.data() : nullptr);
          waits += count;
        }
        const bool is_last = oy + 1 == s.out_height;
        if (se && !is_last) continue;
        if (se) gate_of<T>(*se, pool.data(), s.out_pixels(), gate.data(), s.channels);
        long done = 0;
        for (; waits - done >= (is_last ? 1 : BLOCK); done += std::min(BLOCK, waits - done)) {
          const long count = std::min(BLOCK, waits - done), first = (oy + 1) * s.out_width - waits + done;
          project_pixels<T, false>(&waiting[done * rows.stride], rows.stride, count, se ? gate.data() : nullptr,
                                   project, norm3, identity, has_skip ? image + first * out : nullptr,
                                   y + (n * s.out_pixels() + first) * out, planes, out_tile.data());
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
std::unique_ptr<Ternary> maybe(const GivenTernary* given, int threads) {
  return given ? std::make_unique<Ternary>(*given, threads) : nullptr;
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

// y = act(norm(x)) + skip.
void msunet_apply(int is_half, int act, const void* x, const void* skip /* or null */, void* y, long count, long pixels,
                  long channels, float* norm, int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (long n = 0; n < count; n++) {
        const long at = n * pixels * channels;
        apply<T, decltype(a)>((const T*)x + at, channels, skip ? (const T*)skip + at : nullptr, (T*)y + at, channels,
                              pixels, channels, {norm, padded(channels)}, nullptr);
      }
    });
  });
}

// sums (count, 5, padded channels), zeros before: see SUMS.
void msunet_sums(int is_half, int act, const void* dy, const void* x, long count, long pixels, long channels,
                 float* norm, float* sums, int threads) {
  const Affine affine{norm, padded(channels)};
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (long n = 0; n < count; n++)
        add_sums<T, decltype(a)>((const T*)dy + n * pixels * channels, channels, (const T*)x + n * pixels * channels,
                                 pixels, channels, affine, nullptr, sums + n * SUMS * affine.width);
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

// From the gradient of act(norm(x)) to that of x; dx may be dy.
void msunet_norm_gradient(int is_half, int act, const void* dy, const void* x, void* dx, long count, long pixels,
                          long channels, float* norm, int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (long n = 0; n < count; n++) {
        const long at = n * pixels * channels;
        norm_gradient((const T*)dy + at, channels, (const T*)x + at, (T*)dx + at, channels, pixels, channels,
                      Gradient<T, decltype(a)>{{norm, padded(channels)}, nullptr, nullptr});
      }
    });
  });
}

// See products.
void msunet_products(int is_half, const void* x, long count, long pixels, long groups, long inputs,
                     double* products_out, double* totals, int threads) {
  with_type(is_half, [&](auto type) {
    products((const decltype(type)*)x, count, pixels, groups, inputs, products_out, totals, threads);
  });
}

// See complete.
void msunet_complete(int is_half, const void* u, const float* du, const void* skip /* or null */, void* dx, long pixels,
                     long groups, long inputs, const float* matrix, const float* offset, int threads) {
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    complete((const T*)u, du, (const T*)skip, (T*)dx, pixels, groups, inputs, matrix, offset, threads);
  });
}

// See conv_forward. Each weight is (channels, kernel, kernel); moments_out are those of y.
void msunet_conv_forward(int is_half, int act, int stride, long groups, const long* kernels, const long* channels,
                         const float* const* weights, const void* x, void* y, long count, long height, long width,
                         long out_height, long out_width, long all, const GivenTernary* expand /* or null */,
                         float* norm /* or null */, double* moments_out /* or null */, int threads) {
  const Convs convs(groups, kernels, channels, weights, stride, false);
  const auto conv = maybe(expand, threads);
  const long wide = padded(all);
  Buffer sums(moments_out ? count * 3 * wide : 0);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      conv_forward<T, decltype(a)>((const T*)x, (T*)y, {count, height, width, all, out_height, out_width},
                                   conv.get(), {norm, wide}, convs, moments_out ? sums.data() : nullptr, threads);
    });
  });
  if (moments_out)
    combine_moments(sums.data(), count, out_height * out_width, all, moments_out, moments_out + all);
}

// See project.
void msunet_project(int is_half, int act, const void* y, void* z, long count, long pixels,
                    const GivenTernary* project_given, float* norm, const float* const* se /* or null */, long reduced,
                    float* pooled /* or null */, float* gate /* or null */, double* moments_out, int threads) {
  const Ternary conv(*project_given, threads);
  const long out = conv.all_out();
  Buffer sums(count * 3 * padded(out));
  SqueezeExcite excitation{reduced};
  if (se) excitation = {reduced, se[0], se[1], se[2], se[3]};
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      project<T, decltype(a)>((const T*)y, (T*)z, count, pixels, conv, {norm, padded(conv.all_in())},
                              se ? &excitation : nullptr, pooled, gate, sums.data(), threads);
    });
  });
  combine_moments(sums.data(), count, pixels, out, moments_out, moments_out + out);
}

// See project_backward.
void msunet_project_backward(int is_half, int act, const void* dy, const void* z, const void* y, long count,
                             long pixels, const GivenTernary* transposed, float* last_norm, float* norm,
                             const float* gate /* or null */, float* sums, float* dproject /* or null */,
                             int threads) {
  const Ternary conv(*transposed, threads);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      project_backward<T, decltype(a)>((const T*)dy, (const T*)z, (const T*)y, count, pixels, conv,
                                       {last_norm, padded(conv.all_in())}, {norm, padded(conv.all_out())}, gate, sums,
                                       dproject, threads);
    });
  });
}

// See conv_backward, Behind and Before.
void msunet_conv_backward(int is_half, int act, int stride, long groups, const long* kernels, const long* channels,
                          const float* const* weights, long count, long height, long width, long out_height,
                          long out_width, long all, const void* dy, const void* z /* or null */,
                          const void* y /* or null */, const GivenTernary* project /* or null */,
                          float* last_norm /* or null */, float* after /* or null */,
                          const float* gate /* or null */, const float* dpooled /* or null */,
                          float* const* dweights /* each or null */, const void* x, void* dx /* or null */,
                          const GivenTernary* expand /* or null */, const GivenTernary* transposed /* or null */,
                          float* before /* or null */, float* du /* or null */, float* sums /* or null */,
                          float* dexpand /* or null */, int threads) {
  const Convs convs(groups, kernels, channels, weights, stride, stride == 1);
  const auto expanding = maybe(expand, threads), back = maybe(transposed, threads);
  const auto projecting = maybe(project, threads);
  const long wide = padded(all);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      conv_backward<T, decltype(a)>(
          {count, height, width, all, out_height, out_width},
          {(const T*)dy, (const T*)z, (const T*)y, projecting.get(), {last_norm, project ? padded(project->in) : 0},
           {after, wide}, gate, dpooled}, convs, dweights,
          {(const T*)x, (T*)dx, expanding.get(), back.get(), {before, wide}, du, sums, dexpand},
          threads);
    });
  });
}

// See residual. se: weights and biases of reduce and expand, (reduced, all), (reduced), (reduced, all), (all).
void msunet_residual(int is_half, int act, int stride, long groups, const long* kernels, const long* channels,
                     const float* const* weights, const void* x, void* y, long count, long height, long width,
                     long out_height, long out_width, long all, const GivenTernary* expand /* or null */,
                     float* norm1 /* or null */, float* norm2, const float* const* se /* or null */, long reduced,
                     const GivenTernary* project_given, float* norm3, int has_skip, int threads) {
  const Convs convs(groups, kernels, channels, weights, stride, false);
  const auto expanding = maybe(expand, threads);
  const Ternary projecting(*project_given, threads);
  SqueezeExcite excitation{reduced};
  if (se) excitation = {reduced, se[0], se[1], se[2], se[3]};
  const long wide = padded(all);
  with_type(is_half, [&](auto type) {
    using T = decltype(type);
    with_act(act, [&](auto a) {
      residual<T, decltype(a)>((const T*)x, (T*)y, {count, height, width, all, out_height, out_width},
                               expanding.get(), {norm1, wide}, convs, {norm2, wide}, se ? &excitation : nullptr,
                               projecting, {norm3, padded(projecting.all_out())}, has_skip, threads);
    });
  });
}
}
