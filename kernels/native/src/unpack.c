/* One layer of codes of K and V to numbers. How they lie in it is said in docs/codecs.md.

   A row of 4-bit codes holds number j in the low half of byte j and number j + ceil(n / 2) in its
   high half; a row of 8-bit codes holds one a byte. */
#include "vec.h"

typedef uint8_t u8x8 __attribute__((vector_size(8)));

/* Eight bytes, each in a float lane. */
INLINE f32x8 load_u8(const uint8_t *p) {
#ifdef __AVX2__
    return (f32x8)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
    u8x8 x;
    memcpy(&x, p, sizeof x);
    return __builtin_convertvector(x, f32x8);
#endif
}

INLINE void store_one_f32(f32_t *p, float x) { *p = x; }

/* To the nearest, ties to even; numbers are finite. */
INLINE uint32_t rounded(uint32_t bits) { return (bits + 0x7fff + (bits >> 16 & 1)) >> 16; }

INLINE void store_one_bf16(bf16_t *p, float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    p->bits = (uint16_t)rounded(bits);
}

INLINE void store_bf16(bf16_t *p, f32x8 x) {
    u32x8 bits = (u32x8)x;
    bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#ifdef __AVX2__
    __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
    __m128i whole = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
    _mm_storeu_si128((__m128i *)p, whole);
#else
    u16x8 narrow = __builtin_convertvector(bits, u16x8);
    memcpy(p, &narrow, sizeof narrow);
#endif
}

/* The codes of one row, a byte each; those of 8 bits stay where they are. */
INLINE const uint8_t *codes_of(const uint8_t *row, int64_t n, int bits, uint8_t *codes) {
    if (bits == 8) return row;
    int64_t width = (n + 1) / 2;
    for (int64_t j = 0; j < width; j++) codes[j] = row[j] & 15;
    for (int64_t j = width; j < n; j++) codes[j] = row[j - width] >> 4;
    return codes;
}

/* One head. rows: (tokens, width); scales: (groups, 2, dim), low and step; fine: the channels that
   have four more bits, which stand behind the row. scratch: 2 dim floats and 2 dim bytes. */
#define KEYS(type)                                                                              \
    INLINE void keys_##type(const uint8_t *rows, int64_t tokens, int64_t dim, int bits,         \
                            const bf16_t *scales, int64_t groups, const int32_t *fine,          \
                            int64_t num_fine, type##_t *out, float *scratch) {                  \
        float *low = scratch, *step = scratch + dim;                                            \
        uint8_t *codes = (uint8_t *)(scratch + 2 * dim), *more = codes + dim;                   \
        int64_t base = bits == 8 ? dim : (dim + 1) / 2, width = base + (num_fine + 1) / 2;      \
        for (int64_t group = 0, token = 0; group < groups; group++) {                           \
            const bf16_t *scale = scales + group * 2 * dim;                                     \
            for (int64_t j = 0; j < dim; j++) {                                                 \
                low[j] = one_bf16(scale + j);                                                   \
                step[j] = one_bf16(scale + dim + j);                                            \
            }                                                                                   \
            for (int64_t end = (group + 1) * tokens / groups; token < end; token++) {           \
                const uint8_t *row = rows + token * width;                                      \
                const uint8_t *code = codes_of(row, dim, bits, codes);                          \
                if (num_fine) {                                                                 \
                    codes_of(row + base, num_fine, 4, more);                                    \
                    for (int64_t i = 0; i < num_fine; i++)                                      \
                        codes[fine[i]] = (uint8_t)(codes[fine[i]] << 4 | more[i]);              \
                }                                                                               \
                type##_t *to = out + token * dim;                                               \
                int64_t j = 0;                                                                  \
                for (; j + LANES <= dim; j += LANES)                                            \
                    store_##type(to + j,                                                        \
                                 load_f32(low + j) + load_f32(step + j) * load_u8(code + j));   \
                for (; j < dim; j++) store_one_##type(to + j, low[j] + step[j] * (float)code[j]); \
            }                                                                                   \
        }                                                                                       \
    }
KEYS(f32)
KEYS(bf16)

/* Sums and differences of lanes `h` apart, h below LANES. */
INLINE f32x8 butterfly(f32x8 x, int h) {
    f32x8 other, sign;
    if (h == 1) {
        other = SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
        sign = (f32x8){1, -1, 1, -1, 1, -1, 1, -1};
    } else if (h == 2) {
        other = SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
        sign = (f32x8){1, 1, -1, -1, 1, 1, -1, -1};
    } else {
        other = SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
        sign = (f32x8){1, 1, 1, 1, -1, -1, -1, -1};
    }
    return x * sign + other;
}

