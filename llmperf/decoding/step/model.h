// What Python hands over: a model, a step, how tokens are drawn. llmperf/decoding/cpu_library.py
// reads this file, so it holds plain declarations alone.
enum { OF_F32, OF_BF16, OF_INT8, OF_INT4 };  // prefixed, since windows.h has an INT8
enum { SILU, GELU_TANH, GELU, RELU };

typedef struct {  // weight (rows, columns) times an input, times scale, plus bias
  const void *weight;
  const float *bias, *scale;  // one a row
  const uint16_t *groups;  // OF_INT4, bf16: (rows / 64, groups, 2, 64): scale, value of code 8
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

#define MOST_CANDIDATES 1024  // the largest top_k that is drawn here
typedef struct {
  const int32_t *suppressed;  // never drawn
  int32_t suppressed_count, top_k;
  double temperature, top_p;
} Sampling;
