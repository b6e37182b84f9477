"""Codes of 1 to 8 bits out of bytes; how they lie there, `pallas_kernels.quantize.xla` says."""

import jax.numpy as jnp

from jaxkv.types import Array
from pallas_kernels.quantize.xla import PLANES, pack

__all__ = ["PLANES", "pack", "unpack"]


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
