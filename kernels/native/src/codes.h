/* Rows of codes of K and V to numbers. How they lie in a layer is said in docs/codecs.md.

   A row of 4-bit codes holds number j in the low half of byte j and number j + ceil(n / 2) in its
   high half; a row of 8-bit codes holds one a byte. Each product below is exact in float32, so that
   fusing it with a sum changes no bit. */
#ifndef KVRAG_CODES_H
#define KVRAG_CODES_H

#include "vec.h"

#define WIDE 16
#define WIDEST_BLOCK 64

typedef uint8_t u8x8 __attribute__((vector_size(8)));
typedef uint8_t u8x16 __attribute__((vector_size(WIDE)));

typedef struct {
    int64_t heads, tokens, k_dim, v_dim, bits, groups, parts;
} shape_t;

/* Sixteen channels of K, some of which have four more bits, and where those lie behind a row: for
   each the byte behind `low` whose low half it is, or the one behind `high` whose high half; 0x80 is
   neither. */
typedef struct {
    int64_t channel, low, high;
    uint8_t fine[WIDE], from_low[WIDE], from_high[WIDE];
} sixteen_t;

/* Numbers of K, a row after the other; `sixteens` are those with fine channels. */
typedef struct {
    const shape_t *shape;
    const bf16_t *scales; /* of the next group: low and step, k_dim each */
    const uint8_t *row;
    int64_t group, token, end, width;
    float *low, *step;
    uint8_t *codes;
    sixteen_t *sixteens;
    int64_t num_sixteens, overrun; /* whether more than a row may be read at its end */
} keys_t;

typedef struct {
    const shape_t *shape;
    const bf16_t *steps;
    const uint8_t *row;
    uint8_t *codes;
} values_t;

/* Where the parts of a layer begin. */
typedef struct {
    const bf16_t *scales, *steps;
    const uint8_t *masks, *rows;
} layer_t;

INLINE int64_t row_nbytes(int64_t numbers, int64_t bits) {
    return bits == 8 ? numbers : (numbers + 1) / 2;
}

INLINE int is_fine(const uint8_t *mask, int64_t channel) { return mask[channel / 8] >> channel % 8 & 1; }

INLINE int64_t count_fine(const uint8_t *mask, int64_t dim) {
    int64_t count = 0;
    for (int64_t j = 0; j < dim; j++) count += is_fine(mask, j);
    return count;
}

INLINE layer_t parts_of(const uint8_t *data, const shape_t *s) {
    layer_t layer = {.scales = (const bf16_t *)data};
    layer.steps = layer.scales + s->heads * s->groups * 2 * s->k_dim;
    layer.masks = (const uint8_t *)(layer.steps + s->heads * s->tokens * s->parts);
    layer.rows = layer.masks + s->heads * ((s->k_dim + 7) / 8);
    return layer;
}

INLINE int64_t v_nbytes(const shape_t *s) {
    return s->heads * s->tokens * row_nbytes(s->v_dim, s->bits);
}

INLINE int64_t k_width(const layer_t *layer, const shape_t *s, int64_t head) {
    int64_t fine = count_fine(layer->masks + head * ((s->k_dim + 7) / 8), s->k_dim);
    return row_nbytes(s->k_dim, s->bits) + row_nbytes(fine, 4);
}

/* The bytes that a layer takes, or as many of them as are known from `nbytes` that are too few. */
INLINE int64_t codes_nbytes(const uint8_t *data, int64_t nbytes, const shape_t *s) {
    layer_t layer = parts_of(data, s);
    int64_t needed = layer.rows - data + v_nbytes(s);
    if (needed > nbytes) return needed;
    for (int64_t head = 0; head < s->heads; head++) needed += s->tokens * k_width(&layer, s, head);
    return needed;
}

/* Bytes of `codes` of a row: a vector may begin at the last one. */
#define CODES_NBYTES(dim) ((dim) + WIDE + 1)
#define SIXTEENS(dim) (((dim) + WIDE - 1) / WIDE)

