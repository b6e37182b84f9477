"""A directory of Hugging Face files: safetensors weights in one file or in shards, in and out.

Pickle weights (`pytorch_model.bin`, `*.pt`) are refused: opening one can run any code.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxkv.checkpoints import layout
from jaxkv.checkpoints.errors import CheckpointError, read_json
from jaxkv.checkpoints.generation_config import Generation, generation_to_json, parse_generation
from jaxkv.checkpoints.huggingface_config import config_to_json, parse_config
from jaxkv.checkpoints.tokenizer import Tokenizer
from jaxkv.config import DecoderConfig

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLE = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_OWN_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# Where multimodal checkpoints keep the text model, and parts of theirs that the text model does not use.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."), ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)  # fmt: skip
_VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")


def read_config(directory: pathlib.Path) -> DecoderConfig:
    """The configuration alone; no weight is touched."""
    return parse_config(_config_json(directory))


def read_generation(directory: pathlib.Path) -> Generation:
    """generation_config.json where there is one, else the ids in config.json."""
    path = directory / "generation_config.json"
    return parse_generation(read_json(path) if path.exists() else {}, _config_json(directory))


def _config_json(directory: pathlib.Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.exists():
        files = sorted(directory.glob("*.gguf"))
        advice = f"give the path of {files[0].name}" if files else "a Hugging Face model directory is needed"
        raise CheckpointError(f"{directory} has no config.json; {advice}")
    return read_json(path)


def load(
    directory: pathlib.Path, config: DecoderConfig, *, dtype: str, progress: layout.Progress | None = None
) -> dict[str, Any]:
    """Reads the weights tensor by tensor onto the default device.

    Args:
      directory: with model.safetensors, or shards and model.safetensors.index.json.
      config: what `read_config` gave.
      dtype: "float32" or "bfloat16"; float32, float16 and bfloat16 are accepted in the file.
      progress: called with (bytes done, bytes in all, parameter name).
    Returns:
      The `params` collection.
    Raises:
      CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected, of wrong shape or type.
    """
    layout.check_dtype(dtype)
    wanted = layout.leaves(config, layout.huggingface_names(config))
    with contextlib.ExitStack() as stack:
        tensors = {}
        for path, names in _files(directory).items():
            tensors |= _tensors_of(path, names, stack)
        extras = {name for name in tensors if _is_extra(name)}
        tied = config.tie_embeddings and "lm_head.weight" in tensors
        if tied:
            extras.add("lm_head.weight")
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        layout.check_tensors(wanted, shapes, extras=extras, where=str(directory))
        for name in (name for leaf in wanted for name, _ in leaf.sources):
            if tensors[name].dtype not in _STORED:
                given, accepted = tensors[name].dtype, ", ".join(_STORED)
                raise CheckpointError(f"{directory}: tensor {name!r} has dtype {given}; accepted: {accepted}")
        if tied:
            _check_tied(tensors, directory)

        def read(name: str, first: int, end: int) -> np.ndarray:
            return tensors[name].rows(first, end)

        return layout.assemble(wanted, read, dtype=dtype, progress=progress)


def _is_extra(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq") or name.startswith(_VISION_PREFIXES)


def _files(directory: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Weight files -> names that the index promises in them (None: whatever is inside)."""
    if (directory / _SINGLE).exists():
        return {directory / _SINGLE: None}
    if not (directory / _INDEX).exists():
        pickles = sorted(path.name for pattern in _PICKLE for path in directory.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{directory} has pickle weights only ({pickles[0]}), which are not safe to open: they can run any "
                "code. Convert them to safetensors: transformers' from_pretrained, then save_pretrained."
            )
        raise CheckpointError(f"{directory} has no weights; {_SINGLE} or {_INDEX} with its shards is needed")
    weight_map = read_json(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{directory / _INDEX}: weight_map must map tensor names to file names")
    files: dict[pathlib.Path, set[str]] = {}
    for tensor, name in weight_map.items():
        if pathlib.Path(name).name != name:
            raise CheckpointError(f"{directory / _INDEX}: shard {name!r} is not a file name in that directory")
        files.setdefault(directory / name, set()).add(tensor)
    absent = sorted(path.name for path in files if not path.exists())
    if absent:
        raise CheckpointError(
            f"{directory}: shard {absent[0]!r} is missing ({len(absent)} of {len(files)}); {_INDEX} names it"
        )
    return files


@dataclasses.dataclass(frozen=True)
class _Stored:
    """A tensor in an open file. Rows are read, not mapped: mapped pages would count as memory of the process."""

    file: BinaryIO
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def rows(self, first: int, end: int) -> np.ndarray:
        kind = _STORED[self.dtype]
        count = int(np.prod(self.shape[1:]))
        self.file.seek(self.offset + first * count * kind.itemsize)
        data = self.file.read((end - first) * count * kind.itemsize)
        return np.frombuffer(data, kind).reshape(end - first, *self.shape[1:])


def _tensors_of(path: pathlib.Path, promised: set[str] | None, stack: contextlib.ExitStack) -> dict[str, _Stored]:
    """The tensors of one file, by the names that a text model has; the file stays open in `stack`."""
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass  # checks the header, and that it describes the whole file
        file = stack.enter_context(path.open("rb", buffering=0))
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({error}); download or write it again") from error
    header.pop("__metadata__", None)
    if promised is not None and promised - header.keys():
        raise CheckpointError(f"{path} lacks tensor {min(promised - header.keys())!r}, which {_INDEX} places there")
    found = {}
    for name, entry in header.items():
        renamed = next((new + name[len(old) :] for old, new in _TEXT_PREFIXES if name.startswith(old)), name)
        found[renamed] = _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + size + entry["data_offsets"][0])
    return found


