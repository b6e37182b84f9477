"""Extend attention by the kernels of flash attention: each tier and the new tokens alone, merged by log-sum-exp.

    out = sum over sources s of  exp(lse_s - lse) out_s,     lse = log sum over sources of  exp(lse_s)

What the policies want of the probabilities comes from a second pass over blocks of queries, which has the log-sum-exp.
"""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention.owners import max_by_head, sum_by_head, to_rows
from pallas_kernels.extend_attention import xla
from pallas_kernels.flash_attention import DEAD, GLOBAL, NEG, flash_attention


def extend_attention(
    queries, keys, values, tiers, *, positions, valid, segments, causal, window, scale, softcap, row_statistic, merge, block,
    kernels, relative=None,
):  # fmt: skip
    """kernels: dtype -> the implementation of flash attention."""
    tiers, heads = tuple(tiers), keys.shape[1]

    def attend(q, k, v, **more):
        q, k, v = _alike(q, k, v)
        return flash_attention(q, k, v, scale=scale, softcap=softcap, implementation=kernels(q.dtype), **more)

    parts = []
    for source, slots in tiers:
        if source.keys.shape[3]:
            near = {} if window is None else {"query_positions": positions, "key_positions": slots}
            parts.append((
                attend(
                    source.queries, jnp.swapaxes(source.keys, 2, 3), source.values, causal=False, window=(window, None),
                    key_segments=_dead(source.live, 0), **near,
                ),
                source,
            ))  # fmt: skip
    near = {} if window is None else {"query_positions": positions, "key_positions": positions}
    own = None if segments is None else jnp.maximum(segments, GLOBAL)
    new = attend(
        queries, keys, values, causal=causal, window=window, query_segments=own,
        key_segments=_dead(valid, 0 if own is None else own), **near,
    )  # fmt: skip
    out, lse = _merged([*parts, (new, None)], heads)
    out = out.astype(values.dtype)
    if row_statistic is None:
        return out, (None,) * (len(tiers) + 1)

    def of_block(sources, start):
        size = sources[-1].queries.shape[3]
        padded = jnp.pad(lse, [(0, 0)] * 3 + [(0, size)], constant_values=-NEG)  # rows that are not there get nothing
        at = jnp.arange(size, dtype=jnp.int32) + start
        rows = padded[:, :, :, at][..., None]
        shares = [
            jnp.where(s.live[:, :, None], jnp.exp(x - to_rows(rows, s.owner)), 0.0)
            for x, s in zip(xla.logits_of(sources, softcap), sources, strict=True)
        ]
        return rows, xla.statistics_of(sources, shares, start, heads, row_statistic)

    _, statistics = xla.in_blocks(
        of_block, queries, keys, values, tiers, positions=positions, valid=valid, segments=segments, causal=causal,
        window=window, scale=scale, watched=True, merge=merge, block=block,
    )  # fmt: skip
    return out, statistics


def _alike(q, k, v):
    """Of one dtype, float32 where they differ."""
    dtype = q.dtype if q.dtype == k.dtype == v.dtype else jnp.float32
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def _dead(live, segment):
    return jnp.where(live, segment, DEAD).astype(np.int32)


def _merged(parts, heads: int):
    """[((out [B, P, G, T, H], log-sum-exp [B, P, G, T]), source or None)] -> out float32 and log-sum-exp by head."""
    owners = [None if source is None else source.owner for _, source in parts]
    top = parts[-1][0][1]
    for ((_, lse), _), owner in zip(parts, owners, strict=True):
        top = jnp.maximum(top, max_by_head(lse, owner, heads, NEG))
    total, mean = 0.0, 0.0
    for ((out, lse), source), owner in zip(parts, owners, strict=True):
        # Where nothing is seen at all, the outs are zeros and may weigh what they like.
        weight = jnp.exp(lse - to_rows(top, owner))
        part = sum_by_head(out.astype(jnp.float32) * weight[..., None], owner, heads)
        mean = mean + (part if source is None else source.finish(part))
        total = total + sum_by_head(weight, owner, heads)
    return mean / total[..., None], top + jnp.log(total)
