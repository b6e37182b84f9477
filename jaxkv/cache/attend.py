"""One layer: new tokens attend to the tiers and to each other, then the candidates among them are inserted."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.cache.insert import after, insert
from jaxkv.cache.state import EMPTY, live_slots, packed_keys, packed_values, positions_of, tier_keys, tier_values
from jaxkv.config import DecoderConfig, LayerConfig
from jaxkv.quantization import get_scheme
from jaxkv.quantization.balance import factor_of, find_balance
from jaxkv.rope import angles, rotate
from jaxkv.types import Array, Entries, LayerState, Rotary, Rows, Tier
from pallas_kernels.decode_attention import Source, decode_attention
from pallas_kernels.extend_attention import TierSource, extend_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What all layers of one `extend` share.

    positions [B, T] int32 of the new tokens; valid [B, T] bool: those that are seen; lasting: those that also take a
    place in the row; replay: those that take none; candidates: those that may be stored; count [B] int32 of lasting
    ones; newest [B] int32, the last lasting position; segments [B, T] int32 or None; offsets: one [B] per tier.
    angles: per kind of RoPE, (cos, sin) of the new positions in each tier's frame.
    """

    positions: Array
    valid: Array
    lasting: Array
    replay: Array
    candidates: Array
    count: Array
    newest: Array
    segments: Array | None
    offsets: tuple[Array, ...]
    angles: tuple
    rotary: tuple[Rotary, ...]


def make_context(state, valid, candidates, segments, replay=None) -> Context:
    """Positions follow on from the state; a token that is not valid takes none, and replayed ones start behind all."""
    lasting = valid if replay is None else valid & (replay == 0)
    steps = jnp.cumsum(lasting, axis=1, dtype=jnp.int32)
    positions = state.next_position[:, None] + jnp.maximum(steps - 1, 0)
    count = steps[:, -1]
    if replay is not None:
        positions = jnp.where(replay > 0, (state.next_position + count)[:, None] + replay - 1, positions)
    frames = state.offsets or (jnp.zeros_like(count),)
    return Context(
        positions=positions,
        valid=valid,
        lasting=lasting,
        replay=valid & ~lasting,
        candidates=candidates & lasting,
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
        TierSource(_source(q, tier, layer.balance), positions_of(tier) + offset[:, None, None])
        for q, tier, offset in zip(grouped, () if fresh else layer.tiers, context.offsets, strict=False)
    )
    policy = layer.policy
    remaining = context.count[:, None] - jnp.cumsum(context.lasting, axis=1, dtype=jnp.int32)

    def row_statistic(p, visible, live, start, own):
        rows_from = lambda x, fill: jax.lax.dynamic_slice_in_dim(
            jnp.pad(x, ((0, 0), (0, p.shape[3])), constant_values=fill), start, p.shape[3], axis=1
        )
        rows = Rows(
            remaining=rows_from(remaining, 0),
            valid=rows_from(context.lasting, False),
            replay=rows_from(context.replay, False),
            count=context.count,
            live=live,
            own=own,
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
        merge=policy.merge,
    )
    heads = jnp.moveaxis(out, 3, 1).reshape(batch, length, -1, size)
    layer = _balanced(layer, grouped[0], keys, context, config=config, kind=kind)
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
        source = _source(q, tier, layer.balance, packed=True)
        if kind.window is not None:
            near = context.positions[:, :, None] - (positions_of(tier) + offset[:, None, None]) < kind.window
            source = source._replace(live=source.live & near)
        sources.append(source)
    valid = jnp.broadcast_to(context.valid[:, None, :], keys.shape[:3])
    sources.append(Source(grouped[0], jnp.swapaxes(keys, 2, 3), values, valid))
    out, probabilities = decode_attention(tuple(sources), scale=config.query_scale, softcap=config.attention_softcap)
    statistics = None
    if layer.tiers and layer.policy.needs_attention:
        seen = [source.live & valid for source in sources]
        rows = lambda number: Rows(
            remaining=jnp.zeros_like(context.positions),
            valid=context.valid,
            replay=context.replay,
            count=context.count,
            live=sum(see.sum(axis=-1, dtype=jnp.int32) for see in seen)[..., None],
            own=number == len(seen) - 1,
        )
        statistics = tuple(
            layer.policy.row_statistic(p[:, :, :, None], see[:, :, None], rows(number), layer.row)
            for number, (p, see) in enumerate(zip(probabilities, seen, strict=True))
        )
    heads = out.reshape(batch, 1, -1, size)
    layer = _balanced(layer, grouped[0][:, :, :, None], keys, context, config=config, kind=kind)
    keys, values = after(out, keys), after(out, values)
    return heads, _store(layer, keys, values, statistics, context, config=config, kind=kind)


