/* One layer of codes of K and V to numbers; see codes.h. */
#include "codes.h"

INLINE void put_row_f32(const float *row, int64_t n, f32_t *out) {
    memcpy(out, row, (size_t)n * sizeof *out);
}

/* Of numbers that are rounded already. */
INLINE void put_row_bf16(const float *row, int64_t n, bf16_t *out) {
    for (int64_t j = 0; j < n; j++) {
        uint32_t bits;
        memcpy(&bits, row + j, sizeof bits);
        out[j].bits = (uint16_t)(bits >> 16);
    }
}

/* data: a layer of `nbytes`. k: (heads, tokens, k_dim), v: (heads, tokens, v_dim), contiguous.
   Returns the bytes that the layer takes; if those are more, k and v stay as they were. */
#define UNPACK(type, narrow)                                                                    \
    INLINE void unpack_as_##type(const uint8_t *data, const shape_t *s, int64_t bits,           \
                                 type##_t *k, type##_t *v) {                                    \
        int64_t dim = s->k_dim > s->v_dim ? s->k_dim : s->v_dim;                                \
        float row[dim], low[dim], step[dim];                                                    \
        uint8_t codes[CODES_NBYTES(dim)];                                                       \
        sixteen_t sixteens[SIXTEENS(dim)];                                                      \
        layer_t layer = parts_of(data, s);                                                      \
        const uint8_t *rows = layer.rows;                                                       \
        for (int64_t head = 0; head < s->heads; head++) {                                       \
            keys_t keys = keys_of(&layer, s, head, rows, low, step, codes, sixteens);           \
            for (int64_t i = 0; i < s->tokens; i++, k += s->k_dim) {                            \
                next_key(&keys, s->k_dim, bits, narrow, row);                                             \
                put_row_##type(row, s->k_dim, k);                                               \
            }                                                                                   \
            rows = keys.row;                                                                    \
        }                                                                                       \
        values_t values = {s, layer.steps, rows, codes};                                        \
        for (int64_t i = 0; i < s->heads * s->tokens; i++, v += s->v_dim) {                     \
            next_value(&values, s->v_dim, bits, narrow, row);                                             \
            put_row_##type(row, s->v_dim, v);                                                   \
        }                                                                                       \
    }                                                                                           \
    EXPORT int64_t unpack_##type(const uint8_t *data, int64_t nbytes, int64_t heads,            \
                                 int64_t tokens, int64_t k_dim, int64_t v_dim, int64_t bits,    \
                                 int64_t groups, int64_t parts, type##_t *k, type##_t *v) {     \
        shape_t s = {heads, tokens, k_dim, v_dim, bits, groups, parts};                         \
        int64_t needed = codes_nbytes(data, nbytes, &s);                                        \
        if (needed > nbytes) return needed;                                                     \
        if (bits == 8)                                                                          \
            unpack_as_##type(data, &s, 8, k, v);                                                \
        else                                                                                    \
            unpack_as_##type(data, &s, 4, k, v);                                                \
        return needed;                                                                          \
    }
UNPACK(f32, 0)
UNPACK(bf16, 1)
