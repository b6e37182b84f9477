"""One layer: new tokens attend to the tiers and to each other; then `store` inserts the candidates among them."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.cache.insert import after, insert
from jaxkv.cache.state import EMPTY, live_slots, packed_keys, packed_values, positions_of, tier_keys, tier_values
from jaxkv.config import DecoderConfig, LayerConfig
from jaxkv.quantization import get_scheme
from jaxkv.quantization.balance import factor_of, find_balance
from jaxkv.rope import angles, rotate
from jaxkv.types import Array, Entries, LayerState, Newcomers, Projected, Relative, Rotary, Rows, Tier
from pallas_kernels.decode_attention import Source, decode_attention
from pallas_kernels.decode_attention.owners import of_head, sum_by_head, to_rows, turns
from pallas_kernels.extend_attention import TierSource, at_distances, distance_logits, extend_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """What all layers of one `extend` share.

    positions [B, T] int32 of the new tokens; valid [B, T] bool: those that are seen; lasting: those that also take a
    place in the row; replay: those that take none; passages [B, T] int32: the place of each of those in its passage, from
    1 (None: there are none); candidates: those that may be stored; count [B] int32 of lasting ones; newest [B] int32, the
    last lasting position; segments [B, T] int32 or None; offsets: one [B] per tier.
    angles: per kind of RoPE, (cos, sin) of the new positions in each tier's frame.
    """

    positions: Array
    valid: Array
    lasting: Array
    replay: Array
    passages: Array | None
    candidates: Array
    count: Array
    newest: Array
    segments: Array | None
    offsets: tuple[Array, ...]
    angles: tuple
    rotary: tuple[Rotary, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class New:
    """What one layer has to store: keys (rotated), values [B, K, T, H], queries [B, K, G, T, H] if the policy wants them;
    what the queries said of the slots of each tier and, last, of these tokens (None: nothing); the layer's balance and taps.
    """

    queries: Array | None
    keys: Array
    values: Array
    statistics: tuple | None
    balance: Array | None
    taps: Array | None


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
        passages=None if replay is None else jnp.where(valid, replay, 0),
        candidates=candidates & lasting,
        count=count,
        newest=state.next_position + count - 1,
        segments=segments,
        offsets=state.offsets,
        angles=tuple(tuple(angles(r, positions - o[:, None]) for o in frames) for r in state.rotary),
        rotary=state.rotary,
    )


def attend_extend(
    projected: Projected, layer: LayerState, context: Context, *, config: DecoderConfig, kind: LayerConfig, causal: bool,
    watch: bool | None = None,
):  # fmt: skip
    """T new tokens, projected by the attention of their layer.

    A layer whose tiers hold nothing may come without them, so that layers of any size are one program; then watch says
    whether its policy looks.
    Returns: heads [B, T, N, H], and what is `New`, for `store`.
    """
    watch = bool(layer.tiers) and layer.policy.needs_attention if watch is None else watch
    batch, length, _, size = projected.keys.shape
    heads = config.num_kv_heads
    grouped = [by_group(q, heads) for q in projected.queries]  # [B, P, G, T, H]
    keys, values = jnp.swapaxes(projected.keys, 1, 2), jnp.swapaxes(projected.values, 1, 2)  # [B, P, T, H]
    tiers = tuple(
        TierSource(_source(q, tier, layer), positions_of(tier) + offset[:, None, None])
        for q, tier, offset in zip(grouped, layer.tiers, context.offsets, strict=False)
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
        relative=relative_by_group(projected.relative, heads),
        row_statistic=row_statistic if watch else None,
        merge=policy.merge,
        implementation=config.kernels,
    )
    heads = jnp.moveaxis(out, 3, 1).reshape(batch, length, -1, size)
    new = New(
        queries=grouped[0] if policy.needs_queries else None,
        keys=keys,
        values=values,
        statistics=statistics if watch else None,
        balance=_balance(layer, grouped[0], keys, context, kind=kind),
        taps=projected.taps,
    )
    return heads, new


def by_group(x: Array, heads: int) -> Array:
    """[B, T, N, C] -> [B, K, G, T, C]: query heads beside their kv head."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], heads, -1, x.shape[-1]), 1, 3)


