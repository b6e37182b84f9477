"""Keep what the newest token looks at.

Source: Transformers are Multi-State RNNs (arXiv 2401.06104), section 3.2, TOVA: at each step the token that gets the least
attention from the current query leaves.
Departs: query heads vote per kv head by their mean, not over the whole layer; scores are kept in bfloat16, 2 bytes a slot.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy, expand, mean_vote
from jaxkv.quantization.base import from_bits, to_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    """The attention of the newest query alone."""

    name: ClassVar[str] = "tova"
    summary: ClassVar[str] = "what the newest token attends to"
    source: ClassVar[str] = "TOVA, arXiv 2401.06104"
    needs_attention: ClassVar[bool] = True

    recent: int = 1

    def enter(self, new, row):
        return {"attention": jnp.zeros(new.keys.shape[:3], jnp.uint16)}

    def row_statistic(self, p, visible, rows, row):
        last = rows.valid & (rows.remaining == 0)
        return {"attention": jnp.einsum("bpts,bt->bps", mean_vote(p), last.astype(p.dtype))}

    def absorb(self, slots, statistic, row, count):
        seen = expand(count > 0, slots["attention"])
        return {"attention": jnp.where(seen, to_bits(statistic["attention"]), slots["attention"])}

    def score(self, slots, row, positions):
        return from_bits(slots["attention"])
