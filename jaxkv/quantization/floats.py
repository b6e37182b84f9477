"""Floating-point storage.

bfloat16 travels as its bits in uint16, fp8 as its bits in uint8: on CPU, JAX 0.10 rewrites a whole array of those types
to change one row of it, an integer array it changes in place. fp8 has one factor per group of 64 channels, the largest
magnitude over the format's largest number, rounded up to bfloat16 so that nothing overflows. e4m3 has 3 bits of
mantissa (relative error 1/16 at most), e5m2 has 2 (1/8) and more range.
"""

import functools

import jax
import jax.numpy as jnp

from jaxkv.quantization.base import Scheme, encoded, from_bits, spread, to_bits
from jaxkv.types import Array, Encoded
from pallas_kernels.quantize import Float8

F32 = Scheme(
    name="f32",
    summary="float32",
    bits=32,
    carrier="float32",
    encode=lambda x: Encoded(codes=x.astype(jnp.float32)),
    decode=lambda e, axis: e.codes,
    slots_minor=False,
)

BF16 = Scheme(
    name="bf16",
    summary="bfloat16",
    bits=16,
    carrier="uint16",
    encode=lambda x: Encoded(codes=to_bits(x)),
    decode=lambda e, axis: jax.lax.bitcast_convert_type(e.codes, jnp.bfloat16),
    level=from_bits,
)


def _decode(e: Encoded, axis: int, *, dtype) -> Array:
    x = jax.lax.bitcast_convert_type(e.codes, dtype).astype(jnp.float32)
    return x * spread(from_bits(e.factors[0]), x.shape[axis], axis)


def _fp8(name, dtype, summary):
    how = lambda channels: Float8(mantissa=jnp.finfo(dtype).nmant)
    return Scheme(
        name=name, summary=summary, bits=8, carrier="uint8", factors=1,
        encode=functools.partial(encoded, how=how), how=how, decode=functools.partial(_decode, dtype=dtype),
        level=lambda codes: jax.lax.bitcast_convert_type(codes, dtype).astype(jnp.float32),
    )  # fmt: skip


E4M3 = _fp8("fp8_e4m3", jnp.float8_e4m3fn, "float8 with 3 bits of mantissa, a factor per 64 channels")
E5M2 = _fp8("fp8_e5m2", jnp.float8_e5m2, "float8 with 2 bits of mantissa, a factor per 64 channels")
