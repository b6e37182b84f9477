"""The kernels for Hopper GPUs, measured on one: decode attention against its memory's bandwidth, flash attention against cuDNN.

    python benchmarks/gpu_kernels.py [--out FILE]

Decode attention reads 8,192 live slots of 8 kv heads of 128 channels for 4 query heads each, at a batch where bfloat16 takes
500 us or more, without scores; its share of bandwidth counts the bytes of keys, values, factors and positions, over what a
copy of an array as large moves (read and written). Times are medians of rounds that alternate between the contenders.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
from common import record

from jaxkv.cache.state import empty_tier, packed_keys, packed_values
from jaxkv.policies import Recency
from jaxkv.quantization import get_scheme
from jaxkv.types import TierSpec
from pallas_kernels.decode_attention import Source, decode_attention
from pallas_kernels.flash_attention import flash_attention

HEADS, GROUP, CHANNELS, SLOTS = 8, 4, 128, 8192
SCHEMES = ("bf16", "int8", "int4", "rotated4", "int2")
LENGTHS = (2048, 8192)
CALLS = 20  # of a round, started one after another


def seconds(contenders: dict, rounds: int) -> dict[str, float]:
    """Median time of one call. contenders: name -> (compiled program, arguments)."""
    taken = {name: [] for name in contenders}
    for program, arguments in contenders.values():
        jax.block_until_ready(program(*arguments))
    for _ in range(rounds):
        for name, (program, arguments) in contenders.items():
            started = time.perf_counter()
            for _ in range(CALLS):
                out = program(*arguments)
            jax.block_until_ready(out)
            taken[name].append((time.perf_counter() - started) / CALLS)
    return {name: statistics.median(times) for name, times in taken.items()}


def full_tier(scheme: str, batch: int):
    """A tier whose slots all hold a token; which bits its codes have does not matter."""
    limit = jnp.full((batch,), SLOTS, jnp.int32)
    tier = empty_tier(Recency(), TierSpec(slots=SLOTS, scheme=(scheme, scheme)), limit, (batch, HEADS, CHANNELS))
    positions = jnp.broadcast_to(jnp.arange(SLOTS, dtype=tier.positions.dtype), tier.positions.shape).copy()
    return dataclasses.replace(tier, positions=positions)


def attend(q, tier, *, implementation):
    """One step of decoding from one tier."""
    keys, values = map(get_scheme, tier.scheme)
    turned = keys.into_basis(q).astype(q.dtype)
    source = Source(turned, packed_keys(tier), packed_values(tier), tier.positions >= 0, values.out_of_basis)
    scale = CHANNELS**-0.5
    return decode_attention((source,), scale=scale, softcap=None, scores=False, implementation=implementation)[0]


def decode_rows(batch: int, rounds: int) -> list[dict]:
    """Decode attention by scheme, by the kernel and by XLA."""
    q = jnp.ones((batch, HEADS, GROUP, CHANNELS), jnp.bfloat16)
    copied = jnp.ones((2**29,), jnp.bfloat16)
    contenders, read = {"copy": (jax.jit(lambda x: x + 1), (copied,))}, {}
    for scheme in SCHEMES:
        tier = full_tier(scheme, batch)
        read[scheme] = sum(x.nbytes for x in jax.tree.leaves((tier.keys, tier.values, tier.positions)))
        for name in ("gpu", "xla"):
            contenders[f"{scheme} {name}"] = (jax.jit(functools.partial(attend, implementation=name)), (q, tier))
    times = seconds(contenders, rounds)
    bandwidth = 2 * copied.nbytes / times["copy"]
    return [
        {
            "stored as": scheme, "by": name, "batch": batch, "us": round(times[f"{scheme} {name}"] * 1e6, 1),
            "share of copy bandwidth": round(read[scheme] / times[f"{scheme} {name}"] / bandwidth, 3),
            "speed over bf16": round(times["bf16 gpu"] / times[f"{scheme} {name}"], 2),
            "copy GB/s": round(bandwidth / 1e9),
        }
        for scheme in SCHEMES for name in ("gpu", "xla")
    ]  # fmt: skip


def flash_rows(rounds: int) -> list[dict]:
    """The forward pass of causal attention."""
    rows, scale = [], CHANNELS**-0.5
    jaxs = lambda which: jax.jit(
        functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation=which)
    )
    for length in LENGTHS:
        batch = max(1, 16384 // length)
        q = jnp.ones((batch, HEADS, GROUP, length, CHANNELS), jnp.bfloat16)
        k = v = jnp.ones((batch, HEADS, length, CHANNELS), jnp.bfloat16)
        flat = jnp.ones((batch, length, HEADS * GROUP, CHANNELS), jnp.bfloat16)
        few = jnp.ones((batch, length, HEADS, CHANNELS), jnp.bfloat16)
        contenders = {
            "kernel": (
                jax.jit(functools.partial(flash_attention, causal=True, scale=scale, implementation="gpu")),
                (q, k, v),
            ),
            "cudnn": (jaxs("cudnn"), (flat, few, few)),
        }
        if length <= 2048:  # XLA holds all logits
            contenders["xla"] = (jaxs("xla"), (flat, few, few))
        times = seconds(contenders, rounds)
        work = 2 * batch * HEADS * GROUP * length * length * CHANNELS  # half of the products, being causal
        rows += [
            {
                "flash forward by": name, "tokens": length, "batch": batch, "us": round(taken * 1e6, 1),
                "TFLOP/s": round(work / taken / 1e12, 1), "speed over cudnn": round(times["cudnn"] / taken, 2),
            }
            for name, taken in times.items()
        ]  # fmt: skip
    return rows


def main():
    """Both tables, on the first GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    device = jax.devices()[0]
    if device.platform != "gpu":
        sys.exit(f"benchmarks/gpu_kernels.py measures on a GPU; JAX sees only {device.platform}: install jax[cuda13]")
    record(
        given.out,
        title=f"Kernels for Hopper GPUs: decode attention over {SLOTS} slots, flash attention forward",
        command=f"python benchmarks/gpu_kernels.py --batch {given.batch} --rounds {given.rounds}",
        machine=f"{device.device_kind}, compute capability {device.compute_capability}",
        rows=decode_rows(given.batch, given.rounds) + flash_rows(given.rounds),
    )


if __name__ == "__main__":
    main()
