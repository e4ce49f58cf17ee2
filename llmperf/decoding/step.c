// One forward step of a decoder on a CPU, from token ids to logits, in one parallel region.
//
// A row is one token: of a request that decodes, or one of several of a prompt. Each row names the
// slot (which request's keys and values) and the position that it writes, so requests begin and end
// independently of their neighbours. All sums run in the same order whatever the number of rows, so
// a request's logits do not depend on who shares its step.
//
// Threads take items of work from one counter and meet at a barrier that spins: a step has about
// 200 short phases, for which sleeping threads are too slow. No header of torch is needed; weights
// are read where torch holds them.
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef _WIN32
#include <windows.h>
#define EXPORT __declspec(dllexport)
#else
#include <pthread.h>
#include <sched.h>
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

// ---- Vectors of 16 numbers; the compiler splits them where registers are shorter.

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef int8_t b16 __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i16){__VA_ARGS__})
#endif

INLINE v16 all(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 choose(i16 mask, v16 yes, v16 no) { return (v16)((mask & (i16)yes) | (~mask & (i16)no)); }
INLINE v16 load_f32(const void *p) { v16 v; memcpy(&v, p, 64); return v; }
INLINE v16 load_bf16(const void *p) {
  h16 half; memcpy(&half, p, 32);
  u16 bits = __builtin_convertvector(half, u16) << 16;
  return (v16)bits;
}
INLINE v16 load_int8(const void *p) {
  b16 bytes; memcpy(&bytes, p, 16);
  return __builtin_convertvector(__builtin_convertvector(bytes, i16), v16);
}
INLINE void store_bf16(void *p, v16 v) {  // round to nearest even, as torch does
  u16 bits = (u16)v;
  h16 half = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, h16);
  memcpy(p, &half, 32);
}

