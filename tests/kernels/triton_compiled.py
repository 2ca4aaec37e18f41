"""Triton's kernels through its compiler, down to a GPU's machine code, without a GPU.

`test_triton.py` runs this in a process of its own. The launchers run as they are; only the launch
itself stops behind the compilation.
"""

from __future__ import annotations

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kvrag.kernels.triton import KERNELS

#: Bytes of shared memory that a program may have on every GPU since Ampere.
SHARED_NBYTES = 99 * 1024


class NoGpu:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability):
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return self._target


@pytest.fixture
def compiled(monkeypatch):
    """Names and shared memory of the kernels compiled so far."""
    made = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        assert kernel.asm["cubin"]
        made.append((self.__name__, kernel.metadata.shared))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    yield made
    driver.set_active(None)


@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "window"),
    [(80, torch.bfloat16, 64, None), (90, torch.bfloat16, 128, 7)],
)
def test_kernels_compile(compiled, capability, dtype, dim, window):
    driver.set_active(NoGpu(capability))
    q, kv = torch.empty(6, 300, dim, dtype=dtype), torch.empty(2, 300, dim, dtype=dtype)
    KERNELS.attention_received(q, kv, kv, torch.arange(300), window=window)
    KERNELS.decode_attention(q[:, :2], [kv, kv], [kv, kv], [300, 3], window=None)
    table = torch.empty(300, dim, dtype=dtype)
    for positions in (slice(0, 300), torch.arange(300)):
        KERNELS.rotate_into(kv.float(), table, table, kv, positions)
    KERNELS.deviation(kv, kv)
    KERNELS.rms_norm(q, torch.empty(dim), 1e-5)
    for activation in ("silu", "gelu_tanh"):
        KERNELS.gated(torch.empty(3, 4000, dtype=dtype), activation)
    names = {name for name, _ in compiled}
    assert names == {
        *("attend", "combine", "receive", "decode"),
        *("rotate", "deviate", "norm", "gate"),
    }
    assert max(shared for _, shared in compiled) <= SHARED_NBYTES
