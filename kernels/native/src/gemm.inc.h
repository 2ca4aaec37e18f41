/* y[r] += x[r] w for so many rows (a constant) and the outputs of one panel; y: (rows, PANEL). What
   was there is added at the end: sums of sums lose less than one long sum. `ahead`, `step` bytes
   for each of `depth`, is asked for meanwhile: in one burst it would wait for itself. */
INLINE void NAMED(tile)(int rows, const float *x, int64_t x_row, const ELEM *w, int64_t depth,
                        float *y, const char *ahead, int64_t step) {
    f32x8 acc[TALL][2];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) acc[r][j] = splat(0);
    for (int64_t k = 0; k < depth; k++) {
        f32x8 left, right;
        NAMED(panel)(w + k * PANEL, &left, &right);
        __builtin_prefetch(ahead + k * step, 0, 2);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            f32x8 factor = splat(x[r * x_row + k]);
            acc[r][0] += factor * left;
            acc[r][1] += factor * right;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            float *at = y + r * PANEL + j * LANES;
            store_f32(at, load_f32(at) + acc[r][j]);
        }
}

static void NAMED(group)(int64_t rows, const float *x, int64_t x_row, const ELEM *w, int64_t depth,
                         float *y, const char *ahead, int64_t step) {
    switch (rows) {
        case 1: NAMED(tile)(1, x, x_row, w, depth, y, ahead, step); break;
        case 2: NAMED(tile)(2, x, x_row, w, depth, y, ahead, step); break;
        case 3: NAMED(tile)(3, x, x_row, w, depth, y, ahead, step); break;
        case 4: NAMED(tile)(4, x, x_row, w, depth, y, ahead, step); break;
        case 5: NAMED(tile)(5, x, x_row, w, depth, y, ahead, step); break;
        default: NAMED(tile)(6, x, x_row, w, depth, y, ahead, step);
    }
}

/* x: (n, inputs), rows x_row apart; w: panels, each (inputs, PANEL), behind one another; bias: NULL
   or (outputs). y: (n, outputs), contiguous. */
EXPORT void NAMED(gemm)(const float *x, int64_t n, int64_t x_row, const ELEM *w, int64_t inputs,
                        int64_t outputs, const float *bias, float *y, int threads) {
    int64_t panels = (outputs + PANEL - 1) / PANEL, groups = (n + TALL - 1) / TALL;
    int64_t bands = (groups + MOST_GROUPS - 1) / MOST_GROUPS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < bands * panels; task++) {
        int64_t from = groups * (task / panels) / bands, to = groups * (task / panels + 1) / bands;
        int64_t first = task % panels * PANEL, start = n * from / groups;
        int64_t rows = n * to / groups - start;
        int64_t wide = outputs - first < PANEL ? outputs - first : PANEL;
        float sums[MOST_GROUPS * TALL * PANEL];
        for (int64_t r = 0; r < rows; r++)
            for (int64_t o = 0; o < PANEL; o++)
                sums[r * PANEL + o] = bias && o < wide ? bias[first + o] : 0;
        for (int64_t k = 0; k < inputs; k += DEEP) {
            int64_t depth = inputs - k < DEEP ? inputs - k : DEEP;
            const ELEM *part = w + first * inputs + k * PANEL;
            for (int64_t g = from; g < to; g++) {
                /* What follows in memory is needed next: each group asks for its share. */
                int64_t step = ((int64_t)(PANEL * sizeof *part) + to - from - 1) / (to - from);
                const char *ahead = (const char *)(part + depth * PANEL);
                int64_t row = n * g / groups, next = n * (g + 1) / groups;
                NAMED(group)(next - row, x + row * x_row + k, x_row, part, depth,
                             sums + (row - start) * PANEL, ahead + (g - from) * depth * step, step);
            }
        }
        for (int64_t r = 0; r < rows; r++)
            memcpy(y + (start + r) * outputs + first, sums + r * PANEL, (size_t)wide * sizeof *y);
    }
}
