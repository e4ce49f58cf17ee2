// The matrix products of a step, for each kind of weights and for 1, 2 or 4 input rows at once.

// Rows of an input in fp32, and in the 16 bits that the weights are multiplied with: bf16, or whole
// numbers; then `blocks` holds for each BLOCK of them their scale, and their sum times the scale.
#define BLOCK 64
#define SCALED 256  // columns that share a scale
typedef struct { float *full; uint16_t *narrow; float *blocks; int64_t stride; int rows; } Input;
typedef struct { float *to; int64_t stride; int add; float scale; } Output;

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

// ---- Weights in fp32 and bf16. Pairs of bf16 are multiplied where the processor can do that.
#ifdef __AVX512BF16__
#define WIDTH(kind) ((kind) == OF_BF16 ? 32 : 16)
INLINE v16 load_input(Input in, int64_t at, int kind) {
  if (kind == OF_F32) return load_f32(in.full + at);
  return (v16)_mm512_loadu_si512(in.narrow + at);
}
INLINE v16 load_weight(const void *w, int64_t at, int kind) {
  if (kind == OF_F32) return load_f32((const float *)w + at);
  return (v16)_mm512_loadu_si512((const uint16_t *)w + at);
}
INLINE v16 multiply_add(v16 sum, v16 a, v16 b, int kind) {
  if (kind == OF_F32) return sum + a * b;
  return (v16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
#else
#define WIDTH(kind) 16
INLINE v16 load_input(Input in, int64_t at, int kind) {
  (void)kind;
  return load_f32(in.full + at);
}
INLINE v16 load_weight(const void *w, int64_t at, int kind) {
  if (kind == OF_F32) return load_f32((const float *)w + at);
  return load_bf16((const uint16_t *)w + at);
}
INLINE v16 multiply_add(v16 sum, v16 a, v16 b, int kind) {
  (void)kind;
  return sum + a * b;
}
#endif

// n weight rows from `first` on times r input rows, n * r = 16: that of weight i and input j is
// number j * n + i. With `ahead` the rows that the next 16 outputs need are fetched meanwhile.
INLINE v16 float_tile(const Matrix *w, Input in, int64_t first, int row, int n, int r, int ahead,
                      int kind) {
  const int64_t k = w->columns, size = kind == OF_F32 ? 4 : 2;
  const char *from = (const char *)w->weight + first * k * size;
  v16 acc[16], x[4];
  int64_t at = 0;
  UNROLL for (int i = 0; i < 16; i++) acc[i] = all(0);
  for (; at + WIDTH(kind) <= k; at += WIDTH(kind)) {
    UNROLL for (int j = 0; j < r; j++) x[j] = load_input(in, (row + j) * in.stride + at, kind);
    UNROLL for (int i = 0; i < n; i++) {
      const v16 weight = load_weight(from, i * k + at, kind);
      if (ahead) __builtin_prefetch(from + ((16 + i) * k + at) * size, 0, 2);
      UNROLL for (int j = 0; j < r; j++)
        acc[j * n + i] = multiply_add(acc[j * n + i], weight, x[j], kind);
    }
  }
  if (at < k) {
    UNROLL for (int j = 0; j < r; j++) x[j] = load_input(in, (row + j) * in.stride + at, kind);
    UNROLL for (int i = 0; i < n; i++) {
      char rest[64] = {0};  // zero beyond k, whatever the input holds there
      memcpy(rest, from + (i * k + at) * size, (k - at) * size);
      const v16 weight = load_weight(rest, 0, kind);
      UNROLL for (int j = 0; j < r; j++)
        acc[j * n + i] = multiply_add(acc[j * n + i], weight, x[j], kind);
    }
  }
  return sums(acc);
}

// ---- Weights in int8 and int4. The input is rounded to whole numbers of 16 bits, so that pairs of
// columns are multiplied and added in whole numbers.

// int8: 32 columns of n weight rows times r input rows. With `rest` there are only that many, and
// weights beyond are 0, whatever the input holds there.
INLINE void int8_columns(i16 *part, const int8_t *w, const uint16_t *x, int64_t stride, int64_t k,
                         int n, int r, int ahead, int rest) {
  i16 pairs[4];
  UNROLL for (int j = 0; j < r; j++) memcpy(pairs + j, x + j * stride, 64);
  UNROLL for (int i = 0; i < n; i++) {
    int8_t last[32] = {0};
    if (rest) memcpy(last, w + i * k, rest);
    const i16 weight = load_bytes(rest ? last : w + i * k);
    if (ahead) __builtin_prefetch(w + (16 + i) * k, 0, 2);
    UNROLL for (int j = 0; j < r; j++)
      part[j * n + i] = add_pairs(part[j * n + i], weight, pairs[j]);
  }
}

// As float_tile.
INLINE v16 int8_tile(const Matrix *matrix, Input in, int64_t first, int row, int n, int r,
                     int ahead) {
  const int64_t k = matrix->columns;
  const int8_t *w = (const int8_t *)matrix->weight + first * k;
  v16 acc[16];
  UNROLL for (int i = 0; i < 16; i++) acc[i] = all(0);
  for (int64_t start = 0; start < k; start += SCALED) {
    const int64_t end = least(start + SCALED, k);
    const uint16_t *x = in.narrow + row * in.stride;
    int64_t at = start;
    i16 part[16];
    UNROLL for (int i = 0; i < 16; i++) part[i] = (i16){0};
    for (; at + 32 <= end; at += 32)
      int8_columns(part, w + at, x + at, in.stride, k, n, r, ahead, 0);
    if (at < end) int8_columns(part, w + at, x + at, in.stride, k, n, r, 0, (int)(end - at));
    UNROLL for (int j = 0; j < r; j++) {
      const v16 scale = all(in.blocks[((row + j) * in.stride + start) / BLOCK * 2]);
      UNROLL for (int i = 0; i < n; i++)
        acc[j * n + i] += __builtin_convertvector(part[j * n + i], v16) * scale;
    }
  }
  return sums(acc);
}
// int4: 64 outputs for r input rows. With AVX-512 torch keeps 4-bit weights in blocks of 64
// outputs: 32 bytes a column, output i in the low half of byte i, output i + 32 in the high half.
INLINE void int4_block(const Matrix *w, Input in, Output out, int n, int row, int r) {
  const uint8_t *weights = (const uint8_t *)w->weight + (int64_t)n / 2 * w->columns;
  const Matrix plain = {.bias = w->bias};
  v16 acc[16];  // that of input j and outputs from 16 q on is number j * 4 + q
  UNROLL for (int i = 0; i < 4 * r; i++) acc[i] = all(0);
  for (int64_t at = 0; at < w->columns; at += BLOCK) {
    i16 part[16];
    UNROLL for (int i = 0; i < 4 * r; i++) part[i] = (i16){0};
    for (int k = 0; k < BLOCK; k += 2) {
      const u16 four = interleave(weights + (at + k) * 32);
      __builtin_prefetch(weights + (at + k) * 32 + 4096, 0, 2);
      const u16 weight[] = {four, four >> 8, four >> 4, four >> 12};
      UNROLL for (int j = 0; j < r; j++) {
        int32_t pair;
        memcpy(&pair, in.narrow + (row + j) * in.stride + at + k, 4);
        UNROLL for (int q = 0; q < 4; q++)
          part[j * 4 + q] = add_pairs(part[j * 4 + q], (i16)(weight[q] & 0x000f000fu),
                                      (i16){} + pair);
      }
    }
    const float *scale = w->scale + at / w->group * 2 * w->rows + n, *middle = scale + w->rows;
    UNROLL for (int j = 0; j < r; j++) {
      const float *block = in.blocks + ((row + j) * in.stride + at) / BLOCK * 2;
      UNROLL for (int q = 0; q < 4; q++) {
        const v16 found = __builtin_convertvector(part[j * 4 + q], v16) * block[0];
        acc[j * 4 + q] += (found - 8 * block[1]) * load_f32(scale + q * 16) +
                          block[1] * load_f32(middle + q * 16);
      }
    }
  }
  UNROLL for (int i = 0; i < 4 * r; i++)
    put(&plain, out, row + i / 4, n + i % 4 * 16, 16, 1, acc[i]);
}

// ---- All kinds.

INLINE v16 tile(const Matrix *w, Input in, int64_t first, int row, int n, int r, int ahead,
                int kind) {
  if (kind == OF_INT8) return int8_tile(w, in, first, row, n, r, ahead);
  return float_tile(w, in, first, row, n, r, ahead, kind);
}
// `count` outputs from n on, at most 16, for r input rows from `row` on.
INLINE void block(const Matrix *w, Input in, Output out, int n, int count, int row, int r,
                  int ahead, int kind) {
  const int width = 16 / r, end = n + count;
  for (; n + width <= end; n += width)
    put(w, out, row, n, width, r, tile(w, in, n, row, width, r, ahead, kind));
  for (; n < end; n++)
    for (int j = row; j < row + r; j++)
      put(w, out, j, n, 1, 1, tile(w, in, n, j, 1, 1, 0, kind));
}
#define BLOCK_OF(kind, r)                                                                         \
  static NOINLINE void kind##_##r(const Matrix *w, Input in, Output out, int n, int count,        \
                                  int row) {                                                      \
    if (row) block(w, in, out, n, count, row, r, 0, kind);                                        \
    else block(w, in, out, n, count, row, r, 1, kind);                                            \
  }
#define PRODUCT(kind)                                                                             \
  BLOCK_OF(kind, 1) BLOCK_OF(kind, 2) BLOCK_OF(kind, 4)                                            \
  static void product_##kind(const Matrix *w, Input in, Output out, int n, int count) {           \
    int row = 0;                                                                                  \
    for (; row + 4 <= in.rows; row += 4) kind##_4(w, in, out, n, count, row);                     \
    for (; row + 2 <= in.rows; row += 2) kind##_2(w, in, out, n, count, row);                     \
    for (; row < in.rows; row++) kind##_1(w, in, out, n, count, row);                             \
  }
