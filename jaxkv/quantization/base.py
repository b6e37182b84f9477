"""What a storage scheme is: how the keys or values of tokens become the bytes of a tier.

    encode   x [..., H] float ─> codes [..., H'] in `carrier`, factors [..., g] uint16 (bfloat16 bits)   once per tier
             x [..., n, H] at a time where `granule` tokens share factors: codes [..., n, H'], factors [..., n / granule, H]
    decode   codes and factors, channels at any `axis` ─> [.., H, ..] float, in the scheme's own basis    at every read

The basis is the channels themselves, or for `rotated` schemes a fixed rotation of them: there, queries are turned once a
step and outputs turned back once, never the entries.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxkv.types import Array, Encoded
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize.arithmetic import LARGEST

__all__ = ["LARGEST", "Scheme", "encoded", "from_bits", "spread", "to_bits"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store vectors of H channels.

    bits: of one channel, factors not counted. carrier: dtype of the codes in a state. factors: how many per group.
    multiple: H must be a multiple of it.
    encode: [..., H] in any float dtype -> Encoded with channels last.
    decode: (Encoded, axis) -> float32 (bfloat16 for bf16) with H channels at `axis`, negative.
    into_basis, out_of_basis: [..., H] float32 -> the same shape; the identity but for rotated schemes. Scalar products
      are the same in both bases.
    level: codes as numbers -> float32 before the factors, (scale) or (scale, zero); None for floats that need none.
    slots_minor: values are stored [B, P, H', S], as keys are, and not [B, P, S, H'].
    balanced: keys are multiplied by their row's balance before they are encoded, and queries divided.
    granule: adjacent slots that are encoded together, once, and leave together.
    keys_only: it makes no sense for values.
    how: H -> what `pallas_kernels.quantize` is told to make of vectors of H channels; None: codes are a cast.
    """

    name: str
    summary: str
    bits: float
    carrier: str
    encode: Callable[[Array], Encoded]
    decode: Callable[[Encoded, int], Array]
    factors: int = 0
    multiple: int = 1
    into_basis: Callable[[Array], Array] = lambda x: x
    out_of_basis: Callable[[Array], Array] = lambda x: x
    level: Callable[[Array], Array] | None = None
    slots_minor: bool = True
    balanced: bool = False
    granule: int = 1
    keys_only: bool = False
    how: Callable[[int], Any] | None = None

    def check(self, channels: int) -> None:
        """Raises: ValueError if vectors of this many channels cannot be stored."""
        if channels % self.multiple:
            raise ValueError(
                f"storage scheme {self.name!r} takes head sizes that are multiples of {self.multiple}, got {channels}"
            )

    def bytes_per_vector(self, channels: int) -> float:
        """Bytes of one encoded vector, factors included."""
        shapes = jax.eval_shape(self.encode, jax.ShapeDtypeStruct((self.granule, channels), jnp.float32))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / self.granule


def to_bits(x: Array) -> Array:
    """bfloat16 bits in uint16 of a float array."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def from_bits(x: Array) -> Array:
    """float32 of bfloat16 bits."""
    return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(jnp.float32)


def encoded(x: Array, *, how: Callable[[int], Any]) -> Encoded:
    """[..., H] in any float dtype, or [..., n, H] where n tokens share factors, by `pallas_kernels.quantize`."""
    rows = x.shape[:-2] if x.ndim > 1 else ()
    tokens = x.shape[-2] if x.ndim > 1 else 1
    codes, factors = quantize(x.reshape(1, math.prod(rows), tokens, x.shape[-1]), how=how(x.shape[-1]))
    back = lambda y: jnp.swapaxes(y, -1, -2).reshape(*rows, *(() if x.ndim == 1 else (-1,)), y.shape[2])
    return Encoded(codes=back(codes), factors=tuple(map(back, factors)))


def spread(factor: Array, channels: int, axis: int) -> Array:
    """Factors with groups at `axis` -> one per channel at `axis`."""
    return jnp.repeat(factor, channels // factor.shape[axis], axis=axis)
