"""The same evaluation under several seeds: other excerpts, contexts, facts and random draws each time."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from infer.evaluate import metrics
from infer.evaluate.run import Interrupted, Progress, accuracies, evaluate
from jaxkv.policies import Random
from jaxkv.presets import make_preset

MEANS = ("kl_mean", "kl_p99", "top1", "perplexity", "bits_per_byte", "tokens_per_second")
SPREAD = ("kl_mean", "top1", "perplexity", "bits_per_byte")


def evaluate_seeds(
    lm: Any, *, seeds: Sequence[int], caches: Sequence, progress: Progress | None = None, **options
) -> list[dict[str, Any]]:
    """Rows of `evaluate`, each over all seeds; `random` draws anew under each.

    Args: seeds: at least one. The other arguments are those of `evaluate`, `seed` left out.
    Returns: as `evaluate`: means over seeds, accuracies of all questions together; and seeds, spread (metric -> [lowest,
      highest seed]), by_seed (metric -> a value per seed).
    Raises: as `evaluate`; Interrupted has the rows over the seeds that were finished, or what the first one measured.
    """
    if not seeds:
        raise ValueError("no seeds were given; give at least one, such as [0]")
    runs = []
    for number, seed in enumerate(seeds):
        own = [make_preset(cache) for cache in caches]
        own = [make_preset(p, seed=seed) if isinstance(p.policy, Random) else p for p in own]

        def step(done, total, what, number=number, seed=seed):
            if progress is not None:
                progress(number * total + done, len(seeds) * total, f"seed {seed}: {what}")

        try:
            runs.append(evaluate(lm, caches=own, seed=seed, progress=step, **options))
        except KeyboardInterrupt as stopped:
            if not runs and not isinstance(stopped, Interrupted):
                raise
            whole = zip(*runs, strict=True) if runs else ((row,) for row in stopped.rows)
            raise Interrupted(
                [_together(same, list(seeds[: number or 1])) | {"partial": True} for same in whole]
            ) from None
    return [_together(same, list(seeds)) for same in zip(*runs, strict=True)]


def _together(same: Sequence[dict[str, Any]], seeds: list[int]) -> dict[str, Any]:
    """One row of the same cache and budget under every seed."""
    row = dict(same[0])
    values = {name: [one[name] for one in same] for name in MEANS if same[0][name] is not None}
    row.update({name: float(np.mean(found)) for name, found in values.items()})
    if len(same) > 1 and "kl_mean" in values:
        _, interval = metrics.mean_interval(np.asarray(values["kl_mean"]))
        row["kl_interval"] = None if interval is None else list(interval)
    row["seeds"] = seeds
    row["kl_by_excerpt"] = [value for one in same for value in one["kl_by_excerpt"]]
    row["by_seed"] = {name: values[name] for name in SPREAD if name in values}
    row["spread"] = {name: [min(found), max(found)] for name, found in row["by_seed"].items()}
    answers = {task: [one for run in same for one in run["answers"][task]] for task in row["answers"]}
    return row | accuracies(answers)
