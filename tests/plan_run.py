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

LARGE = dataclasses.replace(
    CONFIG, layers=CONFIG.layers[:1], hidden_size=1024, intermediate_size=2048, vocab_size=1024, num_heads=8,
    num_kv_heads=4, head_dim=128, max_positions=2048,
)  # fmt: skip
LONG = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1] * 3)
CASES = {  # name -> (config, cache, budget, exact)
    "recency": (LONG, "recency", "50%", False),
    "recency exact": (LONG, "recency", "50%", True),
    "full": (CONFIG, "full", None, False),
    "gemma tiers": (GEMMA, "rotated-4", "60%", False),
    "two bits": (LONG, "rotated-2", "50%", False),
    "groups": (LONG, "kivi-2", "50%", False),
    "replay": (dataclasses.replace(CONFIG, layers=CONFIG.layers[:1]), "kvzip", "50%", False),
}


def planned(topology, config, cache, budget, exact):
    case = plan.check(config, topology=topology, context=96, batch=4, cache=cache, budget=budget, dtype="bfloat16")
    report = plan.make_plan(case, exact=exact)
    return {"report": dataclasses.asdict(report), "table": plan.describe(report)}


def arguments(topology):
    """Of a decode program whose arrays are so large that the padding of small ones does not count."""
    case = plan.check(
        LARGE, topology=topology, context=2048, batch=4, cache="rotated-4", budget="50%", dtype="bfloat16"
    )
    (cost,) = programs.compile_all([programs.decode_traced(case.job, case.mesh)])
    params, state = programs.params_of(case.job), programs.state_of(case.job)
    parts = ((params, param_specs(params)), (state, state_specs(state)))
    return {
        "compiled": cost.arguments,
        "parts": [programs.device_bytes(tree, specs, case.mesh) for tree, specs in parts],
    }


if __name__ == "__main__":
    topology, *names = sys.argv[1:]
    found = {name: planned(topology, *CASES[name]) for name in names}
    json.dump({"cases": found, "arguments": arguments(topology)}, sys.stdout)
