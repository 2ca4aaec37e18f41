"""From the `model` setting to an opened model: a name, a folder, a GGUF file or a hub's id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from kvrag.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from kvrag.models.config import ModelConfig
from kvrag.models.config_values import token_id_list
from kvrag.models.decoder import Decoder
from kvrag.models.file_parts import FileParts
from kvrag.models.fingerprint import model_fingerprint
from kvrag.models.folder import read_json
from kvrag.models.gguf.convert import convert_gguf
from kvrag.models.hub import hub_folder, hub_id
from kvrag.models.packaged import PACKAGED, packaged_source
from kvrag.models.tokenizer import Tokenizer
from kvrag.models.weights import Weights

__all__ = ["Model", "model_folder", "open_model"]


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with its tokenizer and the fingerprint that names them both."""

    folder: Path
    decoder: Decoder
    tokenizer: Tokenizer
    fingerprint: str
    eos_token_ids: frozenset[int]


def model_folder(model: str, models_dir: Path) -> Path:
    """The Hugging Face folder of `model`; GGUF files are converted on first use.

    What is on disk comes first: a hub is asked for `organisation/name[@revision]` only when no
    such path exists.

    Raises:
        ModelNotFoundError: neither a packaged name, nor a folder, nor a GGUF file, nor on the hub.
        ModelError, UnsupportedModelError: see `convert_gguf` and `hub_folder`.
    """
    if model in PACKAGED:
        packaged = packaged_source(model)
        if packaged is None:
            raise ModelNotFoundError(
                f"model {model!r} is not installed; `kvrag model fetch {model}` installs it"
            )
        if isinstance(packaged, FileParts):
            return convert_gguf(packaged, models_dir)
        path = packaged
    else:
        path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        return convert_gguf(path, models_dir)
    if not path.exists() and (repository := hub_id(model)) is not None:
        return hub_folder(repository)
    raise ModelNotFoundError(
        f"no model {model!r}: give a packaged name ({', '.join(PACKAGED)}), "
        "a Hugging Face folder, a hub's organisation/name or a .gguf file"
    )


def open_model(
    model: str,
    models_dir: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    context_length: int | None = None,
    int8_decoding: bool = False,
    kernels: str = "auto",
    kernels_dir: Path | None = None,
) -> Model:
    """Open a model for `dtype` on `device`.

    Args:
        context_length: most positions of a prompt with its answer; None is all the model has.
        int8_decoding, kernels, kernels_dir: see `Decoder`.

    Raises:
        ModelError: and its kinds; the message names the file, tensor or option.
    """
    folder = model_folder(model, models_dir)
    raw = read_json(folder / "config.json")
    try:
        config = ModelConfig.from_hf(raw, context_length=context_length)
    except UnsupportedModelError as exc:
        raise UnsupportedModelError(f"{folder / 'config.json'}: {exc}") from exc
    weights = _weights(folder, model, models_dir)
    tokenizer = Tokenizer(folder)
    generation = folder / "generation_config.json"
    stops = token_id_list(read_json(generation).get("eos_token_id")) if generation.exists() else ()
    _check_rows(folder, tokenizer, config.vocab_size)
    _check_stops(folder / "config.json", tokenizer, config.eos_token_ids)
    _check_stops(generation, tokenizer, stops)
    decoder = Decoder(
        config,
        weights,
        dtype=dtype,
        device=device,
        int8_decoding=int8_decoding,
        kernels=kernels,
        kernels_dir=kernels_dir,
    )
    return Model(
        folder=folder,
        decoder=decoder,
        tokenizer=tokenizer,
        fingerprint=model_fingerprint(
            config, weights, tokenizer.digest, dtype, decoder.compute_dtype
        ),
        eos_token_ids=frozenset(config.eos_token_ids + stops),
    )


def _weights(folder: Path, model: str, models_dir: Path) -> Weights:
    try:
        return Weights(folder)
    except ModelError as exc:
        if not folder.is_relative_to(models_dir) or Path(model).expanduser() == folder:
            raise
        # What was converted once can be converted again.
        raise ModelError(f"{exc}; delete {folder}, and {model!r} is converted anew") from exc


def _check_rows(folder: Path, tokenizer: Tokenizer, rows: int) -> None:
    """A tokenizer a little smaller than the embedding is normal, which is padded for speed."""
    if 2 * tokenizer.vocab_size < rows:
        raise ModelError(
            f"{folder / 'tokenizer.json'} is another model's: it has {tokenizer.vocab_size} "
            f"tokens, but the embedding has {rows} rows"
        )
    beyond = tokenizer.token_beyond(rows)
    if beyond is not None:
        token_id, token = beyond
        raise ModelError(
            f"{folder / 'tokenizer.json'} is another model's: its token {token!r} has id "
            f"{token_id}, but the embedding has {rows} rows (the tokenizer has "
            f"{tokenizer.vocab_size} tokens)"
        )


def _check_stops(path: Path, tokenizer: Tokenizer, eos_token_ids: tuple[int, ...]) -> None:
    for token_id in eos_token_ids:
        if tokenizer.token(token_id) is None:
            raise ModelError(
                f"{path} ends sequences with id {token_id}, which is no token of tokenizer.json "
                f"(it has {tokenizer.vocab_size} tokens): one of the two is another model's"
            )
