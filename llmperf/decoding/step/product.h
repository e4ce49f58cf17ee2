// The matrix products of a step, for each kind of weights and for 1, 2, 4 or 8 input rows at once.

// Rows of an input in fp32, and in the 16 bits that the weights are multiplied with: bf16, or whole
// numbers; then `blocks` holds for each BLOCK of them their scale, and their sum times the scale.
#define BLOCK 64
#define SCALED 256  // columns that share a scale
typedef struct { float *full; uint16_t *narrow; float *blocks; int64_t stride; int rows; } Input;
typedef struct { float *to; int64_t stride; int add; float scale; } Output;

INLINE void put_row(const Matrix *w, Output out, float *to, int n, int count, const float *sum) {
  for (int i = 0; i < count; i++) {
    const float scaled = sum[i] * (w->scale ? w->scale[n + i] : 1);
    const float found = (scaled + (w->bias ? w->bias[n + i] : 0)) * out.scale;
    to[i] = out.add ? to[i] + found : found;
  }
}
// Store the sums of `count` weight rows, at most 16, from n on for r input rows from `row` on; sum
// holds 16 a row.
static NOINLINE void put(const Matrix *w, Output out, int row, int n, int count, int r,
                         const float *sum) {
  for (int j = 0; j < r; j++, sum += 16) {
    float *to = out.to + (row + j) * out.stride + n;
    if (count == 16) put_row(w, out, to, n, 16, sum);
    else put_row(w, out, to, n, count, sum);
  }
}

// How many of n weight rows are read at the same time for r input rows: as many as there are
// registers for sums. For one input row it is one: then reading is all the work, and a processor
// reads one long row faster than several at once. It fetches that row ahead by itself; of several
// it has to be asked to, `bytes_ahead` of where it reads.
INLINE int rows_at_once(int n, int r) { return r == 1 ? 1 : (int)least(n, most(1, AT_ONCE / r)); }
INLINE int64_t bytes_ahead(int64_t row_bytes, int m, int r) {
  return r == 1 ? 0 : most(8192, m * row_bytes);
}

// ---- Weights in fp32 and bf16. Pairs of bf16 are multiplied where the processor can do that.
#ifdef __AVX512BF16__
#define PAIRED(kind) ((kind) == OF_BF16)
#define ADD_PAIRS(sum, a, b) (vector)_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b))
#else
#define PAIRED(kind) ((kind) < 0)
#define ADD_PAIRS(sum, a, b) (sum)
#endif
#define WIDTH(kind) (PAIRED(kind) ? 2 * LANES : LANES)  // columns in a vector
INLINE vector load_input(Input in, int64_t at, int kind) {
  return PAIRED(kind) ? (vector)load_pairs(in.narrow + at) : load_f32(in.full + at);
}
INLINE vector load_weight(const void *w, int kind) {
  if (PAIRED(kind)) return (vector)load_pairs(w);
  return kind == OF_F32 ? load_f32(w) : load_bf16(w);
}
INLINE vector multiply_add(vector sum, vector a, vector b, int kind) {
  return PAIRED(kind) ? ADD_PAIRS(sum, a, b) : sum + a * b;
}

