"""Arms of a comparison, trained side by side: as many steps, the same texts, a block of steps of each arm in turn, so that
what slows the machine slows all of them."""

import dataclasses
import itertools
import math
import statistics
import time

import jax
import numpy as np

from train.config import Recipe
from train.data import first_batches, make_batches
from train.describe import compile_step
from train.loop import compiled
from train.prepare import Prepared, first_memory, first_state, prepare
from train.sharding import put_batch

TABLES = "/distances/table", "positions/embedding"  # ends of the paths of parameters that stand for places


@dataclasses.dataclass(frozen=True)
class Trained:
    """One arm under one seed. seconds: of its steps, block by block. training: share of right guesses over all steps."""

    bits: float
    accuracy: float
    training: float
    seconds: tuple[float, ...]


class Arm:
    """A recipe with its programs, compiled once for all seeds."""

    def __init__(self, recipe: Recipe):
        self.recipe, self._prepared = recipe, prepare(recipe)
        self._step, self._evaluate = compile_step(self._prepared), compiled(self._prepared)[1]

    def facts(self) -> dict:
        """Parameters, and memory of the compiled step."""
        sizes = {path: x.size for path, x in self._prepared.shapes.trained.items()}
        memory = self._step.memory_analysis()
        return {
            "parameters": sum(sizes.values()),
            "of these in tables of places": sum(n for path, n in sizes.items() if path.endswith(TABLES)),
            "state MB": round(memory.argument_size_in_bytes / 1e6, 2),
            "a step's MB beyond": round(memory.temp_size_in_bytes / 1e6, 2),
        }

    def run(self, seed: int, block: int):
        """Takes `block` steps at each turn and says how long they took; at last gives a `Trained`."""
        prepared = prepare(dataclasses.replace(self.recipe, seed=seed))
        recipe, state = prepared.recipe, first_state(prepared)
        batches = iter(make_batches(prepared.windows, batch=recipe.batch, seed=None if recipe.memory else seed))
        seconds, right, seen = [], 0.0, 0.0
        for first in range(0, recipe.steps, block):
            given = [put_batch(x, prepared.mesh) for x in itertools.islice(batches, min(block, recipe.steps - first))]
            metrics, began = [], time.perf_counter()
            for batch in given:
                state, found = self._step(state, batch)
                metrics.append(found)
            jax.block_until_ready(state)
            seconds.append((time.perf_counter() - began) / len(given))
            right += sum(float(m["accuracy"] * m["tokens"]) for m in metrics)
            seen += sum(float(m["tokens"]) for m in metrics)
            yield
        bits, accuracy = self._validate(prepared, state)
        yield Trained(bits, accuracy, right / seen, tuple(seconds))

    def _validate(self, prepared: Prepared, state) -> tuple[float, float]:
        """Bits per byte and share of right guesses, over all of the validation text but what fills no whole batch row."""
        memory, sums = first_memory(prepared), []
        for batch in first_batches(prepared.validation, batch=self.recipe.batch, count=len(prepared.validation)):
            found, memory = self._evaluate(state, put_batch(batch, prepared.mesh), memory)
            sums.append([float(found.cross_entropy), float(found.right), float(found.weight)])
        loss, right, weight = np.sum(sums, axis=0)
        return loss / weight / math.log(2) / prepared.bytes_per_token, right / weight


def compare(recipes: dict[str, Recipe], *, seeds: int, block: int, write) -> None:
    """Trains every arm under every seed. The first arm is what the others are compared with, seed by seed.

    Args: write: called with the rows of the seeds so far, after each.
    """
    arms = {name: Arm(recipe) for name, recipe in recipes.items()}
    found = {name: [] for name in arms}
    for seed in range(seeds):
        runs = {name: arm.run(seed, block) for name, arm in arms.items()}
        for turns in zip(*runs.values(), strict=True):  # a block of steps each, and at last what came of them
            results = dict(zip(runs, turns, strict=True))
        for name, result in results.items():
            found[name].append(result)
        write([row(name, arms[name], found[name], found[next(iter(arms))]) for name in arms])


def row(name: str, arm: Arm, mine: list[Trained], first: list[Trained]) -> dict:
    """A line of the table: mean over seeds [lowest, highest]."""
    pairs = list(zip(mine, first, strict=True))
    ratios = [
        a / b for x, y in pairs for a, b in zip(x.seconds[1:] or x.seconds, y.seconds[1:] or y.seconds, strict=True)
    ]
    return {
        "arm": name,
        "seeds": len(mine),
        "bits per byte": shown([x.bits for x in mine], ".4f"),
        "less than the first arm's": shown([y.bits - x.bits for x, y in pairs], ".4f"),
        "accuracy": shown([x.accuracy for x in mine], ".4f"),
        "accuracy over all training steps": shown([x.training for x in mine], ".4f"),
        "step time over the first arm's": round(statistics.median(ratios), 3),
        "ms of a step": round(1000 * statistics.median([s for x in mine for s in x.seconds]), 1),
    } | arm.facts()


def shown(values, form: str) -> str:
    """ "mean [lowest, highest]"."""
    return f"{statistics.mean(values):{form}} [{min(values):{form}}, {max(values):{form}}]"