/* The Hadamard transform of 64 numbers, which stay in registers as far as there are any. */
INLINE void hadamard64(float *x) {
    f32x8 v[8];
    for (int i = 0; i < 8; i++)
        v[i] = butterfly(butterfly(butterfly(load_f32(x + i * LANES), 1), 2), 4);
#pragma GCC unroll 3
    for (int h = 1; h < 8; h *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (!(i & h)) {
                f32x8 a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
    for (int i = 0; i < 8; i++) store_f32(x + i * LANES, v[i]);
}

/* The same of any power of two. */
INLINE void hadamard(float *x, int64_t block) {
    if (block == 64) {
        hadamard64(x);
        return;
    }
    for (int64_t h = 1; h < block; h *= 2)
        for (int64_t i = 0; i < block; i++)
            if (!(i & h)) {
                float a = x[i], b = x[i + h];
                x[i] = a + b;
                x[i + h] = a - b;
            }
}

/* rows: (n, width); steps: (n, parts). scratch: dim floats and dim bytes. */
#define VALUES(type)                                                                            \
    INLINE void values_##type(const uint8_t *rows, int64_t n, int64_t dim, int bits,            \
                              const bf16_t *steps, int64_t parts, int64_t block,                \
                              type##_t *out, float *scratch) {                                  \
        uint8_t *codes = (uint8_t *)(scratch + dim);                                            \
        int64_t width = bits == 8 ? dim : (dim + 1) / 2, part = parts ? dim / parts : 0;        \
        float middle = bits == 8 ? 127.5f : 7.5f, share = 1.0f / (float)block;                  \
        for (int64_t row = 0; row < n; row++) {                                                 \
            const uint8_t *code = codes_of(rows + row * width, dim, bits, codes);               \
            type##_t *to = out + row * dim;                                                     \
            for (int64_t p = 0; p < parts; p++) {                                               \
                float step = one_bf16(steps + row * parts + p) * share;                         \
                int64_t j = p * part, end = j + part;                                           \
                for (; j + LANES <= end; j += LANES)                                            \
                    store_f32(scratch + j, (load_u8(code + j) - middle) * step);                \
                for (; j < end; j++) scratch[j] = ((float)code[j] - middle) * step;             \
                for (j = p * part; j < end; j += block) hadamard(scratch + j, block);           \
            }                                                                                   \
            int64_t j = 0;                                                                      \
            for (; j + LANES <= dim; j += LANES) store_##type(to + j, load_f32(scratch + j));   \
            for (; j < dim; j++) store_one_##type(to + j, scratch[j]);                          \
        }                                                                                       \
    }
VALUES(f32)
VALUES(bf16)

/* The channels of a head's mask, ascending, into `fine`; returns how many. */
INLINE int64_t channels(const uint8_t *mask, int64_t dim, int32_t *fine) {
    int64_t count = 0;
    for (int64_t j = 0; j < dim; j++)
        if (mask[j / 8] >> j % 8 & 1) fine[count++] = (int32_t)j;
    return count;
}

/* k: (heads, tokens, k_dim), v: (heads, tokens, v_dim), contiguous. scratch: 4 floats for each of
   the larger dimension. Returns the bytes that the layer takes; if those are more than `nbytes`, k and v
   stay as they were. */
#define LAYER(type)                                                                             \
    EXPORT int64_t unpack_##type(const uint8_t *layer, int64_t nbytes, int64_t heads,           \
                                 int64_t tokens, int64_t k_dim, int64_t v_dim, int bits,        \
                                 int64_t groups, int64_t parts, int64_t block, type##_t *k,     \
                                 type##_t *v, float *scratch) {                                 \
        const bf16_t *scales = (const bf16_t *)layer;                                           \
        const bf16_t *steps = scales + heads * groups * 2 * k_dim;                              \
        const uint8_t *masks = (const uint8_t *)(steps + heads * tokens * parts);               \
        int64_t mask_width = (k_dim + 7) / 8, base = bits == 8 ? k_dim : (k_dim + 1) / 2;       \
        const uint8_t *rows = masks + heads * mask_width;                                       \
        int64_t v_nbytes = heads * tokens * (bits == 8 ? v_dim : (v_dim + 1) / 2);              \
        int64_t needed = rows - layer + v_nbytes;                                               \
        int32_t *fine = (int32_t *)(scratch + 3 * k_dim);                                       \
        if (rows - layer > nbytes) return needed;                                               \
        for (int64_t head = 0; head < heads; head++)                                            \
            needed += tokens * (base + (channels(masks + head * mask_width, k_dim, fine) + 1) / 2); \
        if (needed > nbytes) return needed;                                                     \
        for (int64_t head = 0; head < heads; head++) {                                          \
            int64_t count = channels(masks + head * mask_width, k_dim, fine);                   \
            keys_##type(rows, tokens, k_dim, bits, scales + head * groups * 2 * k_dim, groups,  \
                        fine, count, k + head * tokens * k_dim, scratch);                       \
            rows += tokens * (base + (count + 1) / 2);                                          \
        }                                                                                       \
        values_##type(rows, heads * tokens, v_dim, bits, steps, parts, block, v, scratch);      \
        return needed;                                                                          \
    }
LAYER(f32)
LAYER(bf16)
