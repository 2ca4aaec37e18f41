"""Models of a hub by `organisation/name` or `organisation/name@revision`, where a network exists.

Files go into the cache that the programs of Hugging Face share, and the library's own environment
variables hold: HF_HOME, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. Only what kvrag reads is
downloaded, with progress on stderr if that is a terminal.

The hub is asked once at an opening. When it cannot be reached, a complete copy in the cache
serves. Files are fetched one by one, since the library's call for a whole repository waits without
limit for a server that takes the connection and stays silent.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from kvrag.models.folder import INDEX, missing_files, weight_files

__all__ = ["HubId", "found_folder", "hub_folder", "hub_id"]

#: Seconds that a server may be silent.
_TIMEOUT_S = 10.0

_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^@\s]+))?", re.ASCII)
_SINGLE = "model.safetensors"
_NEEDED = ("config.json", "tokenizer.json")
_OPTIONAL = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository, and which branch, tag or commit of it."""

    name: str
    revision: str = "main"

    def __str__(self) -> str:
        return self.name if self.revision == "main" else f"{self.name}@{self.revision}"


class _UnreachableError(Exception):
    """The hub gave no answer, or not all of it; the message is the reason."""


class _OfflineError(_UnreachableError):
    """The user wants no network."""


def hub_id(text: str) -> HubId | None:
    """`text` as a hub's id, or None when it cannot be one."""
    match = _ID.fullmatch(text)
    return HubId(match["name"], match["revision"] or "main") if match else None


def found_folder(name: str) -> Path:
    """The folder of that path, or where there is none, of the hub's model with that id.

    Raises:
        ModelNotFoundError: neither, or see `hub_folder`.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or (repository := hub_id(name)) is None:
        raise ModelNotFoundError(f"{name!r} is neither a folder nor a hub's organisation/name")
    return hub_folder(repository)


def hub_folder(wanted: HubId) -> Path:
    """The folder of a model in the cache, downloaded when it is not there in the hub's version.

    Raises:
        ModelNotFoundError: the hub does not have the model or does not give it, or cannot be
            reached while the cache has no complete copy.
        UnsupportedModelError: the repository has no safetensors.
        ModelError: a file cannot be written.
    """
    cached = _cached(wanted)
    lacks = ["config.json"] if cached is None else missing_files(cached)
    if cached is not None and not lacks and cached.name == wanted.revision:
        return cached  # a commit never changes
    try:
        return _newest(wanted, cached)
    except _UnreachableError as exc:
        where, cache = _places()
        if cached is None or lacks:
            copy = f"an incomplete copy (it lacks {', '.join(lacks)})" if cached else "no copy"
            raise ModelNotFoundError(
                f"no model '{wanted}': no such folder is here, {where} was not of use ({exc}), and "
                f"the cache {cache} has {copy}"
            ) from exc
        if not isinstance(exc, _OfflineError):
            _log.warning("'%s': %s was not of use (%s); using %s", wanted, where, exc, cached)
        return cached


def _newest(wanted: HubId, cached: Path | None) -> Path:
    """What the hub has now, in the cache; a file that is there costs no request."""
    commit, names = _listing(wanted)
    _check_names(wanted, names)
    folder = _fetch(wanted, "config.json", commit).parent
    for name in _wanted_files(folder, wanted, commit, names):
        _fetch(wanted, name, commit)
    if cached != folder:
        # Now that all is there, under the branch's name too: so it is found without a network.
        _fetch(wanted, "config.json", wanted.revision)
    return folder


def _wanted_files(
    folder: Path, wanted: HubId, commit: str, names: Collection[str]
) -> Iterator[str]:
    yield from (name for name in (*_NEEDED, *_OPTIONAL) if name in names)
    if _SINGLE in names:
        yield _SINGLE
    elif INDEX in names:
        _fetch(wanted, INDEX, commit)
        yield from (path.name for path in weight_files(folder))
    else:
        yield from (name for name in names if name.endswith(".safetensors"))


def _check_names(wanted: HubId, names: Collection[str]) -> None:
    """Refuse a repository before anything large is downloaded."""

    def some(*ends: str) -> str | None:
        return min((name for name in names if name.endswith(ends)), default=None)

    if some(".safetensors") is None:
        if gguf := some(".gguf"):
            raise UnsupportedModelError(
                f"the repository '{wanted}' holds GGUF files alone: download one of them "
                f"({gguf}) and give its path"
            )
        if pickle := some(".bin", ".pt", ".pth"):
            raise UnsupportedModelError(
                f"the repository '{wanted}' holds its weights as pickle alone ({pickle}), which is "
                "not read because opening a pickle runs whatever code is in it"
            )
    needed = [name for name in _NEEDED if name not in names]
    if some(".safetensors") is None:
        needed.append("*.safetensors")
    if needed:
        raise ModelNotFoundError(
            f"the repository '{wanted}' is no model that can be opened: it lacks "
            f"{', '.join(needed)}"
        )


# ---- the library ---------------------------------------------------------------------------------


def _places() -> tuple[str, str]:
    """The hub's address and the cache folder, as the environment has them."""
    from huggingface_hub import constants

    return constants.ENDPOINT, constants.HF_HUB_CACHE