def relative_by_group(relative: Relative | None, heads: int):
    """The relative term as the operations of attention take it: queries [B, K, G, T, C], table [K or 1, G or 1, R, C]."""
    if relative is None:
        return None
    table = relative.table
    table = table[None] if table.shape[0] == 1 else table.reshape(heads, -1, *table.shape[1:])
    return by_group(relative.queries, heads), table


def attend_decode(
    projected: Projected, layer: LayerState, context: Context, *, config: DecoderConfig, kind: LayerConfig
):
    """`attend_extend` for T = 1 on the fast path, equal to rounding."""
    batch, _, _, size = projected.keys.shape
    heads = config.num_kv_heads
    grouped = [q.reshape(batch, heads, -1, size) for q in projected.queries]  # [B, P, G, H]
    keys, values = jnp.swapaxes(projected.keys, 1, 2), jnp.swapaxes(projected.values, 1, 2)  # [B, P, 1, H]
    sources = []
    by_distance = None
    if projected.relative is not None:
        queries, table = relative_by_group(projected.relative, heads)
        by_distance = distance_logits(queries, table[:, :, : kind.window], config.query_scale)[..., 0, :]
    for q, tier, offset in zip(grouped, layer.tiers, context.offsets, strict=False):
        source = _source(q, tier, layer, packed=True)
        behind = context.positions[:, :, None] - (positions_of(tier) + offset[:, None, None])
        if kind.window is not None:
            source = source._replace(live=source.live & (behind < kind.window))
        if by_distance is not None:
            source = source._replace(bias=at_distances(to_rows(by_distance, layer.owner), behind[:, :, None]))
        sources.append(source)
    valid = jnp.broadcast_to(context.valid[:, None, :], keys.shape[:3])
    itself = None if by_distance is None else by_distance[..., :1]
    sources.append(Source(grouped[0], jnp.swapaxes(keys, 2, 3), values, valid, bias=itself))
    watch = bool(layer.tiers) and layer.policy.needs_attention
    out, probabilities = decode_attention(
        tuple(sources),
        scale=config.query_scale,
        softcap=config.attention_softcap,
        scores=watch,
        implementation=config.kernels,
    )
    statistics = None
    if watch:
        seen = [source.live & context.valid[:, :, None] for source in sources]
        live = sum(
            sum_by_head(see.sum(axis=-1, dtype=jnp.int32), s.owner, heads) for see, s in zip(seen, sources, strict=True)
        )
        rows = lambda number: Rows(
            remaining=jnp.zeros_like(context.positions),
            valid=context.valid,
            replay=context.replay,
            count=context.count,
            live=to_rows(live, sources[number].owner)[..., None],
            own=number == len(seen) - 1,
        )
        statistics = tuple(
            layer.policy.row_statistic(p[:, :, :, None], see[:, :, None], rows(number), layer.row)
            for number, (p, see) in enumerate(zip(probabilities, seen, strict=True))
        )
    heads = out.reshape(batch, 1, -1, size)
    single = grouped[0][:, :, :, None]
    new = New(
        queries=single if layer.policy.needs_queries else None,
        keys=after(out, keys),
        values=after(out, values),
        statistics=statistics,
        balance=_balance(layer, single, keys, context, kind=kind),
        taps=projected.taps,
    )
    return heads, new


def _balance(layer: LayerState, queries, keys, context: Context, *, kind) -> Array | None:
    """The layer's balance, found by rows that read for the first time. queries [B, P, G, T, H]; keys [B, P, T, H]."""
    if layer.balance is None:
        return None
    return find_balance(layer.balance, queries, keys, context.lasting, rotary_dim=kind.rope.rotary_dim)


