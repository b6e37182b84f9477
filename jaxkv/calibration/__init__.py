"""How much of the cache each kv head of a model deserves, measured once per model by `benchmarks/calibrate.py`.

Some heads look up single tokens of a long context, others only ever look nearby. Which is which hardly depends on the text,
so the budget can follow it. A file here says, for shares of a whole cache, which share of its tokens each head keeps:

    {"model": digest of the configuration, "policy": ..., "levels": [0.1, ..., 1.0],
     "heads": [[[share per level] per kv head] per layer]}
"""

import dataclasses
import functools
import hashlib
import json
import pathlib

import numpy as np

from jaxkv.config import DecoderConfig

FOLDER = pathlib.Path(__file__).parent


def digest_of(config: DecoderConfig) -> str:
    """Identifies an architecture: models with equal configurations share a calibration. Fields at their defaults do not
    count, so that a new switch leaves those that do without it as they are; nor does how a program runs (`repr=False`)."""
    fields = [f for f in dataclasses.fields(config) if f.repr]
    told = [(f.name, getattr(config, f.name)) for f in fields if getattr(config, f.name) != f.default]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@functools.cache
def find(config: DecoderConfig) -> "Calibration | None":
    """The calibration of this architecture, if there is one."""
    digest = digest_of(config)
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        if found["model"] == digest:
            return Calibration(np.asarray(found["levels"]), np.asarray(found["heads"]))
    return None


class Calibration:
    """levels [n], ascending to 1; heads [L, K, n]: kept share of each head when all together keep a level."""

    def __init__(self, levels: np.ndarray, heads: np.ndarray):
        self.levels, self.heads = levels, heads

    def shares(self, level: float) -> np.ndarray:
        """Kept share of each head, [L, K]; between the levels by straight lines, below the least one in proportion."""
        if level < self.levels[0]:
            return self.heads[..., 0] * (level / self.levels[0])
        upper = min(int(np.searchsorted(self.levels, level, side="right")), len(self.levels) - 1)
        below, above = self.levels[upper - 1], self.levels[upper]
        way = (level - below) / (above - below)
        return self.heads[..., upper - 1] * (1 - way) + self.heads[..., upper] * way
