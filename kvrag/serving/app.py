"""The REST application over one engine.

Questions, additions and deletions take their turn in a `ModelQueue`; everything else is answered at
once. The engine belongs to the caller, who closes it after the application has ended.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from kvrag import __version__
from kvrag.engine import Engine
from kvrag.errors import KvragError
from kvrag.retrieval.errors import RetrievalError
from kvrag.serving.documents import documents_router
from kvrag.serving.errors import problem_of
from kvrag.serving.guard import Guard
from kvrag.serving.query import query_router
from kvrag.serving.queue import ModelQueue
from kvrag.serving.retrieve import retrieve_router
from kvrag.serving.schemas import BlendingBody, ControllerBody, Health, TierBody, error_responses
from kvrag.store.errors import StoreError

__all__ = ["MAX_BODY_BYTES", "create_app"]

MAX_BODY_BYTES = 16 * 2**20

#: The framework's own, ours, and the rest.
_CAUGHT: tuple[type[Exception], ...] = (
    RequestValidationError,
    HTTPException,
    KvragError,
    RetrievalError,
    StoreError,
    Exception,
)


def create_app(engine: Engine, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The application; `app.state.queue` is its `ModelQueue`.

    It answers requests to loopback addresses and `localhost` alone, as the Host header names them.

    Args:
        max_body_bytes: larger bodies are answered with 413.
    """
    queue = ModelQueue(engine.settings.queue_size)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        queue.stop()

    app = FastAPI(
        title="kvrag",
        version=__version__,
        summary="Answers over a corpus whose KV caches were computed beforehand.",
        lifespan=lifespan,
        redirect_slashes=False,
    )
    app.state.queue = queue
    app.add_middleware(Guard, max_body_bytes=max_body_bytes)
    for kind in _CAUGHT:
        app.add_exception_handler(kind, _answer_problem)
    app.include_router(query_router(engine, queue))
    app.include_router(retrieve_router(engine))
    app.include_router(documents_router(engine, queue))

    # A folder's path is nobody's business; its name, or that of a packaged model, is enough.
    model = Path(engine.settings.model).name

    @app.get(
        "/health",
        summary="Whether the server answers",
        tags=["server"],
        responses=error_responses(400),
    )
    async def health() -> Health:
        """Never waits for the model."""
        return Health(
            status="ok",
            model=model,
            version=__version__,
            queue_depth=queue.waiting,
            running=queue.running,
            blending=BlendingBody.model_validate(asdict(engine.blending)),
            controller=ControllerBody.model_validate(asdict(engine.controller.estimates)),
            owed_deletions=engine.owed_deletions,
            tiers=[TierBody.model_validate(asdict(tier)) for tier in engine.store.stats().tiers],
        )

    return app


async def _answer_problem(request: Request, exc: Exception) -> Response:
    return problem_of(exc).response()
