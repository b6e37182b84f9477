"""The forward pass of training: whole sequences at once, no cache, differentiable; packed texts do not see each other.

    tokens [B, T] ─ embed ─ block 0 ─ ... ─ block L-1 ─ norm ─> hidden [B, T, D]

It equals `jaxkv.cache.extend.forward` where a row is one text. The blocks are the same; only what stands behind `attend` is
simpler, and what the backward pass keeps of a block can be chosen.

A text may also come in segments, each of which sees a memory of those before it, without gradients:

    memory [B, R, D] of layer l   segment t [B, T, D]             keys, values: of both; queries: of the segment
    a b c d e f                   g h i             ─ block l ─>  the memory of layer l after it: d e f g h i

Source: Transformer-XL, arXiv 1901.02860, section 3.2; as in the code of RCMHA, arXiv 2308.03429, the inputs of layers are
remembered and projected again. Departs: of a layer that convolves over time, Kw - 1 inputs more are kept, which only the
convolution sees, so that a remembered key is that of the whole text and not that of a text which begins with the memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxkv import decoder
from jaxkv.cache.attend import by_group, relative_by_group
from jaxkv.config import DecoderConfig, LayerConfig
from jaxkv.rope import angles, make_rotary
from jaxkv.types import Array, Memory, Place, Projected
from pallas_kernels.flash_attention import DEAD, flash_attention

REMAT = ("none", "block", "dots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Axes of a mesh that the rows of a batch and the kv heads are cut over. The compiler cuts all by itself but kernels: these
    are mapped over the mesh."""

    mesh: Mesh
    rows: tuple[str, ...]
    heads: str


def causal_forward(params, tokens: Array, **options) -> Array:
    """Hidden states [B, T, D] of packed sequences that see nothing before them; arguments as of `segment_forward`."""
    return segment_forward(params, tokens, None, **options)[0]