def _check_tied(tensors: Mapping[str, _Stored], directory: pathlib.Path) -> None:
    head, table = (tensors[name] for name in ("lm_head.weight", "model.embed_tokens.weight"))
    blocks = [(first, min(first + 1024, table.shape[0])) for first in range(0, table.shape[0], 1024)]
    same = head.shape == table.shape and head.dtype == table.dtype
    if not same or not all(np.array_equal(head.rows(*block), table.rows(*block)) for block in blocks):
        raise CheckpointError(
            f"{directory}: tie_word_embeddings is true, but 'lm_head.weight' differs from "
            "'model.embed_tokens.weight'. Set tie_word_embeddings to false, or remove the tensor that is wrong."
        )


def save(
    directory: str | os.PathLike[str],
    config: DecoderConfig,
    params: Mapping[str, Any],
    *,
    tokenizer: Tokenizer | None = None,
    generation: Generation | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 4 * 1024**3,
) -> None:
    """Writes a directory that `open_checkpoint` and transformers load to the same logits.

    Everything is written beside `directory` first and moved into place at the end: either all of it is there, or none.

    Args:
      directory: absent or empty, unless `overwrite`; then it may hold an earlier checkpoint and nothing else.
      config, params: the model; parameters of one dtype, float32 or bfloat16.
      tokenizer, generation: written where given.
      max_shard_bytes: weights beyond this go into several files. Host memory: one shard.
    Raises:
      CheckpointError: the directory is in use or cannot be written, or config and params do not fit each other.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    _check_target(directory, overwrite)
    kinds = sorted({str(leaf.dtype) for leaf in _array_leaves(params)})
    if len(kinds) != 1 or kinds[0] not in layout.DTYPES:
        raise CheckpointError(f"parameters have dtype {', '.join(kinds)}; accepted: one of {', '.join(layout.DTYPES)}")
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    fields = config_to_json(config, dtype=kinds[0], generation=generation)
    partial = directory.with_name(f".{directory.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_json(partial / "config.json", fields)
        if generation is not None:
            _write_json(partial / "generation_config.json", generation_to_json(generation))
        if tokenizer is not None:
            tokenizer.save(partial)
        _write_weights(partial, config, params, max_shard_bytes)
        _move_into_place(partial, directory)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _array_leaves(params: Mapping[str, Any]) -> list[Any]:
    import jax

    return jax.tree_util.tree_leaves(dict(params))


def _check_target(directory: pathlib.Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; a directory to write into is needed")
    names = sorted(path.name for path in directory.iterdir())
    if names and not overwrite:
        raise CheckpointError(f"{directory} is not empty (it has {names[0]!r}); choose another, or overwrite=True")
    own = {*_OWN_FILES, _INDEX, _SINGLE, *(path.name for path in directory.glob("model-*-of-*.safetensors"))}
    foreign = [name for name in names if name not in own]
    if foreign:
        raise CheckpointError(f"{directory} holds {foreign[0]!r}, which is no checkpoint file; it is not overwritten")


def _write_json(path: pathlib.Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(directory: pathlib.Path, config: DecoderConfig, params: Mapping[str, Any], limit: int) -> None:
    from safetensors.numpy import save_file

    wanted = layout.leaves(config, layout.huggingface_names(config))
    width = next(iter(_array_leaves(params))).dtype.itemsize
    sizes = [int(np.prod(shape)) * width for leaf in wanted for _, shape in leaf.sources]
    shards: list[int] = [0]  # index of the shard of each tensor, planned before anything is written
    plan = []
    for size in sizes:
        if shards[-1] and shards[-1] + size > limit:
            shards.append(0)
        shards[-1] += size
        plan.append(len(shards) - 1)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [_SINGLE] if len(shards) == 1 else names
    weight_map, batch, current = {}, {}, 0
    for index, (name, array) in zip(plan, layout.take_apart(wanted, params), strict=True):
        if index != current:
            save_file(batch, directory / names[current], metadata={"format": "pt"})
            batch, current = {}, index
        batch[name] = array
        weight_map[name] = names[index]
    save_file(batch, directory / names[current], metadata={"format": "pt"})
    if len(shards) > 1:
        _write_json(directory / _INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _move_into_place(partial: pathlib.Path, directory: pathlib.Path) -> None:
    if not directory.exists():
        partial.rename(directory)
        return
    old = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    directory.rename(old)
    try:
        partial.rename(directory)
    except OSError:
        old.rename(directory)
        raise
    shutil.rmtree(old)