def _cached(wanted: HubId) -> Path | None:
    """The folder of the revision in the cache, whole or not; None when there is none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(
                wanted.name, "config.json", revision=wanted.revision, local_files_only=True
            )
        ).parent
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as exc:
        raise ModelNotFoundError(
            f"no model '{wanted}': no such folder is here, and no hub has such a name ({exc})"
        ) from exc


def _listing(wanted: HubId) -> tuple[str, list[str]]:
    """The commit that the revision is now, and the files at the top of the repository."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise _OfflineError("HF_HUB_OFFLINE is set")
    try:
        info = HfApi(library_name="kvrag").model_info(
            wanted.name, revision=wanted.revision, timeout=_TIMEOUT_S
        )
    except Exception as exc:  # whatever the library's HTTP client raises
        raise _translated(exc, wanted) from exc
    if info.sha is None or info.siblings is None:
        raise _UnreachableError("it answers, but not as a hub does")
    names = [file.rfilename for file in info.siblings if "/" not in file.rfilename]
    return info.sha, sorted(names)


def _fetch(wanted: HubId, name: str, revision: str) -> Path:
    """One file in the cache."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(
            hf_hub_download(
                wanted.name,
                name,
                revision=revision,
                library_name="kvrag",
                etag_timeout=_TIMEOUT_S,
            )
        )
    except Exception as exc:  # whatever the library's HTTP client and the file system raise
        raise _translated(exc, wanted, name) from exc


def _translated(exc: Exception, wanted: HubId, name: str | None = None) -> Exception:
    """Ours for the library's: what the hub refused, what failed here, or nobody was there."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where, cache = _places()
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(exc, GatedRepoError):
        return ModelNotFoundError(
            f"the repository '{wanted.name}' is gated: ask for access at {where}/{wanted.name}, "
            "then set HF_TOKEN to a token of that account (or run `hf auth login`)"
        )
    if isinstance(exc, RevisionNotFoundError):
        return ModelNotFoundError(
            f"the repository '{wanted.name}' at {where} has no revision {wanted.revision!r}"
        )
    if isinstance(exc, RepositoryNotFoundError):
        return ModelNotFoundError(
            f"no model '{wanted}': no such folder is here, and {where} shows no repository of "
            "that name; for a private one set HF_TOKEN (or run `hf auth login`)"
        )
    if status in (401, 403):
        return ModelNotFoundError(
            f"{where} refuses '{wanted}' with HTTP {status}: HF_TOKEN (or the token of `hf auth "
            "login`) is wrong, has expired, or does not reach this repository"
        )
    if isinstance(exc, EntryNotFoundError) and not isinstance(exc, LocalEntryNotFoundError):
        return ModelNotFoundError(f"the repository '{wanted}' at {where} lacks the file {name}")
    if isinstance(exc, OSError) and exc.errno is not None and exc.filename is not None:
        return ModelError(f"{name} of '{wanted}' cannot be kept in {cache}: {exc.strerror}")
    reason = exc.__cause__ if isinstance(exc, LocalEntryNotFoundError) and exc.__cause__ else exc
    lines = str(reason).strip().splitlines()
    return _UnreachableError(lines[0] if lines else type(reason).__name__)
