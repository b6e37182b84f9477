"""What a policy is: pure functions that decide which entries of a full tier leave.

A policy never sees a tier, a batch layout or a kernel. It is asked four things:

    enter(new, row)                  what it keeps for slots that were just filled
    row_statistic(p, visible, ...)   what a block of query rows says of each slot; blocks are merged, in one pass
    absorb(slots, statistic, ...)    the slots' new state after those rows (prompt or decode step, the same)
    score(slots, row, positions)     higher stays

Protection of the newest tokens and of sinks, and slots that left a layer's window, are handled once, in `jaxkv.cache`.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxkv.types import Array, Newcomers, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies: keeps nothing, looks at nothing.

    recent: the newest tokens that are never evicted. sinks: the first tokens that are never evicted.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs_attention: ClassVar[bool] = False
    needs_replay: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = False  # in `Newcomers`; else they are None there

    recent: int = 10
    sinks: int = 0

    def __post_init__(self):
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1 (the newest token is always kept), got {self.recent}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @property
    def stateful(self) -> bool:
        """Whether slots keep anything."""
        return type(self).enter is not Policy.enter

    @property
    def watcher(self) -> "Policy":
        """This policy without its protection: policies with the same watcher gather the same statistics."""
        return dataclasses.replace(self, recent=1, sinks=0)

    @property
    def least_budget(self) -> int:
        """The smallest number of slots that holds all protected tokens."""
        return self.recent + self.sinks

    def protected_recent(self, limit: Array) -> Array:
        """How many of the newest tokens are protected under `limit` slots, both [B, P] int32."""
        return jnp.full_like(limit, self.recent)

    def enter(self, new: Newcomers, row: Any) -> Any:
        """State of slots that the n tokens of an extend have just filled: a pytree with leaves [B, P, n, ...].

        `row` is the row's state that already knows of them.
        """
        return ()

    def enter_row(self, shape: tuple[int, int, int], layer: int | Array) -> Any:
        """State of a row that has seen nothing: a pytree with leaves [B] or [B, P, ...]; shape is (B, P, H)."""
        return ()

    def row_statistic(self, p: Array, visible: Array, rows: Rows, row: Any) -> Any:
        """What query rows say of each slot: p [B, P, G, t, S] float32 -> pytree with leaves [B, P, S, ...], >= 0.

        p: the probabilities that each of the G query heads gave, 0 where `visible` [B, P, t, S] is False; `mean_vote`
        averages them. `row` is the row's state from before this extend; of it only leaves [B] fit p, whose second axis is
        that of kv heads for the extend's own tokens, and of block rows for tiers, where heads own several.
        """
        return ()

    def merge(self, one: Any, other: Any) -> Any:
        """Statistics of two blocks of query rows -> of both; zeros are neutral."""
        return jax.tree.map(jnp.add, one, other)

    def smooth(self, statistic: Any, there: Array) -> Any:
        """The merged statistic of an extend's own tokens, in their order, before they absorb it. there [B, n] bool."""
        return statistic

    def absorb(self, slots: Any, statistic: Any, row: Any, count: Array) -> Any:
        """Slots after `count` [B] more query rows, whose summed statistic is given. `row` is from before them."""
        return slots

    def advance(self, row: Any, new: Newcomers) -> Any:
        """The row's state after the valid ones of `new`."""
        return row

    def score(self, slots: Any, row: Any, positions: Array) -> Array:
        """Score of each slot, [B, P, S] float32; the highest stay, ties go to the newer."""
        raise NotImplementedError


def mean_vote(p: Array) -> Array:
    """[B, P, G, t, S] -> [B, P, t, S], the mean over query heads."""
    return sum(p[:, :, g] for g in range(p.shape[2])) * (1.0 / p.shape[2])  # XLA:CPU reduces a middle axis slowly


def expand(x: Array, like: Array) -> Array:
    """[B] -> [B, 1, 1, ...] of the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
