"""Decode attention on TPU: a Pallas kernel reads one source at a time, straight from the codes that the cache stores.

Grid (B, blocks of slots, P); the blocks of a row run one after another with its maximum, sum and mean in scratch. Rows are
innermost, so that what is one number per slot comes for all rows at once. Codes become numbers in registers, [H, slots] at a
time; factors, as bfloat16 bits, multiply logits and weights:

    codes [H', s] ─> levels [H, s] ─> q · levels ─> * scale + zero ─> logits [G, s] ─> weights * scale ─> · levels ─> [G, H]

Query heads are padded to 8 rows, as registers are. Where channels fall into groups with factors of their own, the queries
are repeated for each group with the other channels zeroed, so that one product serves all groups. A block without a live
slot is neither fetched nor computed. The parts of several sources, and of a head's block rows, are merged outside.

Nothing moves before the kernel reads it if slots are a multiple of 128 and rows of codes one of 8. Otherwise XLA saves padding
by storing the array with its axes in another order (H = 80 at 2 or 3 bits, H = 96 at 3), and converts it at every call; so it
does with kivi's factors unless 8 columns divide, and with factors of one group where B pads less than P.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cost import estimate
from pallas_kernels.decode_attention.merge import Part, merge, of_one_slot
from pallas_kernels.decode_attention.packed import Packed
from pallas_kernels.decode_attention.xla import NEGATIVE, softcapped
from pallas_kernels.dispatch import device_of

LANES, SUBLANES = 128, 8
FLOATS = ("TPU v6 lite", "TPU7x")  # chips that compute on vectors of bfloat16: codes become numbers by way of those
NO_PAIRS = ("TPU v4",)  # chips that the compiler has no vectors of 2 bits for: it ends its process
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


def _chip() -> str | None:
    """The kind of chip that is compiled for, if that is a TPU."""
    return getattr(device_of("tpu"), "device_kind", None)


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
        if stored.bits == 2 and _chip() in NO_PAIRS:
            return f"{name} have codes of 2 bits, and the compiler for {_chip()} has no vectors of those."
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
    """How keys or values are stored. groups: of channels with factors of their own, 0 = no factors. dtype: of the levels.
    offset: codes plus this are their levels; None: they are not. through: what small codes become before they are levels.

    swapped: the last two axes, of values whose channels are minor or of factors that slots share, come the other way round.
    """

    bits: int
    level: Any
    offset: float | None
    groups: int
    zero: bool
    granule: int
    slots_minor: bool
    dtype: Any
    swapped: bool = False
    through: Any = jnp.int32

    @property
    def vectors(self) -> int:
        """Factors that are one number per slot."""
        return (1 + self.zero) * (self.groups == 1 and self.granule == 1)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What fixes the kernel of one source. heads: block rows P; group: query heads G; rows: those, padded; block, blocks: of
    slots."""

    keys: _Form
    values: _Form
    heads: int
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

    def at(self, b, j, p, near):
        """The row and block of slots that are read at a step of the grid: those of the last live one."""
        step = near[(b * self.blocks + j) * self.heads + p]
        return step % self.heads, step // self.heads

    def of_slots(self, rows: int) -> pl.BlockSpec:
        """Of an array [B, P, rows, S]."""

        def index(b, j, p, near):
            row, block = self.at(b, j, p, near)
            return b, row, 0, block

        return pl.BlockSpec((1, 1, rows, self.block), index)

    def of_all_rows(self) -> pl.BlockSpec:
        """Of an array [B, P, S]: one block for all steps of the same slots."""
        last = self.heads - 1
        return pl.BlockSpec((1, self.heads, self.block), lambda b, j, p, near: (b, 0, self.at(b, j, last, near)[1]))


@functools.cache
def _offset(level, bits: int) -> float | None:
    """What codes are off the levels that they stand for, if all are off alike."""
    with jax.ensure_compile_time_eval():
        codes = np.arange(2**bits, dtype=np.uint8)
        off = np.asarray(level(jnp.asarray(codes))) - codes.astype(np.float32)
        return float(off[0]) if (off == off[0]).all() else None


