// One forward step of a decoder on a CPU, from token ids to logits, in one parallel region.
//
// A row is one token: of a request that decodes, or one of several of a prompt. Each row names the
// slot (which request's keys and values) and the position that it writes, so requests begin and end
// independently of their neighbours. All sums run in the same order whatever the number of rows, so
// a request's logits do not depend on who shares its step. No header of torch is needed; weights
// are read where torch holds them.
#include "vector.h"
#include "team.h"
#include "model.h"
#include "product.h"
#include "attention.h"
#include "sample.h"

// ---- The other parts of a layer; each works on whole rows or heads.

// Numbers `from` to `to` of an input row in the 16 bits that weights of this kind take.
static void narrow(Input in, int row, int64_t from, int64_t to, int kind) {
  const float *full = in.full + row * in.stride;
  uint16_t *half = in.narrow + row * in.stride;
  if (kind == OF_INT8 || kind == OF_INT4)
    for (int64_t start = from; start < to; start += SCALED) {
      const int64_t end = least(start + SCALED, to);
      float highest = 1e-30f;
      for (int64_t i = start; i < end; i++) {
        const float size = fabsf(full[i]);
        highest = size > highest ? size : highest;
      }
      const float scale = highest / 32767, inverse = 32767 / highest;
      for (int64_t at = start; at < end; at += BLOCK) {
        float *block = in.blocks + (row * in.stride + at) / BLOCK * 2;
        int32_t total = 0;
        for (int64_t i = at; i < least(at + BLOCK, end); i++) {
          const int32_t whole = (int32_t)rintf(full[i] * inverse);
          half[i] = (uint16_t)whole;
          total += whole;
        }
        block[0] = scale, block[1] = total * scale;
      }
    }
#ifdef __AVX512BF16__
  else if (kind == OF_BF16)
    for (int64_t i = from; i < to; i += 16) {
      __m256bh pairs = _mm512_cvtneps_pbh(_mm512_loadu_ps(full + i));
      memcpy(half + i, &pairs, 32);
    }
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
  vector squares = all(0);
  int i = 0;
  for (; i + LANES <= n; i += LANES) {
    const vector x = load_f32(from + i) - mean;
    squares += x * x;
  }
  float total = sum(squares);
  for (; i < n; i++) total += (from[i] - mean) * (from[i] - mean);
  const float scale = 1.0f / sqrtf(total / n + epsilon);
  for (i = 0; i < n; i++)
    to[i] = (from[i] - mean) * scale * norm.weight[i] + (norm.bias ? norm.bias[i] : 0);
}

// Add what a block has computed, normalised, to the residual (Gemma).
static void add_normed(float *row, float *add, Norm norm, const Model *m) {
  normalise(add, add, norm, m->hidden, m->centred, m->epsilon);
  for (int i = 0; i < m->hidden; i++) row[i] += add[i] * m->residual_scale;
}

// The first `rotary` numbers of a head turned by its position; the rest stay.
static void rotate(float *head, const float *cosine, const float *sine, int half) {
  for (int i = 0; i < half; i++) {
    float a = head[i], b = head[i + half];
    head[i] = a * cosine[i] - b * sine[i];
    head[i + half] = b * cosine[i] + a * sine[i];
  }
}

static vector activate(vector x, int kind) {
  if (kind == SILU) return x / (1.0f + exponential(-x));
  if (kind == RELU) return choose(x > 0.0f, x, all(0));
  if (kind == GELU_TANH)
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456f * (x + 0.044715f * x * x * x)));
  for (int i = 0; i < LANES; i++) x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f));
  return x;
}

// ---- One step.

INLINE int64_t padded(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }
static int64_t wide_columns(const Model *m) {
  return padded(most((m->heads + 2 * m->kv_heads) * (int64_t)m->head_dim, 2 * (int64_t)m->feed));
}
static int64_t input_columns(const Model *m) {
  return padded(most(most(m->hidden, m->feed), m->heads * (int64_t)m->head_dim));
}
EXPORT int64_t scratch_floats(const Model *m, int32_t rows, int32_t length, int32_t threads) {
  return rows * (2 * padded(m->hidden) + 2 * input_columns(m) + wide_columns(m)) +
         rows * input_columns(m) / BLOCK * 2 +
         threads * SHARING * padded(length) + 64;
}

