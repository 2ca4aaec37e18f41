EXPORT void NAMED(gemv)(const float *x, const ELEM *w, int64_t inputs, int64_t outputs,
                        const float *bias, float *y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t o = 0; o < outputs; o++) {
        const ELEM *row = w + o * inputs;
        f32x8 acc[4];
        for (int u = 0; u < 4; u++) acc[u] = splat(0);
        int64_t k = 0;
        for (; k + 4 * LANES <= inputs; k += 4 * LANES) {
            __builtin_prefetch((const char *)(row + k) + AHEAD);
#pragma GCC unroll 4
            for (int u = 0; u < 4; u++)
                acc[u] += load_f32(x + k + u * LANES) * LOAD(row + k + u * LANES);
        }
        for (; k + LANES <= inputs; k += LANES) acc[0] += load_f32(x + k) * LOAD(row + k);
        float total = sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
        for (; k < inputs; k++) total += x[k] * ONE(row + k);
        y[o] = bias ? total + bias[o] : total;
    }
}
