"""Options of `kvrag` itself may stand anywhere on its command line: they are moved to the front."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["moved_to_front"]


def moved_to_front(
    arguments: Sequence[str], *, with_value: Collection[str], flags: Collection[str]
) -> list[str]:
    """The arguments with these options, in their order, before all others.

    No command has an option of such a name. What stands behind `--` is no option. One whose value
    is missing is left alone at the end, so that whoever parses says so.
    """
    front: list[str] = []
    rest: list[str] = []
    left = list(arguments)
    while left:
        argument = left.pop(0)
        if argument == "--":
            rest += [argument, *left]
            break
        if argument in flags or argument.partition("=")[0] in with_value:
            front.append(argument)
            if argument in with_value:
                if not left:
                    return front
                front.append(left.pop(0))
        else:
            rest.append(argument)
    return front + rest
