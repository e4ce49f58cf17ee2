// Attention of one token: its query heads against the keys and values of its slot.

INLINE float number(const void *from, int64_t at, int dtype) {
  if (dtype == OF_F32) return ((const float *)from)[at];
  uint32_t bits = (uint32_t)((const uint16_t *)from)[at] << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE vector load_head(const void *from, int64_t at, int count, int half) {
  if (count >= LANES)
    return half ? load_bf16((const uint16_t *)from + at) : load_f32((const float *)from + at);
  vector v = all(0);
  for (int i = 0; i < count; i++) v[i] = number(from, at + i, half ? OF_BF16 : OF_F32);
  return v;
}

// The first `count` numbers of v. A copy of a length that is not known is many times as slow.
INLINE void store_head(float *to, vector v, int64_t count) {
  if (count >= LANES) memcpy(to, &v, sizeof v);
  else for (int i = 0; i < count; i++) to[i] = v[i];
}

// Query heads (heads, dim) that share the keys and values (positions, dim) from `first` to `last`.
// `scores` holds `room` numbers a head.
typedef struct {
  const float *query;
  const void *keys, *values;
  float *scores;
  int64_t room;
  int first, last, dim;
  float scale, cap;
} Attention;

#define SHARING (AT_ONCE / 4)  // heads at a time: as many as there are registers for their sums
INLINE int heads_together(int dim, int left) {
  return dim % (4 * LANES) ? 1 : (int)least(SHARING, left);
}
// A key or value is read once for all `heads`. `whole`: dim is a multiple of four registers.
INLINE void attend(float *out, const Attention *a, int heads, int half, int whole) {
#define PART(at) (whole ? LANES : dim - (at))
  const float *query = a->query;
  const void *keys = a->keys, *values = a->values;
  float *scores = a->scores;
  const int64_t room = a->room;
  const int first = a->first, last = a->last, dim = a->dim, count = last - first + 1;
  const float scale = a->scale, cap = a->cap;
  for (int block = 0; block < count; block += 16) {
    vector acc[SHARING][16];
    for (int j = 0; j < 16; j++) {
      const int64_t at = least(first + block + j, last) * dim;
      vector total[SHARING];
      UNROLL for (int h = 0; h < heads; h++) total[h] = all(0);
      for (int d = 0; d < dim; d += LANES) {
        const vector key = load_head(keys, at + d, PART(d), half);
        UNROLL for (int h = 0; h < heads; h++)
          total[h] += key * load_head(query, h * dim + d, PART(d), 0);
      }
      UNROLL for (int h = 0; h < heads; h++) acc[h][j] = total[h];
    }
    UNROLL for (int h = 0; h < heads; h++) add_up(scores + h * room + block, acc[h], 16);
  }
  float share[SHARING];
  for (int h = 0; h < heads; h++) {
    float *score = scores + h * room, highest = -INFINITY;
    for (int j = 0; j < count; j += LANES) {
      vector found = load_f32(score + j) * scale;
      if (cap > 0) found = cap * hyperbolic_tangent(found / cap);
      memcpy(score + j, &found, sizeof found);
    }
    for (int j = 0; j < count; j++) highest = score[j] > highest ? score[j] : highest;
    vector totals = all(0);
    for (int j = 0; j < count; j += LANES) {
      vector weight = exponential(load_f32(score + j) - highest);
      for (int i = count - j; i < LANES; i++) weight[i] = 0;
      memcpy(score + j, &weight, sizeof weight);
      totals += weight;
    }
    share[h] = 1.0f / sum(totals);
  }
  for (int d = 0; d < dim; d += 4 * LANES) {
    vector acc[SHARING][4];
    const int parts = whole ? 4 : (int)least(4, (dim - d + LANES - 1) / LANES);
    UNROLL for (int i = 0; i < 4 * heads; i++) acc[i / 4][i % 4] = all(0);
    for (int j = 0; j < count; j++)
      UNROLL for (int i = 0; i < parts; i++) {
        const int64_t at = (int64_t)(first + j) * dim + d + LANES * i;
        const vector value = load_head(values, at, PART(d + LANES * i), half);
        UNROLL for (int h = 0; h < heads; h++) acc[h][i] += scores[h * room + j] * value;
      }
    for (int h = 0; h < heads; h++)
      for (int i = 0; i < parts; i++)
        store_head(out + h * dim + d + LANES * i, acc[h][i] * share[h], PART(d + LANES * i));
  }
}

// `heads` known while compiling, so that their sums stay in registers.
INLINE void attend_whole(float *out, const Attention *a, int heads, int half) {
  if (heads == 1) attend(out, a, 1, half, 1);
  else if (heads == 2) attend(out, a, 2, half, 1);
  else if (heads == 3) attend(out, a, SHARING < 3 ? SHARING : 3, half, 1);
  else attend(out, a, SHARING, half, 1);
}
static void attend_together(float *out, const Attention *a, int heads, int half) {
  if (a->dim % (4 * LANES)) half ? attend(out, a, 1, 1, 0) : attend(out, a, 1, 0, 0);
  else if (half) attend_whole(out, a, heads, 1);
  else attend_whole(out, a, heads, 0);
}
