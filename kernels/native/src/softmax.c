/* Softmax of rows in place, each over its own range of columns, and sums of columns. */
#include "vec.h"

/* Four vectors run at once: one would wait for the last comparison or sum. */
INLINE float greatest(const float *x, int64_t n) {
    f32x8 m[4];
    for (int u = 0; u < 4; u++) m[u] = splat(-__builtin_inff());
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) {
            f32x8 v = load_f32(x + j + u * LANES);
            m[u] = choose(v > m[u], v, m[u]);
        }
    for (; j < n; j += LANES) {
        f32x8 v = n - j < LANES ? load_some(x + j, n - j, -__builtin_inff()) : load_f32(x + j);
        m[0] = choose(v > m[0], v, m[0]);
    }
    for (int u = 1; u < 4; u++) m[0] = choose(m[u] > m[0], m[u], m[0]);
    float result = m[0][0];
    for (int lane = 1; lane < LANES; lane++) result = m[0][lane] > result ? m[0][lane] : result;
    return result;
}

/* x becomes e^((x - top) * scale); the sum of that. `top` is the greatest of x. */
INLINE float exponentials(float *x, int64_t n, float top, float scale) {
    const f32x8 factor = splat(scale * LOG2_E), m = splat(top);
    f32x8 total[2] = {splat(0), splat(0)};
    int64_t j = 0;
    for (; j + 2 * LANES <= n; j += 2 * LANES)
#pragma GCC unroll 2
        for (int u = 0; u < 2; u++) {
            f32x8 e = exp2_f32((load_f32(x + j + u * LANES) - m) * factor);
            store_f32(x + j + u * LANES, e);
            total[u] += e;
        }
    for (; j < n; j += LANES) {
        int64_t count = n - j < LANES ? n - j : LANES;
        f32x8 e = exp2_f32((load_some(x + j, count, -__builtin_inff()) - m) * factor);
        store_some(x + j, count, e);
        total[0] += e;
    }
    return sum(total[0] + total[1]);
}

static void multiply(float *x, int64_t n, float factor) {
    for (int64_t j = 0; j < n; j++) x[j] *= factor;
}

/* scores: (rows, columns), rows `stride` apart. Row r becomes the softmax of scale times its
   columns first[r % period] .. last[r % period] - 1 and 0 elsewhere, which is never read. */
EXPORT void softmax_rows(float *scores, int64_t rows, int64_t columns, int64_t stride,
                         const int64_t *first, const int64_t *last, int64_t period, float scale,
                         int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        float *row = scores + r * stride;
        int64_t from = first[r % period], to = last[r % period];
        memset(row, 0, (size_t)from * sizeof *row);
        memset(row + to, 0, (size_t)(columns - to) * sizeof *row);
        float top = greatest(row + from, to - from);
        multiply(row + from, to - from,
                 1 / exponentials(row + from, to - from, top, scale));
    }
}

/* Adds to sums[j] what stands in column j of the rows r with from <= r % period < to. */
EXPORT void add_columns(const float *x, int64_t rows, int64_t columns, int64_t stride,
                        int64_t period, int64_t from, int64_t to, float *sums, int threads) {
    const int64_t width = 512;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t begin = 0; begin < columns; begin += width) {
        int64_t end = columns - begin < width ? columns : begin + width;
        for (int64_t r = 0; r < rows; r++) {
            if (r % period < from || r % period >= to) continue;
            const float *row = x + r * stride;
            for (int64_t j = begin; j < end; j++) sums[j] += row[j];
        }
    }
}
