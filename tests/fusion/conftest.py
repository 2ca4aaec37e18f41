from __future__ import annotations

import pytest
import torch

from tests.models.tiny_models import TinyModels


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> TinyModels:
    """`tiny(family, rope, **config)` is the folder of a tiny random model; do not write into it."""
    return TinyModels(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package", autouse=True)
def _one_thread():
    """Tiny products are twice as fast on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
