/* Norms and gated activations of rows. */
#include "exported.h"

/* out[i] = x[i] * weight / sqrt(mean(x[i]^2) + eps); out may be x. */
EXPORT void rms_norm(const float *x, int64_t n, int64_t dim, int64_t x_stride, const float *weight,
                     float eps, float *out, int64_t out_stride, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) {
        const float *row = x + i * x_stride;
        float *to = out + i * out_stride;
        f32x8 squares[4];
        for (int u = 0; u < 4; u++) squares[u] = splat(0);
        int64_t j = 0;
        for (; j + 4 * LANES <= dim; j += 4 * LANES)
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++) {
                f32x8 v = load_f32(row + j + u * LANES);
                squares[u] += v * v;
            }
        for (; j < dim; j += LANES) {
            f32x8 v = dim - j < LANES ? load_some(row + j, dim - j, 0) : load_f32(row + j);
            squares[0] += v * v;
        }
        float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)dim;
        float scale = 1 / __builtin_sqrtf(mean + eps);
        for (j = 0; j < dim; j++) to[j] = row[j] * scale * weight[j];
    }
}

/* x * sigmoid(x) */
INLINE f32x8 silu(f32x8 x) { return x / (splat(1) + exp_f32(-x)); }

/* x * (1 + tanh(u)) / 2 with u = sqrt(2 / pi) * (x + 0.044715 x^3), which is x * sigmoid(2 u). */
INLINE f32x8 gelu_tanh(f32x8 x) {
    f32x8 cubic = x * (splat(1) + splat(0.044715f) * x * x);
    return x / (splat(1) + exp_f32(splat(-1.5957691216f) * cubic));
}

/* Row i of x holds the gate, then, from `size` on, what is gated. */
#define GATED(activation)                                                                       \
    EXPORT void gated_##activation(const float *x, int64_t n, int64_t size, int64_t x_stride,   \
                                   float *out, int64_t out_stride, int threads) {               \
        _Pragma("omp parallel for num_threads(threads) if (threads > 1)")                       \
        for (int64_t i = 0; i < n; i++) {                                                       \
            const float *gate = x + i * x_stride, *up = gate + size;                            \
            float *to = out + i * out_stride;                                                   \
            int64_t j = 0;                                                                      \
            for (; j + LANES <= size; j += LANES)                                               \
                store_f32(to + j, activation(load_f32(gate + j)) * load_f32(up + j));           \
            if (j < size)                                                                       \
                store_some(to + j, size - j,                                                    \
                           activation(load_some(gate + j, size - j, 0)) *                       \
                               load_some(up + j, size - j, 0));                                 \
        }                                                                                       \
    }
GATED(silu)
GATED(gelu_tanh)
