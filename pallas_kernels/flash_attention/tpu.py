"""Flash attention as a TPU kernel: one grid step is one block of logits, blocks without a visible key are passed over.

What goes with queries or keys one number each (positions, segments, log-sum-exps) lies along lanes in memory, where it is
dense; a kernel that needs it along the rows of a block turns it there, once per row of blocks.

The relative term is a product with the rows of the reversed table that a block can need, 2 blocks of them, shifted in row r
by r: a strided rotation.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cost import estimate
from pallas_kernels.dispatch import device_of
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
)

LANES = 128
UNROTATED = ("TPU v4",)  # chips that the compiler has no strided rotation for
COLUMN = " column"  # of a vector's name: the same turned to lie along rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes. keys: before padding; rows, columns: of blocks. interpret: whether the kernels are interpreted."""

    rule: Rule
    offset: int
    keys: int
    group: int
    block_q: int
    block_k: int
    rows: int
    columns: int
    interpret: bool

    def head(self, n):
        """The head of keys of a query head. (`//` asks for the sign, whose lowering wants to know the chip.)"""
        return jax.lax.div(n, np.int32(self.group))

    @property
    def ragged(self) -> bool:
        """Whether padded keys must be hidden."""
        return self.columns * self.block_k > self.keys


def why_not(x: Operands, *rest, rule: Rule) -> str | None:
    """What the kernels cannot take."""
    if x.q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, not {x.q.dtype}"
    if max(x.q.shape[4], x.v.shape[3]) > 256:
        return f"a block of heads of {max(x.q.shape[4], x.v.shape[3])} channels leaves no room; at most 256"
    kind = getattr(device_of("tpu"), "device_kind", None)
    if x.relative_q is not None and kind in UNROTATED:
        return f"its relative term is a strided rotation, which the compiler for {kind} has not"
    if rule.block is not None and rule.block % LANES:
        return f"a block of {rule.block} is not a multiple of {LANES} lanes"
    return None


def prepared(x: Operands, rule: Rule, interpret: bool):
    """Operands in whole blocks and by query head, [B, K * G, T, H], a table as it is read, the plan, and `needed`."""
    batch, heads, group, length, _ = x.q.shape
    keys, largest = x.k.shape[2], 512 if x.relative_q is None else 256
    block_q, block_k = (rule.block or fitting(size, largest) for size in (length, keys))
    if x.relative_q is not None:
        block_q = block_k = max(LANES, min(block_q, block_k))
    padded = pad(x, block_q, block_k)
    plan = Plan(
        rule=rule, offset=x.offset, keys=keys, group=group, block_q=block_q, block_k=block_k,
        rows=padded.q.shape[3] // block_q, columns=padded.k.shape[2] // block_k, interpret=interpret,
    )  # fmt: skip
    seen = needed(padded, rule, plan.offset, block_q, block_k)
    by_head = lambda y: None if y is None else y.reshape(batch, heads * group, *y.shape[3:])
    table = None
    if x.relative_table is not None:
        table = reversed_table(x.relative_table, padded.q.shape[3], padded.k.shape[2], plan.offset)
    lanes = lambda y: None if y is None else y.reshape(batch, -1, 1, y.shape[-1])
    x = padded._replace(
        q=by_head(padded.q),
        relative_q=by_head(padded.relative_q),
        relative_table=table,
        query_positions=lanes(padded.query_positions),
        key_positions=lanes(padded.key_positions),
        query_segments=lanes(padded.query_segments),
        key_segments=lanes(padded.key_segments),
    )
    return x, plan, seen


