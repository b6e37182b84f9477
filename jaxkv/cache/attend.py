"""One layer: new tokens attend to the tiers and to each other, then the candidates among them are inserted."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.cache.insert import insert
from jaxkv.cache.state import EMPTY, live_slots, tier_keys, tier_values
from jaxkv.config import DecoderConfig, LayerConfig
from jaxkv.rope import angles, rotate
from jaxkv.types import Array, Entries, LayerState, Rotary, Rows
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.extend_attention import extend_attention

SIGNALING_NAN = 0x7F800001  # arithmetic gives quiet NaNs only


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What all layers of one `extend` share.

    positions [B, T] int32 of the new tokens; valid, candidates [B, T] bool; count [B] int32 of valid ones; newest [B]
    int32, the last valid position; segments [B, T] int32 or None; offsets: one [B] per tier.
    angles: per kind of RoPE, (cos, sin) of the new positions in each tier's frame.
    """

    positions: Array
    valid: Array
    candidates: Array
    count: Array
    newest: Array
    segments: Array | None
    offsets: tuple[Array, ...]
    angles: tuple
    rotary: tuple[Rotary, ...]


def make_context(state, valid, candidates, segments) -> Context:
    """Positions follow on from the state; a token that is not valid takes none."""
    steps = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    positions = state.next_position[:, None] + jnp.maximum(steps - 1, 0)
    count = steps[:, -1]
    frames = state.offsets or (jnp.zeros_like(count),)
    return Context(
        positions=positions,
        valid=valid,
        candidates=candidates & valid,
        count=count,
        newest=state.next_position + count - 1,
        segments=segments,
        offsets=state.offsets,
        angles=tuple(tuple(angles(r, positions - o[:, None]) for o in frames) for r in state.rotary),
        rotary=state.rotary,
    )


def attend_extend(
    queries, keys, values, layer: LayerState, context: Context, *, config: DecoderConfig, kind: LayerConfig, causal: bool,
    fresh: bool,
):  # fmt: skip
    """T new tokens. queries: one [B, T, N, H] per tier; keys, values [B, T, K, H]. fresh: the tiers are known to be empty.

    Returns: heads [B, T, N, H], and the layer's state after the insertion.
    """
    batch, length, _, size = keys.shape
    grouped = [
        jnp.moveaxis(q.reshape(batch, length, config.num_kv_heads, -1, size), 1, 3) for q in queries
    ]  # [B, P, G, T, H]
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)  # [B, P, T, H]
    tiers = tuple(
        (q, tier_keys(tier), tier_values(tier), tier.positions + offset[:, None, None], live_slots(tier))
        for q, tier, offset in zip(grouped, () if fresh else layer.tiers, context.offsets, strict=False)
    )
    policy = layer.policy
    remaining = context.count[:, None] - jnp.cumsum(context.valid, axis=1, dtype=jnp.int32)

    def row_statistic(p, visible, live, start):
        rows_from = lambda x, fill: jax.lax.dynamic_slice_in_dim(
            jnp.pad(x, ((0, 0), (0, p.shape[2])), constant_values=fill), start, p.shape[2], axis=1
        )
        rows = Rows(
            remaining=rows_from(remaining, 0), valid=rows_from(context.valid, False), count=context.count, live=live
        )
        return policy.row_statistic(p, visible, rows, layer.row)

    watch = bool(layer.tiers) and policy.needs_attention
    out, statistics = extend_attention(
        grouped[0],
        keys,
        values,
        tiers,
        positions=context.positions,
        valid=context.valid,
        segments=context.segments,
        causal=causal,
        window=kind.window,
        scale=config.query_scale,
        softcap=config.attention_softcap,
        row_statistic=row_statistic if watch else None,
    )
    heads = jnp.moveaxis(out, 3, 1).reshape(batch, length, -1, size)
    return heads, _store(layer, keys, values, statistics if watch else None, context, config=config, kind=kind)


