"""Cancel a job when its client goes away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Receive

from kvrag.serving.queue import Job

__all__ = ["cancel_on_disconnect"]


@asynccontextmanager
async def cancel_on_disconnect(receive: Receive, job: Job[Any, Any]) -> AsyncIterator[None]:
    """Inside the block, a client that goes away cancels `job`; so does an exception.

    The request's body must have been read.
    """

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        job.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        job.cancel()
        raise
    finally:
        watcher.cancel()
