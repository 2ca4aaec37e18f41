/* Attention of one query row a sequence: decoding.

   K and V are read once, in pieces of PIECE keys whose bounds depend on the sequence alone. Each
   piece has a softmax of its own; `combine` weighs them. So the result depends on no thread count.
   The rows of a query group go through a piece together, four at a time. */
#include "exported.h"

#define PIECE 256
#define MOST_ROWS 4
/* Keys whose values stay in the innermost cache while all dimensions are mixed. */
#define MIXED 16
/* Keys that are fetched early. */
#define AHEAD 8
/* A part of a row's state is its greatest score, its sum, and its mixed values. */
#define STATE(dim) ((dim) + 2)

/* The scores x[0 .. n - 1] of one row become their softmax over this piece, undivided. `x` has room
   for whole vectors, which -inf fills up. */
INLINE void weigh(float *x, int64_t n, float scale, float *top, float *total) {
    for (int64_t j = n; j % LANES; j++) x[j] = -__builtin_inff();
    f32x8 m = load_f32(x), sums = splat(0);
    for (int64_t j = LANES; j < n; j += LANES) {
        f32x8 s = load_f32(x + j);
        m = choose(s > m, s, m);
    }
    float lanes[LANES], greatest;
    store_f32(lanes, m);
    greatest = lanes[0];
    for (int i = 1; i < LANES; i++) greatest = lanes[i] > greatest ? lanes[i] : greatest;
    /* A piece of nothing but -inf weighs 0. */
    f32x8 below = splat(greatest == -__builtin_inff() ? 0 : greatest);
    for (int64_t j = 0; j < n; j += LANES) {
        f32x8 e = exp2_f32((load_f32(x + j) - below) * splat(scale * LOG2_E));
        store_f32(x + j, e);
        sums += e;
    }
    *top = greatest * scale;
    *total = sum(sums);
}