/* The rows of a head, which begin at `rows`. low, step: k_dim floats each; codes: CODES_NBYTES;
   sixteens: SIXTEENS. */
INLINE keys_t keys_of(const layer_t *layer, const shape_t *s, int64_t head, const uint8_t *rows,
                      float *low, float *step, uint8_t *codes, sixteen_t *sixteens) {
    const uint8_t *mask = layer->masks + head * ((s->k_dim + 7) / 8);
    int64_t lows = row_nbytes(count_fine(mask, s->k_dim), 4), rank = 0, count = 0;
    for (int64_t from = 0; from < s->k_dim; from += WIDE) {
        sixteen_t *x = sixteens + count;
        memset(x, 0, sizeof *x);
        memset(x->from_low, 0x80, sizeof x->from_low);
        memset(x->from_high, 0x80, sizeof x->from_high);
        int64_t before = rank;
        x->channel = from;
        x->low = rank < lows ? rank : 0;
        x->high = rank < lows ? 0 : rank - lows;
        for (int64_t i = 0; i < WIDE && from + i < s->k_dim; i++) {
            if (!is_fine(mask, from + i)) continue;
            x->fine[i] = 0xff;
            if (rank < lows)
                x->from_low[i] = (uint8_t)(rank - x->low);
            else
                x->from_high[i] = (uint8_t)(rank - lows - x->high);
            rank++;
        }
        count += rank > before;
    }
    return (keys_t){
        .shape = s, .scales = layer->scales + head * s->groups * 2 * s->k_dim, .row = rows,
        .width = k_width(layer, s, head), .low = low, .step = step, .codes = codes,
        .sixteens = sixteens, .num_sixteens = count, .overrun = v_nbytes(s) >= WIDE,
    };
}

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

