"""Unquantized storage. bfloat16 travels as its bits in uint16: on CPU, JAX 0.10 rewrites a whole bfloat16 array to
change one row of it, an integer array it changes in place."""

import jax
import jax.numpy as jnp

from jaxkv.quantization.base import Scheme
from jaxkv.types import Encoded

F32 = Scheme(
    name="f32",
    carrier="float32",
    bits=32,
    encode=lambda x: Encoded(codes=x.astype(jnp.float32)),
    decode=lambda e: e.codes,
)

BF16 = Scheme(
    name="bf16",
    carrier="uint16",
    bits=16,
    encode=lambda x: Encoded(codes=jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)),
    decode=lambda e: jax.lax.bitcast_convert_type(e.codes, jnp.bfloat16),
)
