"""Low-rank adapters in PEFT's files, in and out (LoRA, arXiv 2106.09685): adapter_config.json, adapter_model.safetensors.

    kernel [in, out] + scale * A B     files: lora_A [rank, in], lora_B [out, rank], one pair for each of q, k, v, gate, ...

A fused kernel's adapter is written as one pair per part, all with the same A, and so read back to the same sum. Source: peft
0.17, `tuners/lora`. Departs: what is read is added to the kernels at once; there is no adapter to switch off.
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.checkpoints import layout
from jaxkv.checkpoints.errors import CheckpointError, read_json
from jaxkv.config import DecoderConfig

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
_OFF = (  # fields that change the result and must be off
    "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication",
    "trainable_token_indices", "megatron_config",
)  # fmt: skip


def save_adapters(
    directory: str | os.PathLike[str],
    config: DecoderConfig,
    adapters: Mapping[tuple[str, ...], tuple[Any, Any]],
    *,
    alpha: float,
    base: str,
) -> None:
    """Writes a folder that PEFT and `add_adapters` read.

    Args: adapters: path of a kernel -> (A [in, rank], B [rank, out]). base: the checkpoint that they belong to.
    Raises: CheckpointError for paths that are no kernels, or different ranks.
    """
    from safetensors.numpy import save_file

    kernels = {leaf.path: leaf for leaf in layout.leaves(config, layout.huggingface_names(config)) if leaf.transposed}
    unknown = [path for path in adapters if path not in kernels]
    ranks = {a.shape[1] for a, _ in adapters.values()}
    if unknown or len(ranks) != 1:
        raise CheckpointError(f"adapters need kernels of the model and one rank; got {unknown or sorted(ranks)}")
    tensors, modules = {}, set()
    for path, (a, b) in adapters.items():
        first = 0
        for name, shape in kernels[path].sources:
            module, part = name.removesuffix(".weight"), np.asarray(b)[:, first : first + shape[0]]
            first += shape[0]
            modules.add(module.rpartition(".")[2])
            for letter, array in (("A", np.asarray(a).T), ("B", part.T)):
                tensors[f"{PREFIX}{module}.lora_{letter}.weight"] = np.ascontiguousarray(array)
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": ranks.pop(),
        "lora_alpha": alpha, "target_modules": sorted(modules), "bias": "none", "inference_mode": True,
    }  # fmt: skip
    directory = pathlib.Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be written: {error.strerror or error}") from error


def add_adapters(directory: str | os.PathLike[str], config: DecoderConfig, params):
    """The parameters with a folder's adapters added to their kernels; the sums are computed in float32.

    Raises: CheckpointError for a folder that is not LoRA's, that asks for more than A B, or that belongs to another model.
    """
    import safetensors
    from safetensors.numpy import load_file

    directory = pathlib.Path(directory).expanduser()
    scale = _scale(directory)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{directory / WEIGHTS} cannot be read: {error}") from error
    params, used = jax.tree.map(lambda x: x, params), set()
    for leaf in layout.leaves(config, layout.huggingface_names(config)):
        pairs = [[f"{PREFIX}{name.removesuffix('.weight')}.lora_{x}.weight" for x in "AB"] for name, _ in leaf.sources]
        if not leaf.transposed or not any(name in tensors for pair in pairs for name in pair):
            continue
        columns = []
        for (a, b), (_, (rows, inputs)) in zip(pairs, leaf.sources, strict=True):
            if a not in tensors and b not in tensors:
                columns.append(np.zeros((inputs, rows), np.float32))
                continue
            columns.append(_product(tensors, a, b, (rows, inputs), directory))
            used |= {a, b}
        node = params
        for key in leaf.path[:-1]:
            node = node[key]
        kernel = node[leaf.path[-1]]
        delta = jnp.asarray(np.concatenate(columns, axis=1) * np.float32(scale))
        node[leaf.path[-1]] = (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
    if tensors.keys() - used:
        raise CheckpointError(
            f"{directory}: adapter {min(tensors.keys() - used)!r} belongs to no kernel of this model; is it another's?"
        )
    return params


def _product(tensors, a, b, shape, directory):
    """(B A) transposed, [in, out]."""
    missing = [name for name in (a, b) if name not in tensors]
    if missing:
        raise CheckpointError(f"{directory}: adapter {missing[0]!r} is missing, its other half is there")
    x, y = (np.asarray(tensors[name], np.float32) for name in (a, b))
    if x.ndim != 2 or y.ndim != 2 or (y.shape[0], x.shape[1]) != shape or x.shape[0] != y.shape[1]:
        raise CheckpointError(f"{directory}: {a!r} {x.shape} and {b!r} {y.shape} do not fit a kernel of {shape}")
    return (y @ x).T


def _scale(directory: pathlib.Path) -> float:
    """What the products are multiplied by."""
    fields = read_json(directory / CONFIG)
    if fields.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{directory / CONFIG}: peft_type {fields.get('peft_type')!r} is not supported; accepted: LORA"
        )
    on = [name for name in _OFF if fields.get(name)]
    if fields.get("bias", "none") != "none":
        on.append("bias")
    if on:
        raise CheckpointError(f"{directory / CONFIG}: {on[0]} = {fields[on[0]]!r} is not supported; accepted: off")
    rank, alpha = fields.get("r"), fields.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise CheckpointError(
            f"{directory / CONFIG}: r and lora_alpha must be numbers, r >= 1; got {rank!r}, {alpha!r}"
        )
    return alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