def _source(queries: Array, tier: Tier, layer: LayerState, *, packed: bool = False) -> Source:
    """A tier as attention reads it: queries turned into the basis of its keys, and how its values are turned back.

    packed: leave codes as they are, for the kernel of one query; many queries are worth unpacking for.
    """
    keys, values = (get_scheme(name) for name in tier.scheme)
    queries = to_rows(queries, layer.owner)
    weighed = queries
    if keys.balanced:
        factor = factor_of(to_rows(layer.balance, layer.owner))
        weighed = queries.astype(jnp.float32) / factor.reshape(*factor.shape[:2], *(1,) * (queries.ndim - 3), -1)
    return Source(
        queries=keys.into_basis(weighed).astype(queries.dtype),
        keys=packed_keys(tier) if packed else tier_keys(tier),
        values=packed_values(tier) if packed else tier_values(tier),
        live=live_slots(tier),
        finish=values.out_of_basis,
        owner=layer.owner,
    )


def store(layer: LayerState, new: New, context: Context, *, config: DecoderConfig, kind: LayerConfig) -> LayerState:
    """Absorbs the statistics, then sends the candidates down the chain of tiers."""
    if not layer.tiers:
        return dataclasses.replace(layer, taps=new.taps)
    policy, owner, rotary = layer.policy, layer.owner, context.rotary[config.ropes.index(kind.rope)]
    to_mine = lambda x: to_rows(x, owner)
    newcomers = Newcomers(
        queries=None if new.queries is None else to_mine(new.queries),
        keys=to_mine(new.keys),
        values=to_mine(new.values),
        positions=context.positions,
        valid=context.lasting,
        count=context.count,
        offset=context.offsets[0],
        rotary=rotary,
        scale=config.query_scale,
    )
    shape = newcomers.keys.shape[:3]
    statistics = new.statistics or ((),) * (len(layer.tiers) + 1)
    own_statistic = policy.smooth(statistics[-1], context.lasting) if policy.needs_attention else ()
    own_statistic = jax.tree.map(to_mine, own_statistic)
    absorb = lambda slots, statistic: policy.absorb(slots, statistic, layer.row, context.count)
    slots = [tier.slots for tier in layer.tiers]  # of tiers that were not attended to, being empty, they say nothing
    if len(statistics) == len(layer.tiers) + 1:
        slots = [absorb(tier, statistic) for tier, statistic in zip(slots, statistics[:-1], strict=True)]
    row = policy.advance(layer.row, newcomers)
    own = context.positions - context.offsets[0][:, None]
    spread = lambda x: jnp.broadcast_to(x[:, None, :], shape)
    entries = Entries(
        keys=newcomers.keys,
        values=newcomers.values,
        positions=spread(own),
        slots=absorb(policy.enter(newcomers, row), own_statistic),
        valid=spread(context.candidates) & takes(owner, spread(context.positions)),
        balance=None if new.balance is None else to_mine(new.balance),
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
            retention(policy, x.slots, row, positions_of(x) + offset[:, None, None], upto, context.newest, owner)
            for x in (tier, entries)
        )
        below = layer.tiers[number + 1 :]
        tier, displaced = insert(tier, entries, scores=scores, below=below, kernels=config.kernels)
        tiers.append(tier)
        if below:
            shift = offset - context.offsets[number + 1]
            entries = _reframe(displaced, shift, rotary)
    return LayerState(tiers=tuple(tiers), row=row, policy=policy, balance=new.balance, owner=owner, taps=new.taps)


def takes(owner: Array | None, positions: Array) -> Array | bool:
    """Which tokens, by their positions [B, P, n], each block row is there for."""
    if owner is None:
        return True
    turn, count = turns(owner)
    return (jax.lax.rem(positions, count[..., None]) == turn[..., None]) & (owner >= 0)[..., None]


def retention(policy, slots, row, positions, limit, newest, owner=None):
    """The policy's score [B, P, n], infinite for the protected tokens.

    positions, newest: absolute. limit [B, P]: places in this tier and those above it.
    """
    limit = limit if owner is None else of_head(limit, owner)
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
