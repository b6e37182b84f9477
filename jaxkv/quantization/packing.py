"""Codes of 1 to 8 bits in bytes. Adjacent channels of one token share a byte, so an append never reads a neighbour.

4 bits   byte = c0 | c1 << 4                      H / 2 bytes
2 bits   byte = c0 | c1 << 2 | c2 << 4 | c3 << 6   H / 4
1 bit    eight channels                            H / 8
3 bits   a plane of the low 2 bits, then a plane of the high bit: H / 4 + H / 8 = 3 H / 8
"""

import jax.numpy as jnp

from jaxkv.types import Array

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def pack(codes: Array, bits: int) -> Array:
    """[..., H] unsigned integers below 2**bits -> uint8 [..., H * bits / 8]; H a multiple of 8 / (narrowest plane)."""
    planes, shift = [], 0
    for width in PLANES[bits]:
        part = ((codes >> shift) & ((1 << width) - 1)).astype(jnp.uint8)
        part = part.reshape(*part.shape[:-1], -1, 8 // width)
        places = (jnp.arange(8 // width, dtype=jnp.uint8) * width).reshape((1,) * (part.ndim - 1) + (-1,))
        planes.append((part << places).sum(axis=-1, dtype=jnp.uint8))
        shift += width
    return jnp.concatenate(planes, axis=-1)


def unpack(packed: Array, bits: int, axis: int) -> Array:
    """uint8 with packed channels at `axis` (negative) -> uint8 codes with all channels there."""
    channels = packed.shape[axis] * 8 // bits
    codes, start, shift = None, 0, 0
    for width in PLANES[bits]:
        count = channels * width // 8
        part = jnp.take(packed, jnp.arange(start, start + count), axis=axis) if len(PLANES[bits]) > 1 else packed
        part = jnp.expand_dims(part, axis + packed.ndim + 1)
        places = (jnp.arange(8 // width, dtype=jnp.uint8) * width).reshape((-1,) + (1,) * (-axis - 1))
        places = places.reshape((1,) * (part.ndim - places.ndim) + places.shape)
        part = (part >> places) & jnp.uint8((1 << width) - 1)
        shape = list(packed.shape)
        shape[axis] = channels
        part = part.reshape(shape) << jnp.uint8(shift)
        codes = part if codes is None else codes | part
        start, shift = start + count, shift + width
    return codes
