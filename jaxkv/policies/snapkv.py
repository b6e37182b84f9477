"""Keep what the end of the prompt looks at, and its neighbours.

Source: SnapKV: LLM Knows What You are Looking for Before Generation (arXiv 2404.14469), section 4. Score of a prompt token:
the attention of the prompt's last `window` queries, summed, then averaged over `pool` neighbouring tokens; the window
itself stays.
Departs: the paper evicts once, after the prompt. Here decoding goes on: each later query adds its attention, and what was
there fades by 1 - 1 / window per query, so that the score stays one of the last `window` queries or so. Neighbours are
averaged among the tokens of one prompt. Query heads vote per kv head by their mean, as in later code; the released code
pools with a mean or a maximum, the mean is used here.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy, expand, mean_vote


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    """Attention of the last `window` queries, averaged over `pool` neighbours (odd)."""

    name: ClassVar[str] = "snapkv"
    summary: ClassVar[str] = "what the last 32 queries attend to, with neighbours"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"
    needs_attention: ClassVar[bool] = True

    recent: int = 32
    window: int = 32
    pool: int = 5

    def __post_init__(self):
        super().__post_init__()
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"pool must be odd and at least 1, got {self.pool}")

    def enter(self, new, row):
        return {"attention": jnp.zeros(new.keys.shape[:3], jnp.float32)}

    def row_statistic(self, p, visible, rows, row):
        near = rows.valid & (rows.remaining < self.window)
        return {"attention": jnp.einsum("bpts,bt->bps", mean_vote(p), near.astype(p.dtype))}

    def smooth(self, statistic, there):
        """The mean over `pool` neighbours; those that are not `there` do not count."""
        x = statistic["attention"]
        there = jnp.broadcast_to(there[:, None], x.shape)
        order = jnp.argsort(~there, axis=-1, stable=True)
        packed = jnp.where(jnp.take_along_axis(there, order, axis=-1), jnp.take_along_axis(x, order, axis=-1), 0.0)
        side = self.pool // 2
        wide = jnp.pad(packed, ((0, 0), (0, 0), (side, side)))
        mean = sum(wide[..., i : i + x.shape[-1]] for i in range(self.pool)) * (1.0 / self.pool)
        return {"attention": jnp.where(there, jnp.take_along_axis(mean, jnp.argsort(order, axis=-1), axis=-1), 0.0)}

    def absorb(self, slots, statistic, row, count):
        fade = (1.0 - 1.0 / self.window) ** expand(count.astype(jnp.float32), slots["attention"])
        return {"attention": slots["attention"] * fade + statistic["attention"]}

    def score(self, slots, row, positions):
        return slots["attention"]
