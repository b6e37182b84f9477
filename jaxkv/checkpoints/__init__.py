"""Checkpoints in and out: Hugging Face directories and ids, GGUF files, and the models that have a name.

`open_checkpoint("smollm2", dtype="float32")` gives a `Checkpoint` of configuration, parameters, tokenizer and what the
checkpoint says about generation; `read_config` gives the configuration alone; `save` writes a directory.
"""

import dataclasses
import os
import pathlib
from typing import Any

from jaxkv.checkpoints import gguf, gguf_file, gguf_tokenizer, hub, layout, named, safetensors
from jaxkv.checkpoints.adapters import add_adapters, save_adapters
from jaxkv.checkpoints.chat import ChatPieces
from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.generation_config import Generation
from jaxkv.checkpoints.layout import Progress
from jaxkv.checkpoints.named import NAMED
from jaxkv.checkpoints.safetensors import save
from jaxkv.checkpoints.tokenizer import Tokenizer, load_tokenizer
from jaxkv.config import DecoderConfig

__all__ = [
    "NAMED",
    "ChatPieces",
    "Checkpoint",
    "CheckpointError",
    "Generation",
    "Progress",
    "Tokenizer",
    "add_adapters",
    "load_tokenizer",
    "open_checkpoint",
    "read_config",
    "save",
    "save_adapters",
]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in memory.

    params: the `params` collection of the decoder. tokenizer: None if the source has none.
    source: the directory or file that was read.
    """

    config: DecoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    generation: Generation
    source: pathlib.Path


def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    dtype: str,
    revision: str | None = None,
    token: str | None = None,
    offline: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Loads a model onto the default device, one tensor at a time.

    Args:
      source: a name (`NAMED`), a Hugging Face directory, a .gguf file, or a Hugging Face id (owner/name).
      dtype: of the parameters, "float32" or "bfloat16".
      revision, token, offline: for an id; see `hub.fetch`.
      progress: called with (bytes done, bytes in all, parameter name).
    Raises:
      CheckpointError: what was given, what is accepted, and the fix.
    """
    layout.check_dtype(dtype)
    path = _resolve(source, revision=revision, token=token, offline=offline)
    if path.is_dir():
        config = safetensors.read_config(path)
        tokenizer = load_tokenizer(path)
        generation = safetensors.read_generation(path)
        if not generation.eos_ids and tokenizer is not None:
            generation = dataclasses.replace(generation, eos_ids=tokenizer.eos_ids)
        params = safetensors.load(path, config, dtype=dtype, progress=progress)
    else:
        file = gguf_file.read_gguf(path)
        config = gguf.config_of(file)
        generation = gguf.generation_of(file)
        tokenizer = gguf_tokenizer.tokenizer_of(file, generation)
        params = gguf.load(file, config, dtype=dtype, progress=progress)
    return Checkpoint(config, params, tokenizer, generation, path)


def read_config(
    source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None, offline: bool = False
) -> DecoderConfig:
    """The configuration alone, without the weights (of an id: config.json is downloaded, nothing else).

    Args and Raises: as `open_checkpoint`.
    """
    path = _resolve(source, revision=revision, token=token, offline=offline, config_only=True)
    return safetensors.read_config(path) if path.is_dir() else gguf.config_of(gguf_file.read_gguf(path))


def _resolve(
    source: str | os.PathLike[str],
    *,
    revision: str | None,
    token: str | None,
    offline: bool,
    config_only: bool = False,
) -> pathlib.Path:
    """The directory or GGUF file that `source` means."""
    text = os.fspath(source)
    path = pathlib.Path(text).expanduser()
    accepted = (
        f"accepted: a name ({', '.join(NAMED)}), a directory with config.json and safetensors, a .gguf file, "
        "or a Hugging Face id such as owner/name"
    )
    if text in NAMED:
        return named.find_named(text)
    if text and path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{text} is one file of a model; give its directory, {path.parent}")
        if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
            raise CheckpointError(
                f"{text} is a pickle file, which is not safe to open: it can run any code. Convert it to safetensors."
            )
        raise CheckpointError(f"{text} is not a model file; {accepted}")
    if path.suffix != ".gguf" and hub.is_hub_id(text):
        return hub.fetch(text, revision=revision, token=token, offline=offline, config_only=config_only)
    raise CheckpointError(f"{text!r} does not exist; {accepted}")
