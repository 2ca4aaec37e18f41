/* What a layer does to its rows: all in one call, or before and behind attention in one each.

   Between the products little happens, but from Python each piece costs some microseconds, which is
   as much as few rows take to compute. The structures below are mirrored in row_layer.py. */
#include "exported.h"

typedef struct {
    int64_t f16;        /* or bf16 */
    const void *panels; /* see gemm.c */
    const float *bias;  /* or NULL */
    int64_t inputs, outputs;
} packed_t;

typedef struct {
    norm_t before_attention, q_norm, k_norm, after_attention, before_mlp, after_mlp;
    packed_t qkv, output, gate_up, down;
    int64_t hidden, q_size, kv_size, dim, mlp, gelu, least_shared;
    int64_t window; /* or 0 */
    float norm_eps, attention_scale, residual_scale;
} row_layer_t;

static int shared(const row_layer_t *l, int64_t numbers, int threads) {
    return numbers < l->least_shared ? 1 : threads;
}

/* y: (n, outputs) */
static void multiply(const row_layer_t *l, const packed_t *p, const float *x, int64_t n, float *y,
                     int threads) {
    threads = shared(l, p->inputs * p->outputs, threads);
    if (p->f16)
        gemm_f16(x, n, p->inputs, p->panels, p->inputs, p->outputs, p->bias, y, threads);
    else
        gemm_bf16(x, n, p->inputs, p->panels, p->inputs, p->outputs, p->bias, y, threads);
}

/* The norm of rows (n, hidden) in `out`; without a norm `x` itself. */
static const float *normed(const row_layer_t *l, const norm_t *norm, const float *x, int64_t n,
                           float *out, int threads) {
    if (!norm->weight) return x;
    rms_norm(x, n, l->hidden, l->hidden, norm->weight, l->norm_eps, out, l->hidden,
             shared(l, n * l->hidden, threads));
    return out;
}

/* Of `size` numbers of each row of qkv, at `x`: a norm of one head or of all. */
static void normed_heads(const row_layer_t *l, const norm_t *norm, float *x, int64_t n,
                         int64_t size, int threads) {
    if (!norm->weight) return;
    int64_t row = l->qkv.outputs;
    threads = shared(l, n * size, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++)
        rms_norm(x + i * row, size / norm->size, norm->size, norm->size, norm->weight, l->norm_eps,
                 x + i * row, norm->size, 1);
}

/* x: (n, hidden); qkv: (n, q_size + 2 kv_size). scratch: n hidden numbers. */
EXPORT void project_rows(const row_layer_t *l, const float *x, int64_t n, float *qkv,
                         float *scratch, int threads) {
    const float *rows = normed(l, &l->before_attention, x, n, scratch, threads);
    multiply(l, &l->qkv, rows, n, qkv, threads);
    normed_heads(l, &l->q_norm, qkv, n, l->q_size, threads);
    normed_heads(l, &l->k_norm, qkv + l->q_size, n, l->kv_size, threads);
}

/* out = x + residual_scale * part; out may be x. */
static void add(const row_layer_t *l, const norm_t *norm, const float *x, float *part, int64_t n,
                float *out, int threads) {
    const float *added = normed(l, norm, part, n, part, threads);
    threads = shared(l, n * l->hidden, threads);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n * l->hidden; i++) out[i] = x[i] + l->residual_scale * added[i];
}

/* x, out: (n, hidden); mixed: (n, q_size), what attention gave. `most` rows go through the MLP
   together. scratch: min(n, most) (hidden + 3 mlp) numbers. */
EXPORT void finish_rows(const row_layer_t *l, const float *x, const float *mixed, int64_t n,
                        int64_t most, float *out, float *scratch, int threads) {
    for (int64_t from = 0; from < n; from += most) {
        int64_t rows = n - from < most ? n - from : most;
        const float *before = x + from * l->hidden;
        float *after = out + from * l->hidden;
        float *part = scratch, *gate_up = part + rows * l->hidden;
        float *gated = gate_up + 2 * rows * l->mlp;
        multiply(l, &l->output, mixed + from * l->q_size, rows, part, threads);
        add(l, &l->after_attention, before, part, rows, after, threads);
        multiply(l, &l->gate_up, normed(l, &l->before_mlp, after, rows, part, threads), rows,
                 gate_up, threads);
        (l->gelu ? gated_gelu_tanh : gated_silu)(gate_up, rows, l->mlp, 2 * l->mlp, gated, l->mlp,
                                                 shared(l, 2 * rows * l->mlp, threads));
        multiply(l, &l->down, gated, rows, part, threads);
        add(l, &l->after_mlp, after, part, rows, after, threads);
    }
}