// n weight rows from `first` on times r input rows: sum[j * n + i] is that of weight i and input j.
// What will be read next is fetched meanwhile where `ahead`.
INLINE void float_tile(const Matrix *w, Input in, int64_t first, int row, int n, int r, int ahead,
                       int kind, float *sum) {
  const int64_t k = w->columns, size = kind == OF_F32 ? 4 : 2;
  const int m = rows_at_once(n, r);
  const int64_t fetched = ahead ? bytes_ahead(k * size, m, r) : 0;
  vector total[16];
  for (int start = 0; start < n; start += m) {
    const char *from = (const char *)w->weight + (first + start) * k * size;
    vector acc[16], x[8];
    int64_t at = 0;
    UNROLL for (int i = 0; i < m * r; i++) acc[i] = (vector){0};
    for (; at + WIDTH(kind) <= k; at += WIDTH(kind)) {
      UNROLL for (int j = 0; j < r; j++) x[j] = load_input(in, (row + j) * in.stride + at, kind);
      UNROLL for (int i = 0; i < m; i++) {
        const char *here = from + (i * k + at) * size;
        const vector weight = load_weight(here, kind);
        if (fetched) __builtin_prefetch(here + fetched, 0, 2);
        UNROLL for (int j = 0; j < r; j++)
          acc[j * m + i] = multiply_add(acc[j * m + i], weight, x[j], kind);
      }
    }
    if (at < k) {
      UNROLL for (int j = 0; j < r; j++) x[j] = load_input(in, (row + j) * in.stride + at, kind);
      UNROLL for (int i = 0; i < m; i++) {
        char rest[64] = {0};  // zero beyond k, whatever the input holds there
        memcpy(rest, from + (i * k + at) * size, (k - at) * size);
        const vector weight = load_weight(rest, kind);
        UNROLL for (int j = 0; j < r; j++)
          acc[j * m + i] = multiply_add(acc[j * m + i], weight, x[j], kind);
      }
    }
    UNROLL for (int j = 0; j < r; j++)
      UNROLL for (int i = 0; i < m; i++) total[j * n + start + i] = acc[j * m + i];
  }
  add_up(sum, total, n * r);
}

// ---- Weights in int8 and int4. The input is rounded to whole numbers of 16 bits, so that pairs of
// columns are multiplied and added in whole numbers.

// int8: 2 LANES columns of m weight rows times r input rows. With `rest` there are only that many,
// and weights beyond are 0, whatever the input holds there.
INLINE void int8_columns(integers *part, const int8_t *w, const uint16_t *x, int64_t stride,
                         int64_t k, int m, int r, int64_t fetched, int rest) {
  integers pairs[8];
  UNROLL for (int j = 0; j < r; j++) pairs[j] = load_pairs(x + j * stride);
  UNROLL for (int i = 0; i < m; i++) {
    int8_t last[2 * LANES] = {0};
    if (rest) memcpy(last, w + i * k, rest);
    const integers weight = load_bytes(rest ? last : w + i * k);
    if (fetched) __builtin_prefetch(w + i * k + fetched, 0, 2);
    UNROLL for (int j = 0; j < r; j++)
      part[j * m + i] = add_pairs(part[j * m + i], weight, pairs[j]);
  }
}

// As float_tile.
INLINE void int8_tile(const Matrix *matrix, Input in, int64_t first, int row, int n, int r,
                      int ahead, float *sum) {
  const int64_t k = matrix->columns;
  const int m = rows_at_once(n, r);
  const int64_t fetched = ahead ? bytes_ahead(k, m, r) : 0;
  vector total[16];
  for (int rows = 0; rows < n; rows += m) {
    const int8_t *w = (const int8_t *)matrix->weight + (first + rows) * k;
    vector acc[16];
    UNROLL for (int i = 0; i < m * r; i++) acc[i] = (vector){0};
    for (int64_t start = 0; start < k; start += SCALED) {
      const int64_t end = least(start + SCALED, k);
      const uint16_t *x = in.narrow + row * in.stride;
      int64_t at = start;
      integers part[16];
      UNROLL for (int i = 0; i < m * r; i++) part[i] = (integers){0};
      for (; at + 2 * LANES <= end; at += 2 * LANES)
        int8_columns(part, w + at, x + at, in.stride, k, m, r, fetched, 0);
      if (at < end) int8_columns(part, w + at, x + at, in.stride, k, m, r, 0, (int)(end - at));
      UNROLL for (int j = 0; j < r; j++) {
        const float scale = in.blocks[((row + j) * in.stride + start) / BLOCK * 2];
        UNROLL for (int i = 0; i < m; i++)
          acc[j * m + i] += __builtin_convertvector(part[j * m + i], vector) * scale;
      }
    }
    UNROLL for (int j = 0; j < r; j++)
      UNROLL for (int i = 0; i < m; i++) total[j * n + rows + i] = acc[j * m + i];
  }
  add_up(sum, total, n * r);
}

