"""Decode attention in XLA: one softmax over the concatenation that is never built."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import packed
from pallas_kernels.decode_attention.owners import max_by_head, sum_by_head, to_rows

NEGATIVE = float(np.finfo(np.float32).min) / 2  # finite: a row that sees nothing must not make NaN


def softcapped(logits, softcap):
    """softcap * tanh(logits / softcap), or the logits."""
    return logits if softcap is None else jnp.tanh(logits / softcap) * softcap


def shares(logits, owners):
    """Softmax over the last axes of several arrays together: weights before division, and 1 / their sum [B, K, ..., 1].

    owners: of each array's rows; the last array has a row per head, and a head's weights run over all rows it owns.

    NEGATIVE has no weight; where all are NEGATIVE the weights are 1 and the inverse is 0. (Masking the weights a second
    time would be simpler to read, and makes XLA:CPU compute every mask twice.)
    """
    heads = logits[-1].shape[1]
    tops = [max_by_head(x.max(axis=-1, keepdims=True), o, heads, NEGATIVE) for x, o in zip(logits, owners, strict=True)]
    top = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(x - to_rows(top, o)) for x, o in zip(logits, owners, strict=True)]
    total = sum(sum_by_head(w.sum(axis=-1, keepdims=True), o, heads) for w, o in zip(weights, owners, strict=True))
    return weights, jnp.where(top > NEGATIVE, 1.0 / total, 0.0)


def mix(spec, weights, sources, inverse):
    """The weighted mean of the values of all sources; zeros where nothing is seen, whatever lies in dead slots."""
    computed, heads = (
        sources[-1].queries.dtype,
        sources[-1].queries.shape[1],
    )  # what is stored in another is read as float32

    def weighted(w, source):
        if isinstance(source.values, packed.Packed):
            out = packed.weighted(w, source.values, source.queries.shape[-1])
        else:
            dtype = computed if source.values.dtype == computed else jnp.float32
            out = jnp.einsum(spec, w.astype(dtype), source.values.astype(dtype), preferred_element_type=jnp.float32)
        return source.finish(sum_by_head(out, source.owner, heads))

    out = sum(map(weighted, weights, sources))
    return jnp.where(inverse > 0, out * inverse, 0.0)


def product(spec, queries, keys):
    """Logits in float32; a tier's keys may be wider or narrower than the queries."""
    dtype = queries.dtype if queries.dtype == keys.dtype else jnp.float32
    return jnp.einsum(spec, queries.astype(dtype), keys.astype(dtype), preferred_element_type=jnp.float32)


def decode_attention(sources, *, scale, softcap, scores=True):
    logits = [
        jnp.where(s.live[:, :, None], softcapped(_logits(s.queries * scale, s.keys, s.bias), softcap), NEGATIVE)
        for s in sources
    ]
    weights, inverse = shares(logits, [s.owner for s in sources])
    out = mix("bpgs,bpsh->bpgh", weights, sources, inverse).astype(sources[-1].queries.dtype)
    if not scores:
        return out, None
    return out, tuple(w * to_rows(inverse, s.owner) for w, s in zip(weights, sources, strict=True))


def _logits(queries, keys, bias):
    if isinstance(keys, packed.Packed):
        x = packed.logits(queries.astype(jnp.float32), keys)
    else:
        x = product("bpgh,bphs->bpgs", queries, keys)
    return x if bias is None else x + bias
