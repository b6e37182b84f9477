"""Which tensors of a file make up which parameter, and the loop that assembles them.

Files store linear layers as [out, in] and q, k, v (gate, up) apart; the parameter tree stores [in, out] and one fused
kernel, because that is what is fast (`x @ W` reads rows):

    q [N*H, D]  ┐
    k [K*H, D]  ├─ transpose, join columns ─>  layers_i/attention/qkv/kernel [D, (N+2K)*H]
    v [K*H, D]  ┘

Tensors are read a block of rows at a time, so a block is dequantized, cast and transposed while it is in cache, and
host memory never holds more than the parameter under construction.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.config import DecoderConfig

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
Progress = Callable[[int, int, str], None]
ReadRows = Callable[[str, int, int], np.ndarray]

_BLOCK = 64 * 1024  # elements read at once: fits the second-level cache, measured fastest of 16-1024 rows
_ALIGNMENT = 64  # bytes; XLA:CPU uses a buffer so aligned in place


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and its sources in the file.

    path: keys in the parameter tree. sources: (tensor name, shape in the file), joined along the output axis.
    transposed: the file has [out, in], the tree [in, out].
    """

    path: tuple[str, ...]
    sources: tuple[tuple[str, tuple[int, ...]], ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(shape[0] for _, shape in self.sources)
        rest = self.sources[0][1][1:]
        return (*rest, rows) if self.transposed else (rows, *rest)


def huggingface_names(config: DecoderConfig) -> dict[str, str]:
    """Parameter -> tensor name without `.weight`; `{i}` is the layer."""
    layer = "model.layers.{i}."
    names = {
        "embedding": "model.embed_tokens",
        "positions": "model.embed_positions",
        "head": "lm_head",
        "final_norm": "model.norm",
        "attention_norm": layer + "input_layernorm",
        "mlp_norm": layer + "post_attention_layernorm",
        "query": layer + "self_attn.q_proj",
        "key": layer + "self_attn.k_proj",
        "value": layer + "self_attn.v_proj",
        "output": layer + "self_attn.o_proj",
        "query_norm": layer + "self_attn.q_norm",
        "key_norm": layer + "self_attn.k_norm",
        "gate": layer + "mlp.gate_proj",
        "up": layer + "mlp.up_proj",
        "down": layer + "mlp.down_proj",
    }
    for role in ("queries", "keys", "values"):  # of `variants`, with names of our own
        names[f"{role}_temperature"] = f"{layer}self_attn.{role}_temperature"
        names[f"{role}_temperature/hidden"] = f"{layer}self_attn.{role}_temperature.hidden"
        names[f"{role}_convolution"] = f"{layer}self_attn.{role}_convolution"
    names["distances"] = layer + "self_attn.distances"
    if config.model_type == "phi3":
        names |= {"qkv": layer + "self_attn.qkv_proj", "gate_up": layer + "mlp.gate_up_proj"}
    if config.sandwich_norms:
        names["post_attention_norm"] = layer + "post_attention_layernorm"
        names["mlp_norm"] = layer + "pre_feedforward_layernorm"
        names["post_mlp_norm"] = layer + "post_feedforward_layernorm"
    return names


def leaves(config: DecoderConfig, names: Mapping[str, str]) -> list[Leaf]:
    """Every parameter of the decoder. `names` with "qkv" or "gate_up" means that the file has them fused already."""
    hidden, vocab = config.hidden_size, config.vocab_size
    if config.tie_embeddings:
        found = [Leaf(("head", "kernel"), ((names["embedding"] + ".weight", (vocab, hidden)),), True)]
    else:
        found = [
            Leaf(("embedder", "embedding"), ((names["embedding"] + ".weight", (vocab, hidden)),), False),
            Leaf(("head", "kernel"), ((names["head"] + ".weight", (vocab, hidden)),), True),
        ]
    if config.learned_positions is not None:
        shape = (config.learned_positions, hidden)
        found.append(Leaf(("positions", "embedding"), ((names["positions"] + ".weight", shape),), False))
    for index in range(config.num_layers):
        found += _layer(config, {key: name.replace("{i}", str(index)) for key, name in names.items()}, index)
    found.append(Leaf(("final_norm", "scale"), ((names["final_norm"] + ".weight", (hidden,)),), False))
    return found


def _layer(config: DecoderConfig, names: Mapping[str, str], index: int) -> list[Leaf]:
    hidden, wide, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * size, config.num_kv_heads * size
    found = []

    def add(path: tuple[str, ...], sources: dict[str, tuple[int, ...]], kind: str = "weight") -> None:
        shaped = tuple((f"{names[key]}.{kind}", shape) for key, shape in sources.items())
        found.append(Leaf((f"layers_{index}", *path), shaped, len(shaped[0][1]) == 2))

    def linear(path: tuple[str, ...], outputs: dict[str, int], inputs: int, bias: bool) -> None:
        add((*path, "kernel"), {key: (rows, inputs) for key, rows in outputs.items()})
        if bias:
            add((*path, "bias"), {key: (rows,) for key, rows in outputs.items()}, "bias")

    def alike(owner: str, name: str, shape: tuple[int, ...]) -> None:
        source = (f"{names[owner]}.{name}", shape)
        found.append(Leaf((f"layers_{index}", "attention", owner, name), (source,), False))

    add(("attention_norm", "scale"), {"attention_norm": (hidden,)})
    add(("mlp_norm", "scale"), {"mlp_norm": (hidden,)})
    if config.sandwich_norms:
        add(("post_attention_norm", "scale"), {"post_attention_norm": (hidden,)})
        add(("post_mlp_norm", "scale"), {"post_mlp_norm": (hidden,)})
    if config.qk_norm:
        add(("attention", "query_norm", "scale"), {"query_norm": (size,)})
        add(("attention", "key_norm", "scale"), {"key_norm": (size,)})
    qkv = {"query": queries, "key": keys, "value": keys}
    gate_up = {"gate": wide, "up": wide}
    linear(("attention", "qkv"), {"qkv": queries + 2 * keys} if "qkv" in names else qkv, hidden, config.qkv_bias)
    linear(("attention", "output"), {"output": hidden}, queries, config.output_bias)
    if config.ssa is not None:
        _temperatures(config, add, linear)
    if config.rcmha is not None:
        _distances_and_filters(config, alike, linear)
    if config.mlp_gate:
        linear(("mlp", "gate_up"), {"gate_up": 2 * wide} if "gate_up" in names else gate_up, hidden, config.mlp_bias)
    else:
        linear(("mlp", "up"), {"up": wide}, hidden, config.mlp_bias)
    linear(("mlp", "down"), {"down": hidden}, wide, config.mlp_bias)
    return found


def _temperatures(config: DecoderConfig, add: Any, linear: Any) -> None:
    """The leaves of `jaxkv.attention.ssa`, by the functions of `_layer`."""
    ssa, counts = config.ssa, (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    for role, heads in zip(("queries", "keys", "values"), counts, strict=True):
        terms, owner = getattr(ssa, role), f"{role}_temperature"
        path = ("attention", owner)
        if "token" in terms and ssa.features == "shared":
            linear(path, {owner: heads}, config.head_dim, False)
        elif "token" in terms:
            linear(path, {owner: heads if ssa.token_per_head else 1}, config.hidden_size, False)
        if "token" in terms and ssa.features == "mlp":
            linear((*path, "hidden"), {f"{owner}/hidden": config.hidden_size}, config.hidden_size, False)
        if "position" in terms:
            add((*path, "alpha"), {owner: (heads if ssa.alpha_per_head else 1,)}, "alpha")


def _distances_and_filters(config: DecoderConfig, alike: Any, linear: Any) -> None:
    """The leaves of `jaxkv.attention.rcmha`: all but the kernel of sinusoids are in files as they are in the tree."""
    c, heads, size = config.rcmha, config.num_heads, config.head_dim
    if c.convolution != "none":
        for role, count in zip(("queries", "keys", "values"), (heads, *(config.num_kv_heads,) * 2), strict=True):
            shape = (size,) if c.convolution == "shared" else (count, size)
            alike(f"{role}_convolution", "filters", (c.width, *shape))
            alike(f"{role}_convolution", "bias", shape)
    if c.relative != "none":
        alike("distances", "query_bias", (heads, size))
    if c.relative == "learned":
        alike("distances", "table", (heads, c.distances, size + 1))
    if c.relative == "sinusoidal":
        alike("distances", "distance_bias", (heads, size))
        linear(("attention", "distances"), {"distances": heads * size}, config.hidden_size, False)


def check_tensors(
    wanted: list[Leaf], given: Mapping[str, tuple[int, ...]], *, extras: Collection[str], where: str
) -> None:
    """Compares names and shapes before anything is read.

    Args:
      wanted: from `leaves`.
      given: tensor name -> shape in the file.
      extras: names in `given` that may be there without being used.
      where: the file or directory, for messages.
    Raises:
      CheckpointError: a tensor is missing, unexpected, or of another shape.
    """
    expected = {name: shape for leaf in wanted for name, shape in leaf.sources}
    missing = [name for name in expected if name not in given]
    if missing:
        raise CheckpointError(
            f"{where}: tensor {missing[0]!r} is missing ({len(missing)} of {len(expected)} tensors that the "
            f"configuration needs are); the file has {_some(given)}"
        )
    unexpected = [name for name in given if name not in expected and name not in extras]
    if unexpected:
        raise CheckpointError(
            f"{where}: tensor {unexpected[0]!r} is unexpected ({len(unexpected)} such); the configuration has no place "
            "for it, so leaving it out could change the result. Check that config.json belongs to these weights."
        )
    for name, shape in expected.items():
        if tuple(given[name]) != shape:
            raise CheckpointError(
                f"{where}: tensor {name!r} has shape {list(given[name])}; the configuration needs {list(shape)}"
            )


def _some(names: Collection[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} others" if len(names) > 3 else "") if first else "no tensors"


def check_dtype(dtype: str) -> np.dtype:
    """The numpy type of a `dtype=` argument."""
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not supported; accepted: {', '.join(DTYPES)}")
    return DTYPES[dtype]


def assemble(wanted: list[Leaf], read: ReadRows, *, dtype: str, progress: Progress | None = None) -> dict[str, Any]:
    """Reads, casts, joins and transposes each parameter, and puts it on the default device before the next one.

    Args:
      wanted: from `leaves`, checked by `check_tensors`.
      read: (tensor name, first row, end row) -> those rows, a float array.
      dtype: "float32" or "bfloat16".
      progress: called after each parameter with (bytes done, bytes in all, parameter name).
    Returns:
      The `params` collection.
    """
    kind = check_dtype(dtype)
    total = sum(int(np.prod(leaf.shape)) for leaf in wanted) * kind.itemsize
    done, params = 0, {}
    for leaf in wanted:
        array = jax.block_until_ready(jax.device_put(_read_leaf(leaf, read, kind)))
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = array
        done += int(np.prod(leaf.shape)) * kind.itemsize
        if progress is not None:
            progress(done, total, "/".join(leaf.path))
    return params


def _read_leaf(leaf: Leaf, read: ReadRows, kind: np.dtype) -> np.ndarray:
    out = _aligned_empty(leaf.shape, kind)
    by_rows = out.T if leaf.transposed else out
    start = 0
    for name, shape in leaf.sources:
        step = max(1, _BLOCK // int(np.prod(shape[1:])))
        for first in range(0, shape[0], step):
            end = min(first + step, shape[0])
            by_rows[start + first : start + end] = read(name, first, end)
        start += shape[0]
    return out


def _aligned_empty(shape: tuple[int, ...], kind: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * kind.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(kind).reshape(shape)


def take_apart(wanted: list[Leaf], params: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The inverse of `assemble`: (tensor name, array as the file stores it), one parameter on the host at a time.

    Raises:
      CheckpointError: a parameter is missing, not expected, or of another shape.
    """
    unused = {"/".join(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(dict(params))}
    for leaf in wanted:
        path = "/".join(leaf.path)
        if path not in unused:
            raise CheckpointError(f"parameter {path!r} is missing; the configuration needs shape {list(leaf.shape)}")
        unused.remove(path)
        value: Any = params
        for key in leaf.path:
            value = value[key]
        if value.shape != leaf.shape:
            raise CheckpointError(
                f"parameter {path!r} has shape {list(value.shape)}; the configuration needs {list(leaf.shape)}"
            )
        array = np.asarray(value)
        by_rows = array.T if leaf.transposed else array
        start = 0
        for name, shape in leaf.sources:
            yield name, np.ascontiguousarray(by_rows[start : start + shape[0]])
            start += shape[0]
    if unused:
        raise CheckpointError(f"parameter {min(unused)!r} is unexpected; the configuration has no place for it")