def fitting(length: int, largest: int) -> int:
    """The largest block whose padding costs at most an eighth; a short length is one block."""
    if length < LANES:
        return -(-length // 16) * 16
    sizes = (size for size in range(largest, LANES, -LANES) if -length % size <= length / 8)
    return next(sizes, LANES)


def inputs_of(x: Operands, plan: Plan, at: Callable) -> dict:
    """{name: (array, block)} of the operands. at: grid and prefetched -> (batch row, query head, queries', keys' block)."""
    by_query = lambda y: (y, block_of((1, 1, plan.block_q, y.shape[3]), lambda b, n, i, j: (b, n, i, 0), at))
    by_key = lambda y: (
        y,
        block_of((1, 1, plan.block_k, y.shape[3]), lambda b, n, i, j: (b, plan.head(n), j, 0), at),
    )
    inputs = {"q": by_query(x.q), "k": by_key(x.k), "v": by_key(x.v)}
    for name in ("query_positions", "query_segments"):
        if (y := getattr(x, name)) is not None:
            inputs[name] = y, block_of((1, 1, 1, plan.block_q), lambda b, n, i, j: (b, 0, 0, i), at)
    for name in ("key_positions", "key_segments"):
        if (y := getattr(x, name)) is not None:
            head = plan.head if y.shape[1] > 1 else (lambda n: 0)
            inputs[name] = y, block_of((1, 1, 1, plan.block_k), lambda b, n, i, j, h=head: (b, h(n), 0, j), at)
    if x.relative_q is not None:
        inputs["relative_q"] = by_query(x.relative_q)
        heads, group, _, size = x.relative_table.shape
        of = lambda n: (plan.head(n) if heads > 1 else 0, jax.lax.rem(n, np.int32(plan.group)) if group > 1 else 0)
        for name, more in (("near", 0), ("far", 1)):
            where = lambda b, n, i, j, more=more: (*of(n), plan.rows - 1 - i + j + more, 0)
            inputs[name] = x.relative_table, block_of((1, 1, plan.block_q, size), where, at)
    return inputs


def block_of(shape, where, at):
    return pl.BlockSpec(shape, lambda *ids: where(*at(*ids)))


def of_logit(x: Operands) -> int:
    """Multiplications that the logit of a query and a key takes; of the table, each block reads twice as much as it uses."""
    return x.q.shape[-1] + (0 if x.relative_q is None else 2 * x.relative_q.shape[-1])


def run(
    kernel, plan: Plan, grid, prefetch, inputs: dict, outputs: dict, scratch: dict, *, ordered: int, seen, products: int
):  # fmt: skip
    """Calls kernel(*prefetched, {name: ref}, plan=plan).

    inputs: {name: (array, block)}; outputs: {name: (shape, dtype, block)}; scratch: {name: (shape, dtype)}.
    ordered: how many of the grid's last axes must run in order. seen: from `prepared`; products: multiplications for each
    query and key; both for the estimate of the cost.
    """
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in outputs.values()]
    share = seen.mean() if isinstance(seen, np.ndarray) else 1.0  # of the blocks; where data says which, all
    batch, heads, queries, _ = inputs["q"][0].shape
    pairs = int(share * batch * heads * queries * plan.columns * plan.block_k)
    names = [*inputs, *outputs, *scratch]

    def body(*refs):
        kernel(*refs[: len(prefetch)], dict(zip(names, refs[len(prefetch) :], strict=True)), plan=plan)

    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(prefetch),
        grid=grid,
        in_specs=[block for _, block in inputs.values()],
        out_specs=[block for *_, block in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
    )
    order = ("parallel",) * (len(grid) - ordered) + ("arbitrary",) * ordered
    call = pl.pallas_call(
        body,
        grid_spec=spec,
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=order),
        cost_estimate=estimate(
            [*shapes, *(array for array, _ in inputs.values())], flops=2 * pairs * products, transcendentals=pairs
        ),
        interpret=plan.interpret,
    )
    return call(*(jnp.asarray(p) for p in prefetch), *(array for array, _ in inputs.values()))


def spans(seen):
    """[B|1, K|1, n, m] bool -> what is prefetched, first and last of the m, and (refs, b, head, n) -> both."""
    batch, heads, length, _ = seen.shape

    def read(refs, b, head, at):
        place = ((b if batch > 1 else 0) * heads + (head if heads > 1 else 0)) * length + at
        return refs[0][place], refs[1][place]

    return tuple(bound.reshape(-1) for bound in span(seen)), read


def within(number, first, last):
    """A block that is needed: itself, or the nearest, which is then already there."""
    return jnp.maximum(jnp.minimum(number, last), first)


NT, NN, TN = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ())), (((0,), (0,)), ((), ()))


def dot(a, b, dims):
    """Matrix product in float32; of float32 to its full precision."""
    precision = jax.lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a.astype(b.dtype), b, dims, precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip


def columns_of(names, size: int, dtypes) -> dict:
    """Scratch for vectors that lie along rows."""
    return {name + COLUMN: ((size, LANES), dtype) for name, dtype in zip(names, dtypes, strict=True)}


def turn(ref: dict) -> None:
    """Fills the columns."""
    for name in list(ref):
        if name.endswith(COLUMN):
            lanes = ref[name.removesuffix(COLUMN)][0, 0]
            ref[name][...] = jnp.broadcast_to(lanes, (LANES, lanes.shape[1])).T


def vector(ref: dict, name: str):
    """[n, 1] if it was turned, else [1, n]; None if it is not there."""
    if name + COLUMN in ref:
        return ref[name + COLUMN][:, :1]
    return ref[name][0, 0] if name in ref else None


