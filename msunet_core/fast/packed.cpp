// The packed network as it lies: class scores of uint8 images in one call, without a dense ternary weight.
//
// Images are planes. 64 consecutive pixels of all channels lie together, (blocks, channels, 64), so that what a ternary
// convolution adds up stays in a core's first cache: vectors of pixels go into registers, and nothing is multiplied.
// Three outputs are made at a time. An input enters them as one of 26 patterns of signs and zeros; inputs of one
// pattern are added up once, for all three. That is 0.29 additions for each weight where half of them are 0, instead
// of 0.5, and of the weights only lists of inputs are kept, sorted by pattern, a byte for each. Where most weights are 0
// the lists would be so short that the branches at their ends take longer: there each output has its own.
//
// Depthwise convolutions take planes with a border of zeros, which the 1x1 convolution before them writes, a few
// channels at a time. Before a stride of 2 the pixels of a row are stored even ones first, so it is one of 1 as well.
//
// Many images go to threads a few at a time: where an image has only one block, a list is then read for several blocks,
// and its branches are predicted from the second one on. A single one is shared: threads take parts of each layer and wait for each
// other. Which thread computes a value has no influence on its bits. Nothing but the C++ library is used: no OpenMP,
// so that a process needs to load nothing of PyTorch.

#include "vectors.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>

namespace {

constexpr long SIDE = 32, COLOURS = 3;        // of an image
constexpr long BLOCK = 64;                    // pixels of a block
constexpr int VECTORS = LANES == 16 ? 4 : 2;  // of pixels in registers, for each of three outputs
constexpr long SOME = VECTORS * LANES;        // pixels at a time
constexpr int PATTERNS = 13, COUNTS = 2 * PATTERNS, SHARED_PATTERNS = 10;  // the first: of more outputs than one
// Parts of a convolution's weights that are not 0: fewer, and outputs share no sums; fewer, and more inputs are added up
// at a time, for the lists to be longer, than fit the first cache beside all else.
constexpr double APART_BELOW = 0.2, LONG_BELOW = 0.45;
constexpr long INPUTS = 128, MORE_INPUTS = 192;
constexpr long UNIT = 8, PROJECT_UNIT = 16;  // triples of outputs that a thread takes
constexpr long BORDER = 3;                   // rows of zeros above and below: a kernel of 7 reaches so far
constexpr long GROUP = 4;                    // images that go through the last layers together
constexpr long STEM_UNIT = 8, STEM_OUTPUTS = 4;

typedef vec Some[VECTORS];  // SOME pixels
typedef float vec8 __attribute__((vector_size(32)));
typedef float unaligned_vec8 __attribute__((vector_size(32), aligned(4), may_alias));

// How an input enters three outputs, up to its sign; in the order in which Sums adds them up.
constexpr int PATTERN[PATTERNS][3] = {{1, 1, 1}, {1, 1, -1}, {1, 1, 0}, {1, -1, 1}, {1, -1, -1}, {1, -1, 0}, {1, 0, 1},
                                      {1, 0, -1}, {0, 1, 1}, {0, 1, -1}, {1, 0, 0}, {0, 1, 0}, {0, 0, 1}};

// As Silu, of fewer steps, its error 1 unit in the last place more.
struct Swish {
  static vec value(vec z) {
#ifdef __AVX512F__
    const vec t = at_most(z * -1.44269504f, 126.0f);  // beyond that 1 + 2^t has no inverse
    const vec f = (vec)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT);
    vec p = f * 1.33952e-3f + 9.61843e-3f;
    p = p * f + 5.55033e-2f;
    p = p * f + 2.4022650e-1f;
    p = p * f + 6.9314718e-1f;
    p = p * f + 1.0f;
    const vec sum = 1.0f + (vec)_mm512_scalef_ps((__m512)p, (__m512)(t - f));
    const vec r = (vec)_mm512_rcp14_ps((__m512)sum), q = z * r;
    return q + q * (1.0f - sum * r);
#else
    return Silu::value(z);
#endif
  }
};

#define EACH _Pragma("GCC unroll 4") for (int v = 0; v < VECTORS; v++)

// --- 1x1 convolutions ------------------------------------------------------------------------

// Some consecutive inputs to some consecutive outputs, without the scale.
struct Part {
  long first_in, in, first_out, out, chunks = 1, chunk;  // chunk: inputs of one
  bool is_apart = false;                             // no patterns but those of one output
  std::vector<uint8_t> counts;                       // (chunks, triples, COUNTS): of inputs with a pattern
  std::vector<uint8_t> inputs;                       // of a chunk, in this order
  std::vector<uint32_t> starts;                      // (chunks, triples): in `inputs`
  std::vector<float> dense;                          // or, where weights are floats, (triples, in, 3)

