"""The rows of an evaluation as a table for people, as JSON for programs, and as a picture.

A row is a dict with at least `cache`, `budget`, `bytes`, `share`, `kl_mean`, `kl_p99`, `top1`, `bits_per_byte`,
`accuracy` (task -> share), `accuracy_interval` (task -> [low, high]), `tokens_per_second` and `protocol`; what was not
measured is None.
"""

import io
import json
import os
from collections.abc import Sequence
from typing import Any

from infer.evaluate import metrics
from infer.files import replace_file
from jaxkv.cache.budgets import format_bytes

Row = dict[str, Any]
KL_FLOOR = 1e-5  # nats; what the logarithmic axis of the picture can still tell from the full cache


def table(rows: Sequence[Row]) -> str:
    """An aligned table, one line per row; accuracies with their 95 % interval. "-" was not measured."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["accuracy"]))
    head = ["cache", "budget", "bytes", "share", "KL mean", "KL p99", "top-1", "bits/byte", *tasks, "tokens/s"]
    lines = [head]
    for row in rows:
        lines.append([
            row["cache"],
            row["budget"],
            format_bytes(row["bytes"]),
            f"{row['share']:.1%}",
            _number(row["kl_mean"], ".4f") + _spread(row),
            _number(row["kl_p99"], ".3f"),
            _number(row["top1"], ".1%"),
            _number(row["bits_per_byte"], ".3f"),
            *(_accuracy(row, task) for task in tasks),
            _number(row["tokens_per_second"], ".1f"),
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = lambda cells: "  ".join(
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    out = [text(head), "  ".join("-" * width for width in widths), *map(text, lines[1:])]
    return "\n".join([*(line.rstrip() for line in out), *_footnotes(rows)])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _spread(row: Row) -> str:
    """The lowest and the highest seed."""
    if len(row.get("seeds", ())) < 2 or row["kl_mean"] is None:
        return ""
    low, high = row["spread"]["kl_mean"]
    return f" [{low:.4f}-{high:.4f}]"


def _accuracy(row: Row, task: str) -> str:
    if row["accuracy"].get(task) is None:
        return "-"
    low, high = row["accuracy_interval"][task]
    return f"{row['accuracy'][task]:.0%} [{100 * low:.0f}-{100 * high:.0f}]"


def _footnotes(rows: Sequence[Row]) -> list[str]:
    notes = [""] if rows else []
    protocols = list(dict.fromkeys(row["protocol"] for row in rows))
    if protocols:
        notes.append(
            f"questions: {', '.join(protocols)}; [95 % Wilson interval]; bytes: allocated for one sequence;"
            " share: of a full bfloat16 cache, float32 takes twice that"
        )
    seeds = {tuple(row["seeds"]) for row in rows if len(row.get("seeds", ())) > 1}
    if seeds:
        notes.append(f"mean over seeds {', '.join(map(str, *seeds))} [lowest-highest]; questions of all seeds together")
    batches = sorted({row["batch"] for row in rows if row.get("batch")})
    if batches:
        notes.append(f"tokens/s: decoding, all {', '.join(map(str, batches))} rows of the batch together; KL in nats")
    if any(row.get("partial") for row in rows):
        notes.append("partial: the run was interrupted; what is missing was not measured")
    notes += [f"{row['cache']} {row['budget']}: {row['note']}" for row in rows if row.get("note")]
    return notes


def write_json(rows: Sequence[Row], path: str | os.PathLike[str]) -> None:
    """Writes the list of rows; the file appears complete or not at all.

    Raises: OSError if the place cannot be written.
    """
    text = json.dumps(list(rows), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, text.encode())


def write_picture(
    rows: Sequence[Row], path: str | os.PathLike[str], *, title: str = "Quality against cache size"
) -> None:
    """Draws KL (logarithmic, left) and answers (right, all tasks together) against bytes, one line per cache, as PNG.

    Bars: 95 % intervals, of the mean over excerpts and of the share of right answers (Wilson).

    Raises: ModuleNotFoundError without matplotlib, with what to install; OSError if the place cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the picture needs matplotlib, which is not installed: pip install jaxkv[demo] (the table works without it)"
        ) from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for number, cache in enumerate(dict.fromkeys(row["cache"] for row in rows)):
        mine = sorted((row for row in rows if row["cache"] == cache), key=lambda row: row["bytes"])
        style = {"marker": "osD^vPX*"[number % 8], "label": cache, "color": f"C{number % 10}"}
        _line(left, mine, _kl, style)
        _line(right, mine, _right, style)
    left.set(yscale="log", ylabel="KL(full || this), nats per token", title="distance from the full cache")
    protocols = ", ".join(dict.fromkeys(row["protocol"] for row in rows))
    right.set(
        ylim=(-0.05, 1.05), ylabel="share of answers right", title=f"answers ({protocols})" if protocols else "answers"
    )
    for axes in (left, right):
        axes.set_xlabel("cache, MiB per sequence")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")
    figure.suptitle(title)
    picture = io.BytesIO()
    canvas.print_png(picture)
    replace_file(path, picture.getvalue())


def _line(axes: Any, rows: Sequence[Row], value: Any, style: dict[str, Any]) -> None:
    """value: row -> (value, low, high) or None."""
    points = [(row["bytes"] / 2**20, *found) for row in rows if (found := value(row)) is not None]
    if points:
        x, y, low, high = zip(*points, strict=True)
        bars = [[a - b for a, b in zip(y, low, strict=True)], [b - a for a, b in zip(y, high, strict=True)]]
        axes.errorbar(x, y, yerr=bars, capsize=2, elinewidth=0.8, **style)


def _kl(row: Row) -> tuple[float, float, float] | None:
    if row["kl_mean"] is None:
        return None
    low, high = row["kl_interval"] or (row["kl_mean"],) * 2
    return tuple(max(kl, KL_FLOOR) for kl in (row["kl_mean"], low, high))


def _right(row: Row) -> tuple[float, float, float] | None:
    right, asked = answered(row)
    return (right / asked, *metrics.wilson(right, asked)) if asked else None


def answered(row: Row) -> tuple[int, int]:
    """Right answers of a row, and all, over its tasks."""
    found = [one for answers in row["answers"].values() for one in answers]
    return sum(found), len(found)
