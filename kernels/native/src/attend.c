/* Attention of sorted query rows: all keys of a block at once, for all rows of a KV head.

   Rows stand in lanes. The scores of a block of keys are S[key][row] = sum_d K[key][d] Q[d][row] and
   the mixed values are O[row][d] += sum_key P[key][row] V[key][d]: with Q transposed once, both are
   products whose factors are read where and as they lie. Nothing of K and V is packed, which costs
   more than few rows have to multiply, and both are read once. Softmax runs along with the blocks.

   The bounds of blocks depend on the rows' keys alone, and each number is summed in one order
   whatever stands in the other lanes. So the result depends neither on how rows are cut into tasks
   nor on the number of threads; what keys receive depends on the cut, which is one for all then. */
#include "exported.h"
#ifdef _OPENMP
#include <omp.h>
#endif

#define BLOCK 64
/* Tiles have TALL by 2 or SHORT by 3 vectors: that many sums and factors fit into 16 registers. */
#define TALL 6
#define SHORT 4
/* Rows of one task, in vectors: few enough that several threads find work in few rows. One thread
   alone reads K and V of a question's rows once if all are in one. */
#define MOST_VECTORS 6
#define MOST_ALONE 8

#define ROOM(n) (((n) + LANES - 1) / LANES * LANES)

/* In a register: compilers would load it again for each of its products. */
INLINE f32x8 held(f32x8 x) {
#ifdef __AVX2__
    __asm__("" : "+x"(x));
#endif
    return x;
}

/* c[i][j] = sum over k < depth of a(i, k) b[k * b_k + j], for `tall` i and `wide` vectors of j,
   which are constants. a(i, k) is a[i * a_row + k], or a[k * a_row + i] if `across`; then the sums
   are added to what is there, at the end: sums of sums lose less than one long sum. */
INLINE void tile(int tall, int wide, int across, const float *a, int64_t a_row, const float *b,
                 int64_t b_k, float *c, int64_t c_i, int64_t depth) {
    f32x8 acc[TALL][3];
#pragma GCC unroll 6
    for (int i = 0; i < tall; i++)
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) acc[i][j] = splat(0);
    for (int64_t k = 0; k < depth; k++) {
        f32x8 right[3];
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) right[j] = held(load_f32(b + k * b_k + j * LANES));
#pragma GCC unroll 6
        for (int i = 0; i < tall; i++) {
            f32x8 left = splat(across ? a[k * a_row + i] : a[i * a_row + k]);
#pragma GCC unroll 3
            for (int j = 0; j < wide; j++) acc[i][j] += left * right[j];
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < tall; i++)
#pragma GCC unroll 3
        for (int j = 0; j < wide; j++) {
            float *at = c + i * c_i + j * LANES;
            store_f32(at, across ? load_f32(at) + acc[i][j] : acc[i][j]);
        }
}

/* So many rows of `dim` numbers, `row` apart, that are needed next. */
typedef struct {
    const float *at;
    int64_t row, dim, rows;
} ahead_t;

/* Each tile asks for a few: in one burst they would wait for themselves. */
INLINE void ask(ahead_t *next) {
    for (int i = 0; i < 2 && next->rows > 0; i++, next->rows--, next->at += next->row)
        for (int64_t d = 0; d < next->dim; d += 16) __builtin_prefetch(next->at + d);
}

/* `tile` for n i, cut as evenly as they can be. */
INLINE void band(int wide, int across, int64_t n, const float *a, int64_t a_row, const float *b,
                 int64_t b_k, float *c, int64_t c_i, int64_t depth, ahead_t *ahead) {
    int64_t most = wide == 3 ? SHORT : TALL, groups = (n + most - 1) / most;
    for (int64_t g = 0, i = 0; g < groups; g++) {
        int64_t next = n * (g + 1) / groups;
        const float *from = a + (across ? i : i * a_row);
        float *to = c + i * c_i;
        ask(ahead);
#define CASE(tall) \
    case tall:                                                                             \
        if (tall <= most) tile(tall, wide, across, from, a_row, b, b_k, to, c_i, depth);   \
        break
        switch (next - i) {
            CASE(1);
            CASE(2);
            CASE(3);
            CASE(4);
            CASE(5);
            CASE(6);
        }
#undef CASE
        i = next;
    }
}

