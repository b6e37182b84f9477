"""Decode attention on TPU: a Pallas kernel reads one source at a time, straight from the codes that the cache stores.

Grid (B, P, blocks of slots); the blocks of a row run one after another with the running maximum, sum and mean in scratch.
Codes become numbers in registers, [H, slots] at a time; factors, as bfloat16 bits, multiply logits and weights:

    codes [H', s] ─> levels [H, s] ─> q · levels ─> * scale + zero ─> logits [G, s] ─> weights * scale ─> · levels ─> [G, H]

Query heads are padded to 8 rows, as registers are. Where channels fall into groups with factors of their own, the queries
are repeated for each group with the other channels zeroed, so that one product serves all groups. A block without a live
slot is neither fetched nor computed. The parts of several sources, and of a head's block rows, are merged outside.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.merge import Part, merge, of_one_slot
from pallas_kernels.decode_attention.packed import Packed
from pallas_kernels.decode_attention.xla import NEGATIVE, softcapped

LANES, SUBLANES = 128, 8
BLOCK = 2048 * 128  # slots times channels of a block at most: double-buffered float32 keys and values are 4 MiB then
VMEM = 48 * 2**20  # of 128 MiB (64 on tpu7x); the compiler's own limit is lower
FACTORS = 128  # columns of factors that slots share, of one block


def why_not(sources, **_) -> str | None:
    """The reason why the kernel cannot read these sources, as a sentence; shapes and dtypes are enough."""
    for number, source in enumerate(sources):
        reason = None if _is_one_slot(source) else _refused(source)
        if reason is not None:
            return f"source {number}: {reason}"
    return None


def decode_attention(sources, *, scale, softcap, scores=True, interpret=False):
    """As `pallas_kernels.decode_attention`. interpret: run the kernel as ordinary operations, anywhere; or a TPU
    interpreter's parameters."""
    options = {"scale": scale, "softcap": softcap}
    parts = [
        of_one_slot(source, **options) if _is_one_slot(source)
        else source_attention(source, **options, scores=scores, interpret=interpret)
        for source in sources
    ]  # fmt: skip
    return merge(parts, sources, scores=scores)


def _is_one_slot(source) -> bool:
    """The new token: not worth a kernel."""
    return source.live.shape[2] == 1 and not isinstance(source.keys, Packed) and not isinstance(source.values, Packed)


def _refused(source) -> str | None:
    channels, slots = source.queries.shape[3], source.live.shape[2]
    if jnp.dtype(source.queries.dtype).name not in ("float32", "bfloat16"):
        return f"queries are {source.queries.dtype}; the kernel takes float32 and bfloat16."
    for name, stored in (("keys", source.keys), ("values", source.values)):
        if not isinstance(stored, Packed):
            if jnp.dtype(stored.dtype).name not in ("float32", "bfloat16"):
                return f"{name} are {stored.dtype}; the kernel takes float32, bfloat16 and packed codes."
            continue
        if jnp.dtype(stored.codes.dtype).name != ("uint16" if stored.bits == 16 else "uint8"):
            return f"{name} are {stored.bits}-bit codes in {stored.codes.dtype}; the kernel takes uint8, and uint16 for 16."
        if stored.bits not in (2, 3, 4, 8, 16):
            return f"{name} have codes of {stored.bits} bits; the kernel takes 2, 3, 4, 8 and 16."
        if any(x is not None and jnp.dtype(x.dtype).name != "uint16" for x in (stored.scale, stored.zero)):
            return f"factors of {name} are float32; the kernel reads bfloat16 bits in uint16."
    if _block(source) is None:
        return (
            f"{slots} slots of {channels} channels are no whole number of {LANES}-slot blocks, and too many for one block;"
            f" make them a multiple of {LANES}."
        )
    return None


def _block(source) -> int | None:
    """Slots of a block: the longest multiple of 128 that divides them and fits; else all of them, if they fit."""
    channels, slots = source.queries.shape[3], source.live.shape[2]
    most = BLOCK // max(channels, LANES)
    if slots <= most:
        return slots
    granule = source.keys.granule if isinstance(source.keys, Packed) else 1
    length = math.gcd(slots, granule * FACTORS) if 1 < granule and granule * FACTORS < slots else slots
    fitting = [size for size in range(LANES, most + 1, LANES) if length % size == 0]
    return max(fitting, default=None)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How keys or values are stored. groups: of channels with factors of their own, 0 = no factors. dtype: of the levels."""

    bits: int
    level: Any
    plain: bool
    groups: int
    zero: bool
    granule: int
    slots_minor: bool
    dtype: Any


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What fixes the kernel of one source. group: query heads; rows: those, padded; block, blocks: of slots."""

    keys: _Form
    values: _Form
    group: int
    rows: int
    channels: int
    slots: int
    block: int
    scale: float
    softcap: float | None
    biased: bool
    scores: bool

    @property
    def blocks(self) -> int:
        return self.slots // self.block


