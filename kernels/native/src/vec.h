/* Eight float32 lanes in the compilers' own vector language, so that one source serves every CPU.

   Loads widen the stored types: f32 as it is, bf16 and f16 exactly. No alignment is assumed. */
#ifndef KVRAG_VEC_H
#define KVRAG_VEC_H

#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define LANES 8
#define LOG2_E 1.44269504f
#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

/* For files that are included once for each stored type, with TYPE defined as f32, bf16 or f16. */
#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define NAMED(name) JOIN(name, TYPE)
#define ELEM JOIN(TYPE, t)
#define LOAD JOIN(load, TYPE)
#define ONE JOIN(one, TYPE)

typedef float f32_t;
typedef struct { uint16_t bits; } bf16_t;
typedef struct { uint16_t bits; } f16_t;

INLINE f32x8 splat(float x) { return (f32x8){x, x, x, x, x, x, x, x}; }

INLINE f32x8 load_f32(const f32_t *p) {
    f32x8 x;
    memcpy(&x, p, sizeof x);
    return x;
}

INLINE void store_f32(f32_t *p, f32x8 x) { memcpy(p, &x, sizeof x); }

/* Eight 16-bit numbers, each in a 32-bit lane. Compilers take several shuffles for it. */
INLINE u32x8 load_u16(const void *p) {
#ifdef __AVX2__
    return (u32x8)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    u16x8 x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, u32x8);
#endif
}

INLINE f32x8 load_bf16(const bf16_t *p) { return (f32x8)(load_u16(p) << 16); }

INLINE f32x8 load_f16(const f16_t *p) {
#ifdef __F16C__
    return (f32x8)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    u32x8 wide = load_u16(p);
    u32x8 magnitude = (wide & 0x7fff) << 13, sign = (wide & 0x8000) << 16;
    /* The exponents differ by 112; the product is exact for subnormal numbers, too. */
    u32x8 finite = (u32x8)((f32x8)magnitude * splat(0x1p112f));
    u32x8 special = (u32x8)((wide & 0x7c00) == 0x7c00);
    return (f32x8)(sign | (special & (magnitude | 0x7f800000)) | (~special & finite));
#endif
}

INLINE float one_f32(const f32_t *p) { return *p; }

INLINE float one_bf16(const bf16_t *p) {
    uint32_t wide = (uint32_t)p->bits << 16;
    float x;
    memcpy(&x, &wide, sizeof x);
    return x;
}

INLINE float one_f16(const f16_t *p) {
    f16_t padded[LANES] = {*p};
    return load_f16(padded)[0];
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x8){__VA_ARGS__})
#endif

/* out[i] = the sum of the lanes of x[i], for four vectors at half the price. */
INLINE void sum4(const f32x8 x[4], float *out) {
    f32x8 ab = SHUFFLE(x[0], x[1], 0, 8, 1, 9, 4, 12, 5, 13) +
               SHUFFLE(x[0], x[1], 2, 10, 3, 11, 6, 14, 7, 15);
    f32x8 cd = SHUFFLE(x[2], x[3], 0, 8, 1, 9, 4, 12, 5, 13) +
               SHUFFLE(x[2], x[3], 2, 10, 3, 11, 6, 14, 7, 15);
    f32x8 sums = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                 SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    sums += SHUFFLE(sums, sums, 4, 5, 6, 7, 0, 1, 2, 3);
    memcpy(out, &sums, 4 * sizeof *out);
}

/* The sum of the lanes, always in this order. */
INLINE float sum(f32x8 x) {
    return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

INLINE f32x8 choose(i32x8 where, f32x8 then, f32x8 otherwise) {
    return (f32x8)((where & (i32x8)then) | (~where & (i32x8)otherwise));
}

/* The first `count` (below LANES) numbers at `p`, and `rest` in the other lanes. */
INLINE f32x8 load_some(const float *p, int64_t count, float rest) {
    f32x8 x = splat(rest);
    memcpy(&x, p, (size_t)count * sizeof *p);
    return x;
}

INLINE void store_some(float *p, int64_t count, f32x8 x) { memcpy(p, &x, (size_t)count * sizeof *p); }

/* e^x within 2 ulp where that is a normal number; 0 below (from x = -87.33 down, -inf included),
   +inf from 88.37 up, NaN for NaN.

   e^x = 2^n e^r with n whole and |r| <= ln 2 / 2. The polynomial is a Chebyshev fit of
   (e^r - 1 - r) / r^2 that is off by less than 2e-8. */
INLINE f32x8 exp_f32(f32x8 x) {
    const f32x8 magic = splat(0x1.8p23f); /* adding it rounds to whole numbers, kept in the low bits */
    i32x8 small = x < splat(-87.33f), large = x > splat(88.37f);
    f32x8 shifted = x * splat(LOG2_E) + magic, n = shifted - magic;
    /* ln 2 in two parts; the first has few bits, so that n times it is exact. */
    f32x8 r = x - n * splat(0x1.62e4p-1f);
    r = r - n * splat(1.4286068e-06f);
    f32x8 p = splat(0.001392625f);
    p = p * r + splat(0.008363233f);
    p = p * r + splat(0.041666552f);
    p = p * r + splat(0.16666576f);
    p = p * r + splat(0.5f);
    f32x8 e = (p * r) * r + r + splat(1.0f);
    e *= (f32x8)(((i32x8)shifted - (i32x8)magic + 127) << 23);
    return choose(small, splat(0), choose(large, splat(__builtin_inff()), e));
}

/* The greater of each two lanes; b where either is NaN. */
INLINE f32x8 greater(f32x8 a, f32x8 b) {
#ifdef __AVX2__
    return (f32x8)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return choose(a > b, a, b);
#endif
}

/* x[i] = 2^x[i] for `count` vectors up to 0, as softmax needs it: within 2 ulp, but 0 from -126.5
   down; NaN for NaN. 2^x = 2^n 2^f with n whole and |f| <= 1 / 2, and a polynomial of least
   relative error. Each step waits for the one before, so several vectors go through it together. */
INLINE void exp2_each(int count, f32x8 *x) {
    /* Adding it rounds to whole numbers. The low bits then hold n as an exponent is stored; of
       -127, that is 0. */
    const f32x8 magic = splat(0x1.8p23f + 127);
    const float c[] = {0.009675529f, 0.055507135f, 0.2402212f, 0.69314694f, 1.0000001f};
    f32x8 shifted[4], p[4];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
        x[i] = greater(splat(-127), x[i]);
        shifted[i] = x[i] + magic, x[i] -= shifted[i] - magic, p[i] = splat(0.001327637f);
    }
#pragma GCC unroll 5
    for (int step = 0; step < 5; step++)
#pragma GCC unroll 4
        for (int i = 0; i < count; i++) p[i] = p[i] * x[i] + splat(c[step]);
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) x[i] = p[i] * (f32x8)((i32x8)shifted[i] << 23);
}

INLINE f32x8 exp2_f32(f32x8 x) {
    exp2_each(1, &x);
    return x;
}

#endif
