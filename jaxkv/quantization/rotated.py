"""Rotate, then the best scalar codebook: few bits, one factor per token and head.

A fixed random rotation makes the channels of any vector nearly normal and equal in size, so that one codebook serves all
of them; this is the family of QuaRot (arXiv 2404.00456), PolarQuant (arXiv 2502.02617) and TurboQuant (arXiv 2504.19874).

    y = Hadamard (signs * x) / sqrt(H)                      norms and scalar products stay
    code = nearest(y / sigma), sigma = |x| / sqrt(H)        Lloyd-Max codebook of the normal distribution
    factor = <y, codebook[code]> / |codebook[code]|^2       least squares, then bfloat16
    code = nearest(y / factor)                              fitted to the rounded factor

and factor * codebook[code] is read as (factor * unit) * (codebook[code] / unit), whose second part takes little arithmetic.

Departs from TurboQuant: the rotation is Hadamard with signs and not a dense random matrix; the factor is fitted and not
the norm; levels lie on a cubic, or are equal steps; no residual bit for unbiased scalar products. Heads that are no power
of two are rotated in blocks of the largest power of two that divides them.
"""

import functools

import jax.numpy as jnp
import numpy as np

from jaxkv.quantization.base import Scheme, encoded, from_bits
from jaxkv.quantization.packing import unpack
from jaxkv.types import Array, Encoded
from pallas_kernels.quantize import Codebook
from pallas_kernels.quantize.arithmetic import hadamard

# Codes are read by arithmetic, without a table: as t (t^2 + bend), t = code - (2**bits - 1) / 2, or as t where equal steps are
# near enough. Bends and units are those of the least error, 2.0 % (4 bits), 0.2 % (3) and 1.2 % (2) above the best levels'.
BEND = {4: 115.0, 3: 41.0, 2: None}


def _read(t, bits: int):
    """What t stands for, times the factor; t: array of numpy or JAX."""
    bend = BEND[bits]
    return t if bend is None else t * (t * t + bend)


UNIT = {4: 0.0020931281, 3: 0.0115161477, 2: 0.9956866810}  # read levels times this are those for variance 1
CODEBOOK = {bits: UNIT[bits] * _read(np.arange(2**bits) - (2**bits - 1) / 2, bits) for bits in BEND}


def how(channels: int, *, bits: int) -> Codebook:
    """What `pallas_kernels.quantize` is told."""
    return Codebook(bits=bits, levels=tuple(CODEBOOK[bits].tolist()), signs=_signs(channels), unit=UNIT[bits])


@functools.cache
def _signs(channels: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(20_250_428).choice([-1, 1], channels).tolist())


@functools.cache
def _rotation(channels: int) -> np.ndarray:
    """Orthogonal [H, H] float32: y = x @ R."""
    matrix, block = hadamard(_signs(channels))
    return (matrix / np.sqrt(block)).astype(np.float32)


def rotate(x: Array) -> Array:
    """[..., H] into the basis of the codes, float32."""
    return jnp.einsum("...i,io->...o", x.astype(jnp.float32), _rotation(x.shape[-1]))


def unrotate(y: Array) -> Array:
    """[..., H] back; the exact inverse up to rounding."""
    return jnp.einsum("...o,io->...i", y.astype(jnp.float32), _rotation(y.shape[-1]))


def _levels(codes: Array, bits: int) -> Array:
    """What codes stand for, float32."""
    return _read(codes.astype(jnp.float32) - (2**bits - 1) / 2, bits)


def decode(e: Encoded, axis: int, *, bits: int) -> Array:
    """In the rotated basis, float32."""
    return _levels(unpack(e.codes, bits, axis), bits) * from_bits(e.factors[0])


def _scheme(bits):
    told = functools.partial(how, bits=bits)
    return Scheme(
        name=f"rotated{bits}", summary=f"{bits} bits, Hadamard rotation and Lloyd-Max codebook, one factor", bits=bits,
        carrier="uint8", factors=1, multiple={4: 2, 3: 8, 2: 4}[bits], into_basis=rotate, out_of_basis=unrotate,
        encode=functools.partial(encoded, how=told), how=told, decode=functools.partial(decode, bits=bits),
        level=functools.partial(_levels, bits=bits),
    )  # fmt: skip


ROTATED4, ROTATED3, ROTATED2 = (_scheme(bits) for bits in (4, 3, 2))
