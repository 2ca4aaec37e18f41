"""Copies to a device beside its computing: what they need of it, for CUDA and for any other.

A device does in order what one stream is given, and different streams side by side. Copies have a
stream of their own. An event marks how far it has come, and computing waits for that and no more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["BlockingCopies", "CopyStream", "CudaCopies", "Event", "copy_stream"]


class Event(Protocol):
    """A mark behind the copies that were begun before it."""

    def wait(self) -> None:
        """What the device computes from here on comes behind the mark. Does not wait itself."""
        ...

    def synchronize(self) -> None:
        """Wait, in this thread, until the device has passed the mark."""
        ...


class CopyStream(Protocol):
    """Copies from memory of the CPU to one device, in order. Thread-safe."""

    def pinned_empty(self, nbytes: int) -> Tensor:
        """uint8 (nbytes,) that `copy` can read while this thread goes on."""
        ...

    def is_pinned(self, source: Tensor) -> bool:
        """Whether `copy` can read it while this thread goes on."""
        ...

    def copy(self, source: Tensor) -> Tensor:
        """Begin to copy; the copy on the device, not to be used before an event behind it.

        `source` must stay as it is until then.
        """
        ...

    def record(self) -> Event:
        """Mark the place behind all copies so far."""
        ...

    def share(self, copies: Iterable[Tensor]) -> None:
        """Computing uses these: their memory is given to nobody else before it has done so."""
        ...


class CudaCopies:
    """A stream of its own on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pinned_empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def is_pinned(self, source: Tensor) -> bool:
        return source.is_pinned()

    def copy(self, source: Tensor) -> Tensor:
        # Under the stream the copy's memory is the stream's, too: nobody computes with it any more.
        with torch.cuda.stream(self._stream):
            return source.to(self._device, non_blocking=True)

    def record(self) -> Event:
        # Blocking: a thread that waits for the copies sleeps, and does not spin.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        marked: Event = event
        return marked

    def share(self, copies: Iterable[Tensor]) -> None:
        computing = torch.cuda.current_stream(self._device)
        for copy in copies:
            copy.record_stream(computing)


class BlockingCopies:
    """For devices without such streams, the CPU among them: a copy is done when it returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def pinned_empty(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def is_pinned(self, source: Tensor) -> bool:
        return False  # staged as for a GPU, so that the same is run

    def copy(self, source: Tensor) -> Tensor:
        return source.to(self._device, copy=True)

    def record(self) -> Event:
        return _Passed()

    def share(self, copies: Iterable[Tensor]) -> None:
        pass


class _Passed:
    """An event behind copies that are done."""

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


def copy_stream(device: torch.device) -> CopyStream:
    """The best that the device has."""
    return CudaCopies(device) if device.type == "cuda" else BlockingCopies(device)