@functools.cache
def _is_plain(level, bits: int) -> bool:
    """Whether codes stand for themselves."""
    with jax.ensure_compile_time_eval():
        codes = np.arange(2**bits, dtype=np.uint8)
        return np.array_equal(np.asarray(level(jnp.asarray(codes))), codes.astype(np.float32), equal_nan=True)


def _form(stored, queries, slots_minor: bool) -> tuple[_Form, list]:
    """The form of keys or values, and their arrays: codes, scale, zero."""
    exact = queries.dtype == jnp.float32
    if not isinstance(stored, Packed):
        dtype = jnp.float32 if exact or stored.dtype == jnp.float32 else jnp.bfloat16
        form = _Form(0, None, False, 0, False, 1, slots_minor, dtype)
        return form, [stored]
    codes = stored.bits < 16
    form = _Form(
        bits=stored.bits,
        level=stored.level,
        plain=codes and _is_plain(stored.level, stored.bits),
        groups=0 if stored.scale is None else 1 if stored.granule > 1 else stored.scale.shape[2],
        zero=stored.zero is not None,
        granule=stored.granule,
        slots_minor=stored.slots_minor,
        dtype=jnp.float32 if exact else jnp.bfloat16,
    )
    return form, [x for x in (stored.codes, stored.scale, stored.zero) if x is not None]


def source_attention(source, *, scale, softcap, scores, interpret) -> Part:
    """One source by the kernel."""
    batch, heads, group, channels = source.queries.shape
    slots = source.live.shape[2]
    keys, key_arrays = _form(source.keys, source.queries, True)
    values, value_arrays = _form(source.values, source.queries, False)
    if not values.slots_minor and channels % LANES:  # so XLA lays them out on TPU, and this moves nothing
        value_arrays, values = [jnp.swapaxes(value_arrays[0], 2, 3)], dataclasses.replace(values, slots_minor=True)
    block = _block(source)
    plan = _Plan(
        keys=keys, values=values, group=group, rows=-(-group // SUBLANES) * SUBLANES, channels=channels, slots=slots,
        block=block, scale=scale, softcap=softcap, biased=source.bias is not None, scores=scores,
    )  # fmt: skip
    near = _nearest_live(source.live, plan)
    at = lambda b, p, j, near: near[(b * heads + p) * plan.blocks + j]
    of_row = lambda *shape: pl.BlockSpec((1, 1, *shape), lambda b, p, j, near: (b, p, 0, 0))
    of_slots = lambda rows: pl.BlockSpec((1, 1, rows, block), lambda b, p, j, near: (b, p, 0, at(b, p, j, near)))
    queries = _by_group(source.queries, plan)
    inputs = [queries, source.live[:, :, None].astype(jnp.int8)]
    specs = [of_row(*queries.shape[2:]), of_slots(1)]
    if plan.biased:
        inputs.append(source.bias.astype(jnp.float32))
        specs.append(of_slots(plan.rows))
    out_shape = [(channels, of_row(group, channels)), (1, of_row(group, 1))]
    if scores:
        written = pl.BlockSpec((1, 1, plan.rows, block), lambda b, p, j, near: (b, p, 0, j))
        out_shape.append((slots, written))
    results = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=[jax.ShapeDtypeStruct((batch, heads, group, last), jnp.float32) for last, _ in out_shape],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads, plan.blocks),
            in_specs=specs + _specs(keys, key_arrays, plan, at) + _specs(values, value_arrays, plan, at),
            out_specs=[spec for _, spec in out_shape],
            scratch_shapes=[pltpu.VMEM((plan.rows, n), jnp.float32) for n in (LANES, LANES, channels)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=interpret,
        name="decode_attention",
    )(near, *inputs, *key_arrays, *value_arrays)
    return Part(*results, *([] if scores else [None]))


def _nearest_live(live, plan: _Plan):
    """[B * P * blocks] int32: the last block up to this one that has a live slot, or 0: a block is live if it is itself."""
    found = live.reshape(*live.shape[:2], plan.blocks, plan.block).any(axis=-1)
    index = jnp.where(found, jnp.arange(plan.blocks, dtype=jnp.int32)[None, None], 0)
    return jax.lax.cummax(index, axis=2).reshape(-1)


