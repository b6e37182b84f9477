"""Round to nearest, asymmetric, per token and group of 64 channels: MiKV's quantizer (arXiv 2402.18096, equation 1).

    x_hat = zero + scale * code        code = round((x - zero) / scale) in 0 .. 2**bits - 1

scale and zero are bfloat16; the codes are fitted to that rounded grid, and scale is rounded up, so that the group's
largest number stays on it. Departs: the paper keeps scale and zero in float16, which TPUs cannot load; its groups are
half a head of 128 channels, which is the same 64. A constant group has scale 0 and decodes to zero's bfloat16.
Error: at most scale / 2 inside the grid, and what zero lost to rounding at the group's low end.
"""

import functools

import jax.numpy as jnp

from jaxkv.quantization.base import Scheme, encoded, from_bits, spread
from jaxkv.quantization.packing import unpack
from jaxkv.types import Array, Encoded
from pallas_kernels.quantize import Rounded


def decode(e: Encoded, axis: int, *, bits: int) -> Array:
    """The grid points, float32."""
    codes = unpack(e.codes, bits, axis).astype(jnp.float32)
    scale, zero = (spread(from_bits(f), codes.shape[axis], axis) for f in e.factors)
    return codes * scale + zero


def level(codes: Array) -> Array:
    """Codes as numbers."""
    return codes.astype(jnp.float32)


def _scheme(bits):
    how = lambda channels: Rounded(bits=bits)
    return Scheme(
        name=f"int{bits}", summary=f"{bits} bits, round to nearest, scale and zero per 64 channels", bits=bits,
        carrier="uint8", factors=2, multiple={8: 1, 4: 2, 3: 8, 2: 4}[bits],
        encode=functools.partial(encoded, how=how), how=how, decode=functools.partial(decode, bits=bits), level=level,
    )  # fmt: skip


INT8, INT4, INT3, INT2 = (_scheme(bits) for bits in (8, 4, 3, 2))
