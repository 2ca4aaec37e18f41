"""Memory of the CPU that a GPU copies from by itself."""

from __future__ import annotations

import contextlib
import mmap
import weakref

__all__ = ["pinned_memory"]

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU


def pinned_memory(nbytes: int, device: str) -> memoryview:
    """Writable memory of so many bytes, more than 0, that starts at a page; pinned if it can be.

    It takes whole pages and no more, and is the system's again with the last view of it. Torch's
    own pinned memory takes the next power of two, and is kept when it is freed: up to twice the
    limit that a tier has for its blocks.
    """
    import numpy as np
    import torch

    memory = np.frombuffer(mmap.mmap(-1, nbytes), dtype=np.uint8)
    address = memory.ctypes.data
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        if int(runtime.cudaHostRegister(address, nbytes, _PORTABLE)):
            # The system pins no more. CUDA tells the same error to the next who starts a kernel
            # here, which must not be a query.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=device)
            return memory.data
    # While the array lives, so does the mapping under it; at the end of the process both go anyway.
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
    return memory.data
