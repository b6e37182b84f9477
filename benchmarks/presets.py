"""`auto` against every other preset at the same bytes, on the same excerpts and questions; smollm2, float32.

    python benchmarks/presets.py [--text FILE_OR_NAME] [--caches NAMES] [--budgets ...] [--contexts 0] [--out FILE]

Each cell: KL(full || this) and, in brackets, the 95 % interval of how much more that is than `auto`'s, in pairs over the
excerpts of all seeds. The last line: the other cache with the least KL, and whether its interval lies above 0; and those whose
interval does not, which excerpts that differ much make wide. Intervals are of one comparison each, not corrected for their
number. Neither the calibration nor the tiers of `auto` were chosen on the text.
"""

import pathlib

import numpy as np
from common import record
from quality import command, evaluated, options

from infer.evaluate import metrics
from infer.evaluate.report import answered
from jaxkv.presets import PRESETS

SAME = ("full", "streaming", "scissorhands-reference", "kivi")  # no rival; others stand for the last three
OTHERS = [name for name in PRESETS if name != "auto" and name not in SAME]


def main():
    """Evaluates all, compares in pairs, writes the table."""
    parser = options(
        __doc__, text="wikitext2-test", budgets="50%,25%,12.5%,6.25%", title="Presets beside `auto`, SmolLM2-135M",
        excerpts=2, contexts=0,
    )  # fmt: skip
    parser.add_argument("--caches", default=",".join(OTHERS))
    given = parser.parse_args()
    if given.seeds * given.excerpts < 2:
        parser.error("intervals need at least two excerpts: raise --excerpts or --seeds")
    others, budgets = given.caches.split(","), given.budgets.split(",")
    rows = {(row["cache"], row["budget"]): row for row in evaluated(given, ["full", "auto", *others], budgets)}
    table = [{"cache": "full"} | dict.fromkeys(budgets, "; ".join(["0", *right(rows["full", "100%"])]))]
    for cache in ["auto", *others]:
        line = {"cache": cache}
        for budget in budgets:
            line[budget] = cell(rows[cache, budget], rows["auto", budget])
        table.append(line)
    table.append({"cache": "`auto` against the others"} | {budget: verdict(rows, others, budget) for budget in budgets})
    name = pathlib.Path(given.text).name
    record(
        given.out,
        title=f"{given.title}: {given.context} tokens, KL of the next {given.next} [how much more than auto, 95 %], right"
        f" answers; {given.seeds} seeds of {given.excerpts} excerpts and {8 * given.contexts} questions, {name}",
        command=command(parser, given, "presets.py"),
        rows=table,
    )


def more(row, auto):
    """Mean and interval of KL over `auto`'s, excerpt by excerpt."""
    return metrics.mean_interval(np.subtract(row["kl_by_excerpt"], auto["kl_by_excerpt"]))


def cell(row, auto):
    """KL, the interval of the difference, right answers."""
    _, (low, high) = more(row, auto)
    text = f"{row['kl_mean']:.4f}" + ("" if row is auto else f" [{low:+.4f}, {high:+.4f}]")
    return "; ".join([text, *right(row)])


def right(row):
    """How many answers of how many, where questions were asked."""
    return ["{} of {}".format(*answered(row))] if row["answers"] else []


def verdict(rows, others, budget):
    """Whether the best of the others loses more, outside its interval; and which others are not apart, however far they are."""
    auto = rows["auto", budget]
    close = [name for name in others if more(rows[name, budget], auto)[1][0] <= 0]
    best = min(others, key=lambda name: rows[name, budget]["kl_mean"])
    text = f"{'not apart from' if best in close else 'ahead of'} the best, {best}"
    wide = [name for name in close if name != best]
    return f"{text}; not apart from {', '.join(wide)}" if wide else text


if __name__ == "__main__":
    main()
