"""Between heads and block rows: a tier's axis P, of which one head may own several rows. owner [B, P]: the head of each
row, -1 = of none; None: row p is head p."""

import jax
import jax.numpy as jnp


def to_rows(x, owner):
    """[B, K, ...] of heads -> [B, P, ...]: each row gets what its head has; rows of none anything."""
    return x if owner is None else jax.vmap(lambda one, at: one[at])(x, jnp.maximum(owner, 0).astype(jnp.int32))


def max_by_head(x, owner, heads: int, least):
    """[B, P, ...] of rows -> [B, K, ...]: the largest of each head's rows; `least` for a head without rows."""
    if owner is None:
        return x
    mine = _mine(owner, heads, x.ndim)
    return jnp.where(mine, x[:, None], least).max(axis=2)


def sum_by_head(x, owner, heads: int):
    """[B, P, ...] of rows -> [B, K, ...]: the sum over each head's rows."""
    if owner is None:
        return x
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(_mine(owner, heads, x.ndim), x[:, None], 0).sum(axis=2, dtype=x.dtype)
    flat = x.reshape(*x.shape[:2], -1)
    mine = _mine(owner, heads, 2).astype(x.dtype)
    return jnp.einsum("bkp,bpx->bkx", mine, flat, precision="highest").reshape(x.shape[0], heads, *x.shape[2:])


def turns(owner):
    """Which row of its head each row is, and how many its head has: [B, P] int32 both."""
    same = (owner[:, :, None] == owner[:, None, :]).astype(jnp.int32)
    return jnp.tril(same, -1).sum(axis=-1, dtype=jnp.int32), same.sum(axis=-1, dtype=jnp.int32)


def of_head(x, owner):
    """[B, P] -> [B, P]: the sum over all rows of the same head."""
    same = owner[:, :, None] == owner[:, None, :]
    return jnp.where(same, x[:, None, :], 0).sum(axis=-1, dtype=x.dtype)


def _mine(owner, heads, ndim):
    """[B, K, P, 1, ...]: which rows are a head's."""
    mine = owner[:, None, :] == jnp.arange(heads, dtype=owner.dtype)[None, :, None]
    return mine.reshape(mine.shape + (1,) * (ndim - 2))
