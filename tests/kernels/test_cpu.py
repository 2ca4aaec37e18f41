"""The kernels for CPUs; `test_attention.py` looks at their attention in more detail."""

from __future__ import annotations

import pytest
import torch

from kvrag.config import Settings
from kvrag.kernels.cpu import cpu_kernels
from kvrag.kernels.native import load
from tests.kernels.contract import KernelsContract


class TestCpu(KernelsContract):
    kernels = cpu_kernels(None)
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class TestNative(KernelsContract):
    dtypes = (torch.float32,)

    @pytest.fixture(autouse=True)
    def _load(self):
        native = load(Settings().kernels_dir)
        if native is None:
            pytest.skip("native code cannot be compiled here")
        self.kernels = cpu_kernels(native)
