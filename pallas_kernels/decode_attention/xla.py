"""Decode attention in XLA: one softmax over the concatenation that is never built."""

import functools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.decode_attention import packed

NEGATIVE = float(np.finfo(np.float32).min) / 2  # finite: a row that sees nothing must not make NaN


def softcapped(logits, softcap):
    """softcap * tanh(logits / softcap), or the logits."""
    return logits if softcap is None else jnp.tanh(logits / softcap) * softcap


def shares(logits):
    """Softmax over the last axes of several arrays together: weights before division, and 1 / their sum [..., 1].

    NEGATIVE has no weight; where all are NEGATIVE the weights are 1 and the inverse is 0. (Masking the weights a second
    time would be simpler to read, and makes XLA:CPU compute every mask twice.)
    """
    top = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in logits])
    weights = [jnp.exp(x - top) for x in logits]
    return weights, jnp.where(top > NEGATIVE, 1.0 / sum(w.sum(axis=-1, keepdims=True) for w in weights), 0.0)


def mix(spec, weights, sources, inverse):
    """The weighted mean of the values of all sources; zeros where nothing is seen, whatever lies in dead slots."""
    computed = sources[-1].queries.dtype  # what is stored in another is read as float32

    def weighted(w, source):
        if isinstance(source.values, packed.Packed):
            return source.finish(packed.weighted(w, source.values, source.queries.shape[-1]))
        dtype = computed if source.values.dtype == computed else jnp.float32
        out = jnp.einsum(spec, w.astype(dtype), source.values.astype(dtype), preferred_element_type=jnp.float32)
        return source.finish(out)

    out = sum(map(weighted, weights, sources))
    return jnp.where(inverse > 0, out * inverse, 0.0)


def product(spec, queries, keys):
    """Logits in float32; a tier's keys may be wider or narrower than the queries."""
    dtype = queries.dtype if queries.dtype == keys.dtype else jnp.float32
    return jnp.einsum(spec, queries.astype(dtype), keys.astype(dtype), preferred_element_type=jnp.float32)


def decode_attention(sources, *, scale, softcap):
    logits = [
        jnp.where(s.live[:, :, None], softcapped(_logits(s.queries * scale, s.keys), softcap), NEGATIVE)
        for s in sources
    ]
    weights, inverse = shares(logits)
    out = mix("bpgs,bpsh->bpgh", weights, sources, inverse)
    return out.astype(sources[-1].queries.dtype), tuple(w * inverse for w in weights)


def _logits(queries, keys):
    if isinstance(keys, packed.Packed):
        return packed.logits(queries.astype(jnp.float32), keys)
    return product("bpgh,bphs->bpgs", queries, keys)
