/* What a layer does to its rows before and behind attention, each in one call.

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
    int64_t hidden, q_size, kv_size, mlp, gelu, least_shared;
    float norm_eps, residual_scale;
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
