"""Which tiers lose least at each share of the bytes, under the policy and the head budgets of `auto`; smollm2, float32.

    python benchmarks/auto.py [--text FILE_OR_NAME] [--shares 25%,12.5%] [--tiers NAMES] [--contexts 3] [--out FILE]

Fewer bits keep more tokens in the same bytes. The winner at each share goes into `jaxkv.presets.AUTO` by hand; the text is
one that no published figure is measured on.
"""

import argparse
import pathlib

from common import questions, record
from quality import line

import infer
from infer.evaluate import evaluate_seeds
from infer.texts import load_text
from jaxkv.presets import PRESETS, Preset, tiers

CANDIDATES = {
    "8/8": tiers((1.0, "int8")),
    "8/4": tiers((1.0, "int8", "rotated4")),
    "half 8/4, half 4/4": tiers((0.5, "int8", "rotated4"), (0.5, "rotated4")),
    "4/4": tiers((1.0, "rotated4")),
    "30% 4/4, 70% 4/3": tiers((0.3, "rotated4"), (0.7, "rotated4", "rotated3")),
    "40% 4/3, 60% 3/2": tiers((0.4, "rotated4", "rotated3"), (0.6, "rotated3", "rotated2")),
}


def main():
    """Evaluates the candidates and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="wikitext2-valid")
    parser.add_argument("--shares", default="25%,12.5%,6.25%")
    parser.add_argument("--tiers", default=";".join(CANDIDATES), help="bits of keys/values, with semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--excerpts", type=int, default=3)
    parser.add_argument("--contexts", type=int, default=3, help="of each seed, 8 questions each")
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    caches = [
        Preset(name=name, summary="", policy=PRESETS["auto"].policy, parts=parts, calibrated=((0.0, parts),))
        for name, parts in CANDIDATES.items()
        if name in given.tiers.split(";")
    ]
    rows = evaluate_seeds(
        infer.load("smollm2"), text=load_text(given.text), seeds=range(given.seeds), caches=caches,
        budgets=given.shares.split(","), tasks=["passkey", "magic"] if given.contexts else [], context=1900,
        next_tokens=128, excerpts=given.excerpts, samples=questions(given.contexts),
        progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True),
    )  # fmt: skip
    shown = {k: v for k, v in vars(given).items() if k != "out" and v != parser.get_default(k)}
    shown = {k: pathlib.Path(v).name if k == "text" else v for k, v in shown.items()}
    record(
        given.out,
        title=f"Tiers for `auto`: 1,900 tokens, {given.excerpts} excerpts of {pathlib.Path(given.text).name},"
        f" {8 * given.contexts} questions, {given.seeds} seed(s) [lowest, highest]",
        command=" ".join(["python benchmarks/auto.py", *(f"--{k} '{v}'" for k, v in shown.items())]),
        rows=[line(row) for row in rows],
    )


if __name__ == "__main__":
    main()