def _form(stored, queries, slots_minor: bool) -> tuple[_Form, list]:
    """The form of keys or values, and their arrays: codes, scale, zero."""
    exact = queries.dtype == jnp.float32
    if not isinstance(stored, Packed):
        dtype = jnp.float32 if exact or stored.dtype == jnp.float32 else jnp.bfloat16
        swapped = not slots_minor and _pads_less(*stored.shape[2:])
        return _Form(0, None, None, 0, False, 1, slots_minor, dtype, swapped), [stored]
    codes = stored.bits < 16
    swapped = stored.granule > 1 and _pads_less(*stored.scale.shape[2:])
    swapped = swapped or (not stored.slots_minor and _pads_less(*stored.codes.shape[2:]))
    form = _Form(
        bits=stored.bits,
        level=stored.level,
        offset=_offset(stored.level, stored.bits) if codes else None,
        groups=0 if stored.scale is None else 1 if stored.granule > 1 else stored.scale.shape[2],
        zero=stored.zero is not None,
        granule=stored.granule,
        slots_minor=stored.slots_minor,
        dtype=jnp.float32 if exact else jnp.bfloat16,
        swapped=swapped,
        through=jnp.bfloat16 if _chip() in FLOATS else jnp.int32,
    )
    return form, [x for x in (stored.codes, stored.scale, stored.zero) if x is not None]


def source_attention(source, *, scale, softcap, scores, interpret) -> Part:
    """One source by the kernel."""
    batch, heads, group, channels = source.queries.shape
    slots, block = source.live.shape[2], _block(source)
    keys, key_arrays = _form(source.keys, source.queries, True)
    values, value_arrays = _form(source.values, source.queries, False)
    plan = _Plan(
        keys=keys, values=values, heads=heads, group=group, rows=-(-group // SUBLANES) * SUBLANES, channels=channels,
        slots=slots, block=block, scale=scale, softcap=softcap, biased=source.bias is not None, scores=scores,
    )  # fmt: skip
    queries = _by_group(source.queries, plan)
    whole = lambda *shape: pl.BlockSpec((1, heads, *shape), lambda b, j, p, near: (b, 0, 0, 0))
    inputs, specs = [queries, source.live.astype(jnp.int8)], [whole(*queries.shape[2:]), plan.of_all_rows()]
    if plan.biased:
        inputs.append(source.bias.astype(jnp.float32))
        specs.append(plan.of_slots(plan.rows))
    for form, arrays in ((keys, key_arrays), (values, value_arrays)):
        arranged, blocks = zip(*_arranged(form, arrays, plan), strict=True)
        inputs.extend(arranged)
        specs.extend(blocks)
    outputs = [(channels, whole(group, channels)), (1, whole(group, 1))]
    if scores:
        outputs.append((slots, pl.BlockSpec((1, 1, plan.rows, block), lambda b, j, p, near: (b, p, 0, j))))
    per_row = [pltpu.VMEM((heads, plan.rows, n), jnp.float32) for n in (LANES, LANES, channels)]
    vectors = [pltpu.VMEM((heads, block), jnp.float32)] * (1 + keys.vectors + values.vectors)
    shapes = [jax.ShapeDtypeStruct((batch, heads, group, last), jnp.float32) for last, _ in outputs]
    logits = batch * heads * group * plan.slots
    results = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, plan.blocks, heads),
            in_specs=specs,
            out_specs=[spec for _, spec in outputs],
            scratch_shapes=per_row + vectors,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        cost_estimate=estimate(
            (*inputs, *shapes), flops=4 * logits * plan.channels, transcendentals=logits
        ),  # no block is empty
        interpret=interpret,
        name="decode_attention",
    )(_nearest_live(source.live, plan), *inputs)
    return Part(*results, *([] if scores else [None]))


def _nearest_live(live, plan: _Plan):
    """[B * blocks * P] int32: the last step of a batch row's grid up to this one that has a live slot, or 0. A step is live
    if it is itself."""
    found = live.reshape(*live.shape[:2], plan.blocks, plan.block).any(axis=-1)
    steps = jnp.arange(plan.blocks * plan.heads, dtype=jnp.int32)[None]
    found = jnp.where(jnp.swapaxes(found, 1, 2).reshape(live.shape[0], -1), steps, 0)
    return jax.lax.cummax(found, axis=1).reshape(-1)


