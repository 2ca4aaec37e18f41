/* Products of one row with a weight matrix: y[o] = sum_k x[k] * w[o][k] + bias[o].

   Memory is the bound. The matrix is one stream from front to back: the prefetchers follow one
   better than several, and a hint 2 KiB ahead carries them over the ends of pages. */
#include "exported.h"

#define AHEAD 2048

#define TYPE f32
#include "gemv.inc.h"
#undef TYPE
#define TYPE bf16
#include "gemv.inc.h"
#undef TYPE
#define TYPE f16
#include "gemv.inc.h"
#undef TYPE

/* Eight int8 numbers as float32. */
INLINE f32x8 load_i8(const int8_t *p) {
#ifdef __AVX2__
    return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    typedef int8_t i8x8 __attribute__((vector_size(8)));
    i8x8 x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, f32x8);
#endif
}

/* w[o][k] is w[o][k] as int8 times scales[o][k / group]; group is a multiple of 32 that divides
   inputs. */
EXPORT void gemv_i8(const float *x, const int8_t *w, const float *scales, int64_t inputs,
                    int64_t outputs, int64_t group, const float *bias, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < outputs; o++) {
        const int8_t *row = w + o * inputs;
        const float *scale = scales + o * (inputs / group);
        f32x8 total = splat(0);
        for (int64_t begin = 0; begin < inputs; begin += group) {
            f32x8 acc[4];
            for (int u = 0; u < 4; u++) acc[u] = splat(0);
            for (int64_t k = begin; k < begin + group; k += 4 * LANES) {
                __builtin_prefetch((const char *)(row + k) + AHEAD);
#pragma GCC unroll 4
                for (int u = 0; u < 4; u++)
                    acc[u] += load_f32(x + k + u * LANES) * load_i8(row + k + u * LANES);
            }
            total += ((acc[0] + acc[1]) + (acc[2] + acc[3])) * splat(scale[begin / group]);
        }
        y[o] = bias ? sum(total) + bias[o] : sum(total);
    }
}