PRODUCT(OF_F32) PRODUCT(OF_BF16) PRODUCT(OF_INT8)
static void product_OF_INT4(const Matrix *w, Input in, Output out, int n, int count) {
  (void)count;  // always 64
  int row = 0;
  for (; row + 4 <= in.rows; row += 4) int4_block(w, in, out, n, row, 4);
  for (; row < in.rows; row++) int4_block(w, in, out, n, row, 1);
}

// The matrices of one input, such as query, key and value; their outputs follow one another.
static void products(Team *team, const Matrix *w, int count, Input in, Output out) {
  static void (*const product[])(const Matrix *, Input, Output, int, int) = {
      product_OF_F32, product_OF_BF16, product_OF_INT8, product_OF_INT4};
  int items[3], total = 0;
  for (int i = 0; i < count; i++) total += items[i] = (w[i].rows + 63) / 64;
  FOR_ITEMS(item, total) {
    int i = 0, n = item;
    Output here = out;
    while (n >= items[i]) n -= items[i], here.to += w[i++].rows;
    const Matrix *m = w + i;
    const int step = m->kind == OF_INT4 ? 64 : 16;
    for (int at = n * 64; at < m->rows && at < n * 64 + 64; at += step)
      product[m->kind](m, in, here, at, (int)least(step, m->rows - at));
  }
}
