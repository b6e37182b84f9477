"""Attention sinks and a sliding window of the newest tokens: StreamingLLM.

Source: Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453), section 3.2.
Departs: tokens keep their original positions instead of being renumbered inside the cache, so the rotary distance to
the sinks grows; this is what makes the policy comparable with every other one here, and a control for all of them.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recency(Policy):
    """The first `sinks` tokens and the newest of the rest."""

    name: ClassVar[str] = "recency"
    summary: ClassVar[str] = "attention sinks and the newest tokens"
    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    recent: int = 1
    sinks: int = 4

    def score(self, slots, row, positions):
        return positions.astype(jnp.float32)