def logits(ref: dict, plan: Plan, i, j, *, turned: bool = False):
    """Block (i, j), queries by keys, or keys by queries if `turned`: capped logits float32, and what is seen or None."""
    q, k = ref["q"][0, 0], ref["k"][0, 0]
    total = dot(k, q, NT) if turned else dot(q, k, NT)
    if "relative_q" in ref:
        size = plan.block_q
        x = dot(ref["relative_q"][0, 0], table_rows(ref), NT)
        x = slanted(x, size + 1, plan.interpret)[:, :size]
        total += x.T if turned else x
    row, column = indices(total.shape, 1 if turned else 0), indices(total.shape, 0 if turned else 1)
    distance = (i * plan.block_q + plan.offset - j * plan.block_k) + row - column
    apart, mine, theirs = distance, vector(ref, "query_segments"), vector(ref, "key_segments")
    if "query_positions" in ref:
        apart = vector(ref, "query_positions") - vector(ref, "key_positions")
    seen = sees(plan.rule, distance, apart, mine, theirs)
    if plan.ragged:
        inside = column < plan.keys - j * plan.block_k
        seen = inside if seen is None else seen & inside
    return capped(total, plan.rule.softcap), seen


def slanted(x, shift: int, interpret: bool):
    """[t, n] -> the same with row r rotated right by shift + r.

    An interpreter would compile each row for itself: for it, in as many steps as r has bits, the same.
    """
    if not interpret:
        return pltpu.roll(x, shift, 1, stride=1, stride_axis=0)
    x, row, step = pltpu.roll(x, shift, 1), indices(x.shape, 0), 1
    while step < x.shape[0]:
        x = jnp.where((row // step) % 2 == 1, pltpu.roll(x, step, 1), x)
        step *= 2
    return x


def indices(shape, axis: int):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def table_rows(ref):
    """Of the reversed table, those that a block may need."""
    return jnp.concatenate([ref["near"][0, 0], ref["far"][0, 0]], 0)


def shown(x, seen, otherwise):
    return x if seen is None else jnp.where(seen, x, otherwise)


def forward(x: Operands, *, rule: Rule, interpret: bool = False):
    """out [B, K, G, T, H], log-sum-exp [B, K, G, T] float32."""
    shape, length = x.q.shape[:3], x.q.shape[3]
    x, plan, seen = prepared(x, rule, interpret)
    prefetch, read = spans(seen)
    batch, heads, padded, _ = x.q.shape
    size = x.v.shape[3]

    def at(b, n, i, j, *refs):
        return b, n, i, within(j, *read(refs, b, plan.head(n), i))

    inputs = inputs_of(x, plan, at)
    outputs = {
        "out": ((batch, heads, padded, size), x.v.dtype, block_of((1, 1, plan.block_q, size), _first, at)),
        "lse": ((batch, heads, 1, padded), jnp.float32, block_of((1, 1, 1, plan.block_q), _along, at)),
    }
    turned = [name for name in ("query_positions", "query_segments") if name in inputs]
    wide = (plan.block_q, LANES), jnp.float32
    scratch = {"top": wide, "total": wide, "mean": ((plan.block_q, size), jnp.float32)}
    scratch |= columns_of(turned, plan.block_q, [jnp.int32] * len(turned))
    out, lse = run(
        functools.partial(_forward_kernel, read=read), plan, (batch, heads, plan.rows, plan.columns), prefetch,
        inputs, outputs, scratch, ordered=1, seen=seen, products=of_logit(x) + size,
    )  # fmt: skip
    return out.reshape(*shape, padded, size)[:, :, :, :length], lse.reshape(*shape, padded)[..., :length]


def _first(b, n, i, j):
    return b, n, i, 0


def _along(b, n, i, j):
    return b, n, 0, i


def _forward_kernel(first, last, ref, *, plan, read):
    b, n, i, j = (pl.program_id(axis) for axis in range(4))
    low, high = read((first, last), b, plan.head(n), i)

    @pl.when(j == 0)
    def _():
        ref["top"][...] = jnp.full_like(ref["top"], NEG)
        ref["total"][...] = jnp.zeros_like(ref["total"])
        ref["mean"][...] = jnp.zeros_like(ref["mean"])
        turn(ref)

    @pl.when((low <= j) & (j <= high))
    def _():
        s, seen = logits(ref, plan, i, j)
        s = shown(s, seen, NEG)
        top = ref["top"][:, :1]
        higher = jnp.maximum(top, s.max(1, keepdims=True))
        p, keep = shown(jnp.exp(s - higher), seen, 0.0), jnp.exp(top - higher)
        ref["top"][...] = jnp.broadcast_to(higher, ref["top"].shape)
        ref["total"][...] = keep * ref["total"][...] + p.sum(1, keepdims=True)
        ref["mean"][...] = keep * ref["mean"][...] + dot(p, ref["v"][0, 0], NN)

    @pl.when(j == plan.columns - 1)
    def _():
        total = ref["total"][...]
        some = total > 0
        sure = jnp.where(some, total, 1.0)
        ref["out"][0, 0] = (ref["mean"][...] / sure[:, :1]).astype(ref["out"].dtype)
        ref["lse"][0, 0] = jnp.where(some, ref["top"][...] + jnp.log(sure), NEG).T[:1]
