"""Which kv head gets how much of a budget: block rows of one size, shared out by what the model's heads deserve.

    deserved        head 0: 9 %   head 1: 52 %   head 2: 20 %     of the tokens, when all heads together keep 27 %
    over 27 % * 4   1.3 rows      7.7 rows       3.0 rows         the nearest counts whose sum is one of a few sizes
    block rows      1             8              3

Who owns how many rows depends on the share of a full cache alone; how many tokens a row holds follows from the bytes.
"""

import dataclasses
import math

import jax
import numpy as np

from jaxkv.calibration import Calibration
from jaxkv.presets import split

ROWS = 4  # that a head owns on average: fewer would not tell heads apart, more would make small rows
GROWTH = 1.3  # between the numbers of rows that a layer may have: each is a program to compile
STEP = 4  # tokens of a row
ALMOST = 0.95  # of all tokens: heads that keep so many share evenly


def share_rows(layout, calibration: Calibration, lengths, rooms, uptos):
    """Places for the rows of a batch, which may take `rooms` bytes each and keep `uptos` tokens per head on average.

    Each gets what it would get alone. None where that cannot be, and heads are to share evenly: where a head's block rows
    would not hold the tokens that the policy protects, where rows that differ much would not fit one allocation, in
    layers with a window, and for schemes that store groups of tokens.
    Args: layout: `budgets._Layout`, what a slot of each tier costs.
    Returns: limits [B, tiers] of each block row; slots [tiers]; per layer the head of each block row, [B, P], -1 = none.
    """
    if any(kind.window for kind in layout.config.layers) or any(part.granule > 1 for part in layout.parts):
        return None
    price = _Price(layout)
    rows = [_alone(price, calibration, *one) for one in zip(lengths, rooms, uptos, strict=True)]
    if None in rows:
        return None
    limits = np.asarray([places for places, _ in rows])
    slots = price.slots(limits.max(axis=0))
    owners = [_together([owners[index] for _, owners in rows]) for index in range(layout.config.num_layers)]
    if price.bytes(slots, sum(owner.shape[1] for owner in owners)) > max(rooms):
        return None
    return limits, slots, tuple(owners)


class _Price:
    """Bytes of block rows: slots, limits, owner, and what the policy keeps once per row."""

    def __init__(self, layout):
        heads = layout.config.num_kv_heads
        fixed, per_slot = layout.costs
        shapes = jax.eval_shape(lambda: layout.policy.enter_row((1, 1, layout.config.head_dim), 0))
        kept = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes) if len(x.shape) > 1)
        self.layout, self.fixed, self.per_slot = layout, fixed, per_slot / heads
        self.parts = [
            p if p.slots is None else dataclasses.replace(p, slots=max(1, p.slots // ROWS)) for p in layout.parts
        ]
        self.per_row = 4 * len(self.parts) + 2 + kept
        self.per_token = sum(part.share * cost for part, cost in zip(self.parts, self.per_slot, strict=True))

    def slots(self, places):
        """Allocated: no tier has none; long ones are such as kernels read where they lie."""
        multiple = self.layout.multiple
        return np.where(places > 4 * multiple, -(-places // multiple) * multiple, np.maximum(places, STEP))

    def bytes(self, slots, rows: int) -> float:
        return self.fixed + rows * ((slots * self.per_slot).sum() + self.per_row)


def _alone(price: _Price, calibration: Calibration, length: int, room: float, upto: int):
    """Places [tiers] of each block row, and per layer the head of each, of one row; None if protected tokens do not fit.

    Where a head that deserves little would not hold the protected tokens, every head has more rows at least.
    """
    config = price.layout.config
    heads, whole = config.num_kv_heads, length * config.num_layers * config.head_dim * 4
    level = min(1.0, upto / length, room / (whole * heads) * config.head_dim * 4 / price.per_token)
    wanted = [np.full(heads, float(ROWS))] * config.num_layers
    if level <= ALMOST:
        wanted = [deserved * ROWS / level for deserved in calibration.shares(level)]
    for least in range(1, ROWS + 1):
        owners = [divided(rows, least, math.ceil(ROWS / level)) for rows in wanted]
        rows = sum(map(len, owners))
        tokens = math.ceil(min(upto, length) * config.num_layers * heads / rows / STEP) * STEP
        if upto < length:
            tokens = int(upto * config.num_layers * heads / rows) // STEP * STEP
        while tokens and price.bytes(price.slots(np.asarray(split(price.parts, tokens))), rows) > room:
            tokens -= STEP
        fewest = min(owner.count(head) for owner in owners for head in range(heads))
        if tokens * fewest >= min(price.layout.policy.least_budget, length):
            return split(price.parts, tokens), owners
    return None


def divided(wanted: np.ndarray, least: int, most: int) -> tuple[int, ...]:
    """wanted [K] rows -> the head of each row: `least` to `most` each, by largest remainders."""
    heads = len(wanted)
    wanted = np.clip(wanted, least, most)
    total = min(_near(wanted.sum(), heads), most * heads)
    counts = np.full(heads, least)
    for _ in range(total - least * heads):
        counts[np.argmax(np.where(counts < most, wanted / (counts + 0.5), -1.0))] += 1
    return tuple(np.repeat(np.arange(heads), counts).tolist())


def _near(rows: float, heads: int) -> int:
    """The nearest of the few numbers of rows, geometrically."""
    step = round(math.log(rows / (heads * ROWS), GROWTH))
    return max(heads, round(heads * ROWS * GROWTH**step))


def _together(owners) -> np.ndarray:
    """The owners of one layer for each row of a batch -> [B, P]; -1 where a row has fewer."""
    width = max(map(len, owners))
    return np.asarray([[*owner, *[-1] * (width - len(owner))] for owner in owners], np.int16)