  // weights (out, in)
  Part(const float* weights, bool is_ternary, long first_in, long in, long first_out, long out)
      : first_in(first_in), in(in), first_out(first_out), out(out) {
    if (is_ternary) {
      const double part = 1 - double(std::count(weights, weights + in * out, 0.0f)) / double(in * out);
      const long inputs = part < LONG_BELOW ? MORE_INPUTS : INPUTS;
      chunks = (in + inputs - 1) / inputs, is_apart = part < APART_BELOW;
    }
    chunk = (in + chunks - 1) / chunks;
    const auto weight = [&](long o, long i) { return o < out ? weights[o * in + i] : 0.0f; };
    if (!is_ternary) {
      for (long t = 0; t < triples(); t++)
        for (long i = 0; i < in; i++)
          for (long j = 0; j < 3; j++) dense.push_back(weight(3 * t + j, i));
      return;
    }
    for (long c = 0; c < chunks; c++)
      for (long t = 0; t < triples(); t++) {
        starts.push_back(uint32_t(inputs.size()));
        for (int p = 0; p < PATTERNS; p++)
          for (int sign = 1; sign >= -1; sign -= 2) {
            const size_t before = inputs.size();
            for (long i = c * chunk; i < std::min(in, (c + 1) * chunk); i++) {
              bool fits = !is_apart || p >= SHARED_PATTERNS;
              for (int j = 0; j < 3; j++)
                fits &= weight(3 * t + j, i) == float(sign * PATTERN[p][j]) || (is_apart && !PATTERN[p][j]);
              if (fits) inputs.push_back(uint8_t(i - c * chunk));
            }
            counts.push_back(uint8_t(inputs.size() - before));
          }
      }
  }
  long triples() const { return (out + 2) / 3; }
  size_t bytes() const { return counts.size() + inputs.size() + 4 * (starts.size() + dense.size()); }
};

// Adds, or with SIGN -1 subtracts, the planes of the next `count` inputs. Some processors have units for additions and
// others for products: half of the additions are written as such, of 1, which the compiler must not know.
template <int SIGN> inline __attribute__((always_inline)) void add_list(Some& sum, const uint8_t*& next, long count,
                                                                        const float* x, vec one) {
  for (const uint8_t* end = next + count; next < end; next++) {
    const float* plane = x + *next * BLOCK;
    EACH sum[v] = SIGN > 0 ? sum[v] + load(plane + v * LANES) : sum[v] - one * load(plane + v * LANES);
  }
}

// Adds to three outputs what a chunk of inputs gives, from x: (inputs, BLOCK) on.
inline __attribute__((always_inline)) void add_triple(const Part& part, long chunk, long triple, const float* x,
                                                      Some& a, Some& b, Some& c, vec one) {
  if (!part.dense.empty()) {
    const float* w = &part.dense[triple * part.in * 3];
    for (long i = 0; i < part.in; i++, w += 3)
      EACH {
        const vec value = load(x + i * BLOCK + v * LANES);
        a[v] += w[0] * value;
        b[v] += w[1] * value;
        c[v] += w[2] * value;
      }
    return;
  }
  const long at = chunk * part.triples() + triple;
  const uint8_t *count = &part.counts[at * COUNTS], *next = part.inputs.data() + part.starts[at];
  const auto both = [&](Some& sum) __attribute__((always_inline)) {
    add_list<1>(sum, next, *count++, x, one);
    add_list<-1>(sum, next, *count++, x, one);
  };
  if (part.is_apart) {
    count += 2 * SHARED_PATTERNS;
  } else {
    {  // (1, 1, 1), (1, 1, -1), (1, 1, 0)
      Some same = {}, other = {};
      both(same), both(other);
      EACH c[v] += one * same[v], c[v] -= one * other[v], same[v] += one * other[v];
      both(same);
      EACH a[v] += one * same[v], b[v] += one * same[v];
    }
    {  // (1, -1, 1), (1, -1, -1), (1, -1, 0)
      Some same = {}, other = {};
      both(same), both(other);
      EACH c[v] += one * same[v], c[v] -= one * other[v], same[v] += one * other[v];
      both(same);
      EACH a[v] += one * same[v], b[v] -= one * same[v];
    }
    {  // (1, 0, 1), (1, 0, -1)
      Some same = {}, other = {};
      both(same), both(other);
      EACH c[v] += one * same[v], c[v] -= one * other[v], a[v] += one * same[v], a[v] += one * other[v];
    }
    {  // (0, 1, 1), (0, 1, -1)
      Some same = {}, other = {};
      both(same), both(other);
      EACH c[v] += one * same[v], c[v] -= one * other[v], b[v] += one * same[v], b[v] += one * other[v];
    }
  }
  both(a), both(b), both(c);
}

// Outputs of triples [begin, end) for a block of pixels of all channels: done(output, first pixel, sums). `partial`
// has room for them all.
template <class Done>
void add_up(const Part& part, long begin, long end, const float* x, float* partial, Done done) {
  vec one = vec{} + 1.0f;
  asm("" : "+v"(one));
  for (long pixel = 0; pixel < BLOCK; pixel += SOME)
    for (long chunk = 0; chunk < part.chunks; chunk++) {
      const float* from = x + (part.first_in + chunk * part.chunk) * BLOCK + pixel;
      for (long t = begin; t < end; t++) {
        Some a = {}, b = {}, c = {};
        add_triple(part, chunk, t, from, a, b, c, one);
        float* sums = partial + (t - begin) * 3 * SOME;
        if (chunk > 0) EACH {
          a[v] += load(sums + v * LANES);
          b[v] += load(sums + SOME + v * LANES);
          c[v] += load(sums + 2 * SOME + v * LANES);
        }
        if (chunk + 1 < part.chunks) EACH {
          store(sums + v * LANES, a[v]);
          store(sums + SOME + v * LANES, b[v]);
          store(sums + 2 * SOME + v * LANES, c[v]);
        } else {
          const long output = part.first_out + 3 * t, left = part.out - 3 * t;
          done(output, pixel, a);
          if (left > 1) done(output + 1, pixel, b);
          if (left > 2) done(output + 2, pixel, c);
        }
      }
    }
}

