"""How much of the cache each layer of a model deserves, measured once per model by `benchmarks/calibrate.py`.

Some layers hold heads that look up single tokens of a long context, others only ever look nearby. Which is which hardly
depends on the text (correlation 0.97 between a novel and Wikipedia on SmolLM2-135M), so the budget can follow it. A file
here says, for shares of a whole cache, which share of its tokens each layer keeps:

    {"model": digest of the configuration, "policy": ..., "levels": [0.1, ..., 1.0], "layers": [[share per level] per layer]}
"""

import functools
import hashlib
import json
import pathlib

import numpy as np

from jaxkv.config import DecoderConfig

FOLDER = pathlib.Path(__file__).parent


def digest_of(config: DecoderConfig) -> str:
    """Identifies an architecture: models with equal configurations share a calibration."""
    return hashlib.sha256(repr(config).encode()).hexdigest()[:16]


@functools.cache
def find(config: DecoderConfig) -> "Calibration | None":
    """The calibration of this architecture, if there is one."""
    digest = digest_of(config)
    for path in sorted(FOLDER.glob("*.json")):
        found = json.loads(path.read_text())
        if found["model"] == digest:
            return Calibration(np.asarray(found["levels"]), np.asarray(found["layers"]))
    return None


class Calibration:
    """levels [n], ascending to 1; layers [L, n]: kept share of each layer when all layers together keep a level."""

    def __init__(self, levels: np.ndarray, layers: np.ndarray):
        self.levels, self.layers = levels, layers

    def shares(self, level: float) -> list[float]:
        """Kept share of each layer, between the levels by straight lines; below the least one in proportion."""
        if level < self.levels[0]:
            return (self.layers[:, 0] * level / self.levels[0]).tolist()
        return [float(np.interp(level, self.levels, row)) for row in self.layers]