def _balanced(layer: LayerState, queries, keys, context: Context, *, config, kind) -> LayerState:
    """The layer with the balance of rows that read for the first time. queries [B, P, G, T, H]; keys [B, P, T, H]."""
    if layer.balance is None:
        return layer
    balance = find_balance(layer.balance, queries, keys, context.lasting, rotary_dim=kind.rope.rotary_dim)
    return dataclasses.replace(layer, balance=balance)


def _source(queries: Array, tier: Tier, balance: Array | None, *, packed: bool = False) -> Source:
    """A tier as attention reads it: queries turned into the basis of its keys, and how its values are turned back.

    packed: leave codes as they are, for the kernel of one query; many queries are worth unpacking for.
    """
    keys, values = (get_scheme(name) for name in tier.scheme)
    weighed = queries
    if keys.balanced:
        factor = factor_of(balance)
        weighed = queries / factor.reshape(*factor.shape[:2], *(1,) * (queries.ndim - 3), -1)
    return Source(
        queries=keys.into_basis(weighed).astype(queries.dtype),
        keys=packed_keys(tier) if packed else tier_keys(tier),
        values=packed_values(tier) if packed else tier_values(tier),
        live=live_slots(tier),
        finish=values.out_of_basis,
    )


def _store(layer, keys, values, statistics, context, *, config, kind):
    """Absorbs the statistics, then sends the candidates down the chain of tiers."""
    if not layer.tiers:
        return layer
    policy = layer.policy
    shape = keys.shape[:3]
    statistics = statistics or ((),) * (len(layer.tiers) + 1)
    own_statistic = policy.smooth(statistics[-1], context.lasting) if policy.needs_attention else ()
    absorb = lambda slots, statistic: policy.absorb(slots, statistic, layer.row, context.count)
    slots = [tier.slots for tier in layer.tiers]  # of tiers that were not attended to, being empty, they say nothing
    if len(statistics) == len(layer.tiers) + 1:
        slots = [absorb(tier, statistic) for tier, statistic in zip(slots, statistics[:-1], strict=True)]
    row = policy.advance(layer.row, context.count, keys, context.lasting)
    own = context.positions - context.offsets[0][:, None]
    spread = lambda x: jnp.broadcast_to(x[:, None, :], shape)
    entries = Entries(
        keys=keys,
        values=values,
        positions=spread(own),
        slots=absorb(policy.enter(keys, values, row), own_statistic),
        valid=spread(context.candidates),
        balance=layer.balance,
    )
    tiers, upto = [], jnp.zeros_like(layer.tiers[0].limit)
    for number, tier in enumerate(layer.tiers):
        upto = upto + tier.limit
        offset = context.offsets[number]
        positions = tier.positions
        if kind.window is not None:  # no later query can see these
            gone = context.newest[:, None, None] + 1 - (positions_of(tier) + offset[:, None, None]) >= kind.window
            positions = jnp.where(gone, EMPTY, positions)
            late = context.newest[:, None, None] + 1 - (entries.positions + offset[:, None, None]) < kind.window
            entries = dataclasses.replace(entries, valid=entries.valid & late)
        tier = dataclasses.replace(tier, slots=slots[number], positions=positions)
        scores = tuple(
            retention(policy, x.slots, row, positions_of(x) + offset[:, None, None], upto, context.newest)
            for x in (tier, entries)
        )
        below = layer.tiers[number + 1 :]
        tier, displaced = insert(tier, entries, scores=scores, below=below)
        tiers.append(tier)
        if below:
            shift = offset - context.offsets[number + 1]
            entries = _reframe(displaced, shift, context.rotary[config.ropes.index(kind.rope)])
    return LayerState(tiers=tuple(tiers), row=row, policy=policy, balance=layer.balance)


def retention(policy, slots, row, positions, limit, newest):
    """The policy's score [B, P, n], infinite for the protected tokens.

    positions, newest: absolute. limit [B, P]: places in this tier and those above it.
    """
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
