/* Products of rows with a weight matrix of 16-bit numbers: y[r][o] = sum_k x[r][k] w[o][k] + b[o].

   The matrix is packed once in panels of PANEL outputs that stand beside one another for each k, so
   that a panel is one stream of memory and its outputs stand in lanes. It is widened as it is used,
   which costs two operations for the products of TALL rows. Each number is summed in the order of
   its k, so that it depends neither on the other rows nor on the number of threads. */
#include "exported.h"

#define PANEL 16
/* TALL by two vectors of sums and what they are summed of fit into 16 registers. */
#define TALL 6
/* Inputs of a part of a panel, which stays in the L1 cache for all rows. */
#define DEEP 288
/* Groups of TALL rows that go through a panel together: their x stays in the L2 cache. */
#define MOST_GROUPS 20

EXPORT const int64_t gemm_panel = PANEL;

/* bf16: a 32-bit number holds an output of the left vector below one of the right. */
INLINE void panel_bf16(const bf16_t *w, f32x8 *left, f32x8 *right) {
    u32x8 both;
    memcpy(&both, w, sizeof both);
    *left = (f32x8)(both << 16), *right = (f32x8)(both & 0xffff0000);
}

INLINE void panel_f16(const f16_t *w, f32x8 *left, f32x8 *right) {
    *left = load_f16(w), *right = load_f16(w + LANES);
}

#define TYPE bf16
#include "gemm.inc.h"
#undef TYPE
#define TYPE f16
#include "gemm.inc.h"
#undef TYPE
