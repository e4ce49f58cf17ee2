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

// Rows of an input in fp32, and in the 16 bits that the weights are multiplied with: bf16, or whole
// numbers; then `blocks` holds for each BLOCK of them their scale, and their sum times the scale.
#define BLOCK 64
#define SCALED 256  // share a scale
typedef struct { float *full; uint16_t *narrow; float *blocks; int64_t stride; int rows; } Input;
typedef struct { float *to; int64_t stride; int add; float scale; } Output;

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Store the sums of `width` weight rows from n on for r input rows from `row` on.
INLINE void put(const Matrix *w, Output out, int row, int n, int width, int r, v16 total) {
  float sum[16];
  if (width == 16) {
    if (w->scale) total *= load_f32(w->scale + n);
    if (w->bias) total += load_f32(w->bias + n);
  } else if (w->scale || w->bias) {
    for (int i = 0; i < width * r; i++)
      total[i] = total[i] * (w->scale ? w->scale[n + i % width] : 1) +
                 (w->bias ? w->bias[n + i % width] : 0);
  }
  total *= out.scale;
  memcpy(sum, &total, 64);
  for (int j = 0; j < r; j++) {
    float *to = out.to + (row + j) * out.stride + n;
    if (out.add) for (int i = 0; i < width; i++) to[i] += sum[j * width + i];
    else for (int i = 0; i < width; i++) to[i] = sum[j * width + i];
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

#include "quantised.h"

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
      else if (m->kind == OF_INT8) product_int8(m, in, here, at, outputs);
      else if (m->kind == OF_INT4) product_int4(m, in, here, at);
#ifdef __AVX512BF16__
      else product_bf16(m, in.narrow, in.stride, in.rows, here, at, outputs);
#else
      else product_bf16(m, in.full, in.stride, in.rows, here, at, outputs);
#endif
    }
  }
}
