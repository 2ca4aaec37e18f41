/* Stored K and V into a float32 cache: K rotated to its positions, V as it is. */
#include "exported.h"

#define TYPE f32
#include "rotate.inc.h"
#undef TYPE
#define TYPE bf16
#include "rotate.inc.h"
#undef TYPE
#define TYPE f16
#include "rotate.inc.h"
#undef TYPE
