"""Decode attention in XLA: one softmax over the concatenation that is never built."""

import functools

import jax.numpy as jnp
import numpy as np

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


def mix(spec, weights, values, inverse):
    """The weighted mean of the values of all sources; zeros where nothing is seen, whatever lies in dead slots."""
    out = sum(
        jnp.einsum(spec, w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, v in zip(weights, values, strict=True)
    )
    return jnp.where(inverse > 0, out * inverse, 0.0).astype(values[-1].dtype)


def decode_attention(sources, *, scale, softcap):
    logits = [
        jnp.where(
            live[:, :, None],
            softcapped(jnp.einsum("bpgh,bphs->bpgs", q * scale, k, preferred_element_type=jnp.float32), softcap),
            NEGATIVE,
        )
        for q, k, _, live in sources
    ]
    weights, inverse = shares(logits)
    out = mix("bpgs,bpsh->bpgh", weights, [v for _, _, v, _ in sources], inverse)
    return out, tuple(w * inverse for w in weights)
