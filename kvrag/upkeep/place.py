"""Where blocks are copied from or to: a home, the folder of a disk tier, or a Redis."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kvrag.config import Settings
from kvrag.errors import InputError
from kvrag.home import Home
from kvrag.store.disk import DiskTier
from kvrag.store.layout import Layout
from kvrag.store.redis_address import RedisAddress, RedisUrlError
from kvrag.store.tier import Tier
from kvrag.tiers import open_redis

__all__ = ["Place", "source_place", "target_place"]


@dataclass(frozen=True, slots=True)
class Place:
    """One place. `str()` names it, and masks what is secret in a URL.

    home: None where there is none. folder: of the disk tier; None for a Redis, which has an
    `address`. same: what tells it from other places.
    """

    name: str
    same: object
    home: Home | None = None
    folder: Path | None = None
    address: RedisAddress | None = None
    _url: str = field(default="", repr=False)

    def __str__(self) -> str:
        return self.name

    def open(self, settings: Settings) -> Tier:
        """The tier, of the place's name. Raises as `kvrag.tiers.open_tier`."""
        if self.folder is None:
            return open_redis(settings, self._url, name=self.name)
        return DiskTier(self.folder, self.name, fsync=settings.disk_fsync == "always")


def source_place(text: str) -> Place:
    """The place that has blocks. Raises InputError, without a secret, if there is none."""
    if "://" in text:
        return _redis(text)
    path = _path(text)
    if not path.is_dir():
        raise InputError(f"{path} is no folder")
    place = _folder(path, is_home=Home(path).secret.exists())
    if place.folder is None or not Layout(place.folder).blocks.is_dir():
        raise InputError(f"{path} is neither a home nor the folder of a disk tier")
    return place


def target_place(text: str, source: Place) -> Place:
    """The place for the blocks of `source`: a folder that is not there yet is of its kind.

    Raises InputError for no Redis, and for the source itself.
    """
    if "://" in text:
        place = _redis(text)
    else:
        path = _path(text)
        made = Home(path).secret.exists()
        is_tier = not made and Layout(path).blocks.is_dir()
        place = _folder(path, is_home=made or (source.home is not None and not is_tier))
    if place.same == source.same:
        raise InputError(f"{source} cannot be copied to itself")
    return place


def _folder(path: Path, *, is_home: bool) -> Place:
    home = Home(path) if is_home else None
    folder = path if home is None else home.kv
    return Place(str(path), folder.resolve(), home=home, folder=folder)


def _redis(url: str) -> Place:
    try:
        address = RedisAddress.parse(url)
    except RedisUrlError as exc:
        raise InputError(f"a place with :// in it is a Redis URL: {exc}") from None
    same = (address.kind, address.nodes, address.path, address.service, address.db)
    return Place(str(address), same, address=address, _url=url)


def _path(text: str) -> Path:
    return Path(text).expanduser().absolute()
