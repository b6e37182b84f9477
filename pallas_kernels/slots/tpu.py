"""A kernel that fetches the tile in which a slot lies, and stores it; the rest of the array stays where it is.

    [B, P, C, S]   tile [C, 128]   the slot is a lane        [B, P, S, C]   tile [32, C]   the slot is a row

All arrays of a tier go through one call, a step for each block row. Which tile, the indices of the blocks say, which are
computed from the slots in scalar memory before the step.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
ROWS = 32  # of a tile of bytes; wider dtypes have fewer, which divide it
DTYPES = ("uint8", "uint16", "float32")


def why_not(arrays, new, slot, *, axes, groups) -> str | None:
    """Why the kernels do not take this case."""
    for x, axis in zip(arrays, axes, strict=True):
        if x.shape[axis] != groups:
            return "groups of slots are read and written by XLA"
        if x.dtype.name not in DTYPES:
            return f"it moves {', '.join(DTYPES)}, not {x.dtype.name}"
        if 0 in x.shape:
            return "there is nothing to move"
    return None


def _tile(x, axis):
    """How many slots a block has."""
    return min(x.shape[axis], LANES if axis == 3 else ROWS)


def _block(x, axis):
    """The block that has the slot."""
    tile, slots, heads = _tile(x, axis), x.shape[axis], x.shape[1]
    shape = (1, 1, x.shape[2], tile) if axis == 3 else (1, 1, tile, x.shape[3])

    def index(b, p, slot):
        at = jnp.minimum(slot[b * heads + p], slots - 1) // tile
        return (b, p, 0, at) if axis == 3 else (b, p, at, 0)

    return pl.BlockSpec(shape, index)


def _one(x, axis):
    """The block of a single slot."""
    shape = (1, 1, x.shape[2], 1) if axis == 3 else (1, 1, 1, x.shape[3])
    return pl.BlockSpec(shape, lambda b, p, slot: (b, p, 0, 0))


def _bits(x):
    """As whole numbers of 32 bits: of floats their bits, so that sums and choices change nothing."""
    return jax.lax.bitcast_convert_type(x, jnp.int32) if x.dtype == jnp.float32 else x.astype(jnp.int32)


def _from_bits(x, dtype):
    return jax.lax.bitcast_convert_type(x, dtype) if dtype == jnp.float32 else x.astype(dtype)


def _there(slot_ref, ref, axis, slots, *, clip):
    """Which element of the block is the slot, [C, tile] or [tile, C] bool."""
    b, p = pl.program_id(0), pl.program_id(1)
    given = slot_ref[b * pl.num_programs(1) + p]
    last, tile = jnp.minimum(given, slots - 1), ref.shape[axis]
    place = jax.lax.broadcasted_iota(jnp.int32, ref.shape[2:], axis - 2) + last // tile * tile
    return place == (last if clip else given)


def _read_kernel(slot_ref, *refs, axes, slots):
    # Input: a block [1, 1, C, tile] or [1, 1, tile, C] of each array. Output: [1, 1, C, 1] or [1, 1, 1, C] of each
    count = len(axes)
    for ref, out, axis, size in zip(refs[:count], refs[count:], axes, slots, strict=True):
        there = _there(slot_ref, ref, axis, size, clip=True)
        found = jnp.where(there, _bits(ref[0, 0]), 0).sum(axis=axis - 2, keepdims=True)
        out[0, 0] = _from_bits(found, out.dtype)


def _write_kernel(slot_ref, *refs, axes, slots):
    # Input: [1, 1, C, 1] or [1, 1, 1, C] of each, then the blocks. Output: the blocks, in place
    count = len(axes)
    for new, ref, out, axis, size in zip(
        refs[:count], refs[count : 2 * count], refs[2 * count :], axes, slots, strict=True
    ):
        there = _there(slot_ref, ref, axis, size, clip=False)
        out[0, 0] = _from_bits(jnp.where(there, _bits(new[0, 0]), _bits(ref[0, 0])), out.dtype)


def _cost(arrays, axes, times):
    """Of one call that moves each tile so many times, and one slot of it."""
    moved = sum(
        x.size // x.shape[axis] * x.dtype.itemsize * (_tile(x, axis) * times + 1)
        for x, axis in zip(arrays, axes, strict=True)
    )
    return pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=moved)


def _where_they_lie(arrays, interpret):
    """Not in fast memory, where XLA would bring an array that fits, whole, and back."""
    return arrays if interpret else [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]


@functools.partial(jax.jit, static_argnames=("axes", "interpret"))
def _read(arrays, slot, *, axes, interpret):
    one = lambda x, axis: jax.ShapeDtypeStruct((*x.shape[:axis], 1, *x.shape[axis + 1 :]), x.dtype)
    pairs = list(zip(arrays, axes, strict=True))
    return pl.pallas_call(
        functools.partial(_read_kernel, axes=axes, slots=[x.shape[axis] for x, axis in pairs]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=slot.shape,
            in_specs=[_block(x, axis) for x, axis in pairs],
            out_specs=tuple(_one(x, axis) for x, axis in pairs),
        ),
        out_shape=tuple(one(x, axis) for x, axis in pairs),
        cost_estimate=_cost(arrays, axes, 1),
        interpret=interpret,
        name="read_slot",
    )(slot.reshape(math.prod(slot.shape)).astype(jnp.int32), *_where_they_lie(arrays, interpret))


@functools.partial(jax.jit, static_argnames=("axes", "interpret"))
def _write(arrays, new, slot, *, axes, interpret):
    pairs = list(zip(arrays, axes, strict=True))
    blocks = [_block(x, axis) for x, axis in pairs]
    return pl.pallas_call(
        functools.partial(_write_kernel, axes=axes, slots=[x.shape[axis] for x, axis in pairs]),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=slot.shape,
            in_specs=[*(_one(x, axis) for x, axis in pairs), *blocks],
            out_specs=tuple(blocks),
        ),
        out_shape=tuple((jax.ShapeDtypeStruct if interpret else pltpu.HBM)(x.shape, x.dtype) for x in arrays),
        input_output_aliases={1 + len(arrays) + number: number for number in range(len(arrays))},
        cost_estimate=_cost(arrays, axes, 2),
        interpret=interpret,
        name="write_slot",
    )(slot.reshape(math.prod(slot.shape)).astype(jnp.int32), *new, *_where_they_lie(arrays, interpret))


def run(arrays, new, slot, *, axes, groups, interpret=False):
    """`write_slot`, or `read_slot` where there is nothing new."""
    if new is None:
        return _read(arrays, slot, axes=axes, interpret=interpret)
    return _write(arrays, new, slot, axes=axes, interpret=interpret)


interpreted = functools.partial(run, interpret=True)
