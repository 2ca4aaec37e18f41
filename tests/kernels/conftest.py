"""The dtypes of an implementation become those of the contract's tests; and native code to test."""

from __future__ import annotations

import pytest

from kvrag.kernels.native import load


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames and hasattr(metafunc.cls, "dtypes"):
        metafunc.parametrize("dtype", metafunc.cls.dtypes, ids=str)


@pytest.fixture(scope="module")
def native(pytestconfig):
    native = load(pytestconfig.cache.mkdir("kvrag-kernels"))
    if native is None:
        pytest.skip("native code cannot be compiled here")
    return native