struct Unit { const Part* part; long begin, end; };  // of triples

struct Conv1x1 {
  long in = 0, out = 0;
  std::vector<Part> parts;
  std::vector<float> scale, shift;  // of each output

  // weights (out, in / groups)
  void read(const float* weights, bool is_ternary, long groups, long all_in, long all_out, const float* scales,
            const float* shifts) {
    in = all_in, out = all_out;
    scale.assign(scales, scales + out), shift.assign(shifts, shifts + out);
    const long i = in / groups, o = out / groups;
    for (long g = 0; g < groups; g++) parts.emplace_back(weights + g * i * o, is_ternary, g * i, i, g * o, o);
  }
  std::vector<Unit> units(long triples) const {
    std::vector<Unit> found;
    for (const Part& part : parts)
      for (long t = 0; t < part.triples(); t += triples)
        found.push_back({&part, t, std::min(part.triples(), t + triples)});
    return found;
  }
};

// --- pixels --------------------------------------------------------------------------------

// Evens and odds of 2 * LANES consecutive floats.
#ifdef __AVX512F__
inline vec8 low(vec a) { return (vec8)_mm512_castps512_ps256((__m512)a); }
inline vec8 high(vec a) { return (vec8)_mm512_extractf32x8_ps((__m512)a, 1); }
inline void halve(vec& a, vec& b) {
  const ivec even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  const vec evens = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)even, (__m512)b);
  b = (vec)_mm512_permutex2var_ps((__m512)a, (__m512i)(even + 1), (__m512)b);
  a = evens;
}
#else
inline void halve(vec& a, vec& b) {
  const auto in_order = [](__m256 v) {
    return (vec)_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8));
  };
  const vec evens = in_order(_mm256_shuffle_ps((__m256)a, (__m256)b, 0x88));
  b = in_order(_mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd));
  a = evens;
}
#endif

// A plane with a border of zeros. For a stride of 2 a row has its even pixels, a border, and its odd ones.
struct Grid {
  long width, stride, margin, row, size;
  std::vector<int> at;  // where eights of consecutive pixels go
  bool is_whole;        // and whether whole vectors of them do

  explicit Grid(long width, long stride) : width(width), stride(stride) {
    margin = std::min(16L, width / stride);
    row = width + stride * margin;
    size = (width + 2 * BORDER) * row + margin;
    is_whole = LANES == 8 || width / stride >= 16;
    for (long p = 0; p < width * width; p += 8) {
      long y = p / width, x = p % width;
      if (stride == 2) {  // see halve
        const long group = p / (2 * LANES) * (2 * LANES), odd = p % (2 * LANES) >= LANES;
        const long pixel = group + p % LANES * 2 + odd;
        y = pixel / width, x = pixel % width / 2 + odd * (width / 2 + margin);
      }
      at.push_back(int((y + BORDER) * row + margin + x));
    }
  }
  void write(float* plane, long pixel, const Some& values) const {
    EACH {
      const int* to = &at[(pixel + v * LANES) / 8];
#ifdef __AVX512F__
      if (!is_whole) {
        *(unaligned_vec8*)(plane + to[0]) = low(values[v]);
        *(unaligned_vec8*)(plane + to[1]) = high(values[v]);
        continue;
      }
#endif
      store(plane + to[0], values[v]);
    }
  }
};

// --- depthwise convolutions ----------------------------------------------------------------------

// Replaces pixels by act of them; returns their sums.
template <class Act> inline vec activate(float* y, long pixels) {
  vec pool = {};
  for (long p = 0; p < pixels; p += 2 * LANES) {
    const vec a = Act::value(load(y + p)), b = Act::value(load(y + p + LANES));
    store(y + p, a), store(y + p + LANES, b);
    pool += a + b;
  }
  return pool;
}

