"""Which kv head gets how much of a budget: block rows of one size, shared out by what the model's heads deserve.

wanted tokens   head 0: 90   head 1: 210   head 2: 60      of a layer, from the calibration, at 360 of 1,000
block rows of 40       2            5             2        nearest counts; the sum is one of a few sizes
"""

import dataclasses
import math

import numpy as np

from jaxkv.calibration import Calibration

ROWS = 4  # that a head owns on average: fewer would not tell heads apart, more would make small rows
GROWTH = 1.3  # between the numbers of rows that a layer may have: each is a program to compile


@dataclasses.dataclass(frozen=True)
class Shared:
    """slots: int [tiers] of each block row. owner: per layer, the head of each row."""

    slots: np.ndarray
    owner: tuple[tuple[int, ...], ...]


def share_rows(layout, calibration: Calibration, upto: int, length: int, room: float) -> Shared | None:
    """The most tokens, at most `upto` of `length` on average, whose rows take at most `room` bytes.

    None where a row would not hold the tokens that the policy protects.
    """
    low, high = 0, upto
    while low < high:
        middle = (low + high + 1) // 2
        fits = _bytes(layout, _shared(layout, calibration, middle, length)) <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    while low and _bytes(layout, _shared(layout, calibration, low, length)) > room:  # rounding is not monotonic
        low -= 1
    found = _shared(layout, calibration, low, length) if low else None
    return found if found and found.slots.sum() >= min(layout.policy.least_budget, length) else None


def _shared(layout, calibration, tokens, length) -> Shared:
    parts = [
        part if part.slots is None else dataclasses.replace(part, slots=max(1, part.slots // ROWS))
        for part in layout.parts
    ]
    slots = layout.slots(np.asarray(layout.split(parts, max(1, tokens // ROWS))))
    size, heads = int(slots.sum()), layout.config.num_kv_heads
    owner = []
    for shares, kind in zip(calibration.shares(tokens / length), layout.config.layers, strict=True):
        seen = length if kind.window is None else min(length, kind.window)
        owner.append(_owner(np.minimum(shares, seen / length) * length / size, math.ceil(seen / size), heads))
    return Shared(slots, tuple(owner))


def _owner(wanted: np.ndarray, most: int, heads: int) -> tuple[int, ...]:
    """wanted [K] rows -> the head of each row: at least one each and at most `most`, by largest remainders."""
    wanted = np.clip(wanted, 1, most)
    total = min(_near(wanted.sum(), heads), most * heads)
    counts = np.ones(heads, int)
    for _ in range(total - heads):
        counts[np.argmax(np.where(counts < most, wanted / (counts + 0.5), -1.0))] += 1
    return tuple(np.repeat(np.arange(heads), counts).tolist())


def _near(rows: float, heads: int) -> int:
    """The nearest of the few numbers of rows, geometrically."""
    step = round(math.log(rows / heads, GROWTH))
    return max(heads, round(heads * GROWTH**step))


def _bytes(layout, shared: Shared) -> int:
    fixed, per_slot = layout.costs
    rows = sum(map(len, shared.owner))
    one = (shared.slots * per_slot).sum() / layout.config.num_kv_heads + 4 * len(shared.slots) + 2  # limits and owner
    return fixed + math.ceil(rows * one)
