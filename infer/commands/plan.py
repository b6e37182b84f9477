"""`jaxkv plan`: its options, and what it prints."""

import dataclasses
import json
import sys

from infer.console import whole


def add_options(sub):
    """Declares the options."""
    from infer.chips import EXAMPLES
    from jaxkv.presets import PRESETS

    sub.set_defaults(dtype="bfloat16")
    sub.add_argument("--topology", required=True, help=f"chips to plan for, such as {', '.join(EXAMPLES.split())}")
    sub.add_argument("--context", type=whole(1), required=True, help="tokens of a row, prompt and answer together")
    sub.add_argument("--batch", type=whole(1), default=1, help="rows, over all devices")
    sub.add_argument("--cache", default="full", help=f"one of: {', '.join(PRESETS)}")
    sub.add_argument("--budget", help="tokens per kv head and layer (512), bytes (64MiB) or a share (20%%)")
    sub.add_argument(
        "--tensor", type=whole(1), help="devices that share the heads; default: as many as the model takes; rows lie along"
        " the rest",
    )  # fmt: skip
    sub.add_argument("--exact", action="store_true", help="compile all layers, which takes minutes")
    sub.add_argument("--json", action="store_true", help="print a JSON object instead of a table")


def run(arguments) -> int:
    """Plans, and prints. Returns: the exit code, 0 also for what does not fit."""
    import jax

    from infer.chips import parse_topology
    from infer.plan import check, describe, make_plan
    from jaxkv.cache.budgets import parse_budget
    from jaxkv.checkpoints import read_config
    from jaxkv.presets import make_preset

    make_preset(arguments.cache)
    parse_budget(arguments.budget)
    parse_topology(arguments.topology)
    jax.config.update("jax_platforms", "cpu")  # no device is used, not even one that is there
    config = read_config(arguments.model, revision=arguments.revision, token=arguments.token, offline=arguments.offline)
    names = ("topology", "context", "batch", "cache", "budget", "dtype", "tensor")
    case = check(config, **{name: getattr(arguments, name) for name in names})
    if not arguments.quiet:
        print(f"compiling for {arguments.topology}, about a minute on two cores", file=sys.stderr)
    report = make_plan(case, exact=arguments.exact)
    facts = {"model": arguments.model, **dataclasses.asdict(report)}
    print(json.dumps(facts) if arguments.json else f"{arguments.model} on {describe(report)}")
    return 0
