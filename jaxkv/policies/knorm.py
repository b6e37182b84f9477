"""Small keys stay: the norm of a key as a cheap sign of how little attention it will draw.

Source: A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression (arXiv 2406.11430), section 3. Tokens
whose keys have a small L2 norm tend to draw attention; those with the largest leave. No attention is needed.
Departs: the score is kept in bfloat16, 2 bytes a slot; the newest tokens are protected, as for every policy here.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy
from jaxkv.quantization.base import from_bits, to_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyNorm(Policy):
    """The smallest key norms."""

    name: ClassVar[str] = "knorm"
    summary: ClassVar[str] = "the tokens with the smallest keys"
    source: ClassVar[str] = "L2 norm, arXiv 2406.11430"

    def enter(self, new, row):
        return {"norm": to_bits(jnp.sqrt(jnp.square(new.keys.astype(jnp.float32)).sum(axis=-1)))}

    def score(self, slots, row, positions):
        return -from_bits(slots["norm"])
