"""Settings: the only place that reads the environment or a settings file.

A setting comes from, strongest first: an argument, the environment (`KVRAG_MODEL=…`), a TOML file
(`KVRAG_CONFIG=path`, else `kvrag.toml` in the working directory), the default below. An unknown or
malformed one stops the program with a sentence.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from kvrag.errors import SettingsError
from kvrag.retrieval.vectors.kinds import IndexChoice
from kvrag.searching import RerankMode, SearchMode
from kvrag.store.encryption_key import key_from_text
from kvrag.store.limits import LONGEST_TTL_S
from kvrag.store.redis_address import RedisAddress

__all__ = ["DEFAULT_INSTRUCTION", "Settings", "value_from_text"]

DEFAULT_INSTRUCTION = "You answer questions from the passages that the user gives. Answer briefly."

_PREFIX = "KVRAG_"
#: Names the settings file, and so is no setting itself.
_FILE_VARIABLE = "KVRAG_CONFIG"
#: Never shown.
_SECRET = frozenset({"encryption_key", "redis_url"})
#: What a home keeps, where, and for how long.
_KEEPING = (
    "disk_bytes",
    "ram_policy",
    "disk_policy",
    "ram_admission",
    "disk_admission",
    "disk_write",
    "ram_reserved",
    "namespace_ram_bytes",
    "namespace_disk_bytes",
    "ttl_s",
    "redis_url",
)
#: Read by the test suite alone.
_FOREIGN_VARIABLES = frozenset({_FILE_VARIABLE, "KVRAG_TEST_MODELS"})


def _cache_dir() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "kvrag"


PolicyName = Literal["lru", "lfu", "cost", "s3-fifo"]
AdmissionName = Literal["always", "second-use"]


class Settings(BaseSettings):
    """What an engine is opened with. Immutable.

    Raises:
        SettingsError: an unknown name or a value that is not allowed; the message says which,
            where it came from, and what is allowed.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        # What is chained to a SettingsError must not tell what `_sentence` does not.
        hide_input_in_errors=True,
    )

    model: str = Field(
        "smollm2-135m",
        description="Packaged model name, Hugging Face folder or hub id, or .gguf file.",
    )
    home: Path = Field(
        Path("~/.local/share/kvrag"),
        description="Folder of stored KV, catalog, vector index and key secret; made when absent.",
    )
    models_dir: Path = Field(
        default_factory=lambda: _cache_dir() / "models",
        description="Cache folder for converted models; never under home.",
    )
    dtype: Literal["bfloat16", "float32", "float64"] = Field(
        "bfloat16", description="Dtype of weights and stored KV."
    )
    decode_weights: Literal["stored", "int8"] = Field(
        "stored", description="What decoding multiplies; prefill and stored KV do not depend on it."
    )
    context_length: int | None = Field(
        None,
        ge=1,
        description="Most tokens of a prompt with its answer; None is all the model has.",
    )
    device: str = Field("cpu", description="torch device.")
    kernels: Literal["auto", "torch", "cpu", "triton"] = Field(
        "auto",
        description="What calculates; auto is triton on a GPU where it can run, and cpu otherwise.",
    )
    kernels_dir: Path = Field(
        default_factory=lambda: _cache_dir() / "kernels",
        description="Cache folder of native code, which is compiled at first use.",
    )
    threads: int | None = Field(
        None, ge=1, description="Threads of torch in this process; None leaves torch's choice."
    )
    codec: Literal["raw", "int8", "int4"] = Field(
        "raw", description="How KV is encoded in the store; raw keeps every bit."
    )
    namespace: str = Field("default", min_length=1, description="Tenant whose blocks are used.")
    instruction: str = Field(
        DEFAULT_INSTRUCTION, min_length=1, description="System text in front of the passages."
    )
    corpus_context: str | None = Field(
        None,
        description="Passages, an empty line between them, that chunks are computed behind, since "
        "they will stand among some; None is kvrag's own, '' is none. No prompt shows them.",
    )
    first_blocks: bool = Field(
        True,
        description="Whether a corpus's chunks are stored a second time, as a prompt's first.",
    )
    embedder: str = Field(
        "minilm", description="Packaged embedder or sentence-transformers folder."
    )
    chunk_tokens: int = Field(
        256, ge=32, le=2048, description="Most tokens of a chunk made from a document."
    )
    k: int = Field(4, ge=1, description="Chunks retrieved for a question.")
    index: IndexChoice = Field(
        "auto",
        description="How vectors are searched: exactly (flat), along a graph (hnsw), or compressed "
        "(ivfpq); auto goes by their number.",
    )
    search: SearchMode = Field(
        "hybrid", description="How chunks are found: by meaning, by words, or by both."
    )
    mmr: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Part of relevance in choosing chunks, the rest being novelty (MMR).",
    )
    distinct: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Most similarity of two chunks that are retrieved together; 1 is any.",
    )
    rerank: RerankMode = Field(
        "none", description="Whether the cross_encoder orders what was found anew."
    )
    cross_encoder: str | None = Field(
        None, description="Cross-encoder's folder or hub id, for rerank; none cannot rerank."
    )
    strategy: str = Field("fast", description="Fusion strategy.")
    ratio: float | None = Field(
        None, ge=0, le=1, description="Recompute ratio; None is the strategy's own."
    )
    controller: bool = Field(
        True,
        description="Whether slow loading may raise a ratio that nobody gave, or be left out.",
    )
    ram_bytes: int = Field(2 * 2**30, ge=0, description="Most bytes of KV in memory.")
    disk_bytes: int | None = Field(
        None, ge=0, description="Most bytes of KV on disk; None is no limit."
    )
    disk_fsync: Literal["always", "never"] = Field(
        "always",
        description="Whether storing a block waits until the device has it; if never, a power loss "
        "may cost blocks, which are then computed again.",
    )
    ram_policy: PolicyName = Field("lru", description="What memory evicts first.")
    disk_policy: PolicyName = Field("lru", description="What the disk evicts first.")
    ram_admission: AdmissionName = Field(
        "always", description="Whether memory takes a block at its first use or its second."
    )
    disk_admission: AdmissionName = Field(
        "always", description="The same for the disk, which takes a corpus's blocks at once."
    )
    disk_write: Literal["through", "back"] = Field(
        "through",
        description="Whether a request waits for disk and Redis, or threads write later.",
    )
    ram_reserved: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of ram_bytes that blocks of no corpus leave to those of one.",
    )
    namespace_ram_bytes: int | None = Field(
        None, ge=0, description="Most bytes of one namespace's KV in memory; None is no quota."
    )
    namespace_disk_bytes: int | None = Field(
        None, ge=0, description="Most bytes of one namespace's KV on disk; None is no quota."
    )
    ttl_s: float | None = Field(
        None,
        gt=0,
        le=LONGEST_TTL_S,
        description="Seconds without use after which KV that no corpus refers to is deleted.",
    )
    redis_url: SecretStr | None = Field(
        None, description="Redis or Valkey that also holds KV, behind the disk; None is none."
    )
    redis_bytes: int | None = Field(
        None, ge=0, description="Most bytes of KV that this process knows of in Redis."
    )
    redis_ttl_s: float | None = Field(
        None,
        gt=0,
        le=LONGEST_TTL_S,
        description="Seconds a block stays in Redis unread; None is ttl_s, if that is set.",
    )
    redis_connect_timeout_s: float = Field(
        1.0, gt=0, le=600, description="Most seconds for connecting to Redis."
    )
    redis_timeout_s: float = Field(
        1.0, gt=0, le=600, description="Most seconds for an answer of Redis."
    )
    redis_connections: int = Field(16, ge=1, description="Most connections to Redis.")
    redis_prefix: str = Field(
        "kvrag:",
        max_length=64,
        pattern=r"^[!-~]*$",
        description="What kvrag's keys in Redis begin with.",
    )
    encryption_key: SecretStr | None = Field(
        None,
        description="64 hexadecimal digits: the key that KV outside of memory is encrypted with.",
    )
    encryption_key_file: Path | None = Field(
        None, description="File with that key; None, and no key, is no encryption."
    )
    device_bytes: int = Field(
        0, ge=0, description="Most bytes of decoded KV kept on the device; 0 keeps none."
    )
    max_document_bytes: int = Field(
        64 * 2**20, ge=1, description="Larger files are skipped when a folder is read."
    )
    host: str = Field("127.0.0.1", description="Address of `kvrag serve`.")
    port: int = Field(8321, ge=0, le=65535, description="Port of `kvrag serve`; 0 picks one.")
    queue_size: int = Field(
        64, ge=1, description="Requests that may wait; one more is answered with 429."
    )
    verify_on_start: bool = Field(
        True, description="Whether `kvrag serve` checks blending first, and refuses it if it fails."
    )
    eval_data: Path | None = Field(
        None, description="Folder of evaluation data for `kvrag bench fidelity` and `bench layers`."
    )

    def __init__(self, **values: Any) -> None:
        _refuse_unknown_variables(type(self).model_fields)
        try:
            super().__init__(**values)
        except ValidationError as exc:
            raise SettingsError(_sentence(exc)) from exc

    def apart(self, home: Path, **other: Any) -> Settings:
        """These settings for another home, with `other` ones, whose disk keeps all that is put.

        What was computed there is then found there, whatever this home may hold. Memory, codec
        and encryption stay: what is measured is what this home would do.
        """
        keeping = {name: type(self).model_fields[name].default for name in _KEEPING}
        return Settings(**self.model_dump() | keeping | {"home": home} | other)

    @field_validator("home", "models_dir", "kernels_dir", "eval_data", "encryption_key_file")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @field_validator("redis_url")
    @classmethod
    def _redis_address(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None:
            RedisAddress.parse(url.get_secret_value())
        return url

    @field_validator("encryption_key")
    @classmethod
    def _is_key(cls, key: SecretStr | None) -> SecretStr | None:
        if key is not None:
            key_from_text(key.get_secret_value())
        return key

    @model_validator(mode="after")
    def _reranked_by_something(self) -> Settings:
        if self.rerank == "cross_encoder" and self.cross_encoder is None:
            raise ValueError("rerank is 'cross_encoder', which needs the setting cross_encoder")
        return self

    @model_validator(mode="after")
    def _one_encryption_key(self) -> Settings:
        if self.encryption_key is not None and self.encryption_key_file is not None:
            raise ValueError("set encryption_key or encryption_key_file, not both")
        return self

    @model_validator(mode="after")
    def _models_outside_home(self) -> Settings:
        if self.models_dir.is_relative_to(self.home):
            raise ValueError(
                f"models_dir {self.models_dir} must not lie under home {self.home}: models belong "
                "to the user's cache and outlive a corpus"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        named = os.environ.get(_FILE_VARIABLE)
        path = Path(named).expanduser() if named else Path("kvrag.toml")
        if named and not path.is_file():
            raise SettingsError(f"{_FILE_VARIABLE} names {path}, which is no file")
        try:
            toml = TomlConfigSettingsSource(settings_cls, toml_file=path)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as exc:
            raise SettingsError(f"settings file {path} cannot be read as TOML: {exc}") from exc
        return init_settings, env_settings, toml


def value_from_text(text: str) -> Any:
    """A setting's value as a settings file would have it; text that is no TOML stays text."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in the value could begin further entries. Dates are no setting's type, so a text
    # that reads like one is meant.
    plain = len(table) == 1 and isinstance(table["value"], str | int | float | list | dict)
    return table["value"] if plain else text


def _refuse_unknown_variables(fields: dict[str, Any]) -> None:
    """pydantic-settings ignores variables that name no setting; a misspelt one must not pass."""
    known = {_PREFIX + name.upper() for name in fields} | _FOREIGN_VARIABLES
    for variable in os.environ:
        if variable.upper().startswith(_PREFIX) and variable.upper() not in known:
            raise SettingsError(
                f"environment variable {variable} is no setting; settings are "
                + ", ".join(sorted(known - _FOREIGN_VARIABLES))
            )


def _sentence(exc: ValidationError) -> str:
    """One clause a wrong setting: name, what was given, what is allowed."""
    clauses = []
    for error in exc.errors():
        name = ".".join(str(part) for part in error["loc"])
        if error["type"] == "extra_forbidden":
            clauses.append(
                f"unknown setting {name!r}; known are {', '.join(Settings.model_fields)}"
            )
        elif name in _SECRET:
            clauses.append(f"setting {name!r}: {error['msg'].removeprefix('Value error, ')}")
        elif not name:  # of several settings together; what was given is all of them
            clauses.append(error["msg"].removeprefix("Value error, "))
        else:
            clauses.append(f"setting {name!r} is {error['input']!r}: {error['msg'].lower()}")
    return "; ".join(clauses)