/* `band`s for any number of vectors. A tile of one waits for its sums, so none is left over. */
INLINE void product(int across, int64_t n, const float *a, int64_t a_row, const float *b,
                    int64_t b_k, float *c, int64_t c_i, int64_t depth, int64_t vectors,
                    ahead_t *ahead) {
    while (vectors > 0) {
        int wide = vectors == 1 ? 1 : vectors == 2 || vectors == 4 ? 2 : 3;
        switch (wide) {
            case 1: band(1, across, n, a, a_row, b, b_k, c, c_i, depth, ahead); break;
            case 2: band(2, across, n, a, a_row, b, b_k, c, c_i, depth, ahead); break;
            default: band(3, across, n, a, a_row, b, b_k, c, c_i, depth, ahead);
        }
        b += wide * LANES, c += wide * LANES, vectors -= wide;
    }
}

/* Rows of one KV head that go through the keys together, and what they have gathered. */
typedef struct {
    int64_t rows, room, dim, wide; /* room, wide: rows and dim in whole vectors */
    float *q;                      /* (dim, room), scaled */
    float *mixed;                  /* (room, wide) */
    float *top, *total, *shrink;   /* (room) */
    int32_t *first, *last;         /* (room): the keys that a row sees; none for what is no row */
} rows_t;

/* Vectors from .. to - 1 hold all rows that see a key of begin .. end - 1; both bounds ascend. */
static void seeing(const rows_t *r, int64_t begin, int64_t end, int64_t *from, int64_t *to) {
    int64_t a = 0, b = r->rows;
    while (a < b && r->last[a] <= begin) a++;
    while (b > a && r->first[b - 1] >= end) b--;
    *from = a / LANES, *to = (b + LANES - 1) / LANES;
    if (a == b) *to = *from;
}

/* Of one vector of rows: the scores x of n keys, `room` apart, become powers of e below the greatest
   score so far. What was gathered before has to shrink for that. */
INLINE void weigh(const rows_t *r, int64_t lane, float *x, int64_t n, int64_t key) {
    int64_t room = r->room;
    i32x8 first, last;
    memcpy(&first, r->first + lane, sizeof first);
    memcpy(&last, r->last + lane, sizeof last);
    int masked = 0;
    for (int i = 0; i < LANES; i++) masked |= first[i] > key || last[i] < key + n;
    const f32x8 none = splat(-__builtin_inff());
    if (masked)
        for (int64_t j = 0; j < n; j++) {
            i32x8 at = (i32x8){0} + (int32_t)(key + j);
            store_f32(x + j * room,
                      choose((at >= first) & (at < last), load_f32(x + j * room), none));
        }
    f32x8 before = load_f32(r->top + lane), m[4] = {before, before, before, before};
    int64_t j = 0;
    for (; j + 4 <= n; j += 4)
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) m[u] = greater(load_f32(x + (j + u) * room), m[u]);
    for (; j < n; j++) m[0] = greater(load_f32(x + j * room), m[0]);
    m[0] = greater(greater(m[0], m[1]), greater(m[2], m[3]));
    store_f32(r->top + lane, m[0]);
    /* Where all is -inf, each weighs 0. */
    f32x8 below = choose(m[0] == none, splat(0), m[0]);
    const f32x8 log2_e = splat(LOG2_E);
    /* Exactly 1 where the greatest stays: what is off by a bit would be so once a block. */
    f32x8 shrink = choose(before == below, splat(1), exp2_f32((before - below) * log2_e));
    f32x8 total = splat(0);
    for (j = 0; j + 4 <= n; j += 4) {
        f32x8 e[4];
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) e[u] = (load_f32(x + (j + u) * room) - below) * log2_e;
        exp2_each(4, e);
#pragma GCC unroll 4
        for (int u = 0; u < 4; u++) store_f32(x + (j + u) * room, e[u]);
        total += (e[0] + e[1]) + (e[2] + e[3]);
    }
    for (; j < n; j++) {
        f32x8 e = exp2_f32((load_f32(x + j * room) - below) * log2_e);
        store_f32(x + j * room, e);
        total += e;
    }
    store_f32(r->shrink + lane, shrink);
    store_f32(r->total + lane, load_f32(r->total + lane) * shrink + total);
}

