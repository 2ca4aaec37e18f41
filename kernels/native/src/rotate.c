/* Stored K and V into a float32 cache: K rotated to its positions, V as it is. */
#include "exported.h"

/* Stored K and V of one chunk, (heads, n, dim); kind: f32, bf16 or f16. */
typedef struct {
    int64_t kind, n, start;
    const void *k;
    int64_t k_head, k_token;
    const void *v;
    int64_t v_head, v_token;
} chunk_t;

/* Where chunks go, (heads, positions, dim) each. */
typedef struct {
    int64_t heads, dim, rotary;
    const float *cos, *sin; /* (positions, rotary) */
    float *k, *v;
    int64_t k_head, k_token, v_head, v_token;
} placed_t;

#define TYPE f32
#include "rotate.inc.h"
#undef TYPE
#define TYPE bf16
#include "rotate.inc.h"
#undef TYPE
#define TYPE f16
#include "rotate.inc.h"
#undef TYPE

/* The least and the greatest of n positions, at least one. */
EXPORT void bounds(const int64_t *at, int64_t n, int64_t *found) {
    found[0] = found[1] = at[0];
    for (int64_t i = 1; i < n; i++) {
        if (at[i] < found[0]) found[0] = at[i];
        if (at[i] > found[1]) found[1] = at[i];
    }
}

/* Each chunk's K, rotated, and V to their positions. */
EXPORT void put_chunks(const chunk_t *chunks, int64_t count, int64_t heads, int64_t dim,
                       const float *cos, const float *sin, int64_t rotary, float *k, int64_t k_head,
                       int64_t k_token, float *v, int64_t v_head, int64_t v_token, int threads) {
    placed_t p = {heads, dim, rotary, cos, sin, k, v, k_head, k_token, v_head, v_token};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < count; c++)
        switch (chunks[c].kind) {
            case 0: put_f32(chunks + c, &p); break;
            case 1: put_bf16(chunks + c, &p); break;
            default: put_f16(chunks + c, &p);
        }
}
