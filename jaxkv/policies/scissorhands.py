"""Scissorhands: keep what has lately been pivotal, by counting below-average attention.

Source: Scissorhands: Exploiting the Persistence of Importance Hypothesis (arXiv 2305.17118), section 4, algorithm 2.
Unimportance of a token: in how many of the last `window` query steps its attention was below the uniform share. Those
with the highest counts leave; the newest `recent` tokens are protected.
Departs:
  - The threshold is 1 / (number of keys the row sees), not 1 / t: after eviction a row is normalised over what is left,
    and 1 / t would call almost everything important. They are equal until the first eviction.
  - One entry leaves per step instead of half the budget at once; steadier, and the cache is always full.
  - Query heads that share a kv head vote by their mean probability (the paper predates grouped heads).
  - A prompt longer than the budget is attended to in full and compressed once.
  - `Scissorhands` keeps counts in four buckets of window / 4 steps, 4 bytes a slot; when one fills, the oldest goes as a
    whole, so it looks back between 3/4 of `window` and all of it. `ScissorhandsReference` keeps the exact history,
    window / 8 bytes a slot. Directly after a prompt of at least `window` tokens both are equal.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy, expand, mean_vote

BUCKETS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scissorhands(Policy):
    """Counts of low attention in the last `window` query steps, in four 8-bit buckets of one uint32 per slot.

    Byte 0 is the bucket being filled. row["filled"]: steps in it, 1..window/4 (0 before the first).
    """

    name: ClassVar[str] = "scissorhands"
    summary: ClassVar[str] = "fewest below-average attentions in the last 400 steps"
    source: ClassVar[str] = "Scissorhands, arXiv 2305.17118"
    needs_attention: ClassVar[bool] = True

    window: int = 400

    def __post_init__(self):
        super().__post_init__()
        if self.window < BUCKETS or self.window % BUCKETS or self.window // BUCKETS > 255:
            raise ValueError(
                f"window must be a multiple of {BUCKETS} from {BUCKETS} to {255 * BUCKETS}, got {self.window}"
            )

    @property
    def _bucket(self) -> int:
        return self.window // BUCKETS

    def enter(self, new, row):
        return {"low": jnp.zeros(new.keys.shape[:3], jnp.uint32)}

    def enter_row(self, shape, layer):
        return {"filled": jnp.zeros(shape[:1], jnp.int32)}

    def _filled_after(self, filled, count):
        """Steps in the bucket being filled after `count` more; a run of `window` or more starts buckets anew at its end."""
        ran = (filled + count - 1) % self._bucket + 1
        return jnp.where(count >= self.window, self._bucket, jnp.where(filled + count > 0, ran, 0))

    def row_statistic(self, p, visible, rows, row):
        room = self._bucket - self._filled_after(row["filled"], rows.count)
        age = (rows.remaining + room[:, None]) // self._bucket  # in buckets, [B, t]
        bucket = (age[..., None] == jnp.arange(BUCKETS, dtype=jnp.int32)[None, None]).astype(
            jnp.float32
        )  # [B, t, buckets]
        low = low_attention(p, visible, rows).astype(jnp.float32)
        counts = jnp.einsum("bpts,btk->kbps", low, bucket).astype(jnp.uint32)  # a dot: exact, below 2**24
        return {"low": sum(counts[k] << (8 * k) for k in range(BUCKETS))}

    def absorb(self, slots, statistic, row, count):
        room = self._bucket - self._filled_after(row["filled"], count)
        age = jnp.where(row["filled"] > 0, (count + room) // self._bucket, BUCKETS)
        shift = expand(8 * jnp.minimum(age, BUCKETS - 1).astype(jnp.uint32), slots["low"])
        old = jnp.where(expand(age, slots["low"]) < BUCKETS, slots["low"] << shift, jnp.uint32(0))
        return {"low": old + statistic["low"]}

    def advance(self, row, new):
        return {"filled": self._filled_after(row["filled"], new.count)}

    def score(self, slots, row, positions):
        packed = slots["low"]
        byte = lambda i: ((packed >> (8 * i)) & jnp.uint32(255)).astype(jnp.float32)
        return -sum(byte(i) for i in range(BUCKETS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScissorhandsReference(Policy):
    """The exact history: one bit per slot and step of the last `window`, a ring in packed bytes."""

    name: ClassVar[str] = "scissorhands-reference"
    summary: ClassVar[str] = "the same with the exact 400-step history, for comparison"
    source: ClassVar[str] = "Scissorhands, arXiv 2305.17118"
    needs_attention: ClassVar[bool] = True

    window: int = 400

    def __post_init__(self):
        super().__post_init__()
        if self.window < 8 or self.window % 8:
            raise ValueError(f"window must be a positive multiple of 8, got {self.window}")

    def enter(self, new, row):
        return {"low": jnp.zeros((*new.keys.shape[:3], self.window // 8), jnp.uint8)}

    def enter_row(self, shape, layer):
        return {"step": jnp.zeros(shape[:1], jnp.int32)}

    def _bits(self, steps):
        """One bit of the ring for each step [...]: uint8 [..., window / 8]."""
        place = steps % self.window
        byte = jnp.arange(self.window // 8, dtype=jnp.int32)
        bit = jnp.left_shift(jnp.uint8(1), (place % 8).astype(jnp.uint8))
        return jnp.where(place[..., None] // 8 == byte.reshape((1,) * place.ndim + (-1,)), bit[..., None], jnp.uint8(0))

    def row_statistic(self, p, visible, rows, row):
        step = (row["step"] + rows.count)[:, None] - 1 - rows.remaining
        recent = rows.remaining < self.window
        bits = jnp.where(recent[..., None], self._bits(step), jnp.uint8(0))
        low = low_attention(p, visible, rows).astype(jnp.int32)
        packed = jnp.einsum("bpts,btw->bpsw", low, bits.astype(jnp.int32))  # distinct steps are distinct bits
        return {"low": packed.astype(jnp.uint8)}

    def absorb(self, slots, statistic, row, count):
        back = jnp.arange(self.window, dtype=jnp.int32)[None, :]
        fresh = jnp.where(
            (back < count[:, None])[..., None],
            self._bits(row["step"][:, None] + count[:, None] - 1 - back),
            jnp.uint8(0),
        ).sum(axis=1, dtype=jnp.uint8)
        return {"low": (slots["low"] & ~expand_to_slots(fresh)) | statistic["low"]}

    def advance(self, row, new):
        return {"step": row["step"] + new.count}

    def score(self, slots, row, positions):
        return -jnp.bitwise_count(slots["low"]).sum(axis=-1, dtype=jnp.int32).astype(jnp.float32)


def expand_to_slots(x):
    """[B, W] -> [B, 1, 1, W]."""
    return x[:, None, None, :]


def low_attention(p, visible, rows):
    """Where a valid row gave a key it sees less than the uniform share of the keys it sees: p [B, P, G, t, S] -> bool
    [B, P, t, S]."""
    threshold = 1.0 / jnp.maximum(rows.live, 1).astype(jnp.float32)
    return (mean_vote(p) < threshold[..., None]) & visible & rows.valid[:, None, :, None]