/* Scores of `rows` query rows with `keys` keys. Both are constants; dim is not. */
INLINE void dots(int rows, int keys, const float *q, int64_t dim, const float *k, int64_t token,
                 float *scores) {
    f32x8 acc[MOST_ROWS][4];
#pragma GCC unroll 4
    for (int g = 0; g < rows; g++)
#pragma GCC unroll 4
        for (int j = 0; j < keys; j++) acc[g][j] = splat(0);
    int64_t d = 0;
    for (; d + LANES <= dim; d += LANES) {
        if (d % 16 == 0)
            for (int j = 0; j < keys; j++) __builtin_prefetch(k + (j + AHEAD) * token + d);
        f32x8 key[4];
#pragma GCC unroll 4
        for (int j = 0; j < keys; j++) key[j] = load_f32(k + j * token + d);
#pragma GCC unroll 4
        for (int g = 0; g < rows; g++) {
            f32x8 query = load_f32(q + g * dim + d);
#pragma GCC unroll 4
            for (int j = 0; j < keys; j++) acc[g][j] += query * key[j];
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < rows; g++) {
        if (keys == 4) sum4(acc[g], scores + g * PIECE);
        else
            for (int j = 0; j < keys; j++) scores[g * PIECE + j] = sum(acc[g][j]);
    }
    if (d < dim)
        for (int g = 0; g < rows; g++)
            for (int j = 0; j < keys; j++)
                for (int64_t rest = d; rest < dim; rest++)
                    scores[g * PIECE + j] += q[g * dim + rest] * k[j * token + rest];
}

/* mixed[g][d .. ] += sum_j weights[g][j] * v[j][d .. ] for `width` vectors of d. Meanwhile the
   first `fetched` numbers of later keys are fetched: what this leaves out, the next call reads. */
INLINE void mix(int rows, int width, const float *weights, const float *v, int64_t token, int64_t n,
                int64_t fetched, float *mixed, int64_t state) {
    f32x8 acc[MOST_ROWS][4];
#pragma GCC unroll 4
    for (int g = 0; g < rows; g++)
#pragma GCC unroll 4
        for (int w = 0; w < width; w++) acc[g][w] = load_f32(mixed + g * state + w * LANES);
    for (int64_t j = 0; j < n; j++) {
        for (int64_t d = 0; d < fetched; d += 16) __builtin_prefetch(v + (j + AHEAD) * token + d);
        f32x8 value[4];
#pragma GCC unroll 4
        for (int w = 0; w < width; w++) value[w] = load_f32(v + j * token + w * LANES);
#pragma GCC unroll 4
        for (int g = 0; g < rows; g++) {
            f32x8 weight = splat(weights[g * PIECE + j]);
#pragma GCC unroll 4
            for (int w = 0; w < width; w++) acc[g][w] += weight * value[w];
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < rows; g++)
#pragma GCC unroll 4
        for (int w = 0; w < width; w++) store_f32(mixed + g * state + w * LANES, acc[g][w]);
}

/* The states of `rows` query rows after one piece of n keys. */
INLINE void piece(int rows, const float *q, int64_t dim, const float *k, int64_t k_token,
                  const float *v, int64_t v_token, int64_t n, float scale, float *states) {
    float scores[MOST_ROWS * PIECE];
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) dots(rows, 4, q, dim, k + j * k_token, k_token, scores + j);
    for (; j < n; j++) dots(rows, 1, q, dim, k + j * k_token, k_token, scores + j);
    int64_t state = STATE(dim);
    for (int g = 0; g < rows; g++)
        weigh(scores + g * PIECE, n, scale, states + g * state, states + g * state + 1);
    for (int g = 0; g < rows; g++)
        memset(states + g * state + 2, 0, (size_t)dim * sizeof *states);
    for (j = 0; j < n; j += MIXED) {
        const float *weights = scores + j, *values = v + j * v_token;
        int64_t count = n - j < MIXED ? n - j : MIXED, d = 0;
#define MIX(width) \
    mix(rows, width, weights, values + d, v_token, count, d ? 0 : dim, states + 2 + d, state)
        for (; d + 4 * LANES <= dim; d += 4 * LANES) MIX(4);
        for (; d + LANES <= dim; d += LANES) MIX(1);
#undef MIX
        for (; d < dim; d++)
            for (int g = 0; g < rows; g++)
                for (int64_t i = 0; i < count; i++)
                    states[g * state + 2 + d] += weights[g * PIECE + i] * values[i * v_token + d];
    }
}

EXPORT const int64_t decode_piece = PIECE;

/* One query row out of the states of its pieces, which are `apart` from one another. */
static void combine(const float *states, int64_t pieces, int64_t apart, int64_t dim, float *out) {
    float top = states[0], total = 0;
    for (int64_t p = 1; p < pieces; p++)
        top = states[p * apart] > top ? states[p * apart] : top;
    for (int64_t d = 0; d < dim; d++) out[d] = 0;
    for (int64_t p = 0; p < pieces; p++) {
        const float *part = states + p * apart;
        float weight = exp2_f32(splat((part[0] - top) * LOG2_E))[0];
        total += weight * part[1];
        for (int64_t d = 0; d < dim; d++) out[d] += weight * part[2 + d];
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= total;
}

/* q, out: (sequences, heads, dim), contiguous. Sequence s sees the keys first[s] .. end[s] - 1 of
   k[s] and v[s], whose heads and tokens are strides[4 s ..] apart: k's heads, k's tokens, v's
   heads, v's tokens. states: (pieces[sequences], heads, STATE(dim)); pieces[s] counts the pieces
   of the sequences before s. */
EXPORT void decode(const float *q, int64_t sequences, int64_t heads, int64_t kv_heads, int64_t dim,
                   const float *const *k, const float *const *v, const int64_t *strides,
                   const int64_t *first, const int64_t *end, const int64_t *pieces, float scale,
                   float *states, float *out, int threads) {
    int64_t group = heads / kv_heads, state = STATE(dim);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < pieces[sequences] * kv_heads; task++) {
        int64_t part = task / kv_heads, head = task % kv_heads, s = 0;
        while (pieces[s + 1] <= part) s++;
        int64_t from = first[s] + (part - pieces[s]) * PIECE;
        int64_t n = end[s] - from < PIECE ? end[s] - from : PIECE;
        const int64_t *apart = strides + 4 * s;
        for (int64_t g = 0; g < group; g += MOST_ROWS) {
            int64_t row = head * group + g;
#define PIECE_OF(rows)                                                                          \
    piece(rows, q + (s * heads + row) * dim, dim, k[s] + head * apart[0] + from * apart[1],     \
          apart[1], v[s] + head * apart[2] + from * apart[3], apart[3], n, scale,               \
          states + (part * heads + row) * state)
            switch (group - g) {
                case 1: PIECE_OF(1); break;
                case 2: PIECE_OF(2); break;
                case 3: PIECE_OF(3); break;
                default: PIECE_OF(4);
            }
#undef PIECE_OF
        }
    }
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t row = 0; row < heads; row++)
            combine(states + (pieces[s] * heads + row) * state, pieces[s + 1] - pieces[s],
                    heads * state, dim, out + (s * heads + row) * dim);
}