def attend_decode(
    queries, keys, values, layer: LayerState, context: Context, *, config: DecoderConfig, kind: LayerConfig
):
    """`attend_extend` for T = 1 on the fast path: the same arguments, the same results to rounding."""
    batch, _, _, size = keys.shape
    grouped = [q.reshape(batch, config.num_kv_heads, -1, size) for q in queries]  # [B, P, G, H]
    keys, values = jnp.swapaxes(keys, 1, 2), jnp.swapaxes(values, 1, 2)  # [B, P, 1, H]
    sources = []
    for q, tier, offset in zip(grouped, layer.tiers, context.offsets, strict=False):
        live = live_slots(tier)
        if kind.window is not None:
            live &= context.positions[:, :, None] - (tier.positions + offset[:, None, None]) < kind.window
        sources.append((q, tier_keys(tier), tier_values(tier), live))
    valid = jnp.broadcast_to(context.valid[:, None, :], keys.shape[:3])
    sources.append((grouped[0], jnp.swapaxes(keys, 2, 3), values, valid))
    out, probabilities = decode_attention(tuple(sources), scale=config.query_scale, softcap=config.attention_softcap)
    statistics = None
    if layer.tiers and layer.policy.needs_attention:
        seen = [source[3] & valid for source in sources]
        rows = Rows(
            remaining=jnp.zeros_like(context.positions),
            valid=context.valid,
            count=context.count,
            live=sum(see.sum(axis=-1, dtype=jnp.int32) for see in seen)[..., None],
        )
        statistics = tuple(
            layer.policy.row_statistic(p.mean(axis=2)[:, :, None], see[:, :, None], rows, layer.row)
            for p, see in zip(probabilities, seen, strict=True)
        )
    heads = out.reshape(batch, 1, -1, size)
    keys, values = _after(out, keys), _after(out, values)
    return heads, _store(layer, keys, values, statistics, context, config=config, kind=kind)


def _after(out: Array, new: Array) -> Array:
    """`new` [B, P, 1, H] unchanged, but computed after `out` [B, P, G, H].

    XLA cannot see that a loop may overwrite a slot in place unless the write depends on what has read it; it would copy
    the whole cache at every step. So the write is made to depend on a test that no result of arithmetic passes.
    """
    bits = jax.lax.bitcast_convert_type(out[:, :, :1, :1].astype(jnp.float32), jnp.int32)
    return jnp.where(bits == SIGNALING_NAN, jnp.zeros_like(new), new)


def _store(layer, keys, values, statistics, context, *, config, kind):
    """Absorbs the statistics, then sends the candidates down the chain of tiers."""
    if not layer.tiers:
        return layer
    policy = layer.policy
    shape = keys.shape[:3]
    statistics = statistics or ((),) * (len(layer.tiers) + 1)
    absorb = lambda slots, statistic: policy.absorb(slots, statistic, layer.row, context.count)
    slots = [tier.slots for tier in layer.tiers]  # of tiers that were not attended to, being empty, they say nothing
    if len(statistics) == len(layer.tiers) + 1:
        slots = [absorb(tier, statistic) for tier, statistic in zip(slots, statistics[:-1], strict=True)]
    row = policy.advance(layer.row, context.count)
    own = context.positions - context.offsets[0][:, None]
    spread = lambda x: jnp.broadcast_to(x[:, None, :], shape)
    entries = Entries(
        keys=keys,
        values=values,
        positions=spread(own),
        slots=absorb(policy.enter(shape), statistics[-1]),
        valid=spread(context.candidates),
    )
    tiers = []
    for number, tier in enumerate(layer.tiers):
        offset = context.offsets[number]
        positions = tier.positions
        if kind.window is not None:  # no later query can see these
            gone = context.newest[:, None, None] + 1 - (positions + offset[:, None, None]) >= kind.window
            positions = jnp.where(gone, EMPTY, positions)
            late = context.newest[:, None, None] + 1 - (entries.positions + offset[:, None, None]) < kind.window
            entries = dataclasses.replace(entries, valid=entries.valid & late)
        tier = dataclasses.replace(tier, slots=slots[number], positions=positions)
        scores = tuple(
            retention(policy, x.slots, row, x.positions + offset[:, None, None], tier.limit, context.newest)
            for x in (tier, entries)
        )
        last = number == len(layer.tiers) - 1
        tier, displaced = insert(tier, entries, scores=scores, displace=not last)
        tiers.append(tier)
        if not last:
            shift = offset - context.offsets[number + 1]
            entries = _reframe(displaced, shift, context.rotary[config.ropes.index(kind.rope)])
    return LayerState(tiers=tuple(tiers), row=row, policy=policy)


def retention(policy, slots, row, positions, limit, newest):
    """The policy's score [B, P, n], infinite for the protected tokens. positions, newest: absolute."""
    protected = positions > newest[:, None, None] - policy.protected_recent(limit)[..., None]
    if policy.sinks:
        protected |= positions < policy.sinks
    return jnp.where(protected, jnp.inf, policy.score(slots, row, positions))


def _reframe(entries: Entries, shift: Array, rotary: Rotary) -> Entries:
    """Entries whose stored positions grow by `shift` [B], their keys turned along; exact for shift 0."""
    turn = dataclasses.replace(rotary, scale=jnp.ones_like(rotary.scale))
    cos, sin = angles(turn, shift[:, None])  # [B, 1, R/2], for all heads and entries
    keys = rotate(entries.keys.reshape(entries.keys.shape[0], 1, -1, entries.keys.shape[-1]), cos, sin)
    return dataclasses.replace(
        entries, keys=keys.reshape(entries.keys.shape), positions=entries.positions + shift[:, None, None]
    )
