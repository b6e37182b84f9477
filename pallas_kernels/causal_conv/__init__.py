"""Depthwise causal convolution over time, whole sequences and one token at a time.

    y[t] = bias + sum over k of filters[k] * x[t - (Kw - 1) + k]        channel by channel; the last filter meets x[t]

What lies before the first token are the taps: the last Kw - 1 inputs that a row has read earlier, zeros at first. Tokens that
are not valid are not there: they add nothing, get zeros, and their neighbours are neighbours, wherever the pads lie.

    x        a b . c            taps y z        '.' not valid, Kw = 3
    read     y z a b c
    results  (y z a) (z a b) 0 (a b c)          taps left: b c
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.causal_conv import tpu, xla
from pallas_kernels.dispatch import Implementation, call, takes_all

__all__ = ["BACKWARD", "IMPLEMENTATIONS", "carry", "causal_conv", "step"]

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.forward, tpu.why_not, platform="tpu"),
    "interpret": Implementation(tpu.forward_interpreted, tpu.why_not, by_name_only=True),
    "xla": Implementation(xla.forward, takes_all),
}
BACKWARD = {
    "tpu": Implementation(tpu.backward, tpu.why_not, platform="tpu"),
    "interpret": Implementation(tpu.backward_interpreted, tpu.why_not, by_name_only=True),
    "xla": Implementation(xla.backward, takes_all),
}


def causal_conv(x, filters, bias, taps, *, valid=None, segments=None, implementation: str | None = None):
    """Convolves tokens that follow on what `taps` has of earlier ones. Differentiable in the four arrays.

    Args:
      x: [B, T, C], or with heads [B, N, T, H], float. What is not valid may be anything, NaN too.
      filters: [Kw, C]; with heads [Kw, H], shared by them, or [Kw, N, H]. bias: the same without Kw, or None.
      taps: [B, Kw - 1, C] or [B, N, Kw - 1, H], the last inputs before these, oldest first; None: zeros.
      valid: [B, T] bool; None: all.
      segments: [B, T] int32: tokens meet those of their own segment, and -1 meets all and is met by all, as the taps are;
        None: one segment. A segment is meant to be of one piece: where one goes on behind less than Kw - 1 tokens of
        another, these count as zeros. With segments XLA computes it; kernels count all tokens as neighbours.
    Returns: y like x, zeros where not valid; the taps after these tokens. Sums are in float32.
    Raises: ValueError for shapes that do not fit; NotImplementedError if a named implementation cannot take the case.
    """
    x4, filters3, bias2, taps4 = _with_heads(x, filters, bias, taps)
    for name, y in (("valid", valid), ("segments", segments)):
        if y is not None and y.shape != (x.shape[0], x.shape[-2]):
            raise ValueError(f"{name} must be [B, T] = {(x.shape[0], x.shape[-2])}, got {y.shape}")
    if segments is not None and implementation not in (None, "xla"):
        raise NotImplementedError(f"causal_conv: implementation {implementation!r} cannot take segments; use 'xla'")
    if valid is not None:
        rank = jnp.cumsum(valid, axis=1, dtype=jnp.int32) - 1  # of a token among the valid ones
        count = rank[:, -1:] + 1
        index = jax.lax.broadcasted_iota(jnp.int32, valid.shape, 1)
        place = jnp.where(valid, rank, valid.shape[1])
        row = jnp.arange(valid.shape[0], dtype=jnp.int32)[:, None]
        order = jnp.zeros(valid.shape, jnp.int32).at[row, place].set(index, mode="drop")
        there = index < count
        x4 = _move(x4, order, there, rank, valid)
        segments = None if segments is None else jnp.take_along_axis(segments, order, axis=1)
    else:
        count = jnp.full(x4.shape[:1] + (1,), x4.shape[2], jnp.int32)
    if segments is None:
        y = _dense(x4, taps4, filters3, bias2, implementation)
    else:
        y = xla.forward(x4, taps4, filters3, bias2, segments)
    left = _left(x4, taps4, count)
    if valid is not None:
        y = _move(y, rank, valid, order, there)
    return y.reshape(x.shape), left.reshape(*left.shape[:1], *left.shape[4 - x.ndim + 1 :])


def step(x, filters, bias, taps, *, valid=None):
    """`causal_conv` of one token.

    Args: x [B, C] or [B, N, H]; filters, bias, taps as there; valid [B] bool or None.
    Returns: y like x, zeros where not valid; the taps after it, unchanged where not valid.
    """
    x4, filters3, bias2, taps4 = _with_heads(x[..., None, :], filters, bias, taps)
    y = xla.forward(x4, taps4, filters3, bias2)
    left = jnp.concatenate([taps4, x4], axis=2)[:, :, 1:]
    if valid is not None:
        valid = valid[:, None, None, None]
        y, left = jnp.where(valid, y, 0), jnp.where(valid, left, taps4)
    return y.reshape(x.shape), left.reshape(*left.shape[:1], *left.shape[4 - x.ndim :])


def carry(taps, x, valid=None):
    """The taps after reading x [B, T, C] behind taps [B, Kw - 1, C]: the last of both that are `valid` [B, T] (None: all)."""
    valid = jnp.ones(x.shape[:2], bool) if valid is None else valid
    width, rank = taps.shape[1], jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    own = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None], taps.shape[:2])
    place = jnp.concatenate([own, jnp.where(valid, rank + width - 1, -1)], axis=1)
    wanted = rank[:, -1:] + jnp.arange(width, dtype=jnp.int32)[None]
    index = (place[:, None, :] == wanted[:, :, None]).argmax(axis=-1).astype(jnp.int32)
    return jnp.take_along_axis(jnp.concatenate([taps, x], axis=1), index[..., None], axis=1)


def _with_heads(x, filters, bias, taps):
    """x [B, N, T, H], filters [Kw, M, H], bias [M, H], taps [B, N, Kw - 1, H]; N = 1 without heads, M = 1 where shared."""
    width, heads = filters.shape[0] if filters.ndim else 0, x.ndim == 4
    fits = (
        x.ndim in (3, 4)
        and width > 0
        and (filters.shape[1:] == x.shape[-1:] or (heads and filters.shape[1:] == (x.shape[1], x.shape[3])))
    )
    if not fits:
        raise ValueError(
            "causal_conv takes x [B, T, C] with filters [Kw, C], or x [B, N, T, H] with filters [Kw, H] or [Kw, N, H]; got "
            f"x {x.shape} and filters {filters.shape}"
        )
    before = (*x.shape[:-2], width - 1, x.shape[-1])
    if bias is not None and bias.shape != filters.shape[1:]:
        raise ValueError(f"bias must be {filters.shape[1:]} as the filters are, got {bias.shape}")
    if taps is not None and taps.shape != before:
        raise ValueError(f"taps must be the last {width - 1} inputs, {before}, got {taps.shape}")
    bias = jnp.zeros(filters.shape[1:], filters.dtype) if bias is None else bias
    taps = jnp.zeros(before, x.dtype) if taps is None else taps
    if not heads:
        x, taps = x[:, None], taps[:, None]
    if filters.ndim == 2:
        filters, bias = filters[:, None], bias[None]
    return x, filters, bias, taps.astype(x.dtype)


def _left(x, taps, count):
    """The last Kw - 1 of what was read, [B, N, Kw - 1, H]: taps, then the first `count` [B, 1] of x."""
    index = count + jnp.arange(taps.shape[2], dtype=jnp.int32)[None]
    return jnp.take_along_axis(jnp.concatenate([taps, x], axis=2), index[:, None, :, None], axis=2)


def _take(x, index, there):
    """x [B, N, T, H] at index [B, T], zeros where not `there`."""
    rows = jnp.take_along_axis(x, jnp.maximum(index, 0)[:, None, :, None], axis=2)
    return jnp.where(there[:, None, :, None], rows, jnp.zeros((), x.dtype))


@jax.custom_vjp
def _move(x, index, there, back, back_there):
    """`_take`; (back, back_there) is the way back, which gradients take, so that they gather and never scatter."""
    return _take(x, index, there)


_move.defvjp(
    lambda x, index, there, back, back_there: (_take(x, index, there), (back, back_there)),
    lambda way, gradient: (_take(gradient, *way), None, None, None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _dense(x, taps, filters, bias, implementation):
    """The convolution where every token is valid."""
    return call("causal_conv", IMPLEMENTATIONS, implementation, x, taps, filters, bias)


def _dense_forward(x, taps, filters, bias, implementation):
    return _dense(x, taps, filters, bias, implementation), (x, taps, filters, bias)


def _dense_backward(implementation, kept, gradient):
    x, taps, filters, bias = kept
    dx, df, db = call("causal_conv backward", BACKWARD, implementation, x, taps, filters, gradient)
    return dx, xla.backward_taps(taps, filters, gradient), df.astype(filters.dtype), db.astype(bias.dtype)


_dense.defvjp(_dense_forward, _dense_backward)
