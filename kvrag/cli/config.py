"""`kvrag config`: the settings in force."""

from __future__ import annotations

import typer

from kvrag.cli.common import JsonOption, globals_of, plain_table, print_json, settings_of, show

__all__ = ["app"]

app = typer.Typer(help="Look at the settings.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """A Typer app of one command is that command; this keeps it a group."""


@app.command("show")
def show_settings(context: typer.Context, as_json: JsonOption = False) -> None:
    """Show every setting, its value, and whether it was set or is the default."""
    settings = settings_of(context)
    overrides = globals_of(context).overrides

    def source(name: str) -> str:
        if name in overrides:
            return "command line"
        return "environment or file" if name in settings.model_fields_set else "default"

    values = settings.model_dump(mode="json")
    if as_json:
        print_json(
            {name: {"value": value, "source": source(name)} for name, value in values.items()}
        )
        return
    table = plain_table("setting", "value", "from")
    for name, value in values.items():
        table.add_row(name, "none" if value is None else str(value), source(name))
    show(table)