#if LANES == 16
typedef uint8_t columns __attribute__((vector_size(64)));  // two of them, 32 bytes each
#define FOUR(i) i, i + 16, i + 32, i + 48
#define INTERLEAVED                                                                             \
  FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9),       \
      FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)
#ifdef __clang__
#define SHUFFLE_BYTES(a) __builtin_shufflevector(a, a, INTERLEAVED)
#else
#define SHUFFLE_BYTES(a) __builtin_shuffle(a, (columns){INTERLEAVED})
#endif
// Byte 4 i + c of the result is byte i of the first column, i + 16 of the first, i of the second
// and i + 16 of the second.
INLINE bits interleave(const uint8_t *p) {
  columns two;
  memcpy(&two, p, sizeof two);
  return (bits)SHUFFLE_BYTES(two);
}

// int4: 64 outputs for r input rows. With AVX-512 torch keeps 4-bit weights in blocks of 64
// outputs: 32 bytes a column, output i in the low half of byte i, output i + 32 in the high half.
INLINE void int4_block(const Matrix *w, Input in, Output out, int n, int row, int r) {
  const uint8_t *weights = (const uint8_t *)w->weight + (int64_t)n / 2 * w->columns;
  const uint16_t *groups = w->groups + (int64_t)n / 64 * (w->columns / w->group) * 128;
  vector acc[16];  // that of input j and outputs from 16 q on is number j * 4 + q
  UNROLL for (int i = 0; i < 4 * r; i++) acc[i] = all(0);
  for (int64_t at = 0; at < w->columns; at += BLOCK) {
    integers part[16];
    UNROLL for (int i = 0; i < 4 * r; i++) part[i] = (integers){0};
    for (int k = 0; k < BLOCK; k += 2) {
      const bits four = interleave(weights + (at + k) * 32);
      __builtin_prefetch(weights + (at + k) * 32 + 4096, 0, 2);
      const bits weight[] = {four, four >> 8, four >> 4, four >> 12};
      UNROLL for (int j = 0; j < r; j++) {
        int32_t pair;
        memcpy(&pair, in.narrow + (row + j) * in.stride + at + k, 4);
        UNROLL for (int q = 0; q < 4; q++)
          part[j * 4 + q] = add_pairs(part[j * 4 + q], (integers)(weight[q] & 0x000f000fu),
                                      (integers){} + pair);
      }
    }
    const uint16_t *scale = groups + at / w->group * 128, *middle = scale + 64;
    UNROLL for (int j = 0; j < r; j++) {
      const float *block = in.blocks + ((row + j) * in.stride + at) / BLOCK * 2;
      UNROLL for (int q = 0; q < 4; q++) {
        const vector found = __builtin_convertvector(part[j * 4 + q], vector) * block[0];
        acc[j * 4 + q] += (found - 8 * block[1]) * load_bf16(scale + q * 16) +
                          block[1] * load_bf16(middle + q * 16);
      }
    }
  }
  UNROLL for (int i = 0; i < 4 * r; i++)
    put(w, out, row + i / 4, n + i % 4 * 16, 16, 1, (float *)(acc + i));
}
#endif

// ---- All kinds.

