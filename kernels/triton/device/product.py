"""Products of tiles."""

import triton
import triton.language as tl

__all__ = ["product"]


@triton.jit
def product(
    a,  # (ROWS, INNER)
    b,  # (INNER, COLUMNS), dtype of `a`
    PRECISION: tl.constexpr,
):
    """`a @ b` in float32. PRECISION: as `tl.dot` has it, or "widened", for the interpreter, which
    multiplies the bits of bfloat16 as if they were whole numbers.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)
