"""`kvrag serve`: the engine over HTTP."""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from kvrag.errors import MissingExtraError

__all__ = ["serve"]

_EXTRA = frozenset({"fastapi", "starlette", "uvicorn"})


def serve(
    context: typer.Context,
    host: Annotated[str | None, typer.Option(help="Loopback address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks one.", min=0, max=65535)] = None,
    queue_size: Annotated[
        int | None, typer.Option(help="Requests that may wait for the model.", min=1)
    ] = None,
) -> None:
    """Answer questions over HTTP until Ctrl+C.

    Only this machine is served, since there are no API keys yet. SIGINT and SIGTERM are how a
    server is stopped, so the exit code is 0 then.
    """
    from kvrag.config import Settings

    settings = context.obj if isinstance(context.obj, Settings) else Settings()
    given = {"host": host, "port": port, "queue_size": queue_size}
    given = {name: value for name, value in given.items() if value is not None}
    settings = Settings(**settings.model_dump(include=settings.model_fields_set) | given)
    try:
        from kvrag.serving.run import run
    except ModuleNotFoundError as exc:
        if exc.name not in _EXTRA:
            raise
        raise MissingExtraError(
            f"serving needs {exc.name}, which is not installed; "
            "install it with: pip install 'kvrag[serve]'"
        ) from exc

    # Whoever starts a server wants to know what it does meanwhile; other commands show warnings.
    logger = logging.getLogger("kvrag")
    logger.setLevel(min(logger.level, logging.INFO))

    def announce(url: str) -> None:
        # Flushed, since whoever started the server may wait for it at the end of a pipe.
        sys.stdout.write(f"kvrag serves {settings.model} at {url}\n")
        sys.stdout.flush()

    run(settings, announce)