INLINE void tile(const Matrix *w, Input in, int64_t first, int row, int n, int r, int ahead,
                 int kind, float *sum) {
  if (kind == OF_INT8) int8_tile(w, in, first, row, n, r, ahead, sum);
  else float_tile(w, in, first, row, n, r, ahead, kind, sum);
}
// `count` outputs from n on, at most 16, for r input rows from `row` on.
INLINE void block(const Matrix *w, Input in, Output out, int n, int count, int row, int r,
                  int ahead, int kind) {
  const int width = 16 / r;
  float sum[16], whole[8 * 16];
  int at = 0;
  for (; at + width <= count; at += width) {
    tile(w, in, n + at, row, width, r, ahead, kind, sum);
    UNROLL for (int j = 0; j < r; j++) memcpy(whole + j * 16 + at, sum + j * width, 4 * width);
  }
  for (; at < count; at++)
    for (int j = 0; j < r; j++) tile(w, in, n + at, row + j, 1, 1, 0, kind, whole + j * 16 + at);
  put(w, out, row, n, count, r, whole);
}
#define BLOCK_OF(kind, r)                                                                         \
  static NOINLINE void kind##_##r(const Matrix *w, Input in, Output out, int n, int count,        \
                                  int row) {                                                      \
    if (row) block(w, in, out, n, count, row, r, 0, kind);                                        \
    else block(w, in, out, n, count, row, r, 1, kind);                                            \
  }
#define PRODUCT(kind)                                                                             \
  BLOCK_OF(kind, 1) BLOCK_OF(kind, 2) BLOCK_OF(kind, 4) BLOCK_OF(kind, 8)                          \
  static void product_##kind(const Matrix *w, Input in, Output out, int n, int count) {           \
    int row = 0;                                                                                  \
    for (; row + 8 <= in.rows; row += 8) kind##_8(w, in, out, n, count, row);                     \
    for (; row + 4 <= in.rows; row += 4) kind##_4(w, in, out, n, count, row);                     \
    for (; row + 2 <= in.rows; row += 2) kind##_2(w, in, out, n, count, row);                     \
    for (; row < in.rows; row++) kind##_1(w, in, out, n, count, row);                             \
  }
PRODUCT(OF_F32) PRODUCT(OF_BF16) PRODUCT(OF_INT8)
static void product_OF_INT4(const Matrix *w, Input in, Output out, int n, int count) {
#if LANES == 16
  (void)count;  // always 64
  int row = 0;
  for (; row + 4 <= in.rows; row += 4) int4_block(w, in, out, n, row, 4);
  for (; row < in.rows; row++) int4_block(w, in, out, n, row, 1);
#else  // packed in another way: no number, so that the check of the step refuses it
  for (int row = 0; row < in.rows; row++)
    for (int i = n; i < least(n + count, w->rows); i++) out.to[row * out.stride + i] = NAN;
#endif
}

// Weight rows of one item of work. Each thread gets as many items of a matrix as the others do, and
// they are long: a processor reads one long piece faster than several short ones (288 rows were
// faster than 144, 96, 64, 32 and 16).
INLINE int item_rows(const Matrix *w, int threads) {
  const int step = w->kind == OF_INT4 ? 64 : 16, longest = 288 * threads;
  const int items = ((w->rows + longest - 1) / longest) * threads;
  return items ? (w->rows + items * step - 1) / (items * step) * step : step;
}

// The matrices of one input, such as query, key and value; their outputs follow one another.
static void products(Team *team, const Matrix *w, int count, Input in, Output out) {
  static void (*const product[])(const Matrix *, Input, Output, int, int) = {
      product_OF_F32, product_OF_BF16, product_OF_INT8, product_OF_INT4};
  int items[3], sizes[3], total = 0;
  for (int i = 0; i < count; i++) {
    sizes[i] = item_rows(w + i, team->threads);
    total += items[i] = (w[i].rows + sizes[i] - 1) / sizes[i];
  }
  FOR_ITEMS(item, total) {
    int i = 0, n = item;
    Output here = out;
    while (n >= items[i]) n -= items[i], here.to += w[i++].rows;
    const Matrix *m = w + i;
    const int step = m->kind == OF_INT4 ? 64 : 16, end = (int)least(m->rows, (n + 1) * sizes[i]);
    for (int at = n * sizes[i]; at < end; at += step)
      product[m->kind](m, in, here, at, (int)least(step, end - at));
  }
}
