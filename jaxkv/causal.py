"""The forward pass of training: whole sequences at once, no cache, differentiable; packed texts do not see each other.

    tokens [B, T] ─ embed ─ block 0 ─ ... ─ block L-1 ─ norm ─> hidden [B, T, D]

It equals `jaxkv.cache.extend.forward` where a row is one text. The blocks are the same; only what stands behind `attend` is
simpler, and what the backward pass keeps of a block can be chosen.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxkv import decoder
from jaxkv.cache.attend import by_group, relative_by_group
from jaxkv.config import DecoderConfig, LayerConfig
from jaxkv.rope import angles, make_rotary
from jaxkv.types import Array, Place, Projected
from pallas_kernels.flash_attention import flash_attention

REMAT = ("none", "block", "dots")


def causal_forward(
    params,
    tokens: Array,
    *,
    config: DecoderConfig,
    positions: Array,
    segments: Array,
    remat: str,
    prepare: Callable[[Mapping], Mapping] = lambda params: params,
) -> Array:
    """Hidden states of packed sequences, before the head, after the final norm.

    Args:
      tokens: [B, T] int32. positions: [B, T] int32, of each token in its text. segments: [B, T] int32 >= 0; tokens see
        earlier ones of their own segment.
      remat: what the backward pass computes again: "none"; "block", all but each block's input; "dots", all but the
        products with parameters.
      prepare: (parameters of a block, or of one of those around the blocks) -> those that are used. It is called where they
        are used, so that what it makes of them (another dtype, adapters added) exists for a block at a time.
    Returns: [B, T, D].
    Raises: ValueError for an unknown remat; for sequences longer than a table of positions or distances that was learned.
    """
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is not known; accepted: {', '.join(REMAT)}")
    if config.most_positions is not None and tokens.shape[1] > config.most_positions:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens: the model has learned {config.most_positions} positions; shorten them"
        )
    outer = {name: prepare(params[name]) for name in ("embedder", "positions", "head", "final_norm") if name in params}
    x = decoder.embed(outer, tokens, config=config, positions=positions)
    lengths = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
    turned = {rope: angles(make_rotary(rope, lengths), positions) for rope in config.ropes}

    def block(params, x, turned, kind):
        attend = functools.partial(_attend, segments=segments, config=config, kind=kind)
        place = Place(positions, turned, (turned,), segments=segments)
        return decoder.Block(config).apply({"params": prepare(params)}, x, place, attend)[0]

    policies = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    run = jax.jit(block, static_argnames=("kind",))  # so that all layers of a kind are traced once
    if remat != "none":
        run = jax.checkpoint(run, policy=policies[remat], static_argnums=(3,))
    for index, kind in enumerate(config.layers):
        x = run(params[f"layers_{index}"], x, turned[kind.rope], kind)
    return decoder.final_norm(outer, x, config=config)


def _attend(projected: Projected, *, segments, config: DecoderConfig, kind: LayerConfig):
    """Within a text, tokens stand as far apart as their indices say. Returns: heads [B, T, N, H], and nothing to store."""
    batch, length, heads, size = projected.keys.shape
    grouped = by_group(projected.queries[0], heads)  # [B, K, G, T, H]
    keys, values = jnp.swapaxes(projected.keys, 1, 2), jnp.swapaxes(projected.values, 1, 2)
    relative = relative_by_group(projected.relative, heads)
    if relative is not None:  # the distances that can be seen
        relative = relative[0], relative[1][:, :, : min(length, kind.window or length)]
    out, _ = flash_attention(
        grouped, keys, values, query_segments=segments, key_segments=segments, causal=True, window=kind.window,
        scale=config.query_scale, softcap=config.attention_softcap, relative=relative,
    )  # fmt: skip
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, -1, size), None