// The pixels of a channel, act(conv(plane) + shift), to blocks of pixels from `y` on; returns their sum.
template <int K, int S, long WIDTH_OUT, class Act>
__attribute__((noinline)) float depthwise(const Grid& grid, const float* plane, const float* weight, float shift,
                                          float* y, long block_stride) {  constexpr long IN_VECTOR = std::min(LANES, WIDTH_OUT);
  typedef std::conditional_t<IN_VECTOR == LANES, vec, vec8> row_vec;
  // Rows at a time: as many as there are registers for them and for what they are made of.
  constexpr int ROWS = LANES == 16 ? 8 : S == 1 ? 4 : 2, PAD = K / 2, TAKEN = (ROWS - 1) * S + K;
  constexpr bool IN_REGISTERS = std::is_same_v<Act, Relu> && IN_VECTOR == LANES;  // what is long is done afterwards
  vec pool = {};
  for (long oy = 0; oy < WIDTH_OUT; oy += ROWS) {
    for (long ox = 0; ox < WIDTH_OUT; ox += IN_VECTOR) {
      row_vec sum[ROWS];
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) sum[r] = row_vec{} + shift;
#pragma GCC unroll 8
      for (int kx = 0; kx < K; kx++) {
        const int column = kx - PAD, odd = S == 2 && column % 2 != 0;
        const long offset = S == 1 ? column : (column - odd) / 2 + odd * (grid.width / 2 + grid.margin);
        const float* from = plane + (oy * S + BORDER - PAD) * grid.row + grid.margin + ox + offset;
        row_vec taken[TAKEN];  // the same column of some rows
#pragma GCC unroll 24
        for (int i = 0; i < TAKEN; i++) memcpy(&taken[i], from + i * grid.row, sizeof(row_vec));
#pragma GCC unroll 8
        for (int ky = 0; ky < K; ky++) {
          const float w = weight[ky * K + kx];
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; r++) sum[r] += w * taken[r * S + ky];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; r++) {
        const long pixel = (oy + r) * WIDTH_OUT + ox;
        if constexpr (IN_REGISTERS) pool += sum[r] = Act::value(sum[r]);
        memcpy(y + pixel / BLOCK * block_stride + pixel % BLOCK, &sum[r], sizeof(row_vec));
      }
    }
    if (IN_REGISTERS) continue;
    // Now, while they lie in the first cache: blocks of the same channel fall on the same few places there.
    constexpr long DONE = ROWS * WIDTH_OUT, RUN = std::min(BLOCK, DONE);
    for (long pixel = oy * WIDTH_OUT; pixel < oy * WIDTH_OUT + DONE; pixel += RUN)
      pool += activate<Act>(y + pixel / BLOCK * block_stride + pixel % BLOCK, RUN);
  }
  float total = 0;
  for (long i = 0; i < LANES; i++) total += pool[i];
  return total;
}


// --- small layers --------------------------------------------------------------------------

// A matrix of few values: of squeeze-excitation, where nine in ten may be 0. Of `rows` long rows, whether these are its
// outputs or its inputs, for a short one takes longer to begin than to go through.
struct Sparse {
  std::vector<uint32_t> starts{0};
  std::vector<uint16_t> columns;
  std::vector<float> values, bias;
  // value(row, column)
  template <class Value> void read(long rows, long width, const float* biases, long outputs, Value value) {
    bias.assign(biases, biases + outputs);
    for (long r = 0; r < rows; r++) {
      for (long c = 0; c < width; c++)
        if (const float v = value(r, c)) columns.push_back(uint16_t(c)), values.push_back(v);
      starts.push_back(uint32_t(values.size()));
    }
  }
  // Of inputs x, one for each row, to outputs y.
  void columns_of(const float* x, float* y) const {
    std::copy(bias.begin(), bias.end(), y);
    for (size_t r = 0; r + 1 < starts.size(); r++)
      for (long i = starts[r]; i < starts[r + 1]; i++) y[columns[i]] += values[i] * x[r];
  }
  float row(long r, const float* x) const {
    float sums[4] = {bias[r]};
    long i = starts[r], end = starts[r + 1];
    for (; i + 4 <= end; i += 4)
      for (int k = 0; k < 4; k++) sums[k] += values[i + k] * x[columns[i + k]];
    for (; i < end; i++) sums[0] += values[i] * x[columns[i]];
    return sums[0] + sums[1] + (sums[2] + sums[3]);
  }
};
inline float logistic(float x) { return 1 / (1 + std::exp(-x)); }

// --- the network -----------------------------------------------------------------------------

struct Channel { int kernel; uint32_t weight; };  // of a depthwise convolution: its size, its place in `taps`

struct Block {
  long in, wide, out, width, stride, width_out;
  bool has_expansion, has_skip, is_silu;
  bool halves = false;  // whether the next block's stride is 2
  Conv1x1 expand, project;
  std::vector<Unit> expand_units, project_units;
  std::vector<Channel> channels;
  std::vector<float> taps, shift;
  long reduced = 0;
  Sparse reduce, excite;
  Grid grid;
  Block(long width, long stride) : width(width), stride(stride), width_out(width / stride), grid(width, stride) {}
  long blocks() const { return width * width / BLOCK; }
  long blocks_out() const { return width_out * width_out / BLOCK; }
};

// What a group of images needs, and what each thread needs beside it.
struct Shared {
  Buffer x, y, wide, pooled, together;   // together: what the last blocks get, of all images of the group
  std::vector<std::atomic<long>> taken;  // units of each stage
};
struct Own {
  Buffer image, partial, reduced;
  std::vector<Buffer> planes;  // of each block, for a unit of channels
};

// Waits until `done`: at first spinning, for the others are nearly done as well; where one of them has lost its core to
// another process, asleep.
template <class Done> void wait_for(std::mutex& mutex, std::condition_variable& changed, Done done) {
  for (long spins = 0; spins < 4000; spins++) {
    if (done()) return;
    _mm_pause();
  }
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, done);
}

