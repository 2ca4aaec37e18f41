"""Triton's kernels without a GPU: interpreted, and compiled for one.

Each in a process of its own: the interpreter must be switched on before anything imports triton,
torch included, and would stay on for all tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIRED = "triton" in os.environ.get("TESTS_REQUIRE", "").replace(" ", "").split(",")


@pytest.mark.parametrize(
    ("cases", "interpret"), [("triton_interpreted.py", "1"), ("triton_compiled.py", "0")]
)
def test_triton(cases, interpret, tmp_path):
    if find_spec("triton") is None:
        if REQUIRED:
            pytest.fail("TESTS_REQUIRE has triton, but triton is not installed", pytrace=False)
        pytest.skip("triton is not installed")
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "kernels" / cases)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
