"""`kvrag corpus`: corpora as wholes.

`verify`, `export` and `import` open a model; the others do not.
"""

from __future__ import annotations

import typer

from kvrag.cli.corpus.drop import drop
from kvrag.cli.corpus.exporting import export
from kvrag.cli.corpus.importing import import_
from kvrag.cli.corpus.ls import ls
from kvrag.cli.corpus.show import show
from kvrag.cli.corpus.verify import verify

__all__ = ["app"]

app = typer.Typer(
    help="List corpora, check and mend them, and move them as one file.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command("ls")(ls)
app.command("show")(show)
app.command("verify")(verify)
app.command("export")(export)
app.command("import")(import_)
app.command("drop")(drop)
