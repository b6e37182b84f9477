"""Keep everything. Optionally observe for other policies, so that one prefill serves a comparison of many."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Every token stays, up to the capacity, which callers check before they insert.

    observe: policies whose per-slot state is kept beside the entries; `jaxkv.cache.compress` then makes, from this one
      state, the state that each of them would have reached. balance: find MiKV's balance
      as well. Sliding-window layers drop what left their window.
    """

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = "keeps every token"
    source: ClassVar[str] = "the baseline"

    recent: int = 1
    observe: tuple[Policy, ...] = ()
    balance: bool = False

    @property
    def needs_attention(self) -> bool:  # type: ignore[override]
        return any(policy.needs_attention for policy in self.observe)

    @property
    def needs_replay(self) -> bool:  # type: ignore[override]
        return any(policy.needs_replay for policy in self.observe)

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        return any(policy.needs_queries for policy in self.observe)

    def enter(self, new, row):
        return {policy.name: policy.enter(new, row[policy.name]) for policy in self.observe}

    def enter_row(self, shape, layer):
        return {policy.name: policy.enter_row(shape, layer) for policy in self.observe}

    def row_statistic(self, p, visible, rows, row):
        return {q.name: q.row_statistic(p, visible, rows, row[q.name]) for q in self.observe if q.needs_attention}

    def merge(self, one, other):
        return {q.name: q.merge(one[q.name], other[q.name]) for q in self.observe if q.needs_attention}

    def smooth(self, statistic, there):
        return {q.name: q.smooth(statistic[q.name], there) for q in self.observe if q.needs_attention}

    def absorb(self, slots, statistic, row, count):
        statistic = dict(statistic)  # () when no observed policy needs attention
        return {q.name: q.absorb(slots[q.name], statistic.get(q.name, ()), row[q.name], count) for q in self.observe}

    def advance(self, row, new):
        return {policy.name: policy.advance(row[policy.name], new) for policy in self.observe}

    def score(self, slots, row, positions):
        return positions.astype(jnp.float32)
