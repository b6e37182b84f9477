"""What each cache loses against the full cache, over several seeds; smollm2, float32, what `jaxkv evaluate` measures.

    python benchmarks/quality.py [--text FILE_OR_NAME] [--seeds 3] [--out FILE]

A seed draws other excerpts, other contexts, other facts and another random eviction. Shown: the mean over seeds, and
the lowest and highest seed. Random eviction and recency at the same budgets are the controls.
"""

import argparse
import pathlib

import numpy as np
from common import record

import infer
from infer.evaluate import evaluate
from infer.texts import load_text
from jaxkv.policies import make_policy

CACHES = ("full", "scissorhands", "h2o", "recency", "random")
BUDGETS = ["50%", "25%", "12.5%"]
TASKS = ["passkey", "magic"]


def main():
    """Runs the seeds and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="pride-and-prejudice", help="a name of infer.texts, or a UTF-8 file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--context", type=int, default=1900)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    lm, text, runs = infer.load("smollm2"), load_text(arguments.text), []
    for seed in range(arguments.seeds):
        runs.append(
            evaluate(
                lm, text=text, caches=[make_policy(c, seed=seed) if c == "random" else c for c in CACHES],
                budgets=BUDGETS, tasks=TASKS, context=arguments.context, next_tokens=128, excerpts=4,
                samples=arguments.samples, seed=seed,
                progress=lambda done, total, what, seed=seed: print(f"seed {seed}: {done}/{total} {what}", flush=True),
            )
        )  # fmt: skip
    name = pathlib.Path(arguments.text).name
    record(
        arguments.out,
        title=f"Quality on SmolLM2-135M: {arguments.context} tokens, {runs[0][0]['protocol']}, mean over"
        f" {arguments.seeds} seeds [lowest, highest]; {arguments.samples} questions a task and seed",
        command=f"python benchmarks/quality.py --text {name} --seeds {arguments.seeds} --context {arguments.context}"
        f" --samples {arguments.samples}",
        rows=[row(same) for same in zip(*runs, strict=True)],
    )


def row(same):
    """One line: the same cache and budget under every seed."""
    first = same[0]
    out = {"cache": first["cache"], "budget": first["budget"], "MB": round(first["bytes"] / 1e6, 1)}
    columns = {"KL": "kl_mean", "KL p99": "kl_p99", "top-1": "top1", "bits/byte": "bits_per_byte"}
    for name, key in columns.items():
        out[name] = spread([one[key] for one in same], "{:.1%}" if name == "top-1" else "{:.3f}")
    for task in TASKS:
        out[task] = spread([one["accuracy"][task] for one in same], "{:.0%}")
    return out


def spread(values, form):
    """Mean [lowest, highest]."""
    mean, low, high = (form.format(v) for v in (np.mean(values), min(values), max(values)))
    return f"{mean} [{low}, {high}]"


if __name__ == "__main__":
    main()
