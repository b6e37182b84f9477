"""Which share of the full cache's answers `auto` keeps, and other ways to spend the same bytes; smollm2, float32.

    python benchmarks/retrieval.py [--text FILE_OR_NAME] [--budgets 25%,12.5%] [--contexts 9] [--out FILE]

The context is compressed before the question is known. Ways differ from `auto` in one thing: fewer bits for more tokens,
the same bits for all, or KVzip's score in place of `auto`'s. "lost" were right with the full cache, "won" wrong.
"""

import dataclasses
import pathlib

from common import record
from quality import command, evaluated, options

from infer.evaluate.metrics import wilson
from infer.evaluate.report import answered
from jaxkv.policies import KVzip
from jaxkv.presets import PRESETS, tiers

AUTO = PRESETS["auto"]
SMALL = 0.2  # share below which the second list stands


def way(name, first, second):
    """`auto` over other tiers: `first` for a share from SMALL on, `second` below."""
    return dataclasses.replace(AUTO, name=name, calibrated=((SMALL, first), (0.0, second)))


WAYS = (
    way(
        "fewer bits", tiers((0.5, "int8", "rotated4"), (0.5, "rotated4")),
        tiers((0.4, "rotated4", "rotated3"), (0.6, "rotated3", "rotated2")),
    ),
    way("one kind of bits", tiers((1.0, "rotated4")), tiers((1.0, "rotated4", "rotated3"))),
    dataclasses.replace(AUTO, name="KVzip's score", policy=KVzip()),
)  # fmt: skip


def main():
    """Asks all, counts, writes the table."""
    parser = options(
        __doc__, text="wikitext2-valid", budgets="25%,12.5%", title="Retrieval with `auto`", excerpts=0, contexts=9
    )
    given = parser.parse_args()
    full, *rows = evaluated(given, ["full", "auto", *WAYS], given.budgets.split(","))
    record(
        given.out,
        title=f"{given.title}: {given.context} tokens of {pathlib.Path(given.text).name}, {given.seeds} seeds of"
        f" {8 * given.contexts} questions, of which the full cache answers {answered(full)[0]}",
        command=command(parser, given, "retrieval.py"),
        rows=[line(row, full) for row in rows],
    )


def line(row, full):
    """Answers of one cache beside the full cache's; the interval (95 %, Wilson) is of its own share of right answers."""
    pairs = [pair for task in row["answers"] for pair in zip(row["answers"][task], full["answers"][task], strict=True)]
    right, asked = answered(row)
    low, high = wilson(right, asked)
    return {
        "cache": row["cache"],
        "budget": row["budget"],
        "right": f"{right} of {asked} [{low:.0%}-{high:.0%}]",
        "lost": sum(whole and not mine for mine, whole in pairs),
        "won": sum(mine and not whole for mine, whole in pairs),
        "share of the full cache's": f"{right / answered(full)[0]:.1%}",
    }


if __name__ == "__main__":
    main()
