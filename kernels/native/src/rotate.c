/* Stored K and V into a float32 cache: K rotated to its positions, V as it is. */
#include "codes.h"
#include "exported.h"

/* Stored K and V of one chunk, (heads, n, dim); kind: f32, bf16 or f16. */
typedef struct {
    int64_t kind, n, start;
    const void *k;
    int64_t k_head, k_token;
    const void *v;
    int64_t v_head, v_token;
} chunk_t;

/* A segment of a store that holds a chunk, (heads, tokens, dim), in its first `length` bytes, zeros
   behind them. `checksum` is the XXH3-64 of all, which `verified` ones have been compared with.
   bits: 0 for K, then V, as they are; else those of codes, whose numbers are rounded to `kind`. */
typedef struct {
    const uint8_t *data;
    int64_t nbytes, length;
    uint64_t checksum;
    int64_t verified, kind, tokens, bits, groups, parts;
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

static shape_t shape_of(const stored_t *s, const placed_t *p) {
    return (shape_t){p->heads, s->tokens, p->dim, p->dim, s->bits, s->groups, s->parts};
}

static chunk_t numbers_of(const stored_t *s, const placed_t *p, int64_t start) {
    int64_t token = p->dim, head = s->tokens * token, nbytes = p->heads * head * (s->kind ? 2 : 4);
    return (chunk_t){s->kind, s->tokens, start, s->data, head, token, s->data + nbytes, head, token};
}

static int is_sound(const stored_t *s, const placed_t *p) {
    if (!s->verified) {
        if (xxh3_64(s->data, s->nbytes) != s->checksum) return 0;
        for (int64_t i = s->length; i < s->nbytes; i++)
            if (s->data[i]) return 0;
    }
    if (!s->bits)
        return 2 * p->heads * s->tokens * p->dim * (s->kind ? 2 : 4) <= s->length;
    shape_t shape = shape_of(s, p);
    return codes_nbytes(s->data, s->length, &shape) <= s->length;
}

/* Codes to their positions, by way of one row of numbers that the L1 cache holds. */
INLINE void put_codes_as(const stored_t *s, const placed_t *p, int64_t start, int64_t dim,
                         int64_t rotary, int64_t bits, int narrow) {
    float row[dim], low[dim], step[dim];
    uint8_t codes[CODES_NBYTES(dim)];
    sixteen_t sixteens[SIXTEENS(dim)];
    shape_t shape = {p->heads, s->tokens, dim, dim, bits, s->groups, s->parts};
    layer_t layer = parts_of(s->data, &shape);
    const uint8_t *rows = layer.rows;
    for (int64_t head = 0; head < p->heads; head++) {
        keys_t keys = keys_of(&layer, &shape, head, rows, low, step, codes, sixteens);
        float *out = p->k + head * p->k_head + start * p->k_token;
        for (int64_t at = start; at < start + s->tokens; at++, out += p->k_token) {
            next_key(&keys, dim, bits, narrow, row);
            if (rotary) turn_f32(row, p->cos + at * rotary, p->sin + at * rotary, rotary, out);
            widen_f32(row + rotary, dim - rotary, out + rotary);
        }
        rows = keys.row;
    }
    values_t values = {&shape, layer.steps, rows, codes};
    for (int64_t head = 0; head < p->heads; head++) {
        float *out = p->v + head * p->v_head + start * p->v_token;
        for (int64_t i = 0; i < s->tokens; i++, out += p->v_token)
            next_value(&values, dim, bits, narrow, out);
    }
}

/* With constants for the sizes that most models have. */
#define PUT_CODES(bits, narrow)                                                                 \
    static void put_codes_##bits##_##narrow(const stored_t *s, const placed_t *p, int64_t start) { \
        if (p->dim == 64 && p->rotary == 64 && s->parts == 1)                                   \
            put_codes_as(s, p, start, 64, 64, bits, narrow);                                    \
        else                                                                                    \
            put_codes_as(s, p, start, p->dim, p->rotary, bits, narrow);                         \
    }
PUT_CODES(8, 1)
PUT_CODES(8, 0)
PUT_CODES(4, 1)
PUT_CODES(4, 0)

static void put_codes(const stored_t *s, const placed_t *p, int64_t start) {
    if (s->bits == 8)
        (s->kind ? put_codes_8_1 : put_codes_8_0)(s, p, start);
    else
        (s->kind ? put_codes_4_1 : put_codes_4_0)(s, p, start);
}

/* Each segment that is sound to the positions from starts[c] on: sound[c] tells which. The others
   are not read further. A segment is used while the L2 cache still holds it from being checked. */
EXPORT void put_stored(const stored_t *stored, const int64_t *starts, int64_t count, int64_t heads,
                       int64_t dim, const float *cos, const float *sin, int64_t rotary, float *k,
                       int64_t k_head, int64_t k_token, float *v, int64_t v_head, int64_t v_token,
                       uint8_t *sound, int threads) {
    placed_t p = {heads, dim, rotary, cos, sin, k, v, k_head, k_token, v_head, v_token};
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t c = 0; c < count; c++) {
        const stored_t *s = stored + c;
        if (!(sound[c] = (uint8_t)is_sound(s, &p))) continue;
        if (s->bits) {
            put_codes(s, &p, starts[c]);
        } else {
            chunk_t chunk = numbers_of(s, &p, starts[c]);
            put(&chunk, &p);
        }
    }
}
