"""Decode attention on CPU from quantized tiers, over the fastest layout of float32: 8 kv heads of 128 channels, 4 query heads
each, 8,192 live slots, batch 1, without scores.

    python benchmarks/cpu_attention.py [--rounds 7] [--out FILE]

The loop of one call attends to several tiers in turn, more than a processor's cache holds, as the layers of a model are.
Rounds alternate between the contenders, and the median counts.
"""

import argparse
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import record
from gpu_kernels import CHANNELS, GROUP, HEADS, SLOTS, attend, full_tier

SCHEMES = ("f32", "bf16", "int8", "int4", "rotated4", "rotated3", "rotated2")
STEPS = 3
HELD = 2**26  # bytes of all tiers of a scheme, at least


def program(q, tiers):
    """Some steps, each over all tiers."""
    step = lambda q, tier: q + 1e-6 * attend(q, tier, implementation="xla")
    return jax.lax.fori_loop(0, STEPS, lambda _, q: functools.reduce(step, tiers, q), q)


def main():
    """One row for each scheme."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, HEADS, GROUP, CHANNELS)), jnp.float32)
    contenders, taken = {}, {scheme: [] for scheme in SCHEMES}
    for scheme in SCHEMES:
        one = full_tier(scheme, 1)
        size = sum(x.nbytes for x in jax.tree.leaves((one.keys, one.values)))
        tiers = [full_tier(scheme, 1) for _ in range(max(2, -(-HELD // size)))]
        contenders[scheme] = (jax.jit(program), tiers)
        jax.block_until_ready(contenders[scheme][0](q, tiers))
    for _ in range(given.rounds):
        for scheme, (run, tiers) in contenders.items():
            started = time.perf_counter()
            jax.block_until_ready(run(q, tiers))
            taken[scheme].append((time.perf_counter() - started) / STEPS / len(tiers))
    us = {scheme: statistics.median(times) * 1e6 for scheme, times in taken.items()}
    rows = [
        {"stored as": name, "us": round(time), "time over float32": round(time / us["f32"], 2)}
        for name, time in us.items()
    ]
    record(
        given.out, title=f"Decode attention on CPU: 8 kv heads of {CHANNELS}, {GROUP} query heads each, {SLOTS} slots",
        command=f"python benchmarks/cpu_attention.py --rounds {given.rounds}", rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
