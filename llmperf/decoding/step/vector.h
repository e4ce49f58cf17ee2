// Vectors of 16 numbers. The compiler splits them where registers are shorter.
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#define INLINE static inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define UNROLL _Pragma("GCC unroll 16")

typedef float v16 __attribute__((vector_size(64)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));
typedef int8_t b32 __attribute__((vector_size(32)));
typedef int16_t h32 __attribute__((vector_size(64)));
typedef uint8_t c64 __attribute__((vector_size(64)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define SHUFFLE_BYTES(a) __builtin_shufflevector(a, a, INTERLEAVED)
#else
#define SHUFFLE_BYTES(a) __builtin_shuffle(a, (c64){INTERLEAVED})
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i16){__VA_ARGS__})
#endif

#define FOUR(i) i, i + 16, i + 32, i + 48
#define INTERLEAVED                                                                             \
  FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9),       \
      FOUR(10), FOUR(11), FOUR(12), FOUR(13), FOUR(14), FOUR(15)

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE v16 all(float x) { return (v16){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE v16 choose(i16 mask, v16 yes, v16 no) {
  return (v16)((mask & (i16)yes) | (~mask & (i16)no));
}
INLINE v16 load_f32(const float *p) { v16 v; memcpy(&v, p, 64); return v; }
#ifdef __AVX512BW__  // GCC 12 converts in halves, and bytes one by one
INLINE v16 load_bf16(const uint16_t *p) {
  return (v16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
}
INLINE i16 load_bytes(const int8_t *p) {  // 32 of them, widened to 16 bits
  return (i16)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const void *)p));
}
#else
INLINE v16 load_bf16(const uint16_t *p) {
  h16 half;
  memcpy(&half, p, 32);
  return (v16)(__builtin_convertvector(half, u16) << 16);
}
INLINE i16 load_bytes(const int8_t *p) {
#ifdef __AVX2__
  i16 found;
  __m256i x[2];
  for (int i = 0; i < 2; i++) x[i] = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p + i));
  memcpy(&found, x, 64);
  return found;
#else
  b32 bytes;
  memcpy(&bytes, p, 32);
  return (i16)__builtin_convertvector(bytes, h32);
#endif
}
#endif
// Each number of `sum` plus the products of two pairs of 16 bits.
INLINE i16 add_pairs(i16 sum, i16 a, i16 b) {
#if defined __AVX512VNNI__
  return (i16)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined __AVX512BW__
  return sum + (i16)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined __AVX2__
  __m256i x[2], y[2];
  i16 products;
  memcpy(x, &a, 64), memcpy(y, &b, 64);
  for (int i = 0; i < 2; i++) x[i] = _mm256_madd_epi16(x[i], y[i]);
  memcpy(&products, x, 64);
  return sum + products;
#else
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}
// Two columns of 32 bytes each: byte 4 i + c of the result is byte i of the first, i + 16 of the
// first, i of the second and i + 16 of the second column.
INLINE u16 interleave(const uint8_t *p) {
  c64 bytes;
  memcpy(&bytes, p, 64);
  return (u16)SHUFFLE_BYTES(bytes);
}
INLINE void store_bf16(uint16_t *p, v16 v) {  // rounded to nearest even, as torch does
  u16 bits = (u16)v;
  h16 half = __builtin_convertvector((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, h16);
  memcpy(p, &half, 32);
}

// Sixteen vectors to their sixteen sums. Each is added in the same order.
INLINE v16 sums(const v16 *a) {
  v16 b[8], c[4], d[2];
  for (int i = 0; i < 8; i++)
    b[i] = SHUFFLE(a[i], a[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(a[i], a[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    c[i] = SHUFFLE(b[i], b[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           SHUFFLE(b[i], b[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    d[i] = SHUFFLE(c[i], c[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           SHUFFLE(c[i], c[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return SHUFFLE(d[0], d[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         SHUFFLE(d[0], d[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
INLINE float sum(v16 v) { v16 a[16] = {v}; return sums(a)[0]; }

INLINE v16 exponential(v16 x) {  // 2^n e^r with |r| <= ln(2) / 2; relative error about 1e-7
  x = choose(x < -87.0f, all(-87.0f), x);
  x = choose(x > 88.0f, all(88.0f), x);
  v16 n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to a whole number
  v16 r = x - n * 0.693359375f + n * 2.12194440e-4f;
  v16 p = all(1.9875691500e-4f) * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (v16)((i16)p + (__builtin_convertvector(n, i16) << 23));
}
INLINE v16 hyperbolic_tangent(v16 x) { return 1.0f - 2.0f / (1.0f + exponential(2.0f * x)); }