def segment_forward(
    params,
    tokens: Array,
    memory: Memory | None,
    *,
    config: DecoderConfig,
    positions: Array,
    segments: Array,
    remat: str,
    prepare: Callable[[Mapping], Mapping] = lambda params: params,
    spread: Spread | None = None,
) -> tuple[Array, Memory | None]:
    """Hidden states of packed sequences, before the head, after the final norm.

    Args:
      tokens: [B, T] int32. memory: from `empty_memory`, or what the segment before returned; None: there is none.
      positions: [B, T] int32, of each token in its text; with a memory, only distances count.
      segments: [B, T] int32 >= 0 and < 2**30; tokens see earlier ones of their own segment, those of the memory included.
      remat: what the backward pass computes again: "none"; "block", all but each block's input; "dots", all but the
        products with parameters.
      prepare: (parameters of a block, or of one of those around the blocks) -> those that are used. It is called where they
        are used, so that what it makes of them (another dtype, adapters added) exists for a block at a time.
      spread: over several devices, which share the rows and the kv heads evenly; None: one device.
    Returns: [B, T, D]; the memory after these tokens, of as many, through which no gradient goes.
    Raises: ValueError for an unknown remat; for sequences longer than a table of positions or distances that was learned;
      for a memory of a model that goes by absolute positions.
    """
    if remat not in REMAT:
        raise ValueError(f"remat {remat!r} is not known; accepted: {', '.join(REMAT)}")
    batch, length = tokens.shape
    older = 0 if memory is None else memory.segments.shape[1]
    unmet = older and _behind(config)  # what only convolutions see
    if config.most_positions is not None and older - unmet + length > config.most_positions:
        raise ValueError(
            f"sequences of {older - unmet + length} tokens: the model has learned {config.most_positions} positions;"
            " shorten them"
        )
    outer = {name: prepare(params[name]) for name in ("embedder", "positions", "head", "final_norm") if name in params}
    x = decoder.embed(outer, tokens, config=config, positions=positions)
    recalled = None
    if memory is not None:
        if why := why_no_memory(config):
            raise ValueError(why)
        segments = jnp.concatenate([memory.segments, segments], axis=1)
        positions = jnp.broadcast_to(jnp.arange(older + length, dtype=jnp.int32), segments.shape)
        recalled = positions < older
    lengths = jnp.full((batch,), older + length, jnp.int32)
    turned = {rope: angles(make_rotary(rope, lengths), positions) for rope in config.ropes}

    def block(params, x, past, turned, kind):
        attend = functools.partial(
            _attend, length=length, unmet=unmet, segments=segments, config=config, kind=kind, spread=spread
        )
        place = Place(positions, turned, (turned,), segments=segments, recalled=recalled)
        return decoder.Block(config).apply({"params": prepare(params)}, x, place, attend, past)[0]

    policies = {"block": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
    run = jax.jit(block, static_argnames=("kind",))  # so that all layers of a kind are traced once
    if remat != "none":
        run = jax.checkpoint(run, policy=policies[remat], static_argnums=(4,))
    hidden = []
    for index, kind in enumerate(config.layers):
        past = None if memory is None else memory.hidden[index]
        if memory is not None:
            hidden.append(jax.lax.stop_gradient(jnp.concatenate([past, x], axis=1)[:, -older:]))
        x = run(params[f"layers_{index}"], x, past, turned[kind.rope], kind)
    if memory is not None:
        memory = Memory(hidden=tuple(hidden), segments=segments[:, -older:])
    return decoder.final_norm(outer, x, config=config), memory


def empty_memory(config: DecoderConfig, *, rows: int, tokens: int, dtype) -> Memory:
    """Of rows that have read nothing, with room for so many tokens. dtype: of the forward pass.

    Raises: ValueError as `segment_forward`.
    """
    if why := why_no_memory(config):
        raise ValueError(why)
    room = tokens + _behind(config)
    return Memory(
        hidden=tuple(jnp.zeros((rows, room, config.hidden_size), dtype) for _ in config.layers),
        segments=jnp.full((rows, room), DEAD, jnp.int32),
    )


def why_no_memory(config: DecoderConfig) -> str | None:
    """Why a memory makes no sense for a model, None if it does: what is recalled has no place but its distance."""
    if config.learned_positions is not None:
        return "a memory is known by its distance only, and this model adds learned positions to its embeddings"
    if config.ssa is not None and any(
        "position" in term for term in (config.ssa.queries, config.ssa.keys, config.ssa.values)
    ):
        return "a memory is known by its distance only, and temperatures of this model go by position"
    return None


def _behind(config: DecoderConfig) -> int:
    return config.taps[0] if config.taps else 0


def _attend(
    projected: Projected, *, length: int, unmet: int, segments, config: DecoderConfig, kind: LayerConfig,
    spread: Spread | None,
):  # fmt: skip
    """The last `length` tokens attend to all but the first `unmet`. Within a text, tokens stand as far apart as their indices
    say. Returns: heads [B, length, N, H], and nothing to store."""
    batch, _, heads, size = projected.keys.shape
    grouped = by_group(projected.queries[0][:, -length:], heads)  # [B, K, G, T, H]
    keys, values = (jnp.swapaxes(x[:, unmet:], 1, 2) for x in (projected.keys, projected.values))
    relative = projected.relative
    if relative is not None:
        relative = relative_by_group(relative._replace(queries=relative.queries[:, -length:]), heads)
        far = keys.shape[2]
        relative = relative[0], relative[1][:, :, : min(far, kind.window or far)]  # the distances that can be seen

    def attend(queries, keys, values, mine, theirs, relative):
        return flash_attention(
            queries, keys, values, query_segments=mine, key_segments=theirs, causal=True, window=kind.window,
            scale=config.query_scale, softcap=config.attention_softcap, relative=relative,
        )[0]  # fmt: skip

    if spread is not None:
        rows, cut = PartitionSpec(spread.rows), PartitionSpec(spread.rows, spread.heads)
        by_head = relative is not None and relative[1].shape[0] > 1
        table = PartitionSpec(spread.heads if by_head else None)
        specs = (cut, cut, cut, rows, rows, None if relative is None else (cut, table))
        attend = jax.shard_map(attend, mesh=spread.mesh, in_specs=specs, out_specs=cut, check_vma=False)
    out = attend(grouped, keys, values, segments[:, -length:], segments[:, unmet:], relative)
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, -1, size), None
