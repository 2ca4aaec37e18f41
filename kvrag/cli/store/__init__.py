"""`kvrag store`: what lies in the store and the catalog, and keeping it in order.

`advise` opens a model, and so do `verify --repair`, where a block has to be computed again, and
`copy --codec`.
"""

from __future__ import annotations

import typer

from kvrag.cli.store.advise import advise
from kvrag.cli.store.copy import copy
from kvrag.cli.store.gc import gc
from kvrag.cli.store.ls import ls
from kvrag.cli.store.stat import stat
from kvrag.cli.store.verify import verify

__all__ = ["app"]

app = typer.Typer(
    help="Look into the store, and keep it in order.", no_args_is_help=True, rich_markup_mode=None
)
app.command("stat")(stat)
app.command("ls")(ls)
app.command("verify")(verify)
app.command("gc")(gc)
app.command("copy")(copy)
app.command("advise")(advise)
