// The two products of one decoding step on a CPU. A step reads every weight once, so both kernels
// walk memory in order, one stream a thread, and convert bf16 in registers.
// Stable ABI only: compiles in seconds and does not depend on the torch version.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

struct Float {
  typedef float T;
  typedef f16 V;
  static constexpr int width = 16, many = 4;  // numbers in a vector; rows of x in one tile
  static V load(const T* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
  static void multiply_add(f16& sum, V a, V b) { sum += a * b; }
  static f16 load16(const T* p) { return load(p); }
  static float widen(T x) { return x; }
  static T narrow(float x) { return x; }
};

struct BFloat16 {
  typedef uint16_t T;
  static constexpr int width = 32, many = 8;
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
  static f16 load16(const T* p) {
    h16 half;
    std::memcpy(&half, p, sizeof half);
    u16 bits = __builtin_convertvector(half, u16) << 16;
    f16 v;
    std::memcpy(&v, &bits, sizeof v);
    return v;
  }
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

// One row of w (K) times M rows of x (M, K). U partial sums hide the latency of the multiply-add.
template <class D, int M, int U, class Put>
static inline void tile(const typename D::T* x, const typename D::T* w, int64_t K, Put put) {
  f16 sum[M][U] = {};
  int64_t k = 0;
  auto column = [&](int64_t at, int u) {
    const auto v = D::load(w + at);
    for (int m = 0; m < M; ++m) D::multiply_add(sum[m][u], v, D::load(x + m * K + at));
  };
  for (; k + U * D::width <= K; k += U * D::width)
    for (int u = 0; u < U; ++u) column(k + u * D::width, u);
  for (; k + D::width <= K; k += D::width) column(k, 0);
  for (int m = 0; m < M; ++m) {
    for (int u = 1; u < U; ++u) sum[m][0] += sum[m][u];
    float s = total(sum[m][0]);
    for (int64_t j = k; j < K; ++j) s += D::widen(w[j]) * D::widen(x[m * K + j]);
    put(m, s);
  }
}

// x (M, K), w (N, K) -> put(n, m, value); 32 rows of w at a time stay in the cache for all of x.
template <class D, class T, class Put>
static void rows(const T* x, const T* w, int64_t M, int64_t K, int64_t from, int64_t to, Put put) {
  for (int64_t n = from; n < to; n += 32) {
    const int64_t end = n + 32 < to ? n + 32 : to;
    int64_t m = 0;
    auto at = [&](int64_t i) { return [&put, i, m](int c, float s) { put(i, m + c, s); }; };
    for (; m + D::many <= M; m += D::many)
      for (int64_t i = n; i < end; ++i) tile<D, D::many, 8 / D::many>(x + m * K, w + i * K, K, at(i));
    for (; m + 2 <= M; m += 2)
      for (int64_t i = n; i < end; ++i) tile<D, 2, 4>(x + m * K, w + i * K, K, at(i));
    for (; m < M; ++m)
      for (int64_t i = n; i < end; ++i) tile<D, 1, 4>(x + m * K, w + i * K, K, at(i));
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

// A new contiguous tensor, as the stable new_empty but without the dispatcher's microsecond.
static Tensor fresh(const Tensor& x, const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * shape[i];
  int32_t dtype;
  AtenTensorHandle made;
  aoti_torch_get_dtype(x.get(), &dtype);
  aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype,
                           aoti_torch_device_type_cpu(), 0, &made);
  return Tensor(made);
}

// x (..., K) contiguous, weights (N_i, K), a bias (N_i) for each or for none -> (..., sum of N_i)
Tensor linear(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = 0;
  for (const Tensor& w : weights) shape.back() += w.size(0);
  Tensor y = fresh(x, shape);
  if (x.scalar_type() == torch::headeronly::ScalarType::Float)
    product<Float>(x, weights, biases, y);
  else
    product<BFloat16>(x, weights, biases, y);
  return y;
}

// e^x for x <= 0, a polynomial with the coefficients of Cephes' expf; 0 where e^x is no normal float.
static inline f16 exponential(f16 x) {
  i16 n = __builtin_convertvector(x * 1.44269504f - 0.5f, i16);  // nearest power of two
  f16 m = __builtin_convertvector(n, f16), r = x - m * 0.693359375f + m * 2.12194440e-4f, p, scale;
  p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  i16 bits = (n + 127) << 23;
  std::memcpy(&scale, &bits, sizeof scale);
  return x < -87.0f ? f16{} : p * scale;
}

// p (W) becomes exp(p - its maximum), which is -infinity in places; returns the sum.
static float exponentials(float* p, int64_t W) {
  float top = -INFINITY;
  for (int64_t l = 0; l < W; ++l) top = p[l] > top ? p[l] : top;
  f16 sum = {};
  for (int64_t l = 0; l < W; l += 16) {
    f16 x;
    std::memcpy(&x, p + l, sizeof x);
    x = exponential(x - top);
    std::memcpy(p + l, &x, sizeof x);
    sum += x;
  }
  return total(sum);
}

// 16 columns of N sums of the rows of value (., K), row l times p[n * W + l].
template <class D, int N>
static inline void weigh(const float* p, int64_t W, const typename D::T* value, int64_t K,
                         int64_t rows, f16* out) {
  f16 sum[N] = {};
  for (int64_t l = 0; l < rows; ++l) {
    const f16 v = D::load16(value + l * K);
    for (int n = 0; n < N; ++n) sum[n] += p[n * W + l] * v;
  }
  for (int n = 0; n < N; ++n) out[n] = sum[n];
}

template <class D>
static void attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask,
                      Tensor& y, float scale) {
  typedef typename D::T T;
  const int64_t B = q.size(0), H = q.size(1), K = q.size(3), kv = k.size(1), L = k.size(2);
  const int64_t G = H / kv;  // queries that share one key head
#pragma omp parallel if (B * H * L > 1024)
  {
    std::vector<float> scores(G * (L + 16)), weight(G);
#pragma omp for
    for (int64_t i = 0; i < B * kv; ++i) {
      const bool* keep = (const bool*)mask.data_ptr() + (i / kv) * L;
      int64_t from = 0, to = L;  // padding on the left and unused room on the right are not read
      while (from < L && !keep[from]) ++from;
      while (to > from && !keep[to - 1]) --to;
      const int64_t W = (to - from + 15) / 16 * 16;  // room for a query's scores, whole vectors
      const T* key = (const T*)k.data_ptr() + (i * L + from) * K;
      const T* value = (const T*)v.data_ptr() + (i * L + from) * K;
      std::fill(scores.begin(), scores.begin() + G * W, -INFINITY);
      rows<D>((const T*)q.data_ptr() + i * G * K, key, G, K, 0, to - from,
              [&](int64_t l, int64_t g, float s) {
                if (keep[from + l]) scores[g * W + l] = s * scale;
              });
      for (int64_t g = 0; g < G; ++g) weight[g] = exponentials(&scores[g * W], W);
      T* out = (T*)y.data_ptr() + i * G * K;
      for (int64_t g = 0; g < G; ++g)
        for (int64_t d = K / 16 * 16; d < K; ++d) {
          float sum = 0;
          for (int64_t l = 0; l < to - from; ++l)
            sum += scores[g * W + l] * D::widen(value[l * K + d]);
          out[g * K + d] = D::narrow(sum / weight[g]);
        }
      for (int64_t d = 0; d + 16 <= K; d += 16)
        for (int64_t g = 0, n; g < G; g += n) {
          f16 sum[4];
          n = G - g < 4 ? G - g : 4;
          constexpr decltype(&weigh<D, 1>) by[] = {weigh<D, 1>, weigh<D, 2>, weigh<D, 3>, weigh<D, 4>};
          by[n - 1](&scores[g * W], W, value + d, K, to - from, sum);
          for (int64_t j = 0; j < n; ++j)
            for (int c = 0; c < 16; ++c)
              out[(g + j) * K + d + c] = D::narrow(sum[j][c] / weight[g + j]);
        }
    }
  }
}

// One query a row, all contiguous: query (B, H, 1, D), key and value (B, kv, L, D), mask (B, 1, 1, L)
// bool, True where the query may look -> (B, 1, H, D). A row must see at least one position.
Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  Tensor y = fresh(q, {q.size(0), 1, q.size(1), q.size(3)});
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
