// Matrix products for one kind of weights; included once a kind, with these defined:
// NAME, WEIGHT and INPUT (types of one number), WIDTH (numbers in a vector), VECTOR (its type),
// LOAD_WEIGHT, LOAD_INPUT and MULTIPLY_ADD(sum, weight, input).
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

// n weight rows times r input rows: that of weight i and input j is number j * n + i. The rows that
// the next block of 16 needs are fetched meanwhile.
INLINE v16 JOIN(NAME, tile)(const WEIGHT *w, const INPUT *x, int64_t stride, int64_t k, int n,
                            int r, int ahead) {
  v16 acc[16];
  VECTOR in[8];
  int64_t at = 0;
  UNROLL for (int i = 0; i < 16; i++) acc[i] = all(0);
  for (; at + WIDTH <= k; at += WIDTH) {
    UNROLL for (int j = 0; j < r; j++) in[j] = LOAD_INPUT(x + j * stride + at);
    UNROLL for (int i = 0; i < n; i++) {
      const VECTOR weight = LOAD_WEIGHT(w + i * k + at);
      if (ahead) __builtin_prefetch(w + (16 + i) * k + at, 0, 2);
      UNROLL for (int j = 0; j < r; j++)
        acc[j * n + i] = MULTIPLY_ADD(acc[j * n + i], weight, in[j]);
    }
  }
  if (at < k) {
    UNROLL for (int j = 0; j < r; j++) in[j] = LOAD_INPUT(x + j * stride + at);
    UNROLL for (int i = 0; i < n; i++) {
      WEIGHT rest[WIDTH] = {0};  // zero beyond k, whatever the input holds there
      memcpy(rest, w + i * k + at, (k - at) * sizeof(WEIGHT));
      const VECTOR weight = LOAD_WEIGHT(rest);
      UNROLL for (int j = 0; j < r; j++)
        acc[j * n + i] = MULTIPLY_ADD(acc[j * n + i], weight, in[j]);
    }
  }
  return sums(acc);
}
// `count` outputs from n on, at most 16, for r input rows from `row` on.
INLINE void JOIN(NAME, block)(const Matrix *w, const INPUT *x, int64_t stride, Output out, int n,
                              int count, int row, int r, int ahead) {
  const int64_t k = w->columns;
  const WEIGHT *from = (const WEIGHT *)w->weight + n * k;
  int at = 0;
  x += row * stride;
  for (; at + 16 / r <= count; at += 16 / r)
    put(w, out, row, n + at, 16 / r, r,
        JOIN(NAME, tile)(from + at * k, x, stride, k, 16 / r, r, ahead));
  for (; at < count; at++)
    for (int j = 0; j < r; j++)
      put(w, out, row + j, n + at, 1, 1,
          JOIN(NAME, tile)(from + at * k, x + j * stride, stride, k, 1, 1, 0));
}
#define ROWS(r)                                                                                   \
  static NOINLINE void JOIN(NAME, r)(const Matrix *w, const INPUT *x, int64_t stride, Output out, \
                                     int n, int count, int row) {                                 \
    if (row) JOIN(NAME, block)(w, x, stride, out, n, count, row, r, 0);                           \
    else JOIN(NAME, block)(w, x, stride, out, n, count, row, r, 1);                               \
  }
ROWS(1) ROWS(2) ROWS(4) ROWS(8)
#undef ROWS

// The same for all input rows.
static void NAME(const Matrix *w, const INPUT *x, int64_t stride, int rows, Output out, int n,
                 int count) {
  int row = 0;
  for (; row + 8 <= rows; row += 8) JOIN(NAME, 8)(w, x, stride, out, n, count, row);
  for (; row + 4 <= rows; row += 4) JOIN(NAME, 4)(w, x, stride, out, n, count, row);
  for (; row + 2 <= rows; row += 2) JOIN(NAME, 2)(w, x, stride, out, n, count, row);
  for (; row < rows; row++) JOIN(NAME, 1)(w, x, stride, out, n, count, row);
}
#undef NAME
#undef WEIGHT
#undef INPUT
#undef WIDTH
#undef VECTOR
#undef LOAD_WEIGHT
#undef LOAD_INPUT
#undef MULTIPLY_ADD
