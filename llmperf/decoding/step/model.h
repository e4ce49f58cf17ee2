// What a model is, as llmperf/decoding/cpu_step.py describes it, and its matrix products.
enum { OF_F32, OF_BF16, OF_INT8, OF_INT4 };  // prefixed, since windows.h has an INT8
enum { SILU, GELU_TANH, GELU, RELU };

typedef struct {  // weight (rows, columns) times an input, times scale, plus bias
  const void *weight;
  const float *bias, *scale;  // OF_INT4: (groups, 2, rows), a scale and the value of an 8
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
  int32_t dtype, activation, gated, centred;
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

// Rows of an input in fp32, and rounded to bf16 where the processor multiplies pairs of those.
typedef struct { float *full; uint16_t *half; int64_t stride; int rows; } Input;
typedef struct { float *to; int64_t stride; int add; float scale; } Output;

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Store sums of `width` weight rows from n on, `count` of them whole, for input rows from `row` on.
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

#define NAME product_f32
#define WEIGHT float
#define INPUT float
#define WIDTH 16
#define VECTOR v16
#define LOAD_WEIGHT load_f32
#define LOAD_INPUT load_f32
#define MULTIPLY_ADD(sum, weight, input) ((sum) + (weight) * (input))
#include "product.h"

#define NAME product_int8
#define WEIGHT int8_t
#define INPUT float
#define WIDTH 16
#define VECTOR v16
#define LOAD_WEIGHT load_int8
#define LOAD_INPUT load_f32
#define MULTIPLY_ADD(sum, weight, input) ((sum) + (weight) * (input))
#include "product.h"

#define NAME product_bf16
#define WEIGHT uint16_t
#ifdef __AVX512BF16__
#define INPUT uint16_t
#define WIDTH 32
#define VECTOR __m512bh
#define LOAD_WEIGHT(p) ((__m512bh)_mm512_loadu_si512(p))
#define LOAD_INPUT(p) ((__m512bh)_mm512_loadu_si512(p))
#define MULTIPLY_ADD(sum, weight, input) ((v16)_mm512_dpbf16_ps((__m512)(sum), weight, input))
#else
#define INPUT float
#define WIDTH 16
#define VECTOR v16
#define LOAD_WEIGHT load_bf16
#define LOAD_INPUT load_f32
#define MULTIPLY_ADD(sum, weight, input) ((sum) + (weight) * (input))
#endif
#include "product.h"

// 64 outputs from n on, for r input rows. With AVX-512 torch keeps 4-bit weights in blocks of 64
// outputs: 32 bytes a column, output i in the low half of byte i, output i + 32 in the high half.
INLINE void int4_tile(const Matrix *w, Input in, Output out, int n, int row, int r) {
  const uint8_t *block = (const uint8_t *)w->weight + (int64_t)n / 2 * w->columns;
  const float *x = in.full + row * in.stride;
  const Matrix plain = {.bias = w->bias};
  v16 total[16];
  for (int i = 0; i < 4 * r; i++) total[i] = all(0);
  for (int g = 0; g * w->group < w->columns; g++) {
    v16 part[16];
    float inputs[4] = {0};
    for (int i = 0; i < 4 * r; i++) part[i] = all(0);
    for (int k = g * w->group; k < (g + 1) * w->group; k++)
      for (int q = 0; q < 2; q++) {
        const i16 pair = load_unsigned(block + (int64_t)k * 32 + q * 16);
        const v16 low = __builtin_convertvector(pair & 15, v16);
        const v16 high = __builtin_convertvector(pair >> 4, v16);
        for (int j = 0; j < r; j++) {
          part[j * 4 + q] += low * x[j * in.stride + k];
          part[j * 4 + q + 2] += high * x[j * in.stride + k];
          if (q) inputs[j] += x[j * in.stride + k];
        }
      }
    const float *scale = w->scale + (int64_t)g * 2 * w->rows + n, *middle = scale + w->rows;
    for (int j = 0; j < r; j++)
      for (int q = 0; q < 4; q++)
        total[j * 4 + q] += (part[j * 4 + q] - 8 * inputs[j]) * load_f32(scale + q * 16) +
                            inputs[j] * load_f32(middle + q * 16);
  }
  for (int i = 0; i < 4 * r; i++) put(&plain, out, row + i / 4, n + i % 4 * 16, 16, 16, total[i]);
}
static void product_int4(const Matrix *w, Input in, Output out, int n) {
  int row = 0;
  for (; row + 4 <= in.rows; row += 4) int4_tile(w, in, out, n, row, 4);
  for (; row < in.rows; row++) int4_tile(w, in, out, n, row, 1);
}

// The matrices of one input, such as query, key and value; their outputs follow one another.
static void products(Team *team, const Matrix *w, int count, Input in, Output out) {
  int items[3], total = 0;
  for (int i = 0; i < count; i++) total += items[i] = (w[i].rows + 63) / 64;
  FOR_ITEMS(item, total) {
    int i = 0, n = item;
    Output here = out;
    while (n >= items[i]) n -= items[i], here.to += w[i++].rows;
    const Matrix *m = w + i;
    for (int at = n * 64; at < m->rows && at < n * 64 + 64; at += m->kind == OF_INT4 ? 64 : 16) {
      const int outputs = (int)least(16, m->rows - at);
      if (m->kind == OF_F32) product_f32(m, in.full, in.stride, in.rows, here, at, outputs);
      else if (m->kind == OF_INT8) product_int8(m, in.full, in.stride, in.rows, here, at, outputs);
      else if (m->kind == OF_INT4) product_int4(m, in, here, at);
#ifdef __AVX512BF16__
      else product_bf16(m, in.half, in.stride, in.rows, here, at, outputs);
#else
      else product_bf16(m, in.full, in.stride, in.rows, here, at, outputs);
#endif
    }
  }
}
