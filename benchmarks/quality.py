"""What each cache loses against the full cache, over several seeds; smollm2, float32, what `jaxkv evaluate` measures.

    python benchmarks/quality.py [--text FILE_OR_NAME] [--seeds 3] [--caches ...] [--budgets ...] [--out FILE]

A seed draws other excerpts, other contexts, other facts and another random eviction. Shown: the mean over seeds, and
the lowest and highest seed. Random eviction and recency at the same bytes are the controls.
"""

import argparse
import dataclasses
import functools
import pathlib

from common import questions, record

import infer
from infer.evaluate import PROTOCOLS, evaluate
from infer.evaluate.report import write_json
from infer.texts import load_text
from jaxkv.presets import make_preset

CACHES = "full,auto,kvzip,h2o,scissorhands,recency,random"


def main():
    """Runs the seeds and writes the table."""
    parser = options(__doc__, text="wikitext2-test", budgets="50%,25%,12.5%,6.25%", title="Quality on SmolLM2-135M")
    parser.add_argument("--caches", default=CACHES)
    parser.add_argument("--once", action="store_true", help="`auto` reads the context once, without a replay")
    given = parser.parse_args()
    caches = given.caches.split(",")
    if given.once:
        once = dataclasses.replace(make_preset("auto", replay=False), name="auto, without replay")
        caches = [once if name == "auto" else name for name in caches]
    measure(parser, given, caches, script="quality.py")


def options(doc, *, text, budgets, title, seeds=3, excerpts=4, contexts=9) -> argparse.ArgumentParser:
    """What every such measurement can be told, with these defaults."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=text, help="a name of infer.texts, or a UTF-8 file")
    parser.add_argument("--budgets", default=budgets)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--context", type=int, default=1900)
    parser.add_argument("--next", type=int, default=128)
    parser.add_argument("--scored", type=int)
    parser.add_argument("--excerpts", type=int, default=excerpts)
    parser.add_argument("--contexts", type=int, default=contexts, help="of each seed, 8 questions each")
    parser.add_argument("--protocol", default=PROTOCOLS[0], choices=PROTOCOLS)
    parser.add_argument("--title", default=title)
    parser.add_argument("--out", type=pathlib.Path)
    return parser


def measure(parser, given, caches, *, script):
    """Evaluates caches (names or presets) as the options say, and writes the table."""
    rows = evaluated(given, caches, given.budgets.split(","))
    record(
        given.out,
        title=f"{given.title}: {given.context} tokens, {given.excerpts} excerpts of {pathlib.Path(given.text).name},"
        f" {8 * given.contexts} questions; mean over {given.seeds} seeds [lowest, highest]",
        command=command(parser, given, script),
        rows=[line(row) for row in rows],
    )


def command(parser, given, script) -> str:
    """The command line of these options, defaults left out, texts without their folders."""
    shown = {k: v for k, v in vars(given).items() if k not in ("out", "title") and v != parser.get_default(k)}
    shown = {k: pathlib.Path(v).name if k in ("text", "validation") else v for k, v in shown.items()}
    said = [f"--{k}" if v is True else f"--{k} '{v}'" for k, v in shown.items()]
    return " ".join([f"python benchmarks/{script}", *said])


def evaluated(given, caches, budgets) -> list[dict]:
    """Rows of `infer.evaluate.evaluate`, as the options say; those so far lie beside `--out`, should the run end early."""
    keep = functools.partial(write_json, path=given.out.with_suffix(".rows")) if given.out else None
    return evaluate(
        infer.load("smollm2"), text=load_text(given.text), seeds=range(given.seeds), caches=caches, budgets=budgets,
        tasks=["passkey", "magic"] if given.contexts else [], context=given.context, next_tokens=given.next,
        scored=given.scored, excerpts=given.excerpts, samples=questions(given.contexts),
        protocol=given.protocol, keep=keep,
        progress=lambda done, total, what: print(f"{done}/{total} {what}", flush=True),
    )  # fmt: skip


def line(row):
    """One line of the table."""
    out = {"cache": row["cache"], "budget": row["budget"], "MB": round(row["bytes"] / 1e6, 2)}
    for name, key, form in (("KL", "kl_mean", ".4f"), ("top-1", "top1", ".1%"), ("perplexity", "perplexity", ".2f")):
        if row[key] is not None:
            low, high = row["spread"][key]
            out[name] = f"{row[key]:{form}} [{low:{form}}, {high:{form}}]"
    for task, share in row["accuracy"].items():
        low, high = row["accuracy_interval"][task]
        out[task] = f"{share:.0%} of {row['asked'][task]} [{low:.0%}-{high:.0%}]"
    return out


if __name__ == "__main__":
    main()