def _by_group(queries, plan: _Plan):
    """[B, P, G, H] -> [B, P, groups * rows, H]: for each group of channels, the queries with the others zeroed."""
    padded = jnp.pad(queries, ((0, 0), (0, 0), (0, plan.rows - plan.group), (0, 0))).astype(plan.keys.dtype)
    groups = max(1, plan.keys.groups)
    if groups == 1:
        return padded
    mine = np.arange(plan.channels) // (plan.channels // groups) == np.arange(groups)[:, None]
    split = jnp.where(mine[None, None, :, None], padded[:, :, None], jnp.zeros((), padded.dtype))
    return split.reshape(*padded.shape[:2], -1, plan.channels)


def _arranged(form: _Form, arrays, plan: _Plan) -> list[tuple[Any, pl.BlockSpec]]:
    """The codes, the scale, the zero as the kernel takes them, which is how XLA lays them out, so that nothing moves: it
    chooses the order of axes that pads least."""
    codes, *factors = arrays
    if form.granule > 1:
        width, step = _columns(form, plan), plan.block // form.granule
        column = lambda b, j, p, near: plan.at(b, j, p, near)[1] * step // width
        row = lambda b, j, p, near: plan.at(b, j, p, near)[0]
        if form.swapped:
            spec = pl.BlockSpec((1, 1, width, plan.channels), lambda *at: (at[0], row(*at), column(*at), 0))
            factors = [jnp.swapaxes(x, 2, 3) for x in factors]
        else:
            spec = pl.BlockSpec((1, 1, plan.channels, width), lambda *at: (at[0], row(*at), 0, column(*at)))
        taken = [(x, spec) for x in factors]
    elif form.groups == 1:
        taken = [(x[:, :, 0], plan.of_all_rows()) for x in factors]
    else:
        taken = [(x, plan.of_slots(form.groups)) for x in factors]
    if form.slots_minor:
        return [(codes, plan.of_slots(codes.shape[2])), *taken]
    if form.swapped:
        return [(jnp.swapaxes(codes, 2, 3), plan.of_slots(plan.channels)), *taken]
    of = lambda b, j, p, near: (b, *plan.at(b, j, p, near), 0)
    return [(codes, pl.BlockSpec((1, 1, plan.block, plan.channels), of)), *taken]


