/* One token of one head. out may be x: both halves are read before either is written. */
INLINE void NAMED(turn)(const ELEM *x, const float *cos, const float *sin, int64_t rotary,
                        float *out) {
    int64_t half = rotary / 2, j = 0;
    for (; j + LANES <= half; j += LANES) {
        f32x8 a = LOAD(x + j), b = LOAD(x + half + j);
        store_f32(out + j, a * load_f32(cos + j) + b * load_f32(sin + j));
        store_f32(out + half + j, b * load_f32(cos + half + j) + a * load_f32(sin + half + j));
    }
    for (; j < half; j++) {
        float a = ONE(x + j), b = ONE(x + half + j);
        out[j] = a * cos[j] + b * sin[j];
        out[half + j] = b * cos[half + j] + a * sin[half + j];
    }
}

INLINE void NAMED(widen)(const ELEM *x, int64_t n, float *out) {
    int64_t j = 0;
    for (; j + LANES <= n; j += LANES) store_f32(out + j, LOAD(x + j));
    for (; j < n; j++) out[j] = ONE(x + j);
}

static void NAMED(put)(const chunk_t *c, const placed_t *p) {
    for (int64_t head = 0; head < p->heads; head++)
        for (int64_t i = 0; i < c->n; i++) {
            int64_t at = c->start + i;
            const ELEM *k = (const ELEM *)c->k + head * c->k_head + i * c->k_token;
            float *out = p->k + head * p->k_head + at * p->k_token;
            if (p->rotary)
                NAMED(turn)(k, p->cos + at * p->rotary, p->sin + at * p->rotary, p->rotary, out);
            NAMED(widen)(k + p->rotary, p->dim - p->rotary, out + p->rotary);
            NAMED(widen)((const ELEM *)c->v + head * c->v_head + i * c->v_token, p->dim,
                         p->v + head * p->v_head + at * p->v_token);
        }
}

/* x: (heads, n, dim); token i is turned to position at[i], or start + i without `at`. out: (heads,
   capacity, dim), where it goes to that position, or (heads, n, dim) if `packed`. cos, sin:
   (positions, rotary), contiguous; rotary 0 widens alone. */
EXPORT void NAMED(rotate_into)(const ELEM *x, int64_t heads, int64_t n, int64_t dim,
                               int64_t x_head, int64_t x_token, const float *cos,
                               const float *sin, int64_t rotary, const int64_t *at,
                               int64_t start, float *out, int64_t out_head, int64_t out_token,
                               int packed, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < heads * n; row++) {
        int64_t head = row / n, token = row % n, position = at ? at[token] : start + token;
        const ELEM *from = x + head * x_head + token * x_token;
        float *to = out + head * out_head + (packed ? token : position) * out_token;
        if (rotary)
            NAMED(turn)(from, cos + position * rotary, sin + position * rotary, rotary, to);
        if (rotary < dim && (const void *)(from + rotary) != (const void *)(to + rotary))
            NAMED(widen)(from + rotary, dim - rotary, to + rotary);
    }
}
