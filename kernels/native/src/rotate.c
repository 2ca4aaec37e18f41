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

/* A segment of a store that holds a chunk somewhere in its first `length` bytes, zeros behind them,
   and `checksum`, the XXH3-64 of all. */
typedef struct {
    const uint8_t *data;
    int64_t nbytes, length;
    uint64_t checksum;
    chunk_t chunk;
} stored_t;

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

static void put(const chunk_t *chunk, const placed_t *p) {
    switch (chunk->kind) {
        case 0: put_f32(chunk, p); break;
        case 1: put_bf16(chunk, p); break;
        default: put_f16(chunk, p);
    }
}

/* Each chunk's K, rotated, and V to their positions. */
EXPORT void put_chunks(const chunk_t *chunks, int64_t count, int64_t heads, int64_t dim,
                       const float *cos, const float *sin, int64_t rotary, float *k, int64_t k_head,
                       int64_t k_token, float *v, int64_t v_head, int64_t v_token, int threads) {
    placed_t p = {heads, dim, rotary, cos, sin, k, v, k_head, k_token, v_head, v_token};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < count; c++) put(chunks + c, &p);
}

static int is_sound(const stored_t *s) {
    if (xxh3_64(s->data, s->nbytes) != s->checksum) return 0;
    for (int64_t i = s->length; i < s->nbytes; i++)
        if (s->data[i]) return 0;
    return 1;
}

/* As `put_chunks`, of the segments that are sound: sound[c] tells which. The others are not read
   further. A segment is used while the L2 cache still holds it from being checked. */
EXPORT void put_stored(const stored_t *stored, int64_t count, int64_t heads, int64_t dim,
                       const float *cos, const float *sin, int64_t rotary, float *k, int64_t k_head,
                       int64_t k_token, float *v, int64_t v_head, int64_t v_token, uint8_t *sound,
                       int threads) {
    placed_t p = {heads, dim, rotary, cos, sin, k, v, k_head, k_token, v_head, v_token};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < count; c++)
        if ((sound[c] = (uint8_t)is_sound(stored + c))) put(&stored[c].chunk, &p);
}