def _pads_less(rows: int, columns: int) -> bool:
    """Whether [columns, rows] takes less memory on TPU than [rows, columns]."""
    padded = lambda rows, columns: -(-rows // SUBLANES) * SUBLANES * (-(-columns // LANES) * LANES)
    return padded(columns, rows) < padded(rows, columns)


def _columns(form: _Form, plan: _Plan) -> int:
    """Of the factors that slots share, how many come at a time."""
    return min(plan.slots // form.granule, FACTORS)


def _kernel(*refs, plan: _Plan):
    """One block of slots of one block row. Shapes of the refs without leading ones:

    Prefetch: nearest live steps [B * blocks * P] int32. Inputs: queries [P, groups * rows, H], live [P, s] int8, bias
    [rows, s] if any, keys, values (codes, scale, zero). Outputs: out [P, G, H], lse [P, G, 1], logits [rows, s] if asked for.
    Scratch, all float32: maximum and sum of weights [P, rows, 128], weighted sum [P, rows, H]; live and then each factor that
    is one number per slot, [P, s].
    """
    refs = iter(refs)
    near, queries, live = next(refs), next(refs), next(refs)
    bias = next(refs) if plan.biased else None
    keys, values = ([next(refs) for _ in range(1 + (f.groups > 0) + f.zero)] for f in (plan.keys, plan.values))
    out, lse, logits = next(refs), next(refs), next(refs) if plan.scores else None
    top, total, mean, seen, *vectors = refs
    row, block = pl.program_id(2), pl.program_id(1)
    step, first = block * plan.heads + row, pl.program_id(0) * plan.blocks * plan.heads
    per_slot = [*(keys[1:] if plan.keys.vectors else []), *(values[1:] if plan.values.vectors else [])]

    @pl.when(block == 0)
    def _():
        top[row] = jnp.full(top.shape[1:], NEGATIVE, jnp.float32)
        total[row] = jnp.zeros(total.shape[1:], jnp.float32)
        mean[row] = jnp.zeros(mean.shape[1:], jnp.float32)

    last = (block + 1) * plan.heads - 1  # of the steps of these slots

    @pl.when((row == 0) & (near[first + last] >= step))
    def _():  # one row of a packed array cannot be taken by a number that is not fixed; one of float32 can
        seen[...] = live[0].astype(jnp.float32)
        for stored, wide in zip(per_slot, vectors, strict=True):
            wide[...] = _from_bits(stored[0])

    here = near[first + step] == step

    @pl.when(here)
    def _():
        mine = [wide[pl.ds(row, 1), :] for wide in vectors]
        factors = mine[: plan.keys.vectors] or keys[1:], mine[plan.keys.vectors :] or values[1:]
        see = seen[pl.ds(row, 1), :] > 0
        x = softcapped(_logits(queries[0, row], keys[0], factors[0], bias, block, plan), plan.softcap)
        x = jnp.where(see, x, NEGATIVE)
        if plan.scores:
            logits[0, 0] = x
        before = top[row][:, :1]
        after = jnp.maximum(before, x.max(axis=1, keepdims=True))
        fade = jnp.exp(before - after)
        weights = jnp.where(see, jnp.exp(x - after), 0.0)  # the second mask is for rows that have seen nothing yet
        sums = fade * total[row][:, :1] + weights.sum(axis=1, keepdims=True)
        total[row] = jnp.broadcast_to(sums, total.shape[1:])
        top[row] = jnp.broadcast_to(after, top.shape[1:])
        mean[row] = mean[row] * fade + _weighted(weights, values[0], factors[1], plan)

    if plan.scores:

        @pl.when(jnp.logical_not(here))
        def _():
            logits[0, 0] = jnp.full(logits.shape[2:], NEGATIVE, jnp.float32)

    @pl.when(block == plan.blocks - 1)
    def _():
        sums = total[row][: plan.group, :1]
        any_seen = sums > 0
        safe = jnp.where(any_seen, sums, 1.0)
        out[0, row] = jnp.where(any_seen, mean[row][: plan.group] / safe, 0.0)
        lse[0, row] = jnp.where(any_seen, top[row][: plan.group, :1] + jnp.log(safe), NEGATIVE)


def _logits(queries, codes, factors, bias, block, plan: _Plan):
    """queries [groups * rows, H] against one block -> [rows, s] float32, scaled, biased. factors: refs, or [1, s] float32."""
    form = plan.keys
    levels = _levels(codes, form, plan)
    if form.granule > 1:
        x = _by_column(queries, levels, factors, block, plan)
    else:
        x = _dot(queries, levels)
        if form.offset or form.zero:
            sums = queries.astype(jnp.float32).sum(axis=1, keepdims=True)
        if form.offset:
            x = x + sums * form.offset
        if form.groups:
            scales, zeros = _rows_of(factors, form)
            parts = []
            for group in range(form.groups):
                mine = slice(group * plan.rows, (group + 1) * plan.rows)
                part = x[mine] * scales[group]
                parts.append(part + sums[mine] * zeros[group] if form.zero else part)
            x = functools.reduce(operator.add, parts)
    x = x * plan.scale
    return x if bias is None else x + bias[0, 0]


def _rows_of(factors, form: _Form):
    """Scales and zeros (or None), a [1, s] float32 for each group."""
    if form.vectors:
        return [factors[0]], [factors[1]] if form.zero else None
    wide = [_from_bits(x[0, 0]) for x in factors]
    rows = [[x[group : group + 1] for group in range(form.groups)] for x in wide]
    return rows[0], rows[1] if form.zero else None


def _weighted(weights, codes, factors, plan: _Plan):
    """weights [rows, s] float32 times one block of values -> [rows, H] float32."""
    form = plan.values
    levels = _levels(codes, form, plan)
    axis = 1 if form.slots_minor or form.swapped else 0
    scales, zeros = _rows_of(factors, form) if form.groups else ([], None)
    scaled = [weights * scale for scale in scales] or [weights]
    scaled = (scaled[0] if len(scaled) == 1 else jnp.concatenate(scaled, axis=0)).astype(form.dtype)
    x = _dot(scaled, levels, axis)
    if form.offset:
        x = x + scaled.astype(jnp.float32).sum(axis=1, keepdims=True) * form.offset
    if not form.groups:
        return x
    parts = []
    for group in range(form.groups):
        own = x[group * plan.rows : (group + 1) * plan.rows]
        if form.zero:
            own = own + (weights * zeros[group]).sum(axis=1, keepdims=True)
        if form.groups > 1:
            channel = jax.lax.broadcasted_iota(jnp.int32, own.shape, 1)
            own = jnp.where(channel // (plan.channels // form.groups) == group, own, 0.0)
        parts.append(own)
    return functools.reduce(operator.add, parts)


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
    """The numbers that one block of codes stands for but for the form's offset, [H, s] ([s, H] where slots are not minor), of
    the form's dtype."""
    x = ref[0, 0]
    if form.bits == 0:
        return x.astype(form.dtype)
    if form.bits == 16:
        return jax.lax.bitcast_convert_type(x, jnp.bfloat16).astype(form.dtype)
    codes = _of_planes(x, plan.channels // 4) if form.bits == 3 else _fields(x, form.bits)
    if form.offset is not None:
        return codes.astype(form.dtype)
    return form.level(codes if form.bits == 8 else codes.astype(form.through)).astype(form.dtype)


def _fields(x, bits: int):
    """uint8 [r, s] -> codes [r * 8 / bits, s] of 2, 4 or 8 bits: adjacent rows come from one byte, low bits first."""
    return x if bits == 8 else pltpu.bitcast(x, jnp.dtype(f"uint{bits}"))


def _of_planes(x, cut: int):
    """uint8 [3 H / 8, s], of which the first `cut` rows hold 2 bits of each code and the others the third -> [H, s] uint4. The
    bits of 8 codes are spread over one word, all at once."""
    low = pltpu.bitcast(x[:cut], jnp.uint16).astype(jnp.int32)
    high = x[cut:].astype(jnp.int32)
    for shift, mask in ((8, 0x00FF00FF), (4, 0x0F0F0F0F), (2, 0x33333333)):
        low = (low | (low << shift)) & mask
    for shift, mask in ((12, 0x000F000F), (6, 0x03030303), (3, 0x11111111)):
        high = (high | (high << shift)) & mask
    return pltpu.bitcast(low | (high << 2), jnp.uint4)


def _by_column(queries, levels, factors, block, plan: _Plan):
    """queries [rows, H] times levels [H, s] whose factors are those of a channel and a column of adjacent slots.

    A matrix of ones and zeros, [n, s], spreads the columns over their slots, exactly.
    """
    form, width = plan.keys, _columns(plan.keys, plan)
    shape, step = (width, plan.block), plan.block // form.granule
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 0) - block * step % width
    ours = (column == jax.lax.broadcasted_iota(jnp.int32, shape, 1) // form.granule).astype(jnp.bfloat16)
    scale, zero = (_columns_of(x, block, plan) for x in factors)
    axis = 0 if form.swapped else 1
    wide = jax.lax.dot_general(scale, ours, (((axis,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    levels = levels.astype(jnp.float32) + (form.offset or 0.0)
    x = _dot(queries, (levels * wide).astype(form.dtype))
    shifts = _dot(queries.astype(jnp.float32), zero.astype(jnp.float32), 1 - axis)
    return x + _dot(shifts, ours.astype(jnp.float32))


def _columns_of(ref, block, plan: _Plan):
    """Factors [H, n] bfloat16, or [n, H], of the columns at hand; those past the end are 0."""
    form, width = plan.keys, _columns(plan.keys, plan)
    x, count = _from_bits(ref[0, 0]), plan.slots // form.granule
    if count % width:
        first = block * (plan.block // form.granule) // width * width
        number = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0 if form.swapped else 1)
        x = jnp.where(number + first < count, x, 0.0)
    return x.astype(jnp.bfloat16)
