"""Random eviction: the control that every importance rule must beat at equal bytes."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Each token draws one score from (seed, layer, block row, position) when it enters, and keeps it.

    The batch index takes no part, so a row's kept set does not depend on its mates.
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "a seeded random subset, the control"
    source: ClassVar[str] = "control"

    seed: int = 0

    def enter_row(self, shape, layer):
        stream = jnp.full(shape[:2], self.seed % 2**32, jnp.uint32)
        for part in (jnp.asarray(layer, jnp.uint32), jnp.arange(shape[1], dtype=jnp.uint32)[None]):
            stream = _drawn(stream, part)
        return {"stream": stream}

    def score(self, slots, row, positions):
        drawn = _drawn(row["stream"][..., None], positions.astype(jnp.uint32))
        return (drawn >> 8).astype(jnp.float32)  # 24 bits: every value is exact in float32


def _drawn(stream, part):
    """What a stream of random numbers has at `part`, itself such a stream."""
    return _mix(stream ^ _mix(part + jnp.uint32(0x9E3779B9)))


def _mix(x):
    """The finalizer of MurmurHash3: every input bit flips each output bit with probability about a half."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