// Threads that work on one image wait here for each other.
struct Barrier {
  std::mutex mutex;
  std::condition_variable changed;
  std::atomic<int> waiting{0};
  std::atomic<unsigned> round{0};
  void wait(int size) {
    if (size == 1) return;
    const unsigned now = round.load();
    if (waiting.fetch_add(1) + 1 == size) {
      waiting = 0;
      {
        std::lock_guard<std::mutex> lock(mutex);  // or one that is about to sleep would not hear of it
        round++;
      }
      changed.notify_all();
    } else {
      wait_for(mutex, changed, [&] { return round.load() != now; });
    }
  }
};

struct Team {
  int size, rank;
  Barrier* barrier;
  Shared* shared;
  Own* own;
  void wait() const { barrier->wait(size); }
};

struct Network {
  long stem_channels, classes = 0;
  std::vector<float> stem, stem_shift, factor, offset;  // stem (channels / 4, 27, 4)
  std::vector<Block> blocks;
  Conv1x1 head;
  std::vector<Unit> head_units;
  std::vector<float> classifier, bias;  // (head, padded classes), (padded classes)

  std::mutex running;
  std::vector<std::unique_ptr<Shared>> shared;
  std::vector<std::unique_ptr<Own>> own;

  // From this block on an image is one block of pixels, and the images of a group are blocks side by side.
  size_t last_blocks() const {
    size_t i = 0;
    while (i < blocks.size() && blocks[i].blocks() > 1) i++;
    return i;
  }
  long images_of(size_t block, long images) const { return block < last_blocks() ? 1 : images; }

  // Memory for so many threads.
  void prepare(size_t threads) {
    long narrow = 0, wide = head.out, largest = 0;
    for (size_t i = 0; i < blocks.size(); i++) {
      const Block& b = blocks[i];
      const long pixels = images_of(i, GROUP) * BLOCK;
      narrow = std::max({narrow, b.in * b.blocks() * pixels, b.out * b.blocks_out() * pixels});
      wide = std::max(wide, b.wide);
      largest = std::max(largest, b.wide * b.blocks_out() * pixels);
    }
    while (shared.size() < threads) {
      auto made = std::make_unique<Shared>();
      made->x.resize(narrow), made->y.resize(narrow), made->wide.resize(largest);
      made->pooled.resize(GROUP * wide), made->together.resize(narrow);
      made->taken = std::vector<std::atomic<long>>(GROUP * 2 * blocks.size() + 1);
      shared.push_back(std::move(made));
    }
    while (own.size() < threads) {
      auto made = std::make_unique<Own>();
      made->image.resize(COLOURS * stem_grid().size);
      made->partial.resize(3 * PROJECT_UNIT * SOME);
      made->reduced.resize(2 * padded(wide));
      for (size_t i = 0; i < blocks.size(); i++)
        made->planes.emplace_back(images_of(i, GROUP) * 3 * UNIT * blocks[i].grid.size);
      own.push_back(std::move(made));
    }
  }
  static const Grid& stem_grid() {
    static const Grid grid(SIDE, 1);
    return grid;
  }

  // Units of a stage, one after the other; body(unit).
  template <class Body> void take(const Team& team, long stage, long units, Body body) const {
    for (long unit; (unit = team.shared->taken[stage]++) < units;) body(unit);
  }

  // uint8 (32, 32, 3) to normalised planes with a border.
  void normalise(const uint8_t* image, float* planes) const {
    const Grid& grid = stem_grid();
    for (long c = 0; c < COLOURS; c++)
      for (long y = 0; y < SIDE; y++) {
        float* to = planes + c * grid.size + (y + BORDER) * grid.row + grid.margin;
        for (long x = 0; x < SIDE; x++) to[x] = image[(y * SIDE + x) * COLOURS + c] * factor[c] + offset[c];
      }
  }

  // Four channels from `first` on: to the blocks of pixels x and, with a border, to `planes`.
  void stem_outputs(const float* image, long first, float* x, const Grid& to, float* planes) const {
    const Grid& grid = stem_grid();
    const float* weights = &stem[first * 27];
    for (long p = 0; p < SIDE * SIDE; p += SOME) {
      Some sums[STEM_OUTPUTS];
      for (int o = 0; o < STEM_OUTPUTS; o++) EACH sums[o][v] = vec{} + stem_shift[first + o];
      const float* w = weights;
      for (long c = 0; c < COLOURS; c++)
        for (long ky = 0; ky < 3; ky++)
          for (long kx = 0; kx < 3; kx++, w += STEM_OUTPUTS)
            EACH {
              const long pixel = p + v * LANES;
              const vec value = load(image + c * grid.size + (pixel / SIDE + BORDER + ky - 1) * grid.row + grid.margin +
                                     pixel % SIDE + kx - 1);
#pragma GCC unroll 4
              for (int o = 0; o < STEM_OUTPUTS; o++) sums[o][v] += w[o] * value;
            }
      for (int o = 0; o < STEM_OUTPUTS; o++) {
        EACH sums[o][v] = Relu::value(sums[o][v]);
        to.write(planes + o * to.size, p, sums[o]);
        float* pixels = x + (p / BLOCK * stem_channels + first + o) * BLOCK + p % BLOCK;
        EACH store(pixels + v * LANES, sums[o][v]);
      }
    }
  }

