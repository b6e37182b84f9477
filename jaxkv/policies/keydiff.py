"""Unusual keys stay: those least like the mean of all keys.

Source: KeyDiff: Key Similarity-Based KV Cache Eviction (arXiv 2504.15364), section 3. Score of a token: minus the cosine
between its key and the mean of the normalised keys of its head.
Departs: a token is scored once, when it enters, against the mean of all keys so far, its own prompt included; the paper's
block-wise form scores all of them again at every eviction. The score is kept in bfloat16, 2 bytes a slot.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy
from jaxkv.quantization.base import from_bits, to_bits

TINY = 1e-12  # keeps a zero vector from dividing by zero


def normalised(x):
    """[..., H] -> float32 of length 1."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.sqrt(jnp.square(x).sum(axis=-1, keepdims=True)), TINY)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """The keys least like their head's mean. row["sum"]: of all normalised keys so far, [B, P, H]."""

    name: ClassVar[str] = "keydiff"
    summary: ClassVar[str] = "the tokens whose keys are least like the mean key"
    source: ClassVar[str] = "KeyDiff, arXiv 2504.15364"

    def enter_row(self, shape, layer):
        return {"sum": jnp.zeros(shape, jnp.float32)}

    def advance(self, row, new):
        used = jnp.where(new.valid[:, None, :, None], new.keys.astype(jnp.float32), 0.0)
        return {"sum": row["sum"] + normalised(used).sum(axis=2)}

    def enter(self, new, row):
        return {"likeness": to_bits((normalised(new.keys) * normalised(row["sum"])[:, :, None]).sum(axis=-1))}

    def score(self, slots, row, positions):
        return -from_bits(slots["likeness"])
