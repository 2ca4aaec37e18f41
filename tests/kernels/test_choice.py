"""Which kernels run: `auto` falls back and says why, a choice by name is kept or refused."""

from __future__ import annotations

import logging
import sys
from importlib.util import find_spec

import pytest
import torch

from kvrag.config import Settings
from kvrag.errors import SettingsError, UnsupportedModelError
from kvrag.kernels import KernelsUnavailableError, choose
from kvrag.kernels.choice import NAMES
from kvrag.kernels.native import load
from kvrag.models.source import open_model
from tests.tiny import make_tiny_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("name", ["torch", "cpu"])
def test_what_runs_everywhere(name, device):
    assert choose(name, device, torch.float64).name == name


def test_auto_on_a_cpu_is_cpu_and_nothing_to_talk_about(caplog):
    assert choose("auto", CPU, torch.float32).name == "cpu"
    assert caplog.records == []


@needs_triton
@pytest.mark.parametrize("name", ["auto", "triton"])
def test_a_gpu_gets_triton(name):
    assert choose(name, GPU, torch.bfloat16).name == "triton"


def test_native_code_is_for_float32_on_a_cpu():
    folder = Settings().kernels_dir
    expected = "cpu" if load(folder) is None else "native"
    assert choose("auto", CPU, torch.float32, native_folder=folder).name == expected
    assert choose("auto", CPU, torch.float32, native_folder=folder).native is load(folder)
    assert choose("cpu", CPU, torch.float64, native_folder=folder).name == "cpu"
    assert choose("cpu", CPU, torch.float64, native_folder=folder).native is None
    assert choose("cpu", GPU, torch.float32, native_folder=folder).name == "cpu"


def test_auto_falls_back_and_says_why(without_triton, caplog):
    with caplog.at_level(logging.WARNING):
        assert choose("auto", GPU, torch.float32).name == "cpu"
    (record,) = caplog.records
    assert "pip install 'kvrag[triton]'" in record.getMessage()


def test_triton_that_is_not_there_is_refused(without_triton):
    with pytest.raises(KernelsUnavailableError, match="need the package triton"):
        choose("triton", GPU, torch.float32)


@needs_triton
@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [
        (CPU, torch.float32, "run on GPUs, and the model is on cpu"),
        (GPU, torch.float64, "the compute dtype is torch.float64"),
    ],
)
def test_triton_that_cannot_run_is_refused(device, dtype, why):
    with pytest.raises(KernelsUnavailableError, match=why):
        choose("triton", device, dtype)


def test_unknown_kernels_are_refused():
    with pytest.raises(KernelsUnavailableError, match="unknown kernels 'cuda'; known are auto"):
        choose("cuda", CPU, torch.float32)


def test_a_model_is_opened_with_them(tmp_path):
    folder = make_tiny_model(tmp_path)
    for name in ("torch", "cpu", "auto"):
        model = open_model(str(folder), tmp_path, dtype=torch.float32, kernels=name)
        assert model.decoder.kernels.name == ("cpu" if name == "auto" else name)
    with pytest.raises(UnsupportedModelError, match="kernels 'triton' are not possible here"):
        open_model(str(folder), tmp_path, dtype=torch.float32, kernels="triton")


def test_the_setting_knows_the_same_names():
    for name in NAMES:
        assert Settings(kernels=name).kernels == name
    with pytest.raises(SettingsError, match="setting 'kernels' is 'cuda'"):
        Settings(kernels="cuda")
