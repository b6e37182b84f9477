"""Gradients of flash attention as TPU kernels, each of which makes the probabilities anew from the log-sum-exp:

one with a row of queries at a time for theirs, one with a row of keys for theirs (blocks turned, so that what belongs to
queries lies along lanes), and, for a relative table, one along the diagonals, whose blocks all use the same rows of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.flash_attention.operands import Operands, Rule, reversed_table, uncap
from pallas_kernels.flash_attention.tpu import (
    NN,
    NT,
    TN,
    block_of,
    columns_of,
    dot,
    indices,
    inputs_of,
    logits,
    of_logit,
    prepared,
    run,
    shown,
    slanted,
    spans,
    table_rows,
    turn,
    vector,
    within,
)


def backward(x: Operands, lse, delta, d_out, *, rule: Rule, interpret: bool = False):
    """Gradients of the operands that have one, as Operands. delta [B, K, G, T]: sum of d_out * out less that of lse."""
    given = x
    x, plan, seen = prepared(x, rule, interpret)
    batch, heads, padded, _ = x.q.shape
    more = padded - given.q.shape[3]
    rows = lambda y: jnp.pad(y, [(0, 0)] * 3 + [(0, more)] + [(0, 0)] * (y.ndim - 4)) if more else y
    vectors = {"lse": rows(lse).reshape(batch, heads, 1, padded), "delta": rows(delta).reshape(batch, heads, 1, padded)}
    d_out = rows(d_out).reshape(batch, heads, padded, -1)

    def inputs(at):
        by_row = lambda b, n, i, j: (b, n, i, 0)
        along = lambda b, n, i, j: (b, n, 0, i)
        more = {name: (y, block_of((1, 1, 1, plan.block_q), along, at)) for name, y in vectors.items()}
        more["d_out"] = d_out, block_of((1, 1, plan.block_q, d_out.shape[3]), by_row, at)
        return inputs_of(x, plan, at) | more

    dq, *d_relative = _of_queries(x, plan, seen, inputs)
    dk, dv = _of_keys(x, plan, seen, inputs)
    cut = lambda y: y.reshape(*given.q.shape[:3], padded, -1)[:, :, :, : given.q.shape[3]]
    keys = given.k.shape[2]
    table = None
    if d_relative:
        d_windows = _of_table(x, plan, seen, inputs)
        table = _table_gradient(d_windows, given, plan, padded, x.k.shape[2])
    return Operands(
        q=cut(dq),
        k=dk[:, :, :keys],
        v=dv[:, :, :keys],
        relative_q=cut(d_relative[0]) if d_relative else None,
        relative_table=table,
    )


def gradient(ref: dict, plan, i, j, *, turned: bool = False):
    """Block (i, j) of probabilities and of the gradients of logits before the cap, float32."""
    s, seen = logits(ref, plan, i, j, turned=turned)
    p = shown(jnp.exp(s - vector(ref, "lse")), seen, 0.0)
    v, d_out = ref["v"][0, 0], ref["d_out"][0, 0]
    dp = dot(v, d_out, NT) if turned else dot(d_out, v, NT)
    return p, uncap(p * (dp - vector(ref, "delta")), s, plan.rule.softcap)


def turned_around(x):
    """[t, n] -> its rows in reverse, a product with ones on the other diagonal: a TPU has no instruction for it."""
    size = x.shape[0]
    ones = indices((size, size), 0) + indices((size, size), 1) == size - 1
    return dot(ones.astype(x.dtype), x, NN)


def spread(ds, plan, dtype):
    """[t, t] -> [t, 2t]: row r from column t - 1 - r on, rows in reverse; rotations only grow from row to row."""
    x = turned_around(ds.astype(dtype))
    return slanted(jnp.concatenate([x, jnp.zeros_like(x)], 1), 0, plan.interpret)


BY_QUERY = ("query_positions", "query_segments", "lse", "delta")
BY_KEY = ("key_positions", "key_segments")


def turned_scratch(inputs: dict, names, size: int) -> dict:
    names = [name for name in names if name in inputs]
    return columns_of(names, size, [inputs[name][0].dtype for name in names])


def _of_queries(x, plan, seen, inputs):
    """[dq] or [dq, d_relative_q], [B, N, T, H]."""
    prefetch, read = spans(seen)
    batch, heads, padded, _ = x.q.shape

    def at(b, n, i, j, *refs):
        return b, n, i, within(j, *read(refs, b, plan.head(n), i))

    given, outputs, scratch = inputs(at), {}, {}
    for name in ("q", "relative_q"):
        if name in given:
            size = given[name][0].shape[3]
            block = block_of((1, 1, plan.block_q, size), lambda b, n, i, j: (b, n, i, 0), at)
            outputs["d_" + name] = (batch, heads, padded, size), given[name][0].dtype, block
            scratch["sum_" + name] = (plan.block_q, size), jnp.float32
    scratch |= turned_scratch(given, BY_QUERY, plan.block_q)
    kernel = functools.partial(_queries_kernel, read=read)
    grid = (batch, heads, plan.rows, plan.columns)
    products = 2 * of_logit(x) + x.v.shape[3]
    return run(kernel, plan, grid, prefetch, given, outputs, scratch, ordered=1, seen=seen, products=products)


def _queries_kernel(first, last, ref, *, plan, read):
    b, n, i, j = (pl.program_id(axis) for axis in range(4))
    low, high = read((first, last), b, plan.head(n), i)
    names = [name for name in ("q", "relative_q") if name in ref]

    @pl.when(j == 0)
    def _():
        for name in names:
            ref["sum_" + name][...] = jnp.zeros_like(ref["sum_" + name])
        turn(ref)

    @pl.when((low <= j) & (j <= high))
    def _():
        _, ds = gradient(ref, plan, i, j)
        ref["sum_q"][...] += dot(ds, ref["k"][0, 0], NN)
        if "relative_q" in ref:
            table = table_rows(ref)
            ref["sum_relative_q"][...] += dot(spread(ds, plan, table.dtype), table, NN)

    @pl.when(j == plan.columns - 1)
    def _():
        for name in names:
            total = ref["sum_" + name][...]
            total = turned_around(total) if name == "relative_q" else total
            ref["d_" + name][0, 0] = total.astype(ref["d_" + name].dtype)


def _of_keys(x, plan, seen, inputs):
    """dk, dv [B, K, S, H], summed over the group."""
    prefetch, read = spans(seen.swapaxes(2, 3))
    batch, heads, padded, _ = x.k.shape

    def at(b, h, j, g, i, *refs):
        return b, h * plan.group + g, within(i, *read(refs, b, h, j)), j

    given, outputs, scratch = inputs(at), {}, {}
    for name in ("k", "v"):
        size = given[name][0].shape[3]
        block = block_of((1, 1, plan.block_k, size), lambda b, n, i, j: (b, plan.head(n), j, 0), at)
        outputs["d_" + name] = (batch, heads, padded, size), given[name][0].dtype, block
        scratch["sum_" + name] = (plan.block_k, size), jnp.float32
    scratch |= turned_scratch(given, BY_KEY, plan.block_k)
    kernel = functools.partial(_keys_kernel, read=read)
    grid = (batch, heads, plan.columns, plan.group, plan.rows)
    products = of_logit(x) + x.q.shape[3] + 2 * x.v.shape[3]
    return run(kernel, plan, grid, prefetch, given, outputs, scratch, ordered=2, seen=seen, products=products)


def _keys_kernel(first, last, ref, *, plan, read):
    b, h, j, g, i = (pl.program_id(axis) for axis in range(5))
    low, high = read((first, last), b, h, j)

    @pl.when((g == 0) & (i == 0))
    def _():
        for name in ("sum_k", "sum_v"):
            ref[name][...] = jnp.zeros_like(ref[name])
        turn(ref)

    @pl.when((low <= i) & (i <= high))
    def _():
        p, ds = gradient(ref, plan, i, j, turned=True)
        ref["sum_v"][...] += dot(p, ref["d_out"][0, 0], NN)
        ref["sum_k"][...] += dot(ds, ref["q"][0, 0], NN)

    @pl.when((g == plan.group - 1) & (i == plan.rows - 1))
    def _():
        for name in ("k", "v"):
            ref["d_" + name][0, 0] = ref["sum_" + name][...].astype(ref["d_" + name].dtype)


def _of_table(x, plan, seen, inputs):
    """[N, diagonals, 2 blocks, H] float32: what each diagonal of blocks says of the rows of the table that it uses."""
    prefetch, read = spans(seen)
    batch, heads, _, size = x.relative_q.shape
    diagonals = plan.rows + plan.columns - 1

    def at(n, diagonal, b, i, *refs):
        return b, n, i, i + diagonal - (plan.rows - 1)

    def inside(n, diagonal, b, i, *refs):
        b, n, i, j = at(n, diagonal, b, i)
        return b, n, i, jnp.clip(j, 0, plan.columns - 1)

    given = inputs(inside)
    given |= {name: y for name, y in inputs(at).items() if name in ("near", "far")}
    block = pl.BlockSpec((1, 1, 2 * plan.block_q, size), lambda n, diagonal, *_: (n, diagonal, 0, 0))
    outputs = {"d_table": ((heads, diagonals, 2 * plan.block_q, size), jnp.float32, block)}
    scratch = turned_scratch(given, BY_QUERY, plan.block_q)
    kernel = functools.partial(_table_kernel, read=read)
    grid = (heads, diagonals, batch, plan.rows)
    products = of_logit(x) + x.v.shape[3] + 2 * size
    (out,) = run(kernel, plan, grid, prefetch, given, outputs, scratch, ordered=2, seen=seen, products=products)
    return out


def _table_kernel(first, last, ref, *, plan, read):
    n, diagonal, b, i = (pl.program_id(axis) for axis in range(4))
    j = i + diagonal - (plan.rows - 1)
    low, high = read((first, last), b, plan.head(n), i)

    @pl.when((b == 0) & (i == 0))
    def _():
        ref["d_table"][...] = jnp.zeros_like(ref["d_table"])

    @pl.when((low <= j) & (j <= high))
    def _():
        turn(ref)
        _, ds = gradient(ref, plan, i, j)
        q = ref["relative_q"][0, 0]
        ref["d_table"][0, 0] += dot(spread(ds, plan, q.dtype), turned_around(q).astype(q.dtype), TN)


def _table_gradient(d_windows, given: Operands, plan, queries: int, keys: int):
    """Adds up the windows, of which each block of the table is in two, and heads that share a table."""
    heads, diagonals, _, size = d_windows.shape
    block = plan.block_q
    halves = d_windows.reshape(heads, diagonals, 2, block, size)
    pads = lambda half, side: jnp.pad(halves[:, :, half], [(0, 0), side, (0, 0), (0, 0)])
    whole = (pads(0, (0, 1)) + pads(1, (1, 0))).reshape(*given.q.shape[1:3], -1, size)
    read = lambda table: jnp.broadcast_to(reversed_table(table, queries, keys, plan.offset), whole.shape)
    _, pull = jax.vjp(read, given.relative_table.astype(jnp.float32))
    return pull(whole)[0].astype(given.relative_table.dtype)