/* Numbers of scratch that `advance_rows` needs. */
EXPORT int64_t advance_scratch(const row_layer_t *l, int64_t n, int64_t most, int threads) {
    int64_t attention = attend_scratch(n, l->q_size / l->dim, l->kv_size / l->dim, l->dim, 0,
                                       threads);
    int64_t finishing = (n < most ? n : most) * (l->hidden + 3 * l->mlp);
    int64_t parts[3] = {n * l->hidden, attention, finishing}, room = 0;
    for (int i = 0; i < 3; i++) room = parts[i] > room ? parts[i] : room;
    int64_t bounds = 2 * n * (int64_t)(sizeof(int64_t) / sizeof(float));
    return bounds + n * (l->qkv.outputs + l->q_size) + room;
}

/* Rows x at the positions `at`, which ascend, through the whole layer. Their K, rotated if `rotary`
   is not 0, and V go into k and v, (kv_heads, positions, dim) with last dimensions contiguous, over
   which they attend then. cos, sin: (positions, rotary). out: (n, hidden). most: see `finish_rows`.
   0, and nothing is done, where a position is not below `reach` or does not ascend. */
EXPORT int64_t advance_rows(const row_layer_t *l, const float *x, int64_t n, const int64_t *at,
                            int64_t reach, const float *cos, const float *sin, int64_t rotary,
                            float *k, int64_t k_head, int64_t k_token, float *v, int64_t v_head,
                            int64_t v_token, int64_t most, float *out, float *scratch,
                            int threads) {
    for (int64_t i = 0; i < n; i++)
        if (at[i] < (i ? at[i - 1] : 0) || at[i] >= reach) return 0;
    const int64_t dim = l->dim, heads = l->q_size / dim, kv_heads = l->kv_size / dim;
    const int64_t row = l->qkv.outputs;
    int64_t *first = (int64_t *)scratch, *last = first + n;
    float *q = (float *)(last + n), *own_k = q + l->q_size, *own_v = own_k + l->kv_size;
    float *mixed = q + n * row, *room = mixed + n * l->q_size;

    project_rows(l, x, n, q, room, threads);
    int few = shared(l, n * l->kv_size, threads);
    if (rotary)
        rotate_into_f32((const f32_t *)q, heads, n, dim, dim, row, cos, sin, rotary, at, 0, q, dim,
                        row, 1, shared(l, n * l->q_size, threads));
    rotate_into_f32((const f32_t *)own_k, kv_heads, n, dim, dim, row, cos, sin, rotary, at, 0, k,
                    k_head, k_token, 0, few);
    rotate_into_f32((const f32_t *)own_v, kv_heads, n, dim, dim, row, NULL, NULL, 0, at, 0, v,
                    v_head, v_token, 0, few);

    const int64_t strides[6] = {dim, row, k_head, k_token, v_head, v_token};
    for (int64_t i = 0; i < n; i++) {
        last[i] = at[i] + 1;
        first[i] = l->window && last[i] > l->window ? last[i] - l->window : 0;
    }
    /* Windows of neighbours touch: keys that no row sees may be undefined, and 0 * NaN is NaN. */
    for (int64_t from = 0, to; from < n; from = to) {
        for (to = from + 1; to < n && (!l->window || at[to] - at[to - 1] <= l->window);) to++;
        int64_t seen = last[to - 1] - first[from];
        attend(q + from * row, k, v, strides, to - from, heads, kv_heads, dim, first + from,
               last + from, l->attention_scale, 0, 0, NULL, room, mixed + from * l->q_size,
               shared(l, 2 * l->kv_size * seen, threads));
    }
    finish_rows(l, x, mixed, n, most, out, room, threads);
    return 1;
}
