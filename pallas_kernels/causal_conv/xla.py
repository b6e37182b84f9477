"""Causal convolution in XLA: Kw shifted products, in float32."""

import jax
import jax.numpy as jnp


def shifted(x, offset: int, length: int):
    """x [B, N, n, H] from position `offset` on, `length` of them, float32."""
    return jax.lax.slice_in_dim(x, offset, offset + length, axis=2).astype(jnp.float32)


def forward(x, taps, filters, bias, segments=None):
    """x [B, N, T, H], taps [B, N, Kw - 1, H], filters [Kw, M, H], bias [M, H] -> [B, N, T, H] in x's dtype. M = N or 1.

    segments [B, T] int32: tokens that each meets; see `causal_conv`.
    """
    read, length, last = jnp.concatenate([taps, x], axis=2), x.shape[2], len(filters) - 1
    wide = lambda f: f.astype(jnp.float32)[None, :, None]

    def met(k):
        earlier = shifted(read, k, length)
        if segments is None or k == last:
            return earlier
        theirs = jnp.pad(segments, ((0, 0), (last, 0)), constant_values=-1)[:, k : k + length]
        met = (theirs == segments) | (theirs == -1) | (segments == -1)
        return jnp.where(met[:, None, :, None], earlier, 0.0)

    total = sum(wide(f) * met(k) for k, f in enumerate(filters))
    return (total + wide(bias)).astype(x.dtype)


def backward(x, taps, filters, gradient):
    """gradient [B, N, T, H] of the result -> that of x, in x's dtype, and of filters and bias, float32."""
    read, length, last = jnp.concatenate([taps, x], axis=2), x.shape[2], len(filters) - 1
    ahead = jnp.pad(gradient, ((0, 0), (0, 0), (0, last), (0, 0)))
    wide = lambda f: f.astype(jnp.float32)[None, :, None]
    dx = sum(wide(f) * shifted(ahead, last - k, length) for k, f in enumerate(filters)).astype(x.dtype)
    gradient = gradient.astype(jnp.float32)
    own = (lambda y: y.sum(axis=(0, 2))) if filters.shape[1] == x.shape[1] else (lambda y: y.sum(axis=(0, 1, 2))[None])
    df = jnp.stack([own(gradient * shifted(read, k, length)) for k in range(last + 1)])
    return dx, df, own(gradient)


def backward_taps(taps, filters, gradient):
    """That of taps, which only the first Kw - 1 results have seen: a few numbers, in XLA for every implementation."""
    last = len(filters) - 1
    first = gradient[:, :, :last].astype(jnp.float32)
    near = jnp.pad(first, ((0, 0), (0, 0), (last, last - first.shape[2]), (0, 0)))
    wide = lambda f: f.astype(jnp.float32)[None, :, None]
    total = sum(wide(f) * shifted(near, last - k, last) for k, f in enumerate(filters))
    return total.astype(taps.dtype)
