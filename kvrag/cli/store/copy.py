"""`kvrag store copy`: blocks from one place to another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvrag.cli.common import JsonOption, format_bytes, print_json, settings_of, show, warn

if TYPE_CHECKING:
    from kvrag.store.maintenance import Copied

__all__ = ["copy"]

_EXIT_LEFT_OUT, _EXIT_DAMAGED = 3, 4


def copy(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="FROM", help="Home, folder of a disk tier, or Redis URL.")
    ],
    target: Annotated[str, typer.Argument(metavar="TO", help="The same; made when absent.")],
    codec: Annotated[
        str | None, typer.Option(help="Encode blocks anew: raw, int8 or int4. Opens the model.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Copy all blocks, leaving out those that are there. Run it again to go on.

    Byte by byte; between two homes the key secret is copied, too, and must not be another: without
    it no block is found. Documents and vector index are not. With --codec the blocks of the model
    are encoded anew, and a home TO gets documents and index, too. Exits with 4 if a block of FROM
    is damaged, else with 3 if one was left out.
    """
    from kvrag.cli.bar import shown
    from kvrag.upkeep.copying import copy_place
    from kvrag.upkeep.place import source_place, target_place

    settings = settings_of(context, codec=codec)
    one = source_place(source)
    other = target_place(target, one)
    with shown() as report:
        if codec is None:
            copying = copy_place(one, other, settings, report=report, warn=_warn)
        else:
            from kvrag.upkeep.recoding import recode_place

            copying = recode_place(one, other, settings, report=report, warn=_warn)
    names = ("copied", "present", "damaged", "left_out")
    outcomes = {name: copying.outcomes[name] for name in names}
    if as_json:
        print_json(outcomes | {"nbytes": copying.nbytes})
    else:
        show(
            f"{outcomes['copied']} blocks copied, {format_bytes(copying.nbytes)}; "
            f"{outcomes['present']} were there, {outcomes['damaged']} are damaged, "
            f"{outcomes['left_out']} left out"
        )
        if codec is None and one.home is not None:
            show(
                "blocks alone: documents, chunks and the vector index are not copied (--codec "
                "takes them along to a home)"
            )
    if outcomes["damaged"]:
        raise typer.Exit(_EXIT_DAMAGED)
    if outcomes["left_out"]:
        raise typer.Exit(_EXIT_LEFT_OUT)


def _warn(copied: Copied) -> None:
    warn(f"{copied.key} is left out: {copied.why}")
