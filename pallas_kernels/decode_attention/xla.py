"""Decode attention in XLA: one softmax over the concatenation that is never built."""

import functools

import jax.numpy as jnp

NEGATIVE = -1e30  # finite, so that a row without live slots makes no NaN


def softcapped(logits, softcap):
    """softcap * tanh(logits / softcap), or the logits."""
    return logits if softcap is None else jnp.tanh(logits / softcap) * softcap


def decode_attention(sources, *, scale, softcap):
    logits = [
        jnp.where(
            live[:, :, None],
            softcapped(jnp.einsum("bpgh,bphs->bpgs", q, k, preferred_element_type=jnp.float32) * scale, softcap),
            NEGATIVE,
        )
        for q, k, _, live in sources
    ]
    top = functools.reduce(jnp.maximum, [x.max(axis=-1, keepdims=True) for x in logits])
    weights = [jnp.where(s[3][:, :, None], jnp.exp(x - top), 0.0) for x, s in zip(logits, sources, strict=True)]
    total = sum(w.sum(axis=-1, keepdims=True) for w in weights)
    inverse = jnp.where(total > 0, 1.0 / jnp.where(total > 0, total, 1.0), 0.0)
    out = sum(
        jnp.einsum("bpgs,bpsh->bpgh", w.astype(v.dtype), v, preferred_element_type=jnp.float32)
        for w, (_, _, v, _) in zip(weights, sources, strict=True)
    )
    return (out * inverse).astype(sources[0][2].dtype), tuple(w * inverse for w in weights)
