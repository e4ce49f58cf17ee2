// Products with int8 and int4 weights. The input is rounded to whole numbers of 16 bits, each SCALED
// of which share a scale, so that pairs of columns are multiplied and added in whole numbers.

// int8: 32 columns of n weight rows times r input rows. With `rest` there are only that many, and
// weights beyond are 0, whatever the input holds there.
INLINE void int8_columns(i16 *part, const int8_t *w, const uint16_t *x, int64_t stride, int64_t k,
                         int n, int r, int ahead, int rest) {
  i16 pairs[8];
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

// n weight rows times r input rows, n * r = 16, ordered as in product.h; k columns.
INLINE v16 int8_tile(const int8_t *w, Input in, int row, int64_t k, int n, int r, int ahead) {
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
INLINE void int8_block(const Matrix *w, Input in, Output out, int n, int count, int row, int r,
                       int ahead) {
  const int64_t k = w->columns;
  const int8_t *from = (const int8_t *)w->weight + n * k;
  int at = 0;
  for (; at + 16 / r <= count; at += 16 / r)
    put(w, out, row, n + at, 16 / r, r, int8_tile(from + at * k, in, row, k, 16 / r, r, ahead));
  for (; at < count; at++)
    for (int j = row; j < row + r; j++)
      put(w, out, j, n + at, 1, 1, int8_tile(from + at * k, in, j, k, 1, 1, 0));
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

#define ROWS(r)                                                                                  \
  static NOINLINE void int8_##r(const Matrix *w, Input in, Output out, int n, int count, int row) { \
    if (row) int8_block(w, in, out, n, count, row, r, 0);                                        \
    else int8_block(w, in, out, n, count, row, r, 1);                                            \
  }
ROWS(1) ROWS(2) ROWS(4) ROWS(8)
#undef ROWS

static void product_int8(const Matrix *w, Input in, Output out, int n, int count) {
  int row = 0;
  for (; row + 8 <= in.rows; row += 8) int8_8(w, in, out, n, count, row);
  for (; row + 4 <= in.rows; row += 4) int8_4(w, in, out, n, count, row);
  for (; row + 2 <= in.rows; row += 2) int8_2(w, in, out, n, count, row);
  for (; row < in.rows; row++) int8_1(w, in, out, n, count, row);
}
static void product_int4(const Matrix *w, Input in, Output out, int n) {
  int row = 0;
  for (; row + 4 <= in.rows; row += 4) int4_block(w, in, out, n, row, 4);
  for (; row < in.rows; row++) int4_block(w, in, out, n, row, 1);
}
