"""Measures which kv heads need their cache, and writes it where `auto` finds it (`jaxkv/calibration`).

    python benchmarks/calibrate.py [--model smollm2] [--text FILE_OR_NAME ...] [--context 1900] --out FILE

Reads contexts with facts hidden in them under the full cache, with a replay, and takes the scores of the `replay` policy.
A head's marginal score at rank r is the score of its r-th best token; heads keep the ranks whose marginal score is above
a threshold that is the same for all, and the threshold gives the level.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

import infer
from infer.evaluate import make_samples
from infer.evaluate.tasks import encode_context
from infer.prefill import new_state, read
from infer.replay import repeat_prompt
from infer.texts import load_text
from jaxkv.calibration import digest_of
from jaxkv.policies import Full, make_policy

LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
RANKS = 1000


def main():
    """Scores, marginal scores, thresholds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", nargs="+", default=["pride-and-prejudice", "wikitext2-valid"])
    parser.add_argument("--policy", default="replay")
    parser.add_argument("--context", type=int, default=1900)
    parser.add_argument("--seed", type=int, default=1000, help="apart from the seeds of evaluations")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    given = parser.parse_args()
    lm, curves = infer.load(given.model), []
    for number, name in enumerate(given.text):
        samples = make_samples(
            ["magic"], filler=load_text(name), tokenizer=lm.tokenizer, context_tokens=given.context, samples=16,
            seed=given.seed + number,
        )  # fmt: skip
        for one in samples:
            curves.append(marginal(lm, encode_context(lm.tokenizer, one.context), make_policy(given.policy).watcher))
            print(f"{name}: a context read", flush=True)
    score = np.mean(curves, axis=0)  # [L, K, ranks], falling
    shares = np.stack([share_at(score, level) for level in LEVELS], axis=-1)
    out = {
        "model": digest_of(lm.config),
        "policy": given.policy,
        "command": f"python benchmarks/calibrate.py --model {given.model} --policy {given.policy} --text "
        + f"{' '.join(pathlib.Path(name).name for name in given.text)} --out jaxkv/calibration/{given.out.name}",
        "levels": list(LEVELS),
        "heads": np.round(shares, 4).tolist(),
    }
    given.out.write_text(json.dumps(out, indent=1) + "\n")


def marginal(lm, ids, policy) -> np.ndarray:
    """[L, K, RANKS]: the score at each rank; each context counts alike."""
    planned = lm.plan(Full(observe=(policy,)), None, lengths=[len(ids)])
    state = new_state(lm.config, planned, [len(ids)])
    _, state = read(lm.params, [ids], state, config=lm.config, repeat=repeat_prompt(lm.tokenizer))
    rows = []
    for layer in jax.device_get(state.layers):
        score = np.asarray(policy.score(layer.tiers[0].slots[policy.name], layer.row[policy.name], None))[0]
        best = -np.sort(-score[:, : len(ids)], axis=-1)
        rows.append([np.interp(np.linspace(0, 1, RANKS), np.linspace(0, 1, len(ids)), head) for head in best])
    rows = np.asarray(rows)
    return rows / np.median(rows)


def share_at(score: np.ndarray, level: float) -> np.ndarray:
    """Share of ranks that each head keeps when all together keep `level`, [L, K]."""
    if level == 1:
        return np.ones(score.shape[:2])
    threshold = np.quantile(score, 1 - level)
    return np.maximum((score >= threshold).mean(axis=-1), 1 / RANKS)


if __name__ == "__main__":
    main()
