/* One row through all layers of a transformer: a step of decoding in one call.

   Between the kernels of the other files little happens, but from Python each of them costs as much
   again as it takes to run. The structures below are mirrored in layers.py. */
#include "exported.h"

enum { F32, BF16, F16, I8 };

typedef struct {
    int64_t kind;
    const void *weight;  /* (outputs, inputs), of that kind */
    const float *scales; /* of int8 weights, one for `group` inputs of an output */
    const float *bias;   /* or NULL */
    int64_t inputs, outputs;
} product_t;

typedef struct {
    norm_t before_attention, q_norm, k_norm, after_attention, before_mlp, after_mlp;
    product_t q, k, v, output, gate, up, down;
    int64_t rope;   /* which table, or -1 */
    int64_t window; /* or 0 */
} layer_t;

typedef struct {
    int64_t num_layers, hidden, heads, kv_heads, dim, mlp, gelu, group, least_shared;
    float norm_eps, attention_scale, residual_scale;
} model_t;

typedef struct {
    const float *cos, *sin;
    int64_t rotary;
} table_t;

static int shared(const model_t *m, int64_t numbers, int threads) {
    return numbers < m->least_shared ? 1 : threads;
}

static void multiply(const model_t *m, const product_t *p, const float *x, float *y, int threads) {
    threads = shared(m, p->inputs * p->outputs, threads);
    switch (p->kind) {
        case F32: gemv_f32(x, p->weight, p->inputs, p->outputs, p->bias, y, threads); break;
        case BF16: gemv_bf16(x, p->weight, p->inputs, p->outputs, p->bias, y, threads); break;
        case F16: gemv_f16(x, p->weight, p->inputs, p->outputs, p->bias, y, threads); break;
        default:
            gemv_i8(x, p->weight, p->scales, p->inputs, p->outputs, m->group, p->bias, y, threads);
    }
}

/* The norm of `count` numbers, `norm->size` at a time, in `out`; without a norm `x` itself. */
static const float *normed(const model_t *m, const norm_t *norm, const float *x, int64_t count,
                           float *out) {
    if (!norm->weight) return x;
    rms_norm(x, count / norm->size, norm->size, norm->size, norm->weight, m->norm_eps, out,
             norm->size, 1);
    return out;
}

static void add(const model_t *m, const norm_t *norm, float *part, float *x) {
    const float *added = normed(m, norm, part, m->hidden, part);
    for (int64_t i = 0; i < m->hidden; i++) x[i] += m->residual_scale * added[i];
}

/* q becomes what its heads gather from the positions that it sees. k and v: (kv_heads, capacity,
   dim), the row's own at `position` included. */
static void attend_alone(const model_t *m, const layer_t *l, const float *q, const float *k,
                         const float *v, int64_t capacity, int64_t position, float *states,
                         float *out, int threads) {
    int64_t head = capacity * m->dim, end = position + 1;
    int64_t first = l->window && end > l->window ? end - l->window : 0;
    int64_t strides[4] = {head, m->dim, head, m->dim};
    int64_t pieces[2] = {0, (end - first + decode_piece - 1) / decode_piece};
    decode(q, 1, m->heads, m->kv_heads, m->dim, &k, &v, strides, &first, &end, pieces,
           m->attention_scale, states, out,
           shared(m, 2 * m->kv_heads * m->dim * (end - first), threads));
}

/* x: (hidden), changed in place. kv: (num_layers, 2, kv_heads, capacity, dim); K, rotated, and V of
   the row are written to `position`. scratch: `2 hidden + (2 heads + 2 kv_heads) dim + 3 mlp`
   numbers, then the states of decode.c for all positions. */
EXPORT void layers(const model_t *m, const layer_t *all, const table_t *tables, float *x, float *kv,
                   int64_t capacity, int64_t position, float *scratch, int threads) {
    const int64_t dim = m->dim, q_size = m->heads * dim, kv_size = m->kv_heads * dim;
    const int64_t head = capacity * dim;
    float *room = scratch, *part = room + m->hidden, *q = part + m->hidden, *k = q + q_size,
          *v = k + kv_size, *mixed = v + kv_size, *gate_up = mixed + q_size,
          *gated = gate_up + 2 * m->mlp, *states = gated + m->mlp;
    for (int64_t index = 0; index < m->num_layers; index++) {
        const layer_t *l = all + index;
        float *into_k = kv + 2 * index * m->kv_heads * head, *into_v = into_k + m->kv_heads * head;

        const float *row = normed(m, &l->before_attention, x, m->hidden, room);
        multiply(m, &l->q, row, q, threads);
        multiply(m, &l->k, row, k, threads);
        multiply(m, &l->v, row, v, threads);
        normed(m, &l->q_norm, q, q_size, q);
        normed(m, &l->k_norm, k, kv_size, k);
        table_t turn = {0};
        if (l->rope >= 0) {
            turn = tables[l->rope];
            rotate_into_f32((const f32_t *)q, m->heads, 1, dim, dim, dim, turn.cos, turn.sin,
                            turn.rotary, NULL, position, q, dim, 0, 0, 1);
        }
        rotate_into_f32((const f32_t *)k, m->kv_heads, 1, dim, dim, dim, turn.cos, turn.sin,
                        turn.rotary, NULL, position, into_k, head, dim, 0, 1);
        rotate_into_f32((const f32_t *)v, m->kv_heads, 1, dim, dim, dim, NULL, NULL, 0, NULL,
                        position, into_v, head, dim, 0, 1);

        attend_alone(m, l, q, into_k, into_v, capacity, position, states, mixed, threads);
        multiply(m, &l->output, mixed, part, threads);
        add(m, &l->after_attention, part, x);

        row = normed(m, &l->before_mlp, x, m->hidden, room);
        multiply(m, &l->gate, row, gate_up, threads);
        multiply(m, &l->up, row, gate_up + m->mlp, threads);
        if (m->gelu)
            gated_gelu_tanh(gate_up, 1, m->mlp, 2 * m->mlp, gated, m->mlp, 1);
        else
            gated_silu(gate_up, 1, m->mlp, 2 * m->mlp, gated, m->mlp, 1);
        multiply(m, &l->down, gated, part, threads);
        add(m, &l->after_mlp, part, x);
    }
}