/* The rows see n keys, of which `key` is the first; `next` keys follow. s: (n, room); holds their
   weights then. */
static void see(const rows_t *r, const float *k, int64_t k_token, const float *v, int64_t v_token,
                int64_t key, int64_t n, int64_t next, float *s) {
    int64_t from, to, room = r->room;
    seeing(r, key, key + n, &from, &to);
    if (from == to) return;
    from *= LANES, to *= LANES;
    ahead_t values = {v, v_token, r->dim, n}, keys = {k + n * k_token, k_token, r->dim, next};
    product(0, n, k, k_token, r->q + from, room, s + from, room, r->dim, (to - from) / LANES,
            &values);
    for (int64_t lane = from; lane < to; lane += LANES) weigh(r, lane, s + lane, n, key);
    for (int64_t i = from; i < to; i++)
        if (r->shrink[i] != 1)
            for (int64_t d = 0; d < r->dim; d++) r->mixed[i * r->wide + d] *= r->shrink[i];
    int64_t whole = r->dim / LANES;
    product(1, (to < r->rows ? to : r->rows) - from, s + from, room, v, v_token,
            r->mixed + from * r->wide, r->wide, n, whole, &keys);
    for (int64_t d = whole * LANES; d < r->dim; d++)
        for (int64_t i = from; i < to; i++) {
            float mine = 0;
            for (int64_t j = 0; j < n; j++) mine += s[j * room + i] * v[j * v_token + d];
            r->mixed[i * r->wide + d] += mine;
        }
}

/* given[j] = what the rows from .. to - 1 give to key begin + j. weights: (end - begin, room), as
   blocks of `see` left them; tops: (blocks, room), the greatest scores then. */
static void give(const rows_t *r, const float *weights, const float *tops, int64_t begin,
                 int64_t end, int64_t from, int64_t to, float *given) {
    float *share = r->shrink;
    for (int64_t key = begin; key < end; key += BLOCK, tops += r->room) {
        int64_t n = end - key < BLOCK ? end - key : BLOCK, a, b;
        seeing(r, key, key + n, &a, &b);
        a = a * LANES > from ? a * LANES : from, b = b * LANES < to ? b * LANES : to;
        for (int64_t i = a; i < b; i++)
            share[i] = exp2_f32(splat((tops[i] - r->top[i]) * LOG2_E))[0] / r->total[i];
        for (int64_t j = 0; j < n; j++) {
            const float *x = weights + (key - begin + j) * r->room;
            f32x8 total = splat(0);
            int64_t i = a;
            for (; i + LANES <= b; i += LANES) total += load_f32(x + i) * load_f32(share + i);
            if (i < b) total += load_some(x + i, b - i, 0) * load_some(share + i, b - i, 0);
            given[key - begin + j] = sum(total);
        }
    }
}

/* Floats that a thread needs for tasks of at most so many rows; `keys`: how many, where what they
   receive is wanted. */
static int64_t scratch_of(int64_t room, int64_t dim, int64_t keys) {
    int64_t kept = (keys + BLOCK - 1) / BLOCK * (BLOCK + 1) * room;
    return room * (dim + ROOM(dim) + 5) + BLOCK * room + kept;
}

static int64_t tasks_of(int64_t rows, int64_t received, int threads) {
    int64_t most = (threads == 1 && !received ? MOST_ALONE : MOST_VECTORS) * LANES;
    return (rows + most - 1) / most;
}

/* The first row of each of so many tasks, which share whole vectors as evenly as they can. */
static int64_t start_of(int64_t task, int64_t tasks, int64_t rows) {
    int64_t row = ROOM(rows) / LANES * task / tasks * LANES;
    return row < rows ? row : rows;
}

/* Rows of the largest task. */
static int64_t room_of(int64_t rows, int64_t tasks) {
    int64_t vectors = ROOM(rows) / LANES;
    return (vectors + tasks - 1) / tasks * LANES;
}

/* Numbers of scratch that `attend` needs; keys: 0 where nobody asks what they receive, and then
   for fewer rows and threads, too. */
EXPORT int64_t attend_scratch(int64_t n, int64_t heads, int64_t kv_heads, int64_t dim,
                              int64_t keys, int threads) {
    int64_t rows = n * (heads / kv_heads), tasks = tasks_of(rows, keys, threads);
    int64_t room = keys ? room_of(rows, tasks) : ROOM(rows);
    if (room > MOST_ALONE * LANES) room = MOST_ALONE * LANES;
    return threads * scratch_of(room, dim, keys) + kv_heads * tasks * keys;
}

