"""The dtypes of an implementation become those of the contract's tests."""

from __future__ import annotations


def pytest_generate_tests(metafunc):
    if "dtype" in metafunc.fixturenames and hasattr(metafunc.cls, "dtypes"):
        metafunc.parametrize("dtype", metafunc.cls.dtypes, ids=str)
