/* What the files of this library use of one another. */
#ifndef KVRAG_EXPORTED_H
#define KVRAG_EXPORTED_H

#include "vec.h"

#define GEMV(name, type)                                                                        \
    EXPORT void name(const float *x, const type *w, int64_t inputs, int64_t outputs,            \
                     const float *bias, float *y, int threads)
GEMV(gemv_f32, f32_t);
GEMV(gemv_bf16, bf16_t);
GEMV(gemv_f16, f16_t);
#undef GEMV
EXPORT void gemv_i8(const float *x, const int8_t *w, const float *scales, int64_t inputs,
                    int64_t outputs, int64_t group, const float *bias, float *y, int threads);

#define GEMM(name, type)                                                                        \
    EXPORT void name(const float *x, int64_t n, int64_t x_row, const type *w, int64_t inputs,   \
                     int64_t outputs, const float *bias, float *y, int threads)
GEMM(gemm_bf16, bf16_t);
GEMM(gemm_f16, f16_t);
#undef GEMM

EXPORT void rms_norm(const float *x, int64_t n, int64_t dim, int64_t x_stride, const float *weight,
                     float eps, float *out, int64_t out_stride, int threads);
EXPORT void gated_silu(const float *x, int64_t n, int64_t size, int64_t x_stride, float *out,
                       int64_t out_stride, int threads);
EXPORT void gated_gelu_tanh(const float *x, int64_t n, int64_t size, int64_t x_stride, float *out,
                            int64_t out_stride, int threads);

EXPORT void rotate_into_f32(const f32_t *x, int64_t heads, int64_t n, int64_t dim, int64_t x_head,
                            int64_t x_token, const float *cos, const float *sin, int64_t rotary,
                            const int64_t *at, int64_t start, float *out, int64_t out_head,
                            int64_t out_token, int packed, int threads);

EXPORT int64_t attend_scratch(int64_t n, int64_t heads, int64_t kv_heads, int64_t dim,
                              int64_t keys, int threads);
EXPORT void attend(const float *q, const float *k, const float *v, const int64_t *strides,
                   int64_t n, int64_t heads, int64_t kv_heads, int64_t dim, const int64_t *first,
                   const int64_t *last, float scale, int64_t from, int64_t to, float *received,
                   float *scratch, float *out, int threads);

EXPORT uint64_t xxh3_64(const uint8_t *data, int64_t n);

extern EXPORT const int64_t decode_piece;
EXPORT void decode(const float *q, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim,
                   const float *const *k, const float *const *v, const int64_t *strides,
                   const int64_t *first, const int64_t *end, const int64_t *pieces, float scale,
                   float *states, float *out, int threads);

/* The norms of a layer, as layers.py and row_layer.py mirror them. */
typedef struct {
    const float *weight; /* NULL: there is no such norm */
    int64_t size;
} norm_t;

#endif
