"""Which kv head gets how much of a budget: block rows of one size, shared out by what the model's heads deserve.

    deserved        head 0: 9 %   head 1: 52 %   head 2: 20 %     of the tokens, when all heads together keep 27 %
    of 4 * heads    0.33 / 0.27 * 4 rows and so on, the nearest counts whose sum is one of a few sizes
    block rows      2             8              3

Who owns how many rows depends on the share of a full cache alone; how many tokens a row holds follows from the bytes.
"""

import dataclasses
import math

import numpy as np

from jaxkv.calibration import Calibration
from jaxkv.presets import split

ROWS = 4  # that a head owns on average: fewer would not tell heads apart, more would make small rows
GROWTH = 1.3  # between the numbers of rows that a layer may have: each is a program to compile
STEP = 4  # tokens of a row


def share_rows(layout, calibration: Calibration, share: float, lengths, rooms, upto: int):
    """Places for rows of a batch that may take `rooms` bytes each and keep `upto` tokens per head on average.

    Args: layout: `budgets._Layout`, what a slot of each tier costs. share: of the bytes of a full bfloat16 cache.
    Returns: slots [B, tiers] of each block row, and per layer the head of each block row, alike for all rows; or None where
      a block row would not hold the tokens that the policy protects.
    """
    config, (fixed, per_slot) = layout.config, layout.costs
    heads, longest = config.num_kv_heads, max(lengths)
    parts = [p if p.slots is None else dataclasses.replace(p, slots=max(1, p.slots // ROWS)) for p in layout.parts]
    per_token = sum(part.share * cost for part, cost in zip(parts, per_slot, strict=True)) / heads
    level = min(1.0, upto / longest, share * config.head_dim * 4 / per_token)
    owners = []
    for deserved, kind in zip(calibration.shares(level), config.layers, strict=True):
        seen = 1.0 if kind.window is None else min(1.0, kind.window / longest)
        owners.append(divided(np.minimum(deserved, seen) * ROWS / level, math.ceil(seen * ROWS / level), heads))
    rows = sum(map(len, owners))
    average = rows / len(owners) / heads

    def size(tokens):
        one = (np.asarray(split(parts, tokens)) * per_slot).sum() / heads + 4 * len(parts) + 2  # limits and owner
        return fixed + math.ceil(rows * one)

    slots = []
    for length, room in zip(lengths, rooms, strict=True):
        tokens = int(min(upto, length) / average) // STEP * STEP
        while tokens and size(tokens) > room:
            tokens -= STEP
        if tokens < min(layout.policy.least_budget, length):
            return None
        slots.append(split(parts, tokens))
    return np.asarray(slots), tuple(owners)


def divided(wanted: np.ndarray, most: int, heads: int) -> tuple[int, ...]:
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
