"""What a policy is: pure functions that decide which entries of a full tier leave.

A policy never sees a tier, a batch layout or a kernel. It is asked four things:

    enter(shape)                     what it keeps for a slot that was just filled
    row_statistic(p, visible, ...)   what a block of query rows adds to each slot; summed over blocks, one pass
    absorb(slots, statistic, ...)    the slots' new state after those rows (prompt or decode step, the same)
    score(slots, row, positions)     higher stays

Protection of the newest tokens and of sinks, and slots that left a layer's window, are handled once, in `jaxkv.cache`.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from jaxkv.types import Array, Rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Base of all policies: keeps nothing, looks at nothing.

    recent: the newest tokens that are never evicted. sinks: the first tokens that are never evicted.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    needs_attention: ClassVar[bool] = False

    recent: int = 10
    sinks: int = 0

    def __post_init__(self):
        if self.recent < 1:
            raise ValueError(f"recent must be at least 1 (the newest token is always kept), got {self.recent}")
        if self.sinks < 0:
            raise ValueError(f"sinks must not be negative, got {self.sinks}")

    @property
    def least_budget(self) -> int:
        """The smallest number of slots that holds all protected tokens."""
        return self.recent + self.sinks

    def protected_recent(self, limit: Array) -> Array:
        """How many of the newest tokens are protected under `limit` slots, both [B, P] int32."""
        return jnp.full_like(limit, self.recent)

    def enter(self, shape: tuple[int, int, int]) -> Any:
        """State of freshly filled slots: a pytree with leaves [*shape, ...], shape = (B, P, n)."""
        return ()

    def enter_row(self, batch: int, layer: int) -> Any:
        """State of a row that has seen nothing: a pytree with leaves [batch, ...]."""
        return ()

    def row_statistic(self, p: Array, visible: Array, rows: Rows, row: Any) -> Any:
        """What query rows add per slot: p [B, P, t, S] float32 -> pytree with leaves [B, P, S, ...].

        p is 0 where `visible` is False; `row` is the row's state from before this extend.
        """
        return ()

    def absorb(self, slots: Any, statistic: Any, row: Any, count: Array) -> Any:
        """Slots after `count` [B] more query rows, whose summed statistic is given. `row` is from before them."""
        return slots

    def advance(self, row: Any, count: Array) -> Any:
        """The row's state after `count` [B] more query rows."""
        return row

    def score(self, slots: Any, row: Any, positions: Array) -> Array:
        """Score of each slot, [B, P, S] float32; the highest stay, ties go to the newer."""
        raise NotImplementedError


def expand(x: Array, like: Array) -> Array:
    """[B] -> [B, 1, 1, ...] of the rank of `like`."""
    return x.reshape(x.shape + (1,) * (like.ndim - x.ndim))