// Sixteen vectors to their sixteen sums. The order of additions is the same for each.
INLINE v16 sums(const v16 *a) {
  v16 b[8], c[4], d[2];
  for (int i = 0; i < 8; i++)
    b[i] = SHUFFLE(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    c[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    d[i] = SHUFFLE(c[i], c[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(c[i], c[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return SHUFFLE(d[0], d[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         SHUFFLE(d[0], d[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
INLINE float sum(v16 v) { v16 a[16] = {v}; return sums(a)[0]; }

INLINE v16 exponential(v16 x) {  // 2^n e^r with |r| <= ln(2) / 2; relative error about 1e-7
  x = choose(x < -87.0f, all(-87.0f), x);
  x = choose(x > 88.0f, all(88.0f), x);
  v16 n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to a whole number
  v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16 p = all(1.9875691500e-4f) * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (v16)((i16)p + (__builtin_convertvector(n, i16) << 23));
}
INLINE v16 hyperbolic_tangent(v16 x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }

// ---- What a model is; llmperf/decoding/cpu_step.py has the same structures.

enum { F32, BF16, INT8, INT4 };
enum { SILU, GELU_TANH, GELU, RELU };

typedef struct {  // out = weight (rows, columns) x in, times scale, plus bias
  const void *weight;
  const float *bias, *scale;
  int32_t rows, columns, kind, group;
} Matrix;
typedef struct { const float *weight, *bias; } Norm;  // no weight: no such norm
typedef struct {
  Norm attention_norm, query_norm, key_norm, after_attention, feed_norm, after_feed;
  Matrix qkv[3], out, up[2], down;  // outputs of qkv follow one another, as do gate and up
  const float *cosine, *sine;       // (positions, rotary / 2); none: no rotation
  int32_t window;                   // 0: attends to everything before
} Layer;
typedef struct {
  const void *embedding, *positions;  // of kind `dtype`
  Norm final_norm;
  Matrix head;
  const Layer *layers;
  int32_t layer_count, hidden, heads, kv_heads, head_dim, feed, vocabulary, rotary;
  int32_t dtype, activation, gated, centred, first_position;
  float epsilon, embedding_scale, attention_scale, attention_cap, residual_scale, logit_scale,
      logit_cap;
} Model;
typedef struct {
  const int32_t *ids, *slots, *positions;  // one a row
  const int32_t *wanted;                   // rows whose logits are asked for
  float *logits;                           // (wanted_count, vocabulary)
  void *keys, *values;                     // (layers, slots, kv_heads, length, head_dim)
  float *scratch;                          // scratch_floats() of them
  int32_t rows, wanted_count, slot_count, length, threads;
} Step;

INLINE int64_t padded(int64_t n) { return (n + 31) / 32 * 32; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t wide_columns(const Model *m) {
  return most((m->heads + 2 * m->kv_heads) * (int64_t)m->head_dim, 2 * (int64_t)m->feed);
}
static int64_t input_columns(const Model *m) {
  return padded(most(most(m->hidden, m->feed), m->heads * (int64_t)m->head_dim));
}
EXPORT int64_t scratch_floats(const Model *m, int32_t rows, int32_t length, int32_t threads) {
  return rows * (2 * padded(m->hidden) + 2 * input_columns(m) + padded(wide_columns(m))) +
         threads * padded(length) + 64;
}

// ---- Threads.

typedef struct {  // each on its own cache line
  _Alignas(64) _Atomic int32_t next;
  _Alignas(64) _Atomic int32_t arrived;
  _Alignas(64) _Atomic int32_t phase;
  int32_t threads;
} Team;

INLINE void relax(int spins) {
  if (spins > 4096) {  // another program has our core: let it run
#ifdef _WIN32
    SwitchToThread();
#else
    sched_yield();
#endif
  }
}
INLINE int take(Team *t) { return atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed); }
static void barrier(Team *t) {
  int phase = atomic_load_explicit(&t->phase, memory_order_relaxed);
  if (atomic_fetch_add(&t->arrived, 1) == t->threads - 1) {
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->arrived, 0, memory_order_relaxed);
    atomic_store_explicit(&t->phase, phase + 1, memory_order_release);
    return;
  }
  for (int spins = 0; atomic_load_explicit(&t->phase, memory_order_acquire) == phase;) relax(spins++);
}
#define FOR_ITEMS(i, count) \
  for (int i, i##_once = 1; i##_once; i##_once = 0, barrier(team)) while ((i = take(team)) < (count))

// ---- Matrix products. A tile is n weight rows times r input rows, n * r = 16 running sums.

#define DEFINE_TILE(NAME, W, X, WIDTH, V, LOAD_W, LOAD_X, ADD)                                   \
  INLINE void NAME(const W *w, const X *x, int64_t stride, int64_t k, int n, int r, v16 *acc) {  \
    for (int i = 0; i < 16; i++) acc[i] = all(0);                                                \
    int64_t at = 0;                                                                              \
    for (; at + WIDTH <= k; at += WIDTH) {                                                       \
      V in[4];                                                                                   \
      for (int j = 0; j < r; j++) in[j] = LOAD_X(x + j * stride + at);                           \
      for (int i = 0; i < n; i++) {                                                              \
        V weight = LOAD_W(w + i * k + at);                                                       \
        for (int j = 0; j < r; j++) acc[j * n + i] = ADD(acc[j * n + i], weight, in[j]);         \
      }                                                                                          \
    }                                                                                            \
    if (at == k) return;                                                                         \
    for (int i = 0; i < n; i++) {                                                                \
      W rest[WIDTH] = {0};                                                                       \
      memcpy(rest, w + i * k + at, (k - at) * sizeof(W));                                        \
      V weight = LOAD_W(rest);                                                                   \
      for (int j = 0; j < r; j++)                                                                \
        acc[j * n + i] = ADD(acc[j * n + i], weight, LOAD_X(x + j * stride + at));               \
    }                                                                                            \
  }
#define MULTIPLY_ADD(acc, a, b) ((acc) + (a) * (b))
DEFINE_TILE(tile_f32, float, float, 16, v16, load_f32, load_f32, MULTIPLY_ADD)
DEFINE_TILE(tile_int8, int8_t, float, 16, v16, load_int8, load_f32, MULTIPLY_ADD)
#ifdef __AVX512BF16__
#define LOAD_PAIRS(p) ((__m512bh)_mm512_loadu_si512(p))
#define ADD_PAIRS(acc, a, b) ((v16)_mm512_dpbf16_ps((__m512)(acc), a, b))
DEFINE_TILE(tile_bf16, uint16_t, uint16_t, 32, __m512bh, LOAD_PAIRS, LOAD_PAIRS, ADD_PAIRS)
typedef uint16_t Bf16Input;
#else
DEFINE_TILE(tile_bf16, uint16_t, float, 16, v16, load_bf16, load_f32, MULTIPLY_ADD)
typedef float Bf16Input;
#endif

typedef struct { const float *full; const uint16_t *half; int64_t stride; int rows; } Input;
typedef struct { float *to; int64_t stride; int add; float scale; } Output;

// Sums of `width` weight rows from n on and the input rows from `row` on, `count` of them whole.
INLINE void put(const Matrix *w, Output out, int row, int n, int width, int count, v16 total) {
  float sum[16];
  for (int i = 0; i < 16 && (w->scale || w->bias); i++) {
    const int at = n + (i % width < count ? i % width : 0);
    total[i] = total[i] * (w->scale ? w->scale[at] : 1) + (w->bias ? w->bias[at] : 0);
  }
  total *= out.scale;
  memcpy(sum, &total, 64);
  for (int j = 0; j < 16 / width; j++) {
    float *to = out.to + (row + j) * out.stride + n;
    if (out.add) for (int i = 0; i < count; i++) to[i] += sum[j * width + i];
    else for (int i = 0; i < count; i++) to[i] = sum[j * width + i];
  }
}

// Outputs n..n+count of all input rows, count <= 16.
#define DEFINE_BLOCK(NAME, TILE, W, X)                                                            \
  INLINE void NAME##_tiles(const Matrix *w, const X *x, Input in, Output out, int n, int count,   \
                           int row, int r) {                                                      \
    const int width = 16 / r;                                                                     \
    const W *weight = (const W *)w->weight;                                                       \
    for (int at = 0; at < count; at += width) {                                                   \
      v16 acc[16];                                                                                \
      const int here = count - at < width ? count - at : width;                                   \
      const W *from = weight + (int64_t)(n + at) * w->columns;                                    \
      if (here == width) {                                                                        \
        TILE(from, x + row * in.stride, in.stride, w->columns, width, r, acc);                    \
        put(w, out, row, n + at, width, width, sums(acc));                                        \
        continue;                                                                                 \
      }                                                                                           \
      for (int i = 0; i < 16; i++) acc[i] = all(0);                                               \
      for (int i = 0; i < here; i++) {                                                            \
        v16 single[16];                                                                           \
        TILE(from + (int64_t)i * w->columns, x + row * in.stride, in.stride, w->columns, 1, r,    \
             single);                                                                             \
        for (int j = 0; j < r; j++) acc[j * width + i] = single[j];                               \
      }                                                                                           \
      put(w, out, row, n + at, width, here, sums(acc));                                           \
    }                                                                                             \
  }                                                                                               \
  static void NAME(const Matrix *w, const X *x, Input in, Output out, int n, int count) {         \
    int row = 0;                                                                                  \
    for (; row + 4 <= in.rows; row += 4) NAME##_tiles(w, x, in, out, n, count, row, 4);           \
    for (; row + 2 <= in.rows; row += 2) NAME##_tiles(w, x, in, out, n, count, row, 2);           \
    for (; row < in.rows; row++) NAME##_tiles(w, x, in, out, n, count, row, 1);                   \
  }
DEFINE_BLOCK(block_f32, tile_f32, float, float)
DEFINE_BLOCK(block_int8, tile_int8, int8_t, float)
DEFINE_BLOCK(block_bf16, tile_bf16, uint16_t, Bf16Input)

static void block(const Matrix *w, Input in, Output out, int n, int count) {
  if (w->kind == F32) block_f32(w, in.full, in, out, n, count);
  else if (w->kind == INT8) block_int8(w, in.full, in, out, n, count);
#ifdef __AVX512BF16__
  else block_bf16(w, in.half, in, out, n, count);
#else
  else block_bf16(w, in.full, in, out, n, count);
#endif
}

// The matrices of one input, such as query, key and value; their outputs follow one another.
static void products(Team *team, const Matrix *w, int count, Input in, Output out) {
  int blocks[3], total = 0;
  for (int i = 0; i < count; i++) total += blocks[i] = (w[i].rows + 15) / 16;
  FOR_ITEMS(item, total) {
    int i = 0, at = item, shift = 0;
    while (at >= blocks[i]) { at -= blocks[i]; shift += w[i++].rows; }
    Output here = out;
    here.to += shift;
    block(w + i, in, here, at * 16, (int)least(16, w[i].rows - at * 16));
  }
}

// ---- The other parts of a layer; each works on whole rows or heads.

static void to_half(uint16_t *half, const float *full, int64_t n) {
#ifdef __AVX512BF16__
  for (int64_t i = 0; i < n; i += 16) {
    __m256bh pairs = _mm512_cvtneps_pbh(_mm512_loadu_ps(full + i));
    memcpy(half + i, &pairs, 32);
  }
#else
  (void)half, (void)full, (void)n;
#endif
}

// RMSNorm, or LayerNorm when centred. `to` may be `from`.
static void normalise(float *to, const float *from, Norm norm, int n, int centred, float epsilon) {
  float mean = 0;
  if (centred) {
    double total = 0;
    for (int i = 0; i < n; i++) total += from[i];
    mean = (float)(total / n);
  }
  v16 squares = all(0);
  int i = 0;
  for (; i + 16 <= n; i += 16) { v16 x = load_f32(from + i) - mean; squares += x * x; }
  float total = sum(squares);
  for (; i < n; i++) total += (from[i] - mean) * (from[i] - mean);
  const float scale = 1.0f / sqrtf(total / n + epsilon);
  for (i = 0; i < n; i++)
    to[i] = (from[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
}

INLINE float number(const void *from, int64_t at, int dtype) {
  if (dtype == F32) return ((const float *)from)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// The first `rotary` numbers of a head turned by its position; the rest stay.
static void rotate(float *head, const float *cosine, const float *sine, int half) {
  for (int i = 0; i < half; i++) {
    float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

static v16 activate(v16 x, int kind) {
  if (kind == SILU) return x / (1.0f + exponential(-x));
  if (kind == RELU) return choose(x > 0.0f, x, all(0));
  if (kind == GELU_TANH)
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
  for (int i = 0; i < 16; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
  return x;
}

INLINE v16 load_head(const void *from, int64_t at, int count, int half) {
  if (count >= 16)
    return half ? load_bf16((const uint16_t *)from + at) : load_f32((const float *)from + at);
  v16 v = all(0);
  for (int i = 0; i < count; i++) v[i] = number(from, at + i, half ? BF16 : F32);
  return v;
}

// One query head against keys and values (positions, dim) first..last; `scores` has room for all.
INLINE void attend(float *out, const float *query, const void *keys, const void *values,
                   float *scores, int first, int last, int dim, float scale, float cap, int half) {
  float highest = -INFINITY;
  for (int block = first; block <= last; block += 16) {
    v16 acc[16];
    for (int j = 0; j < 16; j++) {
      acc[j] = all(0);
      const int64_t at = (int64_t)least(block + j, last) * dim;
      for (int d = 0; d < dim; d += 16)
        acc[j] += load_head(keys, at + d, dim - d, half) * load_head(query, d, dim - d, 0);
    }
    v16 found = sums(acc) * scale;
    if (cap > 0) found = cap * hyperbolic_tangent(found / cap);
    memcpy(scores + (block - first), &found, 64);
    for (int j = 0; j < 16 && block + j <= last; j++)
      highest = found[j] > highest ? found[j] : highest;
  }
  const int count = last - first + 1;
  v16 totals = all(0);
  for (int j = 0; j < count; j += 16) {
    v16 weight = exponential(load_f32(scores + j) - highest);
    for (int i = count - j; i < 16; i++) weight[i] = 0;
    memcpy(scores + j, &weight, 64);
    totals += weight;
  }
  const float share = 1.0f / sum(totals);
  for (int d = 0; d < dim; d += 16) {
    v16 acc = all(0);
    for (int j = 0; j < count; j++)
      acc += scores[j] * load_head(values, (int64_t)(first + j) * dim + d, dim - d, half);
    acc *= share;
    memcpy(out + d, &acc, 4 * least(16, dim - d));
  }
}

// ---- One step.

static void forward(const Model *m, const Step *s, Team *team, int thread) {
  const int rows = s->rows, dim = m->head_dim, group = m->heads / m->kv_heads, half = m->dtype != F32;
  const int64_t hidden = padded(m->hidden), stride = input_columns(m), wide = padded(wide_columns(m));
  float *x = s->scratch, *full = x + rows * hidden, *large = full + rows * stride;
  float *extra = large + rows * wide;
  uint16_t *pairs = (uint16_t *)(extra + rows * hidden);
  float *scores = (float *)(pairs + 2 * rows * stride) + thread * padded(s->length);
  const Input in = {full, pairs, stride, rows};
  const Output to_large = {large, wide, 0, 1}, to_extra = {extra, hidden, 0, 1};
  const Output to_x = {x, hidden, 1, m->residual_scale};
  const int64_t layer_size = (int64_t)s->slot_count * m->kv_heads * s->length * dim;
  const int64_t queries = (int64_t)m->heads * dim, width = half ? 2 : 4;

  FOR_ITEMS(r, rows) {
    const int64_t id = s->ids[r], place = s->positions[r] + m->first_position;
    for (int i = 0; i < m->hidden; i++) {
      x[r * hidden + i] = number(m->embedding, id * m->hidden + i, m->dtype) * m->embedding_scale;
      if (m->positions) x[r * hidden + i] += number(m->positions, place * m->hidden + i, m->dtype);
    }
    memset(full + r * stride, 0, stride * 4);  // columns beyond an input's width stay zero
    memset(pairs + r * stride, 0, stride * 2);
  }
  for (int n = 0; n < m->layer_count; n++) {
    const Layer *l = m->layers + n;
    char *keys = (char *)s->keys + n * layer_size * width;
    char *values = (char *)s->values + n * layer_size * width;
    FOR_ITEMS(r, rows) {
      normalise(full + r * stride, x + r * hidden, l->attention_norm, m->hidden, m->centred, m->epsilon);
      to_half(pairs + r * stride, full + r * stride, m->hidden);
    }
    products(team, l->qkv, 1 + (l->qkv[1].rows > 0) + (l->qkv[2].rows > 0), in, to_large);

    FOR_ITEMS(i, rows * (m->heads + 2 * m->kv_heads)) {  // heads of query, key, value
      const int r = i / (m->heads + 2 * m->kv_heads), h = i % (m->heads + 2 * m->kv_heads);
      float *head = large + r * wide + (int64_t)h * dim;
      const Norm norm = h < m->heads ? l->query_norm : l->key_norm;
      if (h < m->heads + m->kv_heads) {
        if (norm.weight) normalise(head, head, norm, dim, 0, m->epsilon);
        const int64_t at = (int64_t)s->positions[r] * (m->rotary / 2);
        if (l->cosine) rotate(head, l->cosine + at, l->sine + at, m->rotary / 2);
      }
      if (h < m->heads) continue;
      const int kv = (h - m->heads) % m->kv_heads;
      char *cache = h < m->heads + m->kv_heads ? keys : values;
      const int64_t row = ((int64_t)s->slots[r] * m->kv_heads + kv) * s->length + s->positions[r];
      if (!half) memcpy(cache + row * dim * 4, head, dim * 4);
      else
        for (int d = 0; d < dim; d += 16) {
          uint16_t narrow[16];
          store_bf16(narrow, load_head(head, d, dim - d, 0));
          memcpy(cache + (row * dim + d) * 2, narrow, 2 * least(16, dim - d));
        }
    }
    FOR_ITEMS(i, rows * m->kv_heads) {
      const int r = i / m->kv_heads, kv = i % m->kv_heads, last = s->positions[r];
      const int first = l->window && last >= l->window ? last - l->window + 1 : 0;
      const int64_t at = ((int64_t)s->slots[r] * m->kv_heads + kv) * s->length * dim * width;
      for (int h = kv * group; h < (kv + 1) * group; h++) {
        float *out = full + r * stride + (int64_t)h * dim, *query = large + r * wide + (int64_t)h * dim;
        if (half) attend(out, query, keys + at, values + at, scores, first, last, dim,
                         m->attention_scale, m->attention_cap, 1);
        else attend(out, query, keys + at, values + at, scores, first, last, dim,
                    m->attention_scale, m->attention_cap, 0);
      }
    }
#ifdef __AVX512BF16__
    FOR_ITEMS(r, rows) to_half(pairs + r * stride, full + r * stride, queries);
#endif
    products(team, &l->out, 1, in, l->after_attention.weight ? to_extra : to_x);
    FOR_ITEMS(r, rows) {
      float *row = x + r * hidden, *add = extra + r * hidden;
      if (l->after_attention.weight) {
        normalise(add, add, l->after_attention, m->hidden, m->centred, m->epsilon);
        for (int i = 0; i < m->hidden; i++) row[i] += add[i] * m->residual_scale;
      }
      normalise(full + r * stride, row, l->feed_norm, m->hidden, m->centred, m->epsilon);
      to_half(pairs + r * stride, full + r * stride, m->hidden);
    }
    products(team, l->up, 1 + (l->up[1].rows > 0), in, to_large);
    const int pieces = (m->feed + 255) / 256;
    FOR_ITEMS(i, rows * pieces) {
      const int r = i / pieces, from = i % pieces * 256, to = (int)least(m->feed, from + 256);
      float *gate = large + r * wide, *out = full + r * stride;
      for (int c = from; c < to; c += 16) {
        const int count = (int)least(16, to - c);
        v16 value = activate(load_head(gate, c, count, 0), m->activation);
        if (m->gated) value *= load_head(gate, m->feed + c, count, 0);
        memcpy(out + c, &value, 4 * count);
      }
      to_half(pairs + r * stride + from, out + from, to - from);
    }
    products(team, &l->down, 1, in, l->after_feed.weight ? to_extra : to_x);
    if (l->after_feed.weight)
      FOR_ITEMS(r, rows) {
        normalise(extra + r * hidden, extra + r * hidden, l->after_feed, m->hidden, m->centred, m->epsilon);
        for (int i = 0; i < m->hidden; i++)
          x[r * hidden + i] += extra[r * hidden + i] * m->residual_scale;
      }
  }
  FOR_ITEMS(w, s->wanted_count) {
    normalise(full + w * stride, x + s->wanted[w] * hidden, m->final_norm, m->hidden, m->centred,
              m->epsilon);
    to_half(pairs + w * stride, full + w * stride, m->hidden);
  }
  const Input last = {full, pairs, stride, s->wanted_count};
  const Output logits = {s->logits, m->vocabulary, 0, 1};
  products(team, &m->head, 1, last, logits);
  if (m->logit_scale != 1 || m->logit_cap > 0)
    FOR_ITEMS(w, s->wanted_count)
      for (int i = 0; i < m->vocabulary; i++) {
        float *logit = s->logits + (int64_t)w * m->vocabulary + i;
        *logit *= m->logit_scale;
        if (m->logit_cap > 0) *logit = m->logit_cap * tanhf(*logit / m->logit_cap);
      }
}

// ---- The pool: workers spin for a moment after a step, since the next one often follows at once.

static struct { const Model *model; const Step *step; Team team; _Atomic int32_t run, sleeping; int size; } pool;
#ifdef _WIN32
static SRWLOCK lock = SRWLOCK_INIT;
static CONDITION_VARIABLE awake = CONDITION_VARIABLE_INIT;
#define LOCK() AcquireSRWLockExclusive(&lock)
#define UNLOCK() ReleaseSRWLockExclusive(&lock)
#define SLEEP() SleepConditionVariableSRW(&awake, &lock, INFINITE, 0)
#define WAKE() WakeAllConditionVariable(&awake)
#else
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t awake = PTHREAD_COND_INITIALIZER;
#define LOCK() pthread_mutex_lock(&lock)
#define UNLOCK() pthread_mutex_unlock(&lock)
#define SLEEP() pthread_cond_wait(&awake, &lock)
#define WAKE() pthread_cond_broadcast(&awake)
#endif
#define IDLE_SPINS 3000

#ifdef _WIN32
static DWORD WINAPI work(void *place) {
#else
static void *work(void *place) {
#endif
  const int thread = (int)(intptr_t)place;
  for (int32_t seen = 0;;) {
    int spins = 0;
    while (atomic_load_explicit(&pool.run, memory_order_acquire) == seen)
      if (++spins < IDLE_SPINS) relax(0);
      else {
        LOCK();
        pool.sleeping++;
        while (atomic_load(&pool.run) == seen) SLEEP();
        pool.sleeping--;
        UNLOCK();
      }
    seen = atomic_load_explicit(&pool.run, memory_order_acquire);
    forward(pool.model, pool.step, &pool.team, thread);
    barrier(&pool.team);
  }
  return 0;
}

static int start_workers(int size) {
  for (; pool.size < size - 1; pool.size++) {
#ifdef _WIN32
    HANDLE made = CreateThread(0, 0, work, (void *)(intptr_t)(pool.size + 1), 0, 0);
    if (!made) return 0;
    CloseHandle(made);
#else
    pthread_t made;
    if (pthread_create(&made, 0, work, (void *)(intptr_t)(pool.size + 1))) return 0;
    pthread_detach(made);
#endif
  }
  return 1;
}

// Run one step. With one thread it runs in the caller's; with more, one caller at a time may use
// the pool (cpu_step.py holds a lock). Returns 0, or 1 when threads could not be started.
EXPORT int run_step(const Model *m, const Step *s) {
  if (s->threads <= 1) {
    Team alone = {.threads = 1};
    forward(m, s, &alone, 0);
    return 0;
  }
  if (pool.size == 0) pool.team.threads = s->threads;
  if (!start_workers(pool.team.threads)) return 1;
  pool.model = m, pool.step = s;
  atomic_fetch_add(&pool.run, 1);
  LOCK();
  if (pool.sleeping) WAKE();
  UNLOCK();
  forward(m, s, &pool.team, 0);
  barrier(&pool.team);
  return 0;
}
