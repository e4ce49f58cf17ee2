// The two products of one decoding step on a CPU. A step reads every weight once, so both kernels
// walk memory in order, one stream a thread, and convert bf16 in registers.
// Stable ABI only: compiles in seconds and does not depend on the torch version.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include <omp.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

using torch::stable::Tensor;
typedef float f4 __attribute__((vector_size(16)));
typedef float f8 __attribute__((vector_size(32)));
typedef float f16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));

struct Float {
  typedef float T;
  typedef f16 V;
  static constexpr int width = 16;
  static V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
  static void multiply_add(f16& sum, V a, V b) { sum += a * b; }
  static float widen(T x) { return x; }
  static T narrow(float x) { return x; }
};

struct BFloat16 {
  typedef uint16_t T;
  static constexpr int width = 32;
#if defined(__AVX512BF16__)
  typedef __m512bh V;
  static V load(const T* p) { return (V)_mm512_loadu_si512(p); }
  static void multiply_add(f16& sum, V a, V b) { sum = (f16)_mm512_dpbf16_ps((__m512)sum, a, b); }
#else
  typedef u16 V;  // two numbers a lane: the even ones in the low half, the odd ones in the high half
  static V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
  static f16 as_float(u16 bits) { f16 v; std::memcpy(&v, &bits, sizeof v); return v; }
  static void multiply_add(f16& sum, V a, V b) {
    sum += as_float(a << 16) * as_float(b << 16);
    sum += as_float(a & 0xffff0000u) * as_float(b & 0xffff0000u);
  }
#endif
  static float widen(T x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
  static T narrow(float x) {  // round to nearest even, as torch does
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
};

static inline float total(f16 v) {
  f8 low, high;
  std::memcpy(&low, &v, 32);
  std::memcpy(&high, (char*)&v + 32, 32);
  low += high;
  f4 a, b;
  std::memcpy(&a, &low, 16);
  std::memcpy(&b, (char*)&low + 16, 16);
  a += b;
  return (a[0] + a[1]) + (a[2] + a[3]);
}

// R rows of w (., K) times M rows of x (M, K). U partial sums hide the latency of the multiply-add.
template <class D, int R, int M, int U, class Put>
static inline void tile(const typename D::T* x, const typename D::T* w, int64_t K, Put put) {
  f16 sum[R][M][U] = {};
  int64_t k = 0;
  auto column = [&](int64_t at, int u) {
    typename D::V row[R];
    for (int r = 0; r < R; ++r) row[r] = D::load(w + r * K + at);
    for (int m = 0; m < M; ++m) {
      auto v = D::load(x + m * K + at);
      for (int r = 0; r < R; ++r) D::multiply_add(sum[r][m][u], row[r], v);
    }
  };
  for (; k + U * D::width <= K; k += U * D::width)
    for (int u = 0; u < U; ++u) column(k + u * D::width, u);
  for (; k + D::width <= K; k += D::width) column(k, 0);
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      for (int u = 1; u < U; ++u) sum[r][m][0] += sum[r][m][u];
      float s = total(sum[r][m][0]);
      for (int64_t j = k; j < K; ++j) s += D::widen(w[r * K + j]) * D::widen(x[m * K + j]);
      put(r, m, s);
    }
}

// x (M, K), w (N, K) -> put(n, m, value); 32 rows of w at a time stay in the cache for all of x.
template <class D, class T, class Put>
static void rows(const T* x, const T* w, int64_t M, int64_t K, int64_t from, int64_t to, Put put) {
  for (int64_t n = from; n < to; n += 32) {
    const int64_t end = n + 32 < to ? n + 32 : to;
    int64_t m = 0;
    auto at = [&](int64_t i) {
      return [&put, i, m](int r, int c, float s) { put(i + r, m + c, s); };
    };
    for (; m + 8 <= M; m += 8) {
      int64_t i = n;
      for (; i + 2 <= end; i += 2) tile<D, 2, 8, 1>(x + m * K, w + i * K, K, at(i));
      for (; i < end; ++i) tile<D, 1, 8, 1>(x + m * K, w + i * K, K, at(i));
    }
    for (; m + 2 <= M; m += 2)
      for (int64_t i = n; i < end; ++i) tile<D, 1, 2, 4>(x + m * K, w + i * K, K, at(i));
    for (; m < M; ++m)
      for (int64_t i = n; i < end; ++i) tile<D, 1, 1, 4>(x + m * K, w + i * K, K, at(i));
  }
}

// Several weights of one input share one parallel region: starting one costs microseconds.
template <class D>
static void product(const Tensor& x, const std::vector<Tensor>& weights,
                    const std::vector<Tensor>& biases, Tensor& y) {
  typedef typename D::T T;
  const int64_t K = weights[0].size(1), M = x.numel() / K, N = y.size(y.dim() - 1);
#pragma omp parallel
  {
    const int64_t t = omp_get_thread_num(), threads = omp_get_num_threads();
    int64_t from = N * t / threads, to = N * (t + 1) / threads;  // this thread's columns of y
    T* out = (T*)y.data_ptr();
    for (size_t i = 0; i < weights.size(); ++i) {
      const int64_t n = weights[i].size(0);
      const T* b = biases.empty() ? nullptr : (const T*)biases[i].data_ptr();
      auto put = [=](int64_t row, int64_t m, float s) {
        out[m * N + row] = D::narrow(b ? s + D::widen(b[row]) : s);
      };
      rows<D>((const T*)x.data_ptr(), (const T*)weights[i].data_ptr(), M, K, from > 0 ? from : 0,
              to < n ? to : n, put);
      out += n, from -= n, to -= n;
    }
  }
}

// x (..., K) contiguous, weights (N_i, K), a bias (N_i) for each or for none -> (..., sum of N_i)
Tensor linear(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = 0;
  for (const Tensor& w : weights) shape.back() += w.size(0);
  Tensor y = torch::stable::new_empty(x, shape);
  if (x.scalar_type() == torch::headeronly::ScalarType::Float)
    product<Float>(x, weights, biases, y);
  else
    product<BFloat16>(x, weights, biases, y);
  return y;
}

template <class D>
static void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                      Tensor& y, float scale) {
  typedef typename D::T T;
  const int64_t B = q.size(0), H = q.size(1), K = q.size(3), kv = k.size(1), L = k.size(2);
  const int64_t G = H / kv;  // queries that share one key head
#pragma omp parallel if (B * H * L > 4096)
  {
    std::vector<float> scores(G * L), sums(G * K);
#pragma omp for
    for (int64_t i = 0; i < B * kv; ++i) {
      const bool* keep = (const bool*)mask.data_ptr() + (i / kv) * L;
      const T* value = (const T*)v.data_ptr() + i * L * K;
      int64_t from = 0, to = L;  // padding on the left and unused room on the right are not read
      while (from < L && !keep[from]) ++from;
      while (to > from && !keep[to - 1]) --to;
      rows<D>((const T*)q.data_ptr() + i * G * K, (const T*)k.data_ptr() + i * L * K, G, K, from,
              to, [&](int64_t l, int64_t g, float s) { scores[g * L + l] = s * scale; });
      for (int64_t g = 0; g < G; ++g) {
        float *p = &scores[g * L], *sum = &sums[g * K], top = -INFINITY, weight = 0;
        for (int64_t l = from; l < to; ++l) {
          if (!keep[l]) p[l] = -INFINITY;
          top = p[l] > top ? p[l] : top;
        }
#pragma omp simd reduction(+ : weight)
        for (int64_t l = from; l < to; ++l) weight += p[l] = std::exp(p[l] - top);
        std::fill(sum, sum + K, 0.0f);
        for (int64_t l = from; l < to; ++l)
#pragma omp simd
          for (int64_t d = 0; d < K; ++d) sum[d] += p[l] * D::widen(value[l * K + d]);
        for (int64_t d = 0; d < K; ++d)
          ((T*)y.data_ptr())[(i * G + g) * K + d] = D::narrow(sum[d] / weight);
      }
    }
  }
}

// One query a row, all contiguous: query (B, H, 1, D), key and value (B, kv, L, D), mask (B, 1, 1, L)
// bool, True where the query may look -> (B, 1, H, D). A row must see at least one position.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  Tensor y = torch::stable::new_empty(q, std::vector<int64_t>{q.size(0), 1, q.size(1), q.size(3)});
  if (q.scalar_type() == torch::headeronly::ScalarType::Float)
    attention<Float>(q, k, v, mask, y, scale);
  else
    attention<BFloat16>(q, k, v, mask, y, scale);
  return y;
}

STABLE_TORCH_LIBRARY(llmperf, m) {
  m.def("linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor");
  m.def("attend(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(llmperf, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("attend", TORCH_BOX(&attend));
}
