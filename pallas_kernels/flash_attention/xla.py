"""Flash attention in XLA: blocks of queries under a scan, for each a loop over the blocks of keys that it may see.

Never more than one block of logits is in memory, in neither direction, and blocks without a visible key are not computed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.operands import (
    NEG,
    Operands,
    Rule,
    capped,
    needed,
    pad,
    reversed_table,
    sees,
    span,
    uncap,
)

BLOCK_Q, BLOCK_K = 128, 512


class Blocks(NamedTuple):
    """Padded operands, cut where they are read. first, last [queries' blocks]: the keys' blocks that any row needs."""

    x: Operands
    table: jax.Array | None
    rule: Rule
    offset: int
    keys: int
    size: tuple[int, int]
    first: jax.Array
    last: jax.Array


def blocks_of(x: Operands, rule: Rule) -> Blocks:
    """The operands in blocks."""
    length, keys = x.q.shape[3], x.k.shape[2]
    size = (min(rule.block or BLOCK_Q, length), min(rule.block or BLOCK_K, keys))
    padded = pad(x, *size)
    first, last = span(needed(padded, rule, x.offset, *size).any((0, 1)))
    table = None
    if x.relative_table is not None:
        table = reversed_table(x.relative_table, padded.q.shape[3], padded.k.shape[2], x.offset)
    return Blocks(padded, table, rule, x.offset, keys, size, jnp.asarray(first), jnp.asarray(last))


def rows(y, start, size, axis):
    return None if y is None else jax.lax.dynamic_slice_in_dim(y, start * size, size, axis)


def logits(blocks: Blocks, i, j):
    """Block (i, j): capped logits [B, K, G, t, s] float32 and what is seen, [B|1, K|1, 1, t, s] bool or None."""
    x, (block_q, block_k) = blocks.x, blocks.size
    q, k = rows(x.q, i, block_q, 3), rows(x.k, j, block_k, 2)
    total = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    if blocks.table is not None:
        total += skew(_products(rows(x.relative_q, i, block_q, 3), table_rows(blocks, i, j)), block_k)
    index = lambda start, size: start * size + jnp.arange(size, dtype=jnp.int32)
    column = index(j, block_k)
    distance = ((index(i, block_q) + blocks.offset)[:, None] - column[None, :])[None, None]
    apart = distance
    if x.query_positions is not None:
        apart = rows(x.query_positions, i, block_q, 1)[:, None, :, None]
        apart = apart - rows(x.key_positions, j, block_k, 2)[:, :, None, :]
    mine, theirs = rows(x.query_segments, i, block_q, 1), rows(x.key_segments, j, block_k, 2)
    if theirs is not None:
        mine, theirs = mine[:, None, :, None], theirs[:, :, None, :]
    seen = sees(blocks.rule, distance, apart, mine, theirs)
    if x.k.shape[2] > blocks.keys:
        inside = (column < blocks.keys)[None, None, None]
        seen = inside if seen is None else seen & inside
    return capped(total, blocks.rule.softcap), None if seen is None else seen[:, :, None]


def table_rows(blocks: Blocks, i, j):
    """The rows [K, G, t + s, H] of the reversed table that block (i, j) uses."""
    block_q, block_k = blocks.size
    start = blocks.x.q.shape[3] - (i + 1) * block_q + j * block_k
    cut = jax.lax.dynamic_slice_in_dim(blocks.table, start, block_q + block_k, 2)
    return jnp.broadcast_to(cut, (*blocks.x.q.shape[1:3], *cut.shape[2:]))


def _products(relative_q, table):
    return jnp.einsum("bkgth,kguh->bkgtu", relative_q, table, preferred_element_type=jnp.float32)


def skew(x, width: int):
    """[..., t, t + s] -> [..., t, s]: row r from column t - 1 - r on, by reading it with rows of one less."""
    *outer, t, whole = x.shape
    flat = x.reshape(*outer, t * whole)[..., t - 1 : t * whole - 1]
    return flat.reshape(*outer, t, whole - 1)[..., :width]


def unskew(x):
    """[..., t, s] -> [..., t, t + s]: the transpose of `skew`."""
    *outer, t, width = x.shape
    none = [(0, 0)] * len(outer)
    flat = jnp.pad(x, [*none, (0, 0), (0, t - 1)]).reshape(*outer, t * (t + width - 1))
    return jnp.pad(flat, [*none, (t - 1, 1)]).reshape(*outer, t, t + width)


def shown(x, seen, otherwise):
    return x if seen is None else jnp.where(seen, x, otherwise)


def forward(x: Operands, *, rule: Rule):
    """out [B, K, G, T, H] in v's dtype, log-sum-exp [B, K, G, T] float32."""
    blocks = blocks_of(x, rule)
    x, length, (block_q, block_k) = blocks.x, x.q.shape[3], blocks.size

    def of_rows(_, i):
        def step(j, carry):
            top, total, mean = carry
            s, seen = logits(blocks, i, j)
            s = shown(s, seen, NEG)
            higher = jnp.maximum(top, s.max(-1))
            p = shown(jnp.exp(s - higher[..., None]), seen, 0.0)
            keep = jnp.exp(top - higher)
            v = rows(x.v, j, block_k, 2)
            part = jnp.einsum("bkgts,bksh->bkgth", p.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return higher, total * keep + p.sum(-1), mean * keep[..., None] + part

        shape = (*x.q.shape[:3], block_q)
        zeros = jnp.zeros(shape, jnp.float32)
        start = jnp.full(shape, NEG), zeros, jnp.zeros((*shape, x.v.shape[3]), jnp.float32)
        top, total, mean = jax.lax.fori_loop(blocks.first[i], blocks.last[i] + 1, step, start)
        sure = jnp.where(total > 0, total, 1.0)
        return None, ((mean / sure[..., None]).astype(x.v.dtype), jnp.where(total > 0, top + jnp.log(sure), NEG))

    _, (out, lse) = jax.lax.scan(of_rows, None, jnp.arange(len(blocks.first), dtype=jnp.int32))
    return joined(out)[:, :, :, :length], joined(lse)[:, :, :, :length]


def joined(x):
    """[n, B, K, G, t, ...] -> [B, K, G, n * t, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def backward(x: Operands, lse, delta, d_out, *, rule: Rule):
    """Gradients of the operands that have one, as Operands. delta [B, K, G, T]: sum of d_out * out less that of lse."""
    blocks = blocks_of(x, rule)
    given, x, (block_q, block_k) = x, blocks.x, blocks.size
    length, more = given.q.shape[3], x.q.shape[3] - given.q.shape[3]
    widen = lambda y: jnp.pad(y, [(0, 0)] * 3 + [(0, more)] + [(0, 0)] * (y.ndim - 4)) if more else y
    lse, delta, d_out = widen(lse), widen(delta), widen(d_out)
    wide = lambda y: None if y is None else jnp.zeros(y.shape, jnp.float32)

    def of_rows(sums, i):
        top, less, d = (rows(y, i, block_q, 3) for y in (lse, delta, d_out))
        q, relative_q = rows(x.q, i, block_q, 3), rows(x.relative_q, i, block_q, 3)

        def step(j, carry):
            dq, d_relative, (dk, dv, d_table) = carry
            s, seen = logits(blocks, i, j)
            p = shown(jnp.exp(s - top[..., None]), seen, 0.0)
            k, v = rows(x.k, j, block_k, 2), rows(x.v, j, block_k, 2)
            product = lambda spec, a, b: jnp.einsum(spec, a.astype(b.dtype), b, preferred_element_type=jnp.float32)
            ds = p * (product("bkgth,bksh->bkgts", d, v) - less[..., None])
            ds = uncap(ds, s, rule.softcap)
            dq = dq + product("bkgts,bksh->bkgth", ds, k)
            dk = add(dk, product("bkgts,bkgth->bksh", ds, q), j * block_k)
            dv = add(dv, product("bkgts,bkgth->bksh", p, d), j * block_k)
            if d_table is not None:
                spread = unskew(ds)
                d_relative = d_relative + product("bkgtu,kguh->bkgth", spread, table_rows(blocks, i, j))
                start = x.q.shape[3] - (i + 1) * block_q + j * block_k
                d_table = add(d_table, product("bkgtu,bkgth->kguh", spread, relative_q), start)
            return dq, d_relative, (dk, dv, d_table)

        start = wide(q), wide(relative_q), sums
        dq, d_relative, sums = jax.lax.fori_loop(blocks.first[i], blocks.last[i] + 1, step, start)
        return sums, (dq, d_relative)

    table = None
    if blocks.table is not None:
        spread = lambda t: jnp.broadcast_to(
            reversed_table(t, x.q.shape[3], x.k.shape[2], blocks.offset), (*x.q.shape[1:3], *blocks.table.shape[2:])
        )
        table, pull = jax.vjp(spread, given.relative_table.astype(jnp.float32))
    sums = wide(x.k), wide(x.v), wide(table)
    (dk, dv, d_table), (dq, d_relative) = jax.lax.scan(of_rows, sums, jnp.arange(len(blocks.first), dtype=jnp.int32))
    keys = given.k.shape[2]
    cast = lambda y, like: None if like is None else y.astype(like.dtype)
    return Operands(
        q=cast(joined(dq)[:, :, :, :length], given.q),
        k=cast(dk[:, :, :keys], given.k),
        v=cast(dv[:, :, :keys], given.v),
        relative_q=None if table is None else cast(joined(d_relative)[:, :, :, :length], given.relative_q),
        relative_table=None if table is None else cast(pull(d_table)[0], given.relative_table),
    )


def add(total, part, start):
    here = jax.lax.dynamic_slice_in_dim(total, start, part.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(total, here + part, start, 2)
