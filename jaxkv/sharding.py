"""One model over a mesh of devices: which axis of which array lies where, and the sums that put shards together.

The mesh has two axes. Rows of a batch lie on `data`; attention heads, the MLP's width and the vocabulary on `tensor`. Each
device runs the same functions as one device alone does, under `jax.shard_map`, on the configuration and the arrays of its
own shard; a block then needs two sums over `tensor`, the embedding one and the head a gather:

    x ─ norm ─ qkv | attention | output ─ sum ─ + ─ norm ─ gate·up | down ─ sum ─ + ─>      | = on this shard only

Source: Megatron-LM (arXiv 1909.08053), section 3. Departs: more shards than kv heads are refused, not replicated.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxkv.config import DecoderConfig
from jaxkv.types import Array

DATA, TENSOR = "data", "tensor"  # axes of the mesh

RULES = {  # logical axis -> axis of the mesh; all others are whole on every device
    "batch": DATA,
    "heads": TENSOR,
    "mlp": TENSOR,
    "vocab": TENSOR,
}
PARAMS = {  # end of a parameter's path -> its logical axes
    ("qkv", "kernel"): ("embed", "heads"),
    ("qkv", "bias"): ("heads",),
    ("attention", "output", "kernel"): ("heads", "embed"),
    ("gate_up", "kernel"): ("embed", "mlp"),
    ("down", "kernel"): ("mlp", "embed"),
    ("embedder", "embedding"): ("vocab", "embed"),
    ("head", "kernel"): ("embed", "vocab"),
}


class ShardingError(ValueError):
    """A model cannot be cut into so many shards; the message says why and what is accepted."""


def spec(axes: tuple[str | None, ...]) -> PartitionSpec:
    """Logical axes -> where they lie."""
    return PartitionSpec(*(RULES.get(axis) for axis in axes))


def param_specs(params):
    """Where each parameter lies: the tree of `params` with a PartitionSpec per leaf."""

    def one(path, leaf):
        names = tuple(key.key for key in path)
        return spec(next((axes for end, axes in PARAMS.items() if names[-len(end) :] == end), ()))

    return jax.tree_util.tree_map_with_path(one, params)


def state_specs(state):
    """Where each array of a `State` lies: rows on `data`; of what a layer keeps per block row, those too on `tensor`."""
    rows = jax.tree.map(lambda leaf: spec(("batch",)), state)
    per_head = jax.tree.map(lambda leaf: spec(("batch", "heads") if leaf.ndim > 1 else ("batch",)), state.layers)
    return dataclasses.replace(rows, layers=per_head)


def shard_config(config: DecoderConfig, count: int) -> DecoderConfig:
    """The configuration of one of `count` shards over `tensor`; of a single one, the model's own.

    Raises: ShardingError, with the counts that the model takes.
    """
    if count == 1:
        return config
    sizes = {
        "kv heads": config.num_kv_heads,
        "channels of the MLP": config.intermediate_size,
        "tokens of the vocabulary": config.vocab_size,
    }
    accepted = [n for n in range(1, config.num_kv_heads + 1) if not any(size % n for size in sizes.values())]
    for name, size in sizes.items():
        if size % count:
            raise ShardingError(
                f"{size} {name} cannot be cut into {count} equal shards, and kv heads are not replicated; this model takes"
                f" {', '.join(map(str, accepted))} over {TENSOR!r}"
            )
    if config.attention != "gqa" or not config.mlp_gate:
        what = f"attention {config.attention!r}" if config.attention != "gqa" else "an MLP without a gate"
        raise ShardingError(f"a model with {what} cannot be cut over {TENSOR!r}; use 1")
    if config.output_bias or config.mlp_bias:
        raise ShardingError(
            f"a model with biases after attention or in its MLP cannot be cut over {TENSOR!r}: each shard would add them;"
            " use 1"
        )
    return dataclasses.replace(
        config, num_heads=config.num_heads // count, num_kv_heads=config.num_kv_heads // count,
        intermediate_size=config.intermediate_size // count, tensor_axis=TENSOR,
    )  # fmt: skip


def arrange_params(params, config: DecoderConfig, count: int):
    """Parameters with the columns of fused kernels in the order in which `count` equal shards want them.

    q q q q k k v v  ->  q q k v | q q k v
    """
    parts = {
        "qkv": [n * config.head_dim for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)],
        "gate_up": [config.intermediate_size] * 2,
    }

    def one(path, leaf):
        names = [key.key for key in path]
        fused = next((parts[name] for name in names if name in parts), None)
        if fused is None:
            return leaf
        edges = [sum(fused[:i]) for i in range(1, len(fused))]
        pieces = [jnp.split(piece, count, axis=-1) for piece in jnp.split(leaf, edges, axis=-1)]
        return jnp.concatenate([piece[i] for i in range(count) for piece in pieces], axis=-1)

    return params if count == 1 else jax.tree_util.tree_map_with_path(one, params)


def sum_shards(x: Array, axis: str | None) -> Array:
    """The sum over all shards of a model; x where the model is whole (axis None)."""
    return x if axis is None else jax.lax.psum(x, axis)


def gather_shards(x: Array, axis: str | None) -> Array:
    """The last axis of all shards, one after the other."""
    return x if axis is None else jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True)


def lookup(table: Array, ids: Array, *, along: int, axis: str | None) -> Array:
    """jnp.take(table, ids, axis=along) of a matrix whose axis `along`, the vocabulary, may be cut over shards."""
    if axis is None:
        return jnp.take(table, ids, axis=along, mode="clip")
    size = table.shape[along]
    own = jnp.clip(ids, 0, size * jax.lax.axis_size(axis) - 1) - jax.lax.axis_index(axis) * size
    mine = jnp.expand_dims((own >= 0) & (own < size), -1 if along == 0 else 0)
    rows = jnp.take(table, own, axis=along, mode="clip")
    return jax.lax.psum(jnp.where(mine, rows, jnp.zeros_like(rows)), axis)
