"""Column sums as a TPU kernel: the blocks of flash attention turned, so that log-sum-exps lie along lanes."""

import functools

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention import tpu
from pallas_kernels.flash_attention.operands import Operands, Rule
from pallas_kernels.flash_attention.tpu import (
    LANES,
    block_of,
    of_logit,
    prepared,
    run,
    shown,
    spans,
    turn,
    vector,
    within,
)
from pallas_kernels.flash_attention.tpu_backward import BY_KEY, turned_scratch


def why_not(x: Operands, lse, *, rule: Rule) -> str | None:
    """What the kernel cannot take."""
    return tpu.why_not(x, rule=rule)


def column_sums(x: Operands, lse, *, rule: Rule, interpret: bool = False):
    """[B, K, S] float32: what the queries of each group give each key together."""
    length, keys = x.q.shape[3], x.k.shape[2]
    x, plan, seen = prepared(x, rule, interpret)
    prefetch, read = spans(seen.swapaxes(2, 3))
    batch, heads, padded, _ = x.k.shape
    rows = plan.rows * plan.block_q
    lse = jnp.pad(lse, [(0, 0)] * 3 + [(0, rows - length)]).reshape(batch, heads * plan.group, 1, rows)

    def at(b, h, j, g, i, *refs):
        return b, h * plan.group + g, within(i, *read(refs, b, h, j)), j

    along = lambda b, n, i, j: (b, n, 0, i)
    inputs = tpu.inputs_of(x, plan, at) | {"lse": (lse, block_of((1, 1, 1, plan.block_q), along, at))}
    del inputs["v"]
    block = block_of((1, 1, 1, plan.block_k), lambda b, n, i, j: (b, plan.head(n), 0, j), at)
    outputs = {"sums": ((batch, heads, 1, padded), jnp.float32, block)}
    scratch = {"sum": ((plan.block_k, LANES), jnp.float32)} | turned_scratch(inputs, BY_KEY, plan.block_k)
    kernel = functools.partial(_kernel, read=read, length=length)
    grid = (batch, heads, plan.columns, plan.group, plan.rows)
    (sums,) = run(kernel, plan, grid, prefetch, inputs, outputs, scratch, ordered=2, seen=seen, products=of_logit(x))
    return sums.reshape(batch, heads, padded)[:, :, :keys]


def _kernel(first, last, ref, *, plan, read, length):
    b, h, j, g, i = (pl.program_id(axis) for axis in range(5))
    low, high = read((first, last), b, h, j)

    @pl.when((g == 0) & (i == 0))
    def _():
        ref["sum"][...] = jnp.zeros_like(ref["sum"])
        turn(ref)

    @pl.when((low <= i) & (i <= high))
    def _():
        s, seen = tpu.logits(ref, plan, i, j, turned=True)
        p = shown(jnp.exp(s - vector(ref, "lse")), seen, 0.0)
        if plan.rows * plan.block_q > length:
            row = tpu.indices(p.shape, 1)
            p = jnp.where(row < length - i * plan.block_q, p, 0.0)
        ref["sum"][...] += p.sum(1, keepdims=True)

    @pl.when((g == plan.group - 1) & (i == plan.rows - 1))
    def _():
        ref["sums"][0, 0] = ref["sum"][...].T[:1]
