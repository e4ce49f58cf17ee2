// Vectors of one register: LANES numbers of 32 bits. GCC keeps larger ones in memory, and then a
// product takes four times as long. AT_ONCE: as many sums as there are registers for.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined __AVX512F__ && defined __AVX512BW__
#define LANES 16
#define AT_ONCE 16
#define REGISTER(name) _mm512_##name
#define LOAD_HALF(p) _mm256_loadu_si256((const void *)(p))
typedef __m512i whole;
#elif defined __AVX2__
#define LANES 8
#define AT_ONCE 8
#define REGISTER(name) _mm256_##name
#define LOAD_HALF(p) _mm_loadu_si128((const void *)(p))
typedef __m256i whole;
#else
#define LANES 4
#define AT_ONCE 8
#endif
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vector all(float x) { return (vector){0} + x; }
INLINE vector choose(integers mask, vector yes, vector no) {
  return (vector)((mask & (integers)yes) | (~mask & (integers)no));
}
INLINE vector load_f32(const float *p) { vector v; memcpy(&v, p, sizeof v); return v; }
INLINE integers load_pairs(const uint16_t *p) { integers v; memcpy(&v, p, sizeof v); return v; }
#ifdef REGISTER
INLINE vector load_bf16(const uint16_t *p) {
  return (vector)REGISTER(slli_epi32)(REGISTER(cvtepu16_epi32)(LOAD_HALF(p)), 16);
}
INLINE integers load_bytes(const int8_t *p) {  // 2 LANES of them, widened to 16 bits
  return (integers)REGISTER(cvtepi8_epi16)(LOAD_HALF(p));
}
#else
typedef int8_t bytes __attribute__((vector_size(2 * LANES)));
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
INLINE vector load_bf16(const uint16_t *p) {
  halves half;
  memcpy(&half, p, sizeof half);
  return (vector)(__builtin_convertvector(half, bits) << 16);
}
INLINE integers load_bytes(const int8_t *p) {
  bytes found;
  memcpy(&found, p, sizeof found);
  return (integers)__builtin_convertvector(found, shorts);
}
#endif
INLINE void store_bf16(uint16_t *p, vector v) {  // rounded to nearest even, as torch does
  const bits all_bits = (bits)v;
  const bits rounded = (all_bits + 0x7fffu + ((all_bits >> 16) & 1u)) >> 16;
  const halves half = __builtin_convertvector(rounded, halves);
  memcpy(p, &half, sizeof half);
}
// Each number of `sum` plus the products of two pairs of 16 bits.
INLINE integers add_pairs(integers sum, integers a, integers b) {
#if defined __AVX512VNNI__
  return (integers)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined REGISTER
  return sum + (integers)REGISTER(madd_epi16)((whole)a, (whole)b);
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// The sums of `count` vectors, at most 16. Each is added in the same order.
#if LANES == 16
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (integers){__VA_ARGS__})
#endif
INLINE void add_up(float *to, const vector *from, int count) {
  vector a[16] = {0}, b[8], c[4], d[2];
  UNROLL for (int i = 0; i < count; i++) a[i] = from[i];
  for (int i = 0; i < 8; i++)
    b[i] = SHUFFLE(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    c[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    d[i] = SHUFFLE(c[i], c[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(c[i], c[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const vector found =
      SHUFFLE(d[0], d[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
      SHUFFLE(d[0], d[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  memcpy(to, &found, 4 * count);
}
#else
INLINE void add_up(float *to, const vector *from, int count) {
  for (int i = 0; i < count; i++) {
    float part[LANES];
    memcpy(part, from + i, sizeof part);
    for (int half = LANES / 2; half; half /= 2)
      for (int j = 0; j < half; j++) part[j] += part[j + half];
    to[i] = part[0];
  }
}
#endif
INLINE float sum(vector v) { float found; add_up(&found, &v, 1); return found; }

INLINE vector exponential(vector x) {  // 2^n e^r with |r| <= ln(2) / 2; relative error about 1e-7
  x = choose(x < -87.0f, all(-87.0f), x);
  x = choose(x > 88.0f, all(88.0f), x);
  vector n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to a whole number
  vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vector p = all(1.9875691500e-4f) * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vector)((integers)p + (__builtin_convertvector(n, integers) << 23));
}
INLINE vector hyperbolic_tangent(vector x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }
