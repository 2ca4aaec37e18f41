"""All sections in one run: the table and the JSON line."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from kvrag.bench.frame import print_environment, print_json, print_table
from kvrag.bench.store.disk import disk_section
from kvrag.bench.store.memory import memory_section
from kvrag.bench.store.options import Section, Skipped, StoreOptions
from kvrag.bench.store.peers import peer_section
from kvrag.bench.store.redis import redis_section, redis_url
from kvrag.config import Settings

__all__ = ["run"]


def run(settings: Settings, options: StoreOptions) -> dict[str, Any]:
    """Measure, print and return the result (see the last line's JSON).

    A section that cannot be measured here is named, with the reason, and the others go on.
    """
    sections: dict[str, Callable[[], Section]] = {
        "memory": partial(memory_section, options),
        "disk": partial(disk_section, options),
        "redis": partial(_redis, settings, options),
        **{peer.label: partial(peer_section, peer, settings, options) for peer in options.peers},
    }
    found: dict[str, Section] = {}
    skipped: dict[str, str] = {}
    for name, measure in sections.items():
        try:
            found[name] = measure()
        except Skipped as exc:
            skipped[name] = str(exc)
    result = {
        "benchmark": "store",
        "layers": options.layers,
        "tokens": options.tokens,
        "layer_bytes": options.layer_nbytes,
        "blocks": options.blocks,
        "repetitions": options.repetitions,
        **{name: dict(section.figures) for name, section in found.items()},
        "targets": {
            target.name: {
                "measured": target.measured,
                "at_most" if target.at_most else "at_least": target.wanted,
                "met": target.met,
            }
            for section in found.values()
            for target in section.targets
        },
        "skipped": skipped,
    }
    _show(found, skipped, options, result)
    return result


def _redis(settings: Settings, options: StoreOptions) -> Section:
    with redis_url(settings) as url:
        return redis_section(url, settings, options)


def _show(
    found: dict[str, Section],
    skipped: dict[str, str],
    options: StoreOptions,
    result: dict[str, Any],
) -> None:
    print_environment()
    rows: list[tuple[object, ...]] = [
        (name, *row) for name, section in found.items() for row in section.rows
    ]
    rows += [(name, "skipped", "", "", reason) for name, reason in skipped.items()]
    print_table(
        f"Blocks of {options.nbytes / 2**20:.1f} MiB, medians of {options.repetitions} turns",
        ("section", "who", "ms a block", "GB/s", "relation"),
        rows,
    )
    targets = [target for section in found.values() for target in section.targets]
    print_table(
        "Targets",
        ("figure", "measured", "wanted", "met"),
        [
            (
                target.name,
                target.measured,
                f"{'at most' if target.at_most else 'at least'} {target.wanted:g}",
                "yes" if target.met else "no",
            )
            for target in targets
        ],
    )
    print_json(result)
