"""The model that settings name, opened as they say."""

from __future__ import annotations

import torch

from kvrag.config import Settings
from kvrag.errors import SettingsError
from kvrag.models.source import Model, open_model

__all__ = ["device_of", "opened_model"]


def opened_model(settings: Settings) -> Model:
    """Open the model on the settings' device.

    Raises:
        ModelError, SettingsError: the message says which file or setting.
    """
    return open_model(
        settings.model,
        settings.models_dir,
        dtype=getattr(torch, settings.dtype),
        device=device_of(settings.device),
        context_length=settings.context_length,
        int8_decoding=settings.decode_weights == "int8",
        kernels=settings.kernels,
        kernels_dir=settings.kernels_dir,
    )


def device_of(name: str) -> torch.device:
    """The device of that name. Raises SettingsError if torch cannot use it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        raise SettingsError(f"setting 'device' is {name!r}: {exc}") from exc
    return device