  template <class Act> static float depthwise_act(const Block& b, long channel, const float* plane, float* y) {
    const auto [kernel, at] = b.channels[channel];
    const float* weight = &b.taps[at];
    const long step = b.wide * BLOCK;
    float* to = y + channel * BLOCK;
    const auto with_kernel = [&](auto stride, auto out) {
      if (kernel == 3) return depthwise<3, stride, out, Act>(b.grid, plane, weight, b.shift[channel], to, step);
      if (kernel == 5) return depthwise<5, stride, out, Act>(b.grid, plane, weight, b.shift[channel], to, step);
      return depthwise<7, stride, out, Act>(b.grid, plane, weight, b.shift[channel], to, step);
    };
    const std::integral_constant<int, 1> one;
    const std::integral_constant<int, 2> two;
    if (b.width_out == 32) return with_kernel(one, std::integral_constant<long, 32>());
    if (b.stride == 1)
      return b.width_out == 16 ? with_kernel(one, std::integral_constant<long, 16>())
                               : with_kernel(one, std::integral_constant<long, 8>());
    return b.width_out == 16 ? with_kernel(two, std::integral_constant<long, 16>())
                             : with_kernel(two, std::integral_constant<long, 8>());
  }

  // What comes before the projection, of the channels of a unit.
  template <class Act> void widen(const Team& team, const Block& b, long index, long images, long unit) const {
    Shared& shared = *team.shared;
    const auto plane = [&](long image, long channel) {
      return team.own->planes[index].data() + (image * 3 * UNIT + channel) * b.grid.size;
    };
    long first, end;
    if (b.has_expansion) {
      const auto [part, begin, until] = b.expand_units[unit];
      first = part->first_out + 3 * begin, end = part->first_out + std::min(part->out, 3 * until);
      const float *scale = b.expand.scale.data(), *shift = b.expand.shift.data();
      for (long block = 0; block < images * b.blocks(); block++)
        add_up(*part, begin, until, &shared.x[block * b.in * BLOCK], team.own->partial.data(),
               [&](long o, long pixel, Some& sums) {
                 Some values;
                 EACH values[v] = Act::value(sums[v] * scale[o] + shift[o]);
                 b.grid.write(plane(block / b.blocks(), o - first), block % b.blocks() * BLOCK + pixel, values);
               });
    } else {
      first = unit * STEM_UNIT, end = std::min(stem_channels, first + STEM_UNIT);
      for (long c = first; c < end; c += STEM_OUTPUTS)
        stem_outputs(team.own->image.data(), c, shared.x.data(), b.grid, plane(0, c - first));
    }
    for (long image = 0; image < images; image++)
      for (long c = first; c < end; c++) {
        float* y = &shared.wide[image * b.blocks_out() * b.wide * BLOCK];
        shared.pooled[image * b.wide + c] =
            depthwise_act<Act>(b, c, plane(image, c - first), y) / float(b.width_out * b.width_out);
      }
  }

  void gate(const Team& team, const Block& b, long image) const {
    Shared& shared = *team.shared;
    float* reduced = team.own->reduced.data();
    for (long r = 0; r < b.reduced; r++) {
      const float value = b.reduce.row(r, &shared.pooled[image * b.wide]);
      reduced[r] = value * logistic(value);
    }
    const long begin = b.wide / 4 * team.rank / team.size * 4, end = b.wide / 4 * (team.rank + 1) / team.size * 4;
    float* gates = reduced + padded(b.reduced);
    b.excite.columns_of(reduced, gates);
    for (long c = 0; c < b.wide; c += LANES) store(gates + c, sigmoid(load(gates + c)));
    for (long block = image * b.blocks_out(); block < (image + 1) * b.blocks_out(); block++)
      for (long c = begin; c < end; c++) {
        float* pixels = &shared.wide[(block * b.wide + c) * BLOCK];
        const vec gate = vec{} + gates[c];
        for (long p = 0; p < BLOCK; p += LANES) store(pixels + p, load(pixels + p) * gate);
      }
  }

  void project(const Team& team, const Block& b, long images, long unit) const {
    Shared& shared = *team.shared;
    const long blocks = images * b.blocks_out(), block = unit % blocks;
    const auto [part, begin, end] = b.project_units[unit / blocks];
    const float *scale = b.project.scale.data(), *shift = b.project.shift.data();
    add_up(*part, begin, end, &shared.wide[block * b.wide * BLOCK], team.own->partial.data(),
           [&](long o, long pixel, Some& sums) {
             const long at = (block * b.out + o) * BLOCK + pixel;
             Some values;
             EACH {
               values[v] = sums[v] * scale[o] + shift[o];
               if (b.has_skip) values[v] += load(&shared.x[at + v * LANES]);
             }
             if (b.halves)
               for (int v = 0; v < VECTORS; v += 2) halve(values[v], values[v + 1]);
             EACH store(&shared.y[at + v * LANES], values[v]);
           });
  }