static void forward(const void *model, const void *step, Team *team, int thread) {
  const Model *m = model;
  const Step *s = step;
  const int rows = s->rows, dim = m->head_dim, group = m->heads / m->kv_heads;
  const int half = m->dtype != OF_F32;
  const int64_t hidden = padded(m->hidden), stride = input_columns(m), wide = wide_columns(m);
  float *x = s->scratch, *full = x + rows * hidden, *large = full + rows * stride;
  float *extra = large + rows * wide;
  uint16_t *pairs = (uint16_t *)(extra + rows * hidden);
  float *blocks = (float *)(pairs + 2 * rows * stride);
  float *scores = blocks + rows * stride / BLOCK * 2 + thread * SHARING * padded(s->length);
  const Input in = {full, pairs, blocks, stride, rows};
  const Output to_large = {large, wide, 0, 1}, to_extra = {extra, hidden, 0, 1};
  const Output to_x = {x, hidden, 1, m->residual_scale};
  const int64_t layer_size = (int64_t)s->slot_count * m->kv_heads * s->length * dim;
  const int64_t queries = (int64_t)m->heads * dim, width = half ? 2 : 4;

  FOR_ITEMS(r, rows) {
    const int64_t id = s->ids[r], place = s->positions[r];
    for (int i = 0; i < m->hidden; i++) {
      x[r * hidden + i] = number(m->embedding, id * m->hidden + i, m->dtype) * m->embedding_scale;
      if (m->positions) x[r * hidden + i] += number(m->positions, place * m->hidden + i, m->dtype);
    }
    memset(full + r * stride, 0, stride * 4);  // numbers, so that times 0 they give 0
    memset(pairs + r * stride, 0, stride * 2);
  }
  for (int n = 0; n < m->layer_count; n++) {
    const Layer *l = m->layers + n;
    char *keys = (char *)s->keys + n * layer_size * width;
    char *values = (char *)s->values + n * layer_size * width;
    FOR_ITEMS(r, rows) {
      normalise(full + r * stride, x + r * hidden, l->attention_norm, m->hidden, m->centred,
                m->epsilon);
      narrow(in, r, 0, m->hidden, l->qkv[0].kind);
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
        for (int d = 0; d < dim; d += LANES) {
          uint16_t pairs[LANES], *to = (uint16_t *)cache + row * dim + d;
          store_bf16(dim - d >= LANES ? to : pairs, load_head(head, d, dim - d, 0));
          for (int i = 0; i < dim - d && dim - d < LANES; i++) to[i] = pairs[i];
        }
    }
    FOR_ITEMS(i, rows * m->kv_heads) {
      const int r = i / m->kv_heads, kv = i % m->kv_heads, last = s->positions[r];
      const int first = l->window && last >= l->window ? last - l->window + 1 : 0;
      const int64_t at = ((int64_t)s->slots[r] * m->kv_heads + kv) * s->length * dim * width;
      for (int h = kv * group, n; h < (kv + 1) * group; h += n) {
        n = heads_together(dim, (kv + 1) * group - h);
        float *out = full + r * stride + (int64_t)h * dim;
        const float *query = large + r * wide + (int64_t)h * dim;
        const Attention here = {query, keys + at, values + at, scores, padded(s->length), first,
                                last, dim, m->attention_scale, m->attention_cap};
        attend_together(out, &here, n, half);
      }
    }
    if (l->out.kind != OF_F32) FOR_ITEMS(r, rows) narrow(in, r, 0, queries, l->out.kind);
    products(team, &l->out, 1, in, l->after_attention.weight ? to_extra : to_x);
    FOR_ITEMS(r, rows) {
      float *row = x + r * hidden;
      if (l->after_attention.weight) add_normed(row, extra + r * hidden, l->after_attention, m);
      normalise(full + r * stride, row, l->feed_norm, m->hidden, m->centred, m->epsilon);
      narrow(in, r, 0, m->hidden, l->up[0].kind);
    }
    products(team, l->up, 1 + (l->up[1].rows > 0), in, to_large);
    const int pieces = (m->feed + 255) / 256;
    FOR_ITEMS(i, rows * pieces) {
      const int r = i / pieces, from = i % pieces * 256, to = (int)least(m->feed, from + 256);
      float *gate = large + r * wide, *out = full + r * stride;
      for (int c = from; c < to; c += LANES) {
        vector value = activate(load_head(gate, c, to - c, 0), m->activation);
        if (m->gated) value *= load_head(gate, m->feed + c, to - c, 0);
        store_head(out + c, value, to - c);
      }
      narrow(in, r, from, to, l->down.kind);
    }
    products(team, &l->down, 1, in, l->after_feed.weight ? to_extra : to_x);
    if (l->after_feed.weight)
      FOR_ITEMS(r, rows) add_normed(x + r * hidden, extra + r * hidden, l->after_feed, m);
  }
  FOR_ITEMS(w, s->wanted_count) {
    normalise(full + w * stride, x + s->wanted[w] * hidden, m->final_norm, m->hidden, m->centred,
              m->epsilon);
    narrow(in, w, 0, m->hidden, m->head.kind);
  }
  const Input last = {full, pairs, blocks, stride, s->wanted_count};
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

// Returns 1 when threads could not be started.
EXPORT int run_step(const Model *m, const Step *s) {
  return run_together(forward, m, s, s->threads);
}
