"""Balancing outlier channels between queries and keys, before keys are encoded.

Source: MiKV, "No Token Left Behind" (arXiv 2402.18096), equations 2 to 4. Some channels of keys are far larger than the
others, and then cost all of them precision; if queries are small there, nothing is lost by making those keys smaller:

    b = sqrt(max |q| / max |k|)   per channel, over the prompt       (q / b) . (k * b) = q . k

Found once, at a row's first prompt, and frozen. Departs: query heads that share a kv head share b; b is shared by the two
channels of each rotated pair, so that it commutes with RoPE; it is kept in bfloat16. Where the same channel is large in
queries and keys there is nothing to gain.
"""

import jax.numpy as jnp

from jaxkv.quantization.base import from_bits, to_bits
from jaxkv.types import Array

LIMIT = 1e4  # factors stay within 1 / LIMIT .. LIMIT


def find_balance(balance: Array, queries: Array, keys: Array, valid: Array, *, rotary_dim: int) -> Array:
    """The rows' balance, found now for rows that have none.

    Args: balance [B, P, H] uint16; queries [B, P, G, T, H] and keys [B, P, T, H], both rotated; valid [B, T] bool.
    """
    size = lambda x, seen: jnp.where(seen, jnp.abs(x.astype(jnp.float32)), 0.0)
    q = size(queries, valid[:, None, None, :, None]).max(axis=(2, 3))
    k = size(keys, valid[:, None, :, None]).max(axis=2)
    q, k = _paired(q, rotary_dim), _paired(k, rotary_dim)
    usable = (q > 0) & (k > 0)
    b = jnp.where(usable, jnp.sqrt(jnp.where(usable, q, 1.0) / jnp.where(usable, k, 1.0)), 1.0)
    found = to_bits(jnp.clip(b, 1.0 / LIMIT, LIMIT))
    return jnp.where((balance == 0) & valid.any(axis=1)[:, None, None], found, balance)


def factor_of(balance: Array) -> Array:
    """float32 factors of a balance; 1 where it is not known yet."""
    return jnp.where(balance == 0, 1.0, from_bits(balance))


def _paired(x: Array, rotary_dim: int) -> Array:
    """The larger of the two channels c and c + R / 2 of each rotated pair, for both; channels beyond R keep their own."""
    half = rotary_dim // 2
    pair = jnp.maximum(x[..., :half], x[..., half:rotary_dim])
    return jnp.concatenate([pair, pair, x[..., rotary_dim:]], axis=-1)
