"""`jaxkv evaluate`: caches beside the full cache, on the same text."""

import contextlib
import importlib.util
import pathlib

from infer.commands.options import load, running_options
from infer.console import Bar, Refused, note, read_text, whole, writable


def add_options(sub):
    """Declares the options."""
    from infer.texts import TEXTS

    running_options(sub)
    sub.add_argument("--text", required=True, help=f"a UTF-8 file or one of {', '.join(TEXTS)}; also fills the tasks")
    sub.add_argument("--caches", default="full,scissorhands,h2o,recency,random", help="caches, with commas")
    sub.add_argument("--budgets", default="100%,50%,25%,12.5%", help="budgets, with commas")
    sub.add_argument("--tasks", default="passkey,magic", help="generated tasks, with commas; '' = none")
    sub.add_argument("--context", type=whole(1), default=1900, help="tokens read before the comparison")
    sub.add_argument("--next", type=whole(1), default=128, help="teacher-forced tokens compared after the context")
    sub.add_argument("--excerpts", type=whole(0), default=4, help="excerpts of the text")
    sub.add_argument("--samples", type=whole(0), default=20, help="questions per task")
    sub.add_argument("--samples-file", help="ask these samples instead of generated ones")
    sub.add_argument("--protocol", default="compress then ask", choices=("compress then ask", "ask with context"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--seeds", type=whole(1), default=1, help="this many seeds, from --seed on")
    sub.add_argument("--scored", type=whole(1), help="of the next tokens, the last so many count; default: all")
    sub.add_argument("--json", help="write the rows to this file, as they are measured")
    sub.add_argument(
        "--plot", help="write the picture of quality against bytes to this PNG file; default: beside --json; '' = none"
    )


def run(arguments) -> int:
    """Runs the subcommand. Returns: the exit code."""
    from infer.evaluate import TASKS, Interrupted, evaluate, load_samples, report
    from infer.texts import load_text
    from jaxkv.cache.budgets import parse_budget
    from jaxkv.presets import make_preset

    if arguments.plot is None and arguments.json:
        if importlib.util.find_spec("matplotlib"):
            arguments.plot = str(pathlib.Path(arguments.json).with_suffix(".png"))
        else:
            note(arguments, "no picture will be drawn: matplotlib is not installed (pip install jaxkv[demo])")
    rows_file, picture = writable(arguments.json), writable(arguments.plot or None)
    if picture and importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib, which is not installed: pip install jaxkv[demo]")
    split = lambda text: [part.strip() for part in text.split(",") if part.strip()]
    caches, budgets, tasks = map(split, (arguments.caches, arguments.budgets, arguments.tasks))
    for names, check in ((caches, make_preset), (budgets, parse_budget)):
        for name in names:
            check(name)
    if unknown := [name for name in tasks if name not in TASKS]:
        raise Refused(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    if arguments.samples_file is not None:
        load_samples(arguments.samples_file)
    text = read_text("-") if arguments.text == "-" else load_text(arguments.text, offline=arguments.offline)
    lm = load(arguments)

    def keep(rows):
        if rows_file:
            with contextlib.suppress(OSError):  # the last writing tells
                report.write_json(rows, rows_file)

    try:
        with Bar(arguments, "evaluating", "step") as bar:
            rows = evaluate(
                lm, text=text, caches=caches, budgets=budgets, tasks=tasks, context=arguments.context,
                next_tokens=arguments.next, excerpts=arguments.excerpts, samples=arguments.samples,
                samples_file=arguments.samples_file, seeds=range(arguments.seed, arguments.seed + arguments.seeds),
                scored=arguments.scored, protocol=arguments.protocol, progress=bar, keep=keep,
            )  # fmt: skip
    except Interrupted as stopped:
        rows = stopped.rows
    print(report.table(rows))
    if rows_file:
        report.write_json(rows, rows_file)
    if arguments.signals:
        note(arguments, f"interrupted; {len(rows)} rows were measured, in part or whole, and no picture was drawn")
        return 128 + arguments.signals[-1]
    if picture:
        report.write_picture(rows, picture)
        note(arguments, f"picture: {picture}")
    return 0
