"""Extend attention in XLA.

Queries go through in blocks under `lax.scan`. A causal block never looks beyond itself, so the scan is cut into a few
stages, each with the keys up to its own end: about half the work of a full square, for a few copies of the body.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.owners import sum_by_head, to_rows
from pallas_kernels.decode_attention.source import Source
from pallas_kernels.decode_attention.xla import NEGATIVE, mix, product, shares, softcapped

STAGES = 8  # at most; of two blocks at least, for XLA unrolls a loop of one and then keeps every stage in memory


def extend_attention(queries, keys, values, tiers, *, softcap, row_statistic, **options):
    of_block = functools.partial(_softmax, softcap=softcap, row_statistic=row_statistic)
    return in_blocks(of_block, queries, keys, values, tiers, watched=row_statistic is not None, **options)


def distance_logits(queries, table, scale):
    """The relative term at every distance of the table, [B, K, G, t, R] float32: queries [B, K, G, t, C], table [K or 1, G or
    1, R, C]."""
    heads = jnp.broadcast_to(table, (*queries.shape[1:3], *table.shape[2:]))
    return jnp.einsum("bkgtc,kgrc->bkgtr", queries, heads, preferred_element_type=jnp.float32) * scale


def at_distances(logits, distances):
    """logits [..., R] at distances [..., S] int32, whose axes before may be 1; NaN beyond R, anything below 0."""
    distances = jnp.broadcast_to(distances, (*logits.shape[:-1], distances.shape[-1]))
    return jnp.take_along_axis(logits, distances, axis=-1, mode="fill", fill_value=jnp.nan)


def in_blocks(
    of_block, queries, keys, values, tiers, *, positions, valid, segments, causal, window, scale, watched, merge, block,
    relative=None,
):  # fmt: skip
    """of_block(sources, start) for each block of queries, scaled: its out [B, P, G, t, ...], and its statistics, one for
    each source, which are merged if anyone watched. Returns: out [B, P, G, T, ...], statistics."""
    length = queries.shape[3]
    block = min(block, length)
    blocks = -(-length // block)
    spare = blocks * block - length
    to_blocks = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, spare), (0, 0)]) if spare else x
    rows = jax.tree.map(to_blocks, (queries * scale, tuple(tier.source.queries * scale for tier in tiers)))
    row_relative, table = (None, None) if relative is None else (to_blocks(relative[0]), relative[1])
    far = min(
        (x for x in (window, None if tiers else length) if x is not None), default=None
    )  # distances that can be seen
    slots_minor = jnp.swapaxes(keys, 2, 3)
    row_positions = jnp.pad(positions, ((0, 0), (0, spare)))
    row_segments = None if segments is None else jnp.pad(segments, ((0, 0), (0, spare)))

    def attend(start, end):
        """Query rows start..start+block against the tiers and the new tokens before `end` (static)."""
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, block, axis)
        at = cut(row_positions, 1)[:, None, :, None]  # [B, 1, t, 1]
        by_distance = None if table is None else distance_logits(cut(row_relative, 3), table[:, :, :far], scale)

        def bias(keys_at, owner=None):  # positions [B, P or 1, 1, S]
            return (
                None if by_distance is None else at_distances(to_rows(by_distance, owner), (at - keys_at)[:, :, None])
            )

        index = start + jnp.arange(block, dtype=jnp.int32)
        sources = []
        for tier, tier_queries in zip(tiers, rows[1], strict=True):
            live = tier.source.live
            slot_positions = tier.positions
            see = jnp.broadcast_to(live[:, :, None, :], (*live.shape[:2], block, live.shape[2]))
            if window is not None:
                see &= at - slot_positions[:, :, None, :] < window
            of_tier = bias(slot_positions[:, :, None], tier.source.owner)
            sources.append(tier.source._replace(queries=cut(tier_queries, 3), live=see, bias=of_tier))
        see = jnp.broadcast_to(valid[:, None, None, :end], (valid.shape[0], 1, block, end))
        if causal:
            see &= (jnp.arange(end, dtype=jnp.int32)[None, :] <= index[:, None])[None, None]
        if window is not None:
            see &= jnp.abs(at - positions[:, None, None, :end]) < window
        if segments is not None:
            mine, theirs = cut(row_segments, 1)[:, None, :, None], segments[:, None, None, :end]
            see &= (mine == theirs) | (mine < 0) | (theirs < 0)
        own = bias(positions[:, None, None, :end])
        sources.append(Source(cut(rows[0], 3), slots_minor[..., :end], values[:, :, :end], see, bias=own))
        return of_block(sources, start)

    edges = np.linspace(0, blocks, (min(STAGES, max(1, blocks // 2)) if causal else 1) + 1).astype(int)
    outs, statistics = [], None
    together = lambda a, b: tuple(map(merge, a, b)) if watched else a
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        end = min(int(last) * block, length) if causal else length

        def step(total, start, end=end):
            out, statistic = attend(start, end)
            return together(total, statistic), out

        zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda e=end: attend(0, e)[1]))
        starts = jnp.arange(int(first), int(last), dtype=jnp.int32) * block
        statistic, out = jax.lax.scan(step, zero, starts)
        outs.append(out)
        widen = lambda x, end=end: jnp.pad(x, [(0, 0), (0, 0), (0, length - end)] + [(0, 0)] * (x.ndim - 3))
        statistic = (*statistic[:-1], jax.tree.map(widen, statistic[-1]))
        statistics = statistic if statistics is None else together(statistics, statistic)
    out = jnp.moveaxis(jnp.concatenate(outs), 0, 3)  # [B, P, G, blocks, block, H]
    out = out.reshape(*out.shape[:3], -1, out.shape[-1])[:, :, :, :length]
    return out, statistics


def _softmax(sources, start, *, softcap, row_statistic):
    """One softmax over all sources of one block of query rows, their queries scaled."""
    weights, inverse = shares(logits_of(sources, softcap), [s.owner for s in sources])
    out = mix("bpgts,bpsh->bpgth", weights, sources, inverse).astype(sources[-1].values.dtype)
    if row_statistic is None:
        return out, (None,) * len(sources)
    shares_of = [w * to_rows(inverse, s.owner) for w, s in zip(weights, sources, strict=True)]
    return out, statistics_of(sources, shares_of, start, out.shape[1], row_statistic)


def logits_of(sources, softcap):
    """[B, P, G, t, S] float32 of each source, NEGATIVE where nothing is seen."""

    def of(source):
        x = product("bpgth,bphs->bpgts", source.queries, source.keys)
        x = x if source.bias is None else x + source.bias
        return jnp.where(source.live[:, :, None], softcapped(x, softcap), NEGATIVE)

    return list(map(of, sources))


def statistics_of(sources, probabilities, start, heads: int, row_statistic):
    """What a block of query rows says of each source, from its probabilities [B, P, G, t, S]."""
    seen = [jnp.broadcast_to(s.live, (*p.shape[:2], *p.shape[3:])) for p, s in zip(probabilities, sources, strict=True)]
    live = sum(sum_by_head(x.sum(-1, dtype=jnp.int32), s.owner, heads) for x, s in zip(seen, sources, strict=True))
    return tuple(
        row_statistic(p, see, to_rows(live, s.owner), start, number == len(sources) - 1)
        for number, (p, s, see) in enumerate(zip(probabilities, sources, seen, strict=True))
    )