def _by_group(queries, plan: _Plan):
    """[B, P, G, H] -> [B, P, groups * rows, H]: for each group of channels, the queries with the others zeroed."""
    padded = jnp.pad(queries, ((0, 0), (0, 0), (0, plan.rows - plan.group), (0, 0))).astype(plan.keys.dtype)
    groups = max(1, plan.keys.groups)
    if groups == 1:
        return padded
    mine = np.arange(plan.channels) // (plan.channels // groups) == np.arange(groups)[:, None]
    split = jnp.where(mine[None, None, :, None], padded[:, :, None], jnp.zeros((), padded.dtype))
    return split.reshape(*padded.shape[:2], -1, plan.channels)


def _specs(form: _Form, arrays, plan: _Plan, at) -> list[pl.BlockSpec]:
    """Block by block: the codes, the scale, the zero."""
    if not form.slots_minor:
        return [pl.BlockSpec((1, 1, plan.block, plan.channels), lambda b, p, j, near: (b, p, at(b, p, j, near), 0))]
    of_slots = lambda rows: pl.BlockSpec((1, 1, rows, plan.block), lambda b, p, j, near: (b, p, 0, at(b, p, j, near)))
    if form.granule == 1:
        return [of_slots(x.shape[2]) for x in arrays]
    width, step = _columns(form, plan), plan.block // form.granule
    shared = pl.BlockSpec(
        (1, 1, plan.channels, width), lambda b, p, j, near: (b, p, 0, at(b, p, j, near) * step // width)
    )
    return [of_slots(arrays[0].shape[2]), *[shared] * (len(arrays) - 1)]


def _columns(form: _Form, plan: _Plan) -> int:
    """Of the factors that slots share, how many come at a time."""
    return min(plan.slots // form.granule, FACTORS)


def _kernel(*refs, plan: _Plan):
    """One block of slots of one row. Blocks of refs, their leading axes 1:

    Prefetch: live blocks [B * P * blocks] int32. Inputs: queries [groups * rows, H], live [1, s] int8, bias [rows, s] if
    any, keys, values (codes, scale, zero). Outputs: out [G, H], lse [G, 1], logits [rows, s] if asked for. Scratch: maximum
    and sum of weights [rows, 128], weighted sum [rows, H], all float32.
    """
    refs = iter(refs)
    near, queries, live = next(refs), next(refs), next(refs)
    bias = next(refs) if plan.biased else None
    stored = [[next(refs) for _ in range(1 + (form.groups > 0) + form.zero)] for form in (plan.keys, plan.values)]
    out, lse, logits = next(refs), next(refs), next(refs) if plan.scores else None
    top, total, mean = refs
    row, block = pl.program_id(0) * pl.num_programs(1) + pl.program_id(1), pl.program_id(2)

    @pl.when(block == 0)
    def _():
        top[...] = jnp.full_like(top, NEGATIVE)
        total[...] = jnp.zeros_like(total)
        mean[...] = jnp.zeros_like(mean)

    here = near[row * plan.blocks + block] == block

    @pl.when(here)
    def _():
        seen = live[0, 0].astype(jnp.int32) != 0
        x = softcapped(_logits(queries[0, 0], stored[0], bias, block, plan), plan.softcap)
        x = jnp.where(seen, x, NEGATIVE)
        if plan.scores:
            logits[0, 0] = x
        before = top[:, :1]
        after = jnp.maximum(before, x.max(axis=1, keepdims=True))
        fade = jnp.exp(before - after)
        weights = jnp.where(seen, jnp.exp(x - after), 0.0)  # the second mask is for rows that have seen nothing yet
        total[...] = jnp.broadcast_to(fade * total[:, :1] + weights.sum(axis=1, keepdims=True), total.shape)
        top[...] = jnp.broadcast_to(after, top.shape)
        mean[...] = mean[...] * fade + _weighted(weights, stored[1], plan)

    if plan.scores:

        @pl.when(jnp.logical_not(here))
        def _():
            logits[0, 0] = jnp.full(logits.shape[2:], NEGATIVE, jnp.float32)

    @pl.when(block == plan.blocks - 1)
    def _():
        sums = total[: plan.group, :1]
        any_seen = sums > 0
        safe = jnp.where(any_seen, sums, 1.0)
        out[0, 0] = jnp.where(any_seen, mean[: plan.group] / safe, 0.0)
        lse[0, 0] = jnp.where(any_seen, top[: plan.group, :1] + jnp.log(safe), NEGATIVE)


def _logits(queries, stored, bias, block, plan: _Plan):
    """queries [groups * rows, H] against one block -> [rows, s] float32, scaled, biased."""
    form = plan.keys
    levels = _levels(stored[0], form, plan)
    factors = stored[1:]
    if form.granule > 1:
        ours = _shared_columns(block, plan)
        levels = (levels.astype(jnp.float32) * _dot(_columns_of(factors[0], block, plan), ours)).astype(form.dtype)
        x = _dot(queries, levels)
        zeros = _dot(queries.astype(jnp.float32), _columns_of(factors[1], block, plan).astype(jnp.float32))
        x = x + _dot(zeros, ours.astype(jnp.float32))
    else:
        x = _dot(queries, levels)
        if form.groups:
            sums = queries.astype(jnp.float32).sum(axis=1, keepdims=True)
            scales = _from_bits(factors[0][0, 0])
            zeros = _from_bits(factors[1][0, 0]) if form.zero else None
            total = 0.0
            for group in range(form.groups):
                mine = slice(group * plan.rows, (group + 1) * plan.rows)
                total = total + x[mine] * scales[group : group + 1]
                if form.zero:
                    total = total + sums[mine] * zeros[group : group + 1]
            x = total
    x = x * plan.scale
    return x if bias is None else x + bias[0, 0]


def _weighted(weights, stored, plan: _Plan):
    """weights [rows, s] float32 times one block of values -> [rows, H] float32."""
    form = plan.values
    levels = _levels(stored[0], form, plan)
    axis = 1 if form.slots_minor else 0
    if not form.groups:
        return _dot(weights.astype(form.dtype), levels, axis)
    scales = _from_bits(stored[1][0, 0])
    parts = [weights * scales[group : group + 1] for group in range(form.groups)]
    x = _dot(jnp.concatenate(parts, axis=0).astype(form.dtype), levels, axis)
    zeros = _from_bits(stored[2][0, 0]) if form.zero else None
    total = 0.0
    for group in range(form.groups):
        own = x[group * plan.rows : (group + 1) * plan.rows]
        if form.zero:
            own = own + (weights * zeros[group : group + 1]).sum(axis=1, keepdims=True)
        if form.groups > 1:
            channel = jax.lax.broadcasted_iota(jnp.int32, own.shape, 1)
            own = jnp.where(channel // (plan.channels // form.groups) == group, own, 0.0)
        total = total + own
    return total


def _dot(x, y, axis: int = 0):
    """x [m, k] times y, k at `axis` -> float32. float32 operands are not rounded to bfloat16 on the way."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _from_bits(x):
    """float32 of bfloat16 bits."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.int32) << 16, jnp.float32)


def _levels(ref, form: _Form, plan: _Plan):
    """The numbers that one block of codes stands for, [H, s] ([s, H] where slots are not minor), of the form's dtype."""
    x = ref[0, 0]
    if form.bits == 0:
        return x.astype(form.dtype)
    if form.bits == 16:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(form.dtype)
    if form.bits == 3:
        high = plan.channels // 4
        codes = _fields(ref[0, 0, :high], 2).astype(jnp.int32) | (_single_bits(ref[0, 0, high:]) << 2)
    else:
        codes = _fields(x, form.bits)
        if form.plain:
            return codes.astype(form.dtype)
        codes = codes if form.bits == 8 else codes.astype(jnp.int32)
    return (codes if form.plain else form.level(codes)).astype(form.dtype)


def _fields(x, bits: int):
    """uint8 [r, s] -> codes [r * 8 / bits, s] of 2, 4 or 8 bits: adjacent rows come from one byte, low bits first."""
    return x if bits == 8 else pltpu.bitcast(x, jnp.dtype(f"uint{bits}"))


def _single_bits(x):
    """uint8 [r, s] -> [8 r, s] int32, one bit each; there is no type of one bit."""
    wide = jnp.broadcast_to(x.astype(jnp.int32)[:, None], (x.shape[0], 8, x.shape[1])).reshape(-1, x.shape[1])
    return (wide >> (jax.lax.broadcasted_iota(jnp.int32, wide.shape, 0) % 8)) & 1


def _shared_columns(block, plan: _Plan):
    """[n, s] bfloat16: 1 where a slot of this block takes its factors from a column."""
    form, width = plan.keys, _columns(plan.keys, plan)
    shape = (width, plan.block)
    first = block * (plan.block // form.granule) % width
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - first
    return (column == jax.lax.broadcasted_iota(jnp.int32, shape, 1) // form.granule).astype(jnp.bfloat16)


def _columns_of(ref, block, plan: _Plan):
    """Factors [H, n] bfloat16 of the columns at hand; those past the end are 0."""
    form, width = plan.keys, _columns(plan.keys, plan)
    x, count = _from_bits(ref[0, 0]), plan.slots // form.granule
    if count % width:
        first = block * (plan.block // form.granule) // width * width
        x = jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) + first < count, x, 0.0)
    return x.astype(jnp.bfloat16)
