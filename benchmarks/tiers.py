"""Decode speed over quantized tiers against the float32 cache, smollm2, batch 1, at so many live tokens.

    python benchmarks/tiers.py [--tokens 8000] [--rounds 3] [--schemes int8,rotated4,auto@25%,recency@25%] [--out FILE]

A scheme holds all tokens in one tier; CACHE@BUDGET is what generation would plan for so many. States are made full without
reading a text (what a slot holds does not change the time); rounds alternate between the caches, and the median counts. Every
step is greedy decoding: the layers, the head, the argmax, the insertion.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
from common import record

import infer
from jaxkv import decoder
from jaxkv.cache import decode, empty_state
from jaxkv.cache.budgets import plan
from jaxkv.policies import Full, Recency
from jaxkv.presets import Preset, make_preset, one_tier

STEPS = 16
SCHEMES = ("float32", "int8", "rotated4", "rotated3", "rotated2")


def main():
    """Rounds over all schemes, and the ratio to float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    lm, programs = infer.load("smollm2"), {}
    for name in given.schemes.split(","):
        cache, _, budget = name.partition("@")
        preset = make_preset(Full()) if name == "float32" else make_preset(cache) if budget else _preset(name)
        planned = plan(lm.config, preset, budget or None, lengths=[given.tokens + 64], dtype="float32")
        state = filled(lm.config, planned, given.tokens)
        started = time.perf_counter()
        loop = jax.jit(functools.partial(steps, config=lm.config), donate_argnames="state")
        token = jnp.zeros((1,), jnp.int32)
        program = loop.lower(lm.params, token, state).compile()
        compiled = time.perf_counter() - started
        programs[name] = [program, program(lm.params, token, state), planned, compiled, []]
        print(f"{name}: compiled in {compiled:.1f} s", flush=True)
    for _ in range(given.rounds):
        for one in programs.values():
            started = time.perf_counter()
            one[1] = jax.block_until_ready(one[0](lm.params, *one[1]))
            one[4].append(STEPS / (time.perf_counter() - started))
    base = statistics.median(programs["float32"][4])
    record(
        given.out,
        title=f"Decoding from quantized tiers on SmolLM2-135M, {given.tokens} live tokens, batch 1, float32 computation",
        command=f"python benchmarks/tiers.py --tokens {given.tokens} --rounds {given.rounds} --schemes {given.schemes}",
        rows=[
            {
                "stored as": name, "MB": round(planned.bytes_per_row / 1e6, 1),
                "tokens/s": round(statistics.median(speeds), 1), "over float32": round(statistics.median(speeds) / base, 2),
                "compile s": round(compiled, 1),
            }
            for name, (_, _, planned, compiled, speeds) in programs.items()
        ],
    )  # fmt: skip


def _preset(scheme) -> Preset:
    return Preset(name=scheme, summary="", policy=Recency(), parts=one_tier(scheme))


def filled(config, planned, tokens):
    """A state whose tiers hold `tokens` tokens of zeros."""
    state = empty_state(config, planned.spec, limits=planned.limits, lengths=[tokens + 64], owners=planned.owners)

    def fill(tier):
        at = jnp.arange(tier.positions.shape[2], dtype=tier.positions.dtype)
        full = jnp.where(at < tokens, at, jnp.asarray(-1, at.dtype))
        return dataclasses.replace(tier, positions=jnp.broadcast_to(full, tier.positions.shape).copy())

    layers = tuple(dataclasses.replace(x, tiers=tuple(map(fill, x.tiers))) for x in state.layers)
    return dataclasses.replace(state, layers=layers, next_position=jnp.full((1,), tokens, jnp.int32))


def steps(params, token, state, *, config):
    """STEPS greedy tokens; the position stays inside the capacity, for every round starts where the last one began."""
    start = state.next_position

    def one(_, carry):
        token, state = carry
        hidden, state = decode(params, token, state, config=config, valid=jnp.ones((1,), bool))
        return decoder.logits(params, hidden, config=config).argmax(axis=-1).astype(jnp.int32), state

    token, state = jax.lax.fori_loop(0, STEPS, one, (token, state))
    return token, dataclasses.replace(state, next_position=start)


if __name__ == "__main__":
    main()
