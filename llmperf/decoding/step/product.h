// Matrix products for one kind of weights; included once a kind, with these defined:
// NAME, WEIGHT and INPUT (types of one number), WIDTH (numbers in a vector), VECTOR (its type),
// LOAD_WEIGHT, LOAD_INPUT and MULTIPLY_ADD(sum, weight, input).
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)

// n weight rows times r input rows: n * r = 16 running sums, that of weight i and input j at
// j * n + i. With `ahead` the rows that the next block needs are fetched meanwhile.
INLINE void JOIN(NAME, tile)(const WEIGHT *w, const INPUT *x, int64_t stride, int64_t k, int n,
                             int r, int ahead, v16 *acc) {
  for (int i = 0; i < 16; i++) acc[i] = all(0);
  int64_t at = 0;
  VECTOR in[4];
  for (; at + WIDTH <= k; at += WIDTH) {
    for (int j = 0; j < r; j++) in[j] = LOAD_INPUT(x + j * stride + at);
    for (int i = 0; i < n; i++) {
      VECTOR weight = LOAD_WEIGHT(w + i * k + at);
      if (ahead) __builtin_prefetch(w + (16 + i) * k + at, 0, 2);
      for (int j = 0; j < r; j++) acc[j * n + i] = MULTIPLY_ADD(acc[j * n + i], weight, in[j]);
    }
  }
  if (at == k) return;
  for (int j = 0; j < r; j++) in[j] = LOAD_INPUT(x + j * stride + at);
  for (int i = 0; i < n; i++) {
    WEIGHT rest[WIDTH] = {0};  // zero beyond k, whatever the input holds there
    memcpy(rest, w + i * k + at, (k - at) * sizeof(WEIGHT));
    VECTOR weight = LOAD_WEIGHT(rest);
    for (int j = 0; j < r; j++) acc[j * n + i] = MULTIPLY_ADD(acc[j * n + i], weight, in[j]);
  }
}

// `count` outputs from n on, for r input rows from `row` on.
INLINE void JOIN(NAME, tiles)(const Matrix *w, const INPUT *x, int64_t stride, Output out, int n,
                              int count, int row, int r, int ahead) {
  const int width = 16 / r;
  const int64_t k = w->columns;
  x += row * stride;
  for (int at = 0; at < count; at += width) {
    v16 acc[16], single[16];
    const WEIGHT *from = (const WEIGHT *)w->weight + (n + at) * k;
    const int here = count - at < width ? count - at : width;
    if (here == width) {
      JOIN(NAME, tile)(from, x, stride, k, width, r, ahead, acc);
    } else {
      for (int i = 0; i < 16; i++) acc[i] = all(0);
      for (int i = 0; i < here; i++) {
        JOIN(NAME, tile)(from + i * k, x, stride, k, 1, r, 0, single);
        for (int j = 0; j < r; j++) acc[j * width + i] = single[j];
      }
    }
    put(w, out, row, n + at, width, here, sums(acc));
  }
}

static void NAME(const Matrix *w, const INPUT *x, int64_t stride, int rows, Output out, int n,
                 int count) {
  int row = 0;
  if (rows >= 4) JOIN(NAME, tiles)(w, x, stride, out, n, count, row, 4, 1), row = 4;
  for (; row + 4 <= rows; row += 4) JOIN(NAME, tiles)(w, x, stride, out, n, count, row, 4, 0);
  for (; row + 2 <= rows; row += 2) JOIN(NAME, tiles)(w, x, stride, out, n, count, row, 2, 0);
  for (; row < rows; row++) JOIN(NAME, tiles)(w, x, stride, out, n, count, row, 1, 0);
}
#undef NAME
#undef WEIGHT
#undef INPUT
#undef WIDTH
#undef VECTOR
#undef LOAD_WEIGHT
#undef LOAD_INPUT
#undef MULTIPLY_ADD
