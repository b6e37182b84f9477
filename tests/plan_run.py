"""Run in a process of its own, which loads the TPU compiler: compiles tiny models for a topology and prints what was found.

python plan_run.py TOPOLOGY CASE...     a JSON object, one entry per case
"""

import dataclasses
import json
import sys

import jax

jax.config.update("jax_platforms", "cpu")

from sharded_run import CONFIG, GEMMA  # noqa: E402

from infer import plan, programs  # noqa: E402
from jaxkv.sharding import param_specs, state_specs  # noqa: E402

LONG = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1] * 3)
CASES = {  # name -> (config, cache, budget, exact)
    "recency": (LONG, "recency", "50%", False),
    "recency exact": (LONG, "recency", "50%", True),
    "full": (CONFIG, "full", None, False),
    "gemma mikv": (GEMMA, "mikv", "40%", False),
    "replay": (dataclasses.replace(CONFIG, layers=CONFIG.layers[:1]), "kvzip", "50%", False),
}


def one(topology, config, cache, budget, exact):
    case = plan.check(config, topology=topology, context=96, batch=4, cache=cache, budget=budget, dtype="bfloat16")
    report = plan.make_plan(case, exact=exact)
    short = case.job if exact else case.job.keep([0])
    (cost,) = programs.compile_all([programs.decode_traced(short, case.mesh)])
    params, state = programs.params_of(short), programs.state_of(short)
    counted = sum(
        programs.device_bytes(tree, specs, case.mesh)
        for tree, specs in ((params, param_specs(params)), (state, state_specs(state)))
    )
    return {
        "report": dataclasses.asdict(report),
        "arguments": cost.arguments,
        "weights and state": counted,
        "table": plan.describe(report),
    }


if __name__ == "__main__":
    topology, *names = sys.argv[1:]
    json.dump({name: one(topology, *CASES[name]) for name in names}, sys.stdout)