/* q: (heads, n, dim); k, v: (kv_heads, tokens, dim), last dimensions contiguous; the others are
   strides[0 ..] apart: q's heads and rows, k's heads and tokens, v's. Row i sees the keys first[i]
   .. last[i] - 1, both ascending. Keys below first[0] and from last[n - 1] on are not read.
   received: NULL, or (last[n - 1] - first[0]), to which is added what the rows from .. to - 1 give
   to those keys. out: (n, heads, dim), contiguous. scratch: see `attend_scratch`. */
EXPORT void attend(const float *q, const float *k, const float *v, const int64_t *strides,
                   int64_t n, int64_t heads, int64_t kv_heads, int64_t dim, const int64_t *first,
                   const int64_t *last, float scale, int64_t from, int64_t to, float *received,
                   float *scratch, float *out, int threads) {
    int64_t group = heads / kv_heads, begin = first[0], end = last[n - 1], keys = end - begin;
    int64_t parts = tasks_of(n * group, received != NULL, threads);
    int64_t most = room_of(n * group, parts);
    int64_t apart = scratch_of(most, dim, received ? keys : 0);
    float *given = scratch + threads * apart; /* (tasks, keys) */
    /* Tasks of later rows see more keys. */
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < kv_heads * parts; task++) {
        int64_t head = task / parts, start = start_of(task % parts, parts, n * group);
        int64_t rows = start_of(task % parts + 1, parts, n * group) - start, room = ROOM(rows);
        int64_t kept = (keys + BLOCK - 1) / BLOCK * BLOCK * room;
        float *at = scratch;
#ifdef _OPENMP
        at += omp_get_thread_num() * apart;
#endif
        rows_t r = {.rows = rows, .room = room, .dim = dim, .wide = ROOM(dim)};
        r.q = at, at += dim * room;
        r.mixed = at, at += r.wide * room;
        r.top = at, at += room;
        r.total = at, at += room;
        r.shrink = at, at += room;
        r.first = (int32_t *)at, at += room;
        r.last = (int32_t *)at, at += room;
        float *weights = at, *tops = weights + kept;
        memset(r.mixed, 0, (size_t)(r.wide * room) * sizeof *r.mixed);
        for (int64_t i = 0; i < room; i++) {
            /* The rows of one position follow one another: what they see ascends. */
            int64_t row = (start + i) / group, of = head * group + (start + i) % group;
            int there = i < r.rows;
            const float *x = q + of * strides[0] + row * strides[1];
            for (int64_t d = 0; d < dim; d++)
                r.q[d * room + i] = there ? x[d] * scale : 0;
            r.top[i] = -__builtin_inff(), r.total[i] = 0;
            r.first[i] = there ? (int32_t)first[row] : INT32_MAX;
            r.last[i] = there ? (int32_t)last[row] : 0;
        }
        for (int64_t key = begin; key < end; key += BLOCK) {
            int64_t count = end - key < BLOCK ? end - key : BLOCK, rest = end - key - count;
            see(&r, k + head * strides[2] + key * strides[3], strides[3],
                v + head * strides[4] + key * strides[5], strides[5], key, count,
                rest < BLOCK ? rest : BLOCK, received ? weights + (key - begin) * room : weights);
            if (received)
                memcpy(tops + (key - begin) / BLOCK * room, r.top, (size_t)room * sizeof *tops);
        }
        for (int64_t i = 0; i < r.rows; i++) {
            int64_t row = (start + i) / group, of = head * group + (start + i) % group;
            float *y = out + (row * heads + of) * dim;
            for (int64_t d = 0; d < dim; d++) y[d] = r.mixed[i * r.wide + d] / r.total[i];
        }
        if (received) {
            int64_t a = from * group - start, b = to * group - start;
            give(&r, weights, tops, begin, end, a > 0 ? a : 0, b < r.rows ? b : r.rows,
                 given + task * keys);
        }
    }
    if (received)
        for (int64_t task = 0; task < kv_heads * parts; task++)
            for (int64_t j = 0; j < keys; j++) received[j] += given[task * keys + j];
}
