"""The two layers that everything is made of: a matmul and a norm, as plain functions with thin Linen owners."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkv.types import Array

SMALL = 16 * 2**20  # bytes; larger kernels use every thread as they are


def linear(params, x: Array) -> Array:
    """x @ kernel (+ bias): [..., in] -> [..., out]. Every parameter matmul of a model goes through here."""
    kernel = params["kernel"]
    one_row, even = x.size == x.shape[-1], x.shape[-1] % 2 == 0
    if one_row and even and kernel.size * kernel.dtype.itemsize < SMALL:
        y = _two_halves(x, kernel)
    else:
        y = jnp.einsum("...i,io->...o", x, kernel)
    if "bias" in params:
        y = y + params["bias"].reshape((1,) * (y.ndim - 1) + (-1,))
    return y


def rms_norm(scale: Array, x: Array, *, eps: float, offset: float) -> Array:
    """x / rms(x) * (offset + scale) over the last axis, in float32 (RMSNorm, arXiv 1910.07467)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    scale = (scale.astype(jnp.float32) + offset).reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * scale).astype(x.dtype)


def _two_halves(x: Array, kernel: Array) -> Array:
    """x @ kernel for one row, as the sum over both halves of `in`.

    XLA's CPU backend runs a small matrix-vector product on one thread, at half the machine's memory bandwidth; a batch
    of two runs on two. Other platforms do not mind.
    """
    halves = x.reshape(2, -1), kernel.reshape(2, -1, kernel.shape[1])
    y = jnp.einsum("ni,nio->no", *halves, preferred_element_type=jnp.float32).sum(axis=0)
    return y.reshape(*x.shape[:-1], -1).astype(x.dtype)


class Linear(nn.Module):
    """Owns kernel [in, out] and, if `use_bias`, bias [out]."""

    features: int
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (x.shape[-1], self.features)
        params = {"kernel": self.param("kernel", nn.initializers.lecun_normal(), shape, x.dtype)}
        if self.use_bias:
            params["bias"] = self.param("bias", nn.initializers.zeros_init(), (self.features,), x.dtype)
        return linear(params, x)


class RMSNorm(nn.Module):
    """Owns scale, over the last axis."""

    eps: float
    offset: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        start = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", start, (x.shape[-1],), x.dtype)
        return rms_norm(scale, x, eps=self.eps, offset=self.offset)
