"""Codes in XLA. Adjacent channels of one token share a byte, so that an append never reads a neighbour:

4 bits   byte = c0 | c1 << 4                      H / 2 bytes
2 bits   byte = c0 | c1 << 2 | c2 << 4 | c3 << 6   H / 4
1 bit    eight channels                            H / 8
3 bits   a plane of the low 2 bits, then a plane of the high bit: H / 4 + H / 8 = 3 H / 8
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.quantize import arithmetic
from pallas_kernels.quantize.how import Codebook, Float8, Rounded, groups

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def pack(codes, bits: int):
    """[..., H] unsigned integers below 2**bits -> uint8 [..., H * bits / 8]; H a multiple of 8 / (narrowest plane)."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        part = ((codes >> shift) & ((1 << width) - 1)).astype(jnp.uint8)
        part = part.reshape(*part.shape[:-1], part.shape[-1] * width // 8, 8 // width)
        places = (jnp.arange(8 // width, dtype=jnp.uint8) * width).reshape((1,) * (part.ndim - 1) + (-1,))
        planes.append((part << places).sum(axis=-1, dtype=jnp.uint8))
        shift += width
    return jnp.concatenate(planes, axis=-1)


@functools.partial(jax.jit, static_argnames="how")  # so that a model's layers trace it once
def quantize(x, *, how):
    codes, factors = encode(x, how)
    return jnp.swapaxes(codes, -1, -2), tuple(jnp.swapaxes(factor, -1, -2) for factor in factors)


def encode(x, how):
    """[..., S, H] -> packed codes [..., S, H'] and factors [..., S, groups] or [..., S / granule, H]: channels last."""
    x, shape = arithmetic.finite(x), x.shape
    if how.granule > 1:
        x = x.reshape(*shape[:-2], shape[-2] // how.granule, how.granule, shape[-1])
    elif not isinstance(how, Codebook):
        count = groups(how, shape[-1])
        x = x.reshape(*shape[:-1], count, shape[-1] // count)
    if isinstance(how, Codebook):
        matrix, block = arithmetic.hadamard(how.signs)
        rotate = lambda whole: jnp.einsum("...i,io->...o", whole, matrix, precision="highest")
        codes, factors = arithmetic.codebook(x, rotate, how, block, -1, pick=_pick)
    elif isinstance(how, Float8):
        codes, factors = arithmetic.fit_float8(x, how.mantissa, -1)
    elif isinstance(how, Rounded):
        codes, factors = arithmetic.fit_integers(x, how.bits, -2 if how.granule > 1 else -1)
    codes = pack(codes.astype(jnp.uint8).reshape(shape), how.bits)
    drop = lambda factor: factor if isinstance(how, Codebook) else jnp.squeeze(factor, -2 if how.granule > 1 else -1)
    return codes, tuple(_bits(drop(factor)) for factor in factors)


def _pick(y, factor, edges, values):
    """`arithmetic.pick_in_turn` in few instructions: what XLA compiles in the decode step of every layer, several times."""
    edges = edges.reshape((1,) * y.ndim + (-1,))
    below = (y[..., None] > factor[..., None] * edges).sum(axis=-1, dtype=jnp.int32)
    counts = list(values) == list(range(len(values)))
    return below if counts else jnp.take(jnp.asarray(values, jnp.int32), below, mode="clip")


def _bits(factor):
    """uint16 of a float32 array of bfloat16 numbers."""
    return (jax.lax.bitcast_convert_type(factor, jnp.uint32) >> 16).astype(jnp.uint16)
