"""Several softmaxes over disjoint slots are one: each is known by its output and the logarithm of its sum.

out = sum over parts of  share_i out_i,     share_i = exp(lse_i - lse),     lse = log sum over parts of exp(lse_i)
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels.decode_attention.owners import max_by_head, sum_by_head, to_rows
from pallas_kernels.decode_attention.xla import NEGATIVE, product, softcapped


class Part(NamedTuple):
    """What one source says on its own, per block row: out [B, P, G, H] float32, the mean of its live values; lse
    [B, P, G, 1] float32, NEGATIVE where it has none; logits [B, P, G, S] float32, NEGATIVE in dead slots, or None."""

    out: Any
    lse: Any
    logits: Any


def of_one_slot(source, *, scale, softcap) -> Part:
    """The part of a source with a single slot: its logit is its log-sum-exp."""
    logits = product("bpgh,bphs->bpgs", source.queries * scale, source.keys)
    if source.bias is not None:
        logits = logits + source.bias
    logits = jnp.where(source.live[:, :, None], softcapped(logits, softcap), NEGATIVE)
    out = jnp.broadcast_to(source.values.astype(jnp.float32), (*logits.shape[:3], source.values.shape[-1]))
    return Part(out, logits, logits)


def merge(parts: list[Part], sources, *, scores: bool):
    """The attention over the union of the sources. Returns: out [B, K, G, H], probabilities per source or None."""
    owners, heads, dtype = [s.owner for s in sources], sources[-1].queries.shape[1], sources[-1].queries.dtype
    tops = [max_by_head(part.lse, owner, heads, NEGATIVE) for part, owner in zip(parts, owners, strict=True)]
    top = functools.reduce(jnp.maximum, tops)
    share = lambda x, owner: jnp.where(x > NEGATIVE, jnp.exp(x - to_rows(top, owner)), 0.0)
    shares = [share(part.lse, owner) for part, owner in zip(parts, owners, strict=True)]
    total = sum(sum_by_head(x, owner, heads) for x, owner in zip(shares, owners, strict=True))
    inverse = jnp.where(top > NEGATIVE, 1.0 / total, 0.0)
    out = sum(
        s.finish(sum_by_head(jnp.where(x > 0, part.out, 0.0) * x, s.owner, heads))
        for part, x, s in zip(parts, shares, sources, strict=True)
    )
    out = (out * inverse).astype(dtype)
    if not scores:
        return out, None
    return out, tuple(
        share(part.logits, owner) * to_rows(inverse, owner) for part, owner in zip(parts, owners, strict=True)
    )
