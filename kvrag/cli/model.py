"""`kvrag model`: packaged models, and what a model is."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from kvrag.cli.common import JsonOption, format_bytes, plain_table, print_json, settings_of, show

__all__ = ["app"]

#: Facts that people find in the sentences on others.
_SAID = (
    "stored_bytes",
    "window_kv_bytes_per_token",
    "global_layers",
    "layers_without_rope",
)

app = typer.Typer(
    help="Install, list and describe models.", no_args_is_help=True, rich_markup_mode=None
)


@app.command()
def fetch(
    names: Annotated[list[str], typer.Argument(help="Packaged models; see `kvrag model list`.")],
) -> None:
    """Install packaged models into this Python environment.

    Their dependencies are left out: kvrag needs the weights alone.
    """
    from kvrag.models.packaged import fetch as install
    from kvrag.models.packaged import packaged_path

    # All names are looked at before anything is installed.
    installed = [packaged_path(name) is not None for name in names]
    for name, known in zip(names, installed, strict=True):
        if not known:
            install(name)
        sys.stdout.write(f"{name}: {'installed already' if known else 'installed'}\n")


@app.command("list")
def list_models(as_json: JsonOption = False) -> None:
    """List the packaged models."""
    from kvrag.models.packaged import PACKAGED, packaged_path

    rows = [
        {
            "name": name,
            "what": model.what,
            "requirement": model.requirement,
            "installed": packaged_path(name) is not None,
        }
        for name, model in PACKAGED.items()
    ]
    if as_json:
        print_json({"models": rows})
        return
    table = plain_table("name", "what", "package", "installed")
    for row in rows:
        installed = "yes" if row["installed"] else "no"
        table.add_row(str(row["name"]), str(row["what"]), str(row["requirement"]), installed)
    show(table)


@app.command()
def info(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Name, folder, hub id or .gguf file; default: the setting.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Open a model and describe it.

    A packaged or GGUF model is converted, and one of a hub downloaded, on first use.
    """
    settings = settings_of(context, model=model)
    import torch

    from kvrag.models.describe import describe, sentences
    from kvrag.models.source import open_model
    from kvrag.models.weights import Weights

    dtype = getattr(torch, settings.dtype)
    opened = open_model(
        settings.model, settings.models_dir, dtype=dtype, context_length=settings.context_length
    )
    weights = Weights(opened.folder)
    facts: dict[str, Any] = {
        "model": settings.model,
        "parameters": weights.num_parameters,
        "stored_bytes": weights.nbytes,
        **describe(opened.decoder.config, kv_itemsize=dtype.itemsize),
        "chat_template": opened.tokenizer.has_chat_template,
        "dtype": settings.dtype,
        "compute_dtype": str(opened.decoder.compute_dtype).removeprefix("torch."),
        "fingerprint": opened.fingerprint,
        "folder": str(opened.folder),
    }
    if as_json:
        print_json(facts)
        return
    table = plain_table("what", "value")
    for name, value in _readable(facts, sentences(facts)).items():
        table.add_row(name.replace("_", " "), value)
    show(table)


def _readable(facts: dict[str, Any], said: dict[str, str]) -> dict[str, str]:
    """The facts as one text each; what needs more than a number is said in words."""
    shown = {
        name: ("no", "yes")[value] if isinstance(value, bool) else str(value)
        for name, value in facts.items()
    }
    shown["parameters"] = (
        f"{facts['parameters']:,} (stored in {format_bytes(facts['stored_bytes'])})"
    )
    kv = format_bytes(facts["kv_bytes_per_token"])
    if within := facts["window_kv_bytes_per_token"]:
        kv += f", of which {format_bytes(within)} in layers that use it within their window alone"
    shown |= {"kv_bytes_per_token": kv} | said
    for name in _SAID:
        del shown[name]
    return shown
