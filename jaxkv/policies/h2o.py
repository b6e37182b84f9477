"""Heavy hitters: keep what has gathered the most attention.

Source: H2O: Heavy-Hitter Oracle (arXiv 2306.14048), section 4. Score of a token: the attention probability that all
queries so far have given it, summed. Half of the budget goes to the newest tokens, half to the heavy hitters.
Departs: query heads that share a kv head vote by their mean probability (the paper predates grouped heads); sums are
not divided by the number of queries that could see a token, as in the paper and unlike some later code.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy, mean_vote


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    """Accumulated attention. recent_share: share of the budget that protects the newest tokens."""

    name: ClassVar[str] = "h2o"
    summary: ClassVar[str] = "half the newest, half those with the most accumulated attention"
    source: ClassVar[str] = "H2O, arXiv 2306.14048"
    needs_attention: ClassVar[bool] = True

    recent: int = 1
    recent_share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.recent_share < 1.0:
            raise ValueError(f"recent_share must be in [0, 1), got {self.recent_share}")

    @property
    def watcher(self):
        return dataclasses.replace(self, recent=1, sinks=0, recent_share=0.0)

    def protected_recent(self, limit):
        share = jnp.floor(limit.astype(jnp.float32) * self.recent_share).astype(jnp.int32)
        return jnp.maximum(share, self.recent)

    def enter(self, new, row):
        return {"attention": jnp.zeros(new.keys.shape[:3], jnp.float32)}

    def row_statistic(self, p, visible, rows, row):
        return {"attention": jnp.einsum("bpts,bt->bps", mean_vote(p), rows.valid.astype(p.dtype))}

    def absorb(self, slots, statistic, row, count):
        return {"attention": slots["attention"] + statistic["attention"]}

    def score(self, slots, row, positions):
        return slots["attention"]