/* To the nearest bfloat16, ties to even; numbers are finite. */
INLINE u32x8 rounded(u32x8 bits) { return (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000; }

INLINE float rounded_one(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE f32x8 narrowed(f32x8 x, int narrow) { return narrow ? (f32x8)rounded((u32x8)x) : x; }

/* The codes of one row, a byte each; those of 8 bits stay where they are. */
INLINE uint8_t *codes_of(const uint8_t *row, int64_t n, int64_t bits, uint8_t *codes) {
    if (bits == 8) return (uint8_t *)row;
    int64_t width = (n + 1) / 2, j = 0;
    for (; j + WIDE <= width; j += WIDE) {
        u8x16 x, low, high;
        memcpy(&x, row + j, sizeof x);
        low = x & 15;
        high = x >> 4;
        memcpy(codes + j, &low, sizeof low);
        memcpy(codes + width + j, &high, sizeof high);
    }
    for (; j < width; j++) {
        codes[j] = row[j] & 15;
        codes[width + j] = row[j] >> 4;
    }
    return codes;
}

/* Put four more bits, of those behind a row, under the codes of fine channels. */
INLINE void refine(const sixteen_t *x, const uint8_t *more, uint8_t *codes, int64_t overrun) {
#ifdef __AVX2__
    if (overrun) {
        const __m128i low_half = _mm_set1_epi8(15);
        __m128i low = _mm_loadu_si128((const __m128i *)(more + x->low));
        __m128i high = _mm_loadu_si128((const __m128i *)(more + x->high));
        high = _mm_and_si128(_mm_srli_epi16(high, 4), low_half);
        low = _mm_shuffle_epi8(_mm_and_si128(low, low_half), *(const __m128i_u *)x->from_low);
        high = _mm_shuffle_epi8(high, *(const __m128i_u *)x->from_high);
        __m128i code = _mm_loadu_si128((const __m128i *)(codes + x->channel));
        code = _mm_blendv_epi8(code, _mm_slli_epi16(code, 4), *(const __m128i_u *)x->fine);
        code = _mm_or_si128(code, _mm_or_si128(low, high));
        _mm_storeu_si128((__m128i *)(codes + x->channel), code);
        return;
    }
#endif
    uint8_t *code = codes + x->channel;
    for (int i = 0; i < WIDE; i++)
        if (x->fine[i])
            code[i] = (uint8_t)(code[i] << 4 | (x->from_low[i] < WIDE
                                                    ? more[x->low + x->from_low[i]] & 15
                                                    : more[x->high + x->from_high[i]] >> 4));
}

static void next_group(keys_t *k) {
    int64_t dim = k->shape->k_dim;
    for (int64_t j = 0; j < dim; j++) {
        k->low[j] = one_bf16(k->scales + j);
        k->step[j] = one_bf16(k->scales + dim + j);
    }
    k->scales += 2 * dim;
    k->end = ++k->group * k->shape->tokens / k->shape->groups;
}

/* The next row of a head of K. out: k_dim floats, each a bfloat16 if `narrow`. */
INLINE void next_key(keys_t *k, int64_t dim, int64_t bits, int narrow, float *out) {
    int64_t j = 0;
    if (k->token++ == k->end) next_group(k);
    uint8_t *codes = codes_of(k->row, dim, bits, k->codes);
    if (bits == 4)
        for (int64_t i = 0; i < k->num_sixteens; i++)
            refine(k->sixteens + i, k->row + row_nbytes(dim, 4), codes, k->overrun);
    k->row += k->width;
    for (; j + LANES <= dim; j += LANES) {
        f32x8 x = load_f32(k->low + j) + load_f32(k->step + j) * load_u8(codes + j);
        store_f32(out + j, narrowed(x, narrow));
    }
    for (; j < dim; j++) {
        float x = k->low[j] + k->step[j] * (float)codes[j];
        out[j] = narrow ? rounded_one(x) : x;
    }
}

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

/* The Hadamard transform of 64 codes less `middle`, times `step`: in registers as far as there are
   any. */
INLINE void values64(const uint8_t *codes, float middle, float step, int narrow, float *out) {
    f32x8 v[8], by = splat(step), less = splat(middle * step);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        f32x8 x = load_u8(codes + i * LANES) * by - less;
        v[i] = butterfly(butterfly(butterfly(x, 1), 2), 4);
    }
#pragma GCC unroll 3
    for (int h = 1; h < 8; h *= 2)
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++)
            if (!(i & h)) {
                f32x8 a = v[i], b = v[i + h];
                v[i] = a + b;
                v[i + h] = a - b;
            }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) store_f32(out + i * LANES, narrowed(v[i], narrow));
}

/* The same of `block` codes, any power of two. */
INLINE void values_by(const uint8_t *codes, float middle, float step, int narrow, int64_t block,
                      float *out) {
    for (int64_t j = 0; j < block; j++) out[j] = ((float)codes[j] - middle) * step;
    for (int64_t h = 1; h < block; h *= 2)
        for (int64_t i = 0; i < block; i++)
            if (!(i & h)) {
                float a = out[i], b = out[i + h];
                out[i] = a + b;
                out[i + h] = a - b;
            }
    if (narrow)
        for (int64_t j = 0; j < block; j++) out[j] = rounded_one(out[j]);
}

/* The next row of V, of any head. out: v_dim floats, each a bfloat16 if `narrow`. */
INLINE void next_value(values_t *v, int64_t dim, int64_t bits, int narrow, float *out) {
    const shape_t *s = v->shape;
    const uint8_t *codes = codes_of(v->row, dim, bits, v->codes);
    int64_t part = dim / s->parts, block = part & -part;
    float middle = bits == 8 ? 127.5f : 7.5f;
    if (block > WIDEST_BLOCK) block = WIDEST_BLOCK;
    for (int64_t j = 0, p = 0; p < s->parts; p++) {
        float step = one_bf16(v->steps++) / (float)block;
        for (int64_t end = j + part; j < end; j += block)
            if (block == WIDEST_BLOCK)
                values64(codes + j, middle, step, narrow, out + j);
            else
                values_by(codes + j, middle, step, narrow, block, out + j);
    }
    v->row += row_nbytes(dim, bits);
}

#endif