  // Through a block, from x to y.
  void run_block(const Team& team, size_t index, long images, long& stage) const {
    const Block& b = blocks[index];
    const long units = b.has_expansion ? long(b.expand_units.size()) : (stem_channels + STEM_UNIT - 1) / STEM_UNIT;
    take(team, stage++, units, [&](long unit) {
      if (b.is_silu) widen<Swish>(team, b, long(index), images, unit);
      else widen<Relu>(team, b, long(index), images, unit);
    });
    team.wait();
    if (b.reduced) {
      for (long image = 0; image < images; image++) gate(team, b, image);
      team.wait();
    }
    take(team, stage++, images * b.blocks_out() * long(b.project_units.size()),
         [&](long unit) { project(team, b, images, unit); });
    team.wait();
  }

  // Up to GROUP images.
  void run(const Team& team, const uint8_t* bytes, long images, float* scores) const {
    Shared& shared = *team.shared;
    const size_t last = last_blocks();
    long stage = 0;
    for (long image = 0; image < images; image++) {
      normalise(bytes + image * SIDE * SIDE * COLOURS, team.own->image.data());
      for (size_t i = 0; i < last; i++) {
        run_block(team, i, 1, stage);
        if (team.rank == 0) {
          shared.x.swap(shared.y);
          const long size = blocks[last].in * BLOCK;
          if (i + 1 == last) std::copy(shared.x.data(), shared.x.data() + size, &shared.together[image * size]);
        }
        team.wait();
      }
    }
    if (team.rank == 0) shared.x.swap(shared.together);
    team.wait();
    for (size_t i = last; i < blocks.size(); i++) {
      run_block(team, i, images, stage);
      if (team.rank == 0) shared.x.swap(shared.y);
      team.wait();
    }
    take(team, stage++, long(head_units.size()), [&](long unit) {
      const auto [part, begin, end] = head_units[unit];
      for (long image = 0; image < images; image++)
        add_up(*part, begin, end, &shared.x[image * head.in * BLOCK], team.own->partial.data(),
               [&](long o, long pixel, Some& sums) {
                 vec total = {};
                 EACH total += Relu::value(sums[v] * head.scale[o] + head.shift[o]);
                 float& pooled = shared.pooled[image * head.out + o];
                 if (pixel == 0) pooled = 0;
                 for (long i = 0; i < LANES; i++) pooled += total[i];
               });
    });
    team.wait();
    if (team.rank == 0) {
      for (auto& taken : shared.taken) taken = 0;
      for (long image = 0; image < images; image++)
        classify(&shared.pooled[image * head.out], scores + image * classes);
    }
    team.wait();
  }

  void classify(const float* pooled, float* scores) const {
    const long width = padded(classes);
    for (long c = 0; c < classes; c += LANES) {
      vec sum = load(&bias[c]);
      for (long i = 0; i < head.out; i++) sum += pooled[i] * (1.0f / BLOCK) * load(&classifier[i * width + c]);
      if (c + LANES <= classes) store<true>(scores + c, sum, LANES);
      else store<false>(scores + c, sum, classes - c);
    }
  }
};

// --- threads ---------------------------------------------------------------------------------

// Threads that stay: of the process, for all networks.
struct Pool {
  std::mutex mutex;
  std::condition_variable begin, end;
  std::vector<std::thread> threads;
  std::atomic<unsigned> round{0};
  std::atomic<int> left{0};
  const std::function<void(int)>* work = nullptr;
  int wanted = 0;
  const pid_t process = getpid();

  void serve(int rank, unsigned seen) {
    for (;;) {
      wait_for(mutex, begin, [&] { return round.load() != seen; });
      int size;
      const std::function<void(int)>* body;
      {
        std::lock_guard<std::mutex> lock(mutex);
        seen = round.load(), size = wanted, body = work;
      }
      if (rank >= size) continue;
      (*body)(rank);
      {
        std::lock_guard<std::mutex> lock(mutex);
        left--;
      }
      end.notify_one();
    }
  }
  // body(rank) for rank 0 .. size - 1 at once, 0 on the thread that calls.
  void run(int size, const std::function<void(int)>& body) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      while (int(threads.size()) + 1 < size) {
        const int rank = int(threads.size()) + 1;
        threads.emplace_back([this, rank, seen = round.load()] { serve(rank, seen); });
      }
      work = &body, wanted = size, left = size - 1;
      round++;
    }
    begin.notify_all();
    body(0);
    wait_for(mutex, end, [&] { return left.load() == 0; });
  }
  // A forked process has none of its parent's threads; what is left of them is never freed.
  static Pool& of_process(std::mutex& guard) {
    static Pool* pool = nullptr;
    std::lock_guard<std::mutex> lock(guard);
    if (!pool || pool->process != getpid()) pool = new Pool;
    return *pool;
  }
};

}  // namespace

