"""Keys per channel over groups of 32 tokens: KIVI's keys (arXiv 2402.02750). Its values are `int4` and `int2`.

    x_hat[token, channel] = zero + scale * code       scale and zero of the channel in the token's group

Some channels of keys are far larger than the others, in every token; a range per channel leaves them to themselves. The
rounding is that of `jaxkv.quantization.integers`: scale and zero are bfloat16, codes are fitted to that grid. A group is
complete before it is encoded: until then its tokens wait in the tier above (`jaxkv.cache.insert`). Departs: KIVI encodes a
prompt in order and keeps up to 128 tokens as they are; groups here are of those tokens that leave the tier above, by
whatever policy, in the order of their positions.
"""

import functools

import jax.numpy as jnp

from jaxkv.quantization.base import Scheme, encoded, from_bits, spread
from jaxkv.quantization.integers import level
from jaxkv.quantization.packing import unpack
from jaxkv.types import Array, Encoded
from pallas_kernels.quantize import Rounded

GRANULE = 32  # tokens of a group


def decode(e: Encoded, axis: int, *, bits: int) -> Array:
    """The grid points, float32. Tokens lie at the other of the last two axes."""
    codes, tokens = unpack(e.codes, bits, axis).astype(jnp.float32), -3 - axis
    scale, zero = (spread(from_bits(f), codes.shape[tokens], tokens) for f in e.factors)
    return codes * scale + zero


def scheme(bits: int, granule: int = GRANULE) -> Scheme:
    """Keys at so many bits in groups of so many tokens."""
    how = lambda channels: Rounded(bits=bits, granule=granule)
    return Scheme(
        name=f"kivi{bits}", summary=f"{bits} bits, round to nearest, scale and zero per channel of {granule} tokens", bits=bits,
        carrier="uint8", factors=2, multiple={4: 2, 2: 4}[bits], granule=granule, keys_only=True,
        encode=functools.partial(encoded, how=how), how=how, decode=functools.partial(decode, bits=bits),
        level=level,
    )  # fmt: skip


KIVI4, KIVI2 = (scheme(bits) for bits in (4, 2))