// Weights are (out, in, rows, columns) floats, those of grouped convolutions one group after the other.
extern "C" {

// normal: what a byte of each colour is multiplied by, then what is added. null: no memory.
void* msunet_packed_new(long channels, const float* weights, const float* shift, const float* normal) try {
  auto net = std::make_unique<Network>();
  net->stem_channels = channels;
  net->stem.resize(channels * 27);
  for (long o = 0; o < channels; o++)
    for (long i = 0; i < 27; i++)
      net->stem[(o / STEM_OUTPUTS * 27 + i) * STEM_OUTPUTS + o % STEM_OUTPUTS] = weights[o * 27 + i];
  net->stem_shift.assign(shift, shift + channels);
  net->factor.assign(normal, normal + 3), net->offset.assign(normal + 3, normal + 6);
  return net.release();
} catch (const std::bad_alloc&) {
  return nullptr;
}

void msunet_packed_free(void* given) { delete (Network*)given; }

// The next block, of an input of width * width. sizes and weights of each depthwise convolution's channels, one behind
// the other. Without an expansion (only the first block, groups 0) its three pointers are null. 0: no memory.
int msunet_packed_block(void* given, long in, long wide, long out, long width, long stride, int is_silu, int has_skip,
                        int is_ternary, long expand_groups, const float* expand, const float* expand_scale,
                        const float* expand_shift, const long* kernels, const float* taps, const float* shift,
                        long reduced, const float* reduce, const float* reduce_bias, const float* excite,
                        const float* excite_bias, long project_groups, const float* project,
                        const float* project_scale, const float* project_shift) try {
  Network& net = *(Network*)given;
  if (!net.blocks.empty()) net.blocks.back().halves = stride == 2;
  net.blocks.emplace_back(width, stride);
  Block& b = net.blocks.back();
  b.in = in, b.wide = wide, b.out = out, b.has_skip = has_skip, b.is_silu = is_silu;
  b.has_expansion = expand_groups > 0;
  if (b.has_expansion) b.expand.read(expand, is_ternary, expand_groups, in, wide, expand_scale, expand_shift);
  b.project.read(project, is_ternary, project_groups, wide, out, project_scale, project_shift);
  uint32_t at = 0;
  for (long c = 0; c < wide; at += uint32_t(kernels[c] * kernels[c]), c++) b.channels.push_back({int(kernels[c]), at});
  b.taps.assign(taps, taps + at), b.shift.assign(shift, shift + wide);
  b.reduced = reduced;
  if (reduced) {
    b.reduce.read(reduced, wide, reduce_bias, reduced, [&](long r, long c) { return reduce[r * wide + c]; });
    b.excite.read(reduced, wide, excite_bias, wide, [&](long r, long c) { return excite[c * reduced + r]; });
  }
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

// The last layers; classifier (classes, out). 0: no memory.
int msunet_packed_head(void* given, long in, long out, int is_ternary, const float* weights, const float* scale,
                       const float* shift, long classes, const float* classifier, const float* bias) try {
  Network& net = *(Network*)given;
  net.head.read(weights, is_ternary, 1, in, out, scale, shift);
  net.classes = classes;
  const long width = padded(classes);
  net.classifier.resize(out * width), net.bias.resize(width);
  for (long c = 0; c < classes; c++) {
    net.bias[c] = bias[c];
    for (long i = 0; i < out; i++) net.classifier[i * width + c] = classifier[c * out + i];
  }
  for (Block& b : net.blocks)
    b.expand_units = b.expand.units(UNIT), b.project_units = b.project.units(PROJECT_UNIT);
  net.head_units = net.head.units(PROJECT_UNIT);
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

// Bytes that the 1x1 convolutions take.
long msunet_packed_bytes(const void* given) {
  const Network& net = *(const Network*)given;
  size_t bytes = 0;
  const auto add = [&](const Conv1x1& conv) { for (const Part& part : conv.parts) bytes += part.bytes(); };
  for (const Block& b : net.blocks) add(b.expand), add(b.project);
  add(net.head);
  return long(bytes);
}

// images (count, 32, 32, 3), scores (count, classes). 0: no memory, or no thread.
int msunet_packed_scores(void* given, const uint8_t* images, long count, float* scores, int threads) try {
  Network& net = *(Network*)given;
  std::lock_guard<std::mutex> lock(net.running);
  net.prepare(size_t(threads));
  const long bytes = SIDE * SIDE * COLOURS, each = count / threads * threads;
  const long turns_of_each = (each / threads + GROUP - 1) / GROUP;
  const long group = turns_of_each ? (each / threads + turns_of_each - 1) / turns_of_each : 0;  // none larger than others
  std::atomic<long> next{0};
  Barrier barrier;
  const std::function<void(int)> work = [&](int rank) {
    const Team alone{1, 0, &barrier, net.shared[rank].get(), net.own[rank].get()};
    for (long n; (n = next.fetch_add(group)) < each;)
      net.run(alone, images + n * bytes, std::min(group, each - n), scores + n * net.classes);
    const Team team{threads, rank, &barrier, net.shared[0].get(), net.own[rank].get()};
    if (each < count) team.wait();  // the first thread's memory is shared from here on
    for (long n = each; n < count; n++) net.run(team, images + n * bytes, 1, scores + n * net.classes);
  };
  if (threads == 1) {
    work(0);
    return 1;
  }
  static std::mutex guard, turns;  // a pool serves one call after the other
  std::lock_guard<std::mutex> turn(turns);
  Pool::of_process(guard).run(threads, work);
  return 1;
} catch (const std::exception&) {
  return 0;
}
}
