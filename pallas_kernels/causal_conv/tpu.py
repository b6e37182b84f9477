"""Causal convolution by kernels of our own. A step reads one block of positions and the few before it (or, for gradients,
behind it), which it is given as a second view of the same array:

    x    ... [ NEAR ][      block      ]      result of the block: Kw slices, each shifted by one position
    dy                [      block      ][ NEAR ] ...                 gradient of x: the same, the other way round

Gradients of filters and bias stay in VMEM while positions, rows and, if they share filters, heads go by.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cost import estimate

NEAR = 16  # positions beside a block that a step can see: a whole tile of bfloat16
BLOCK = 512  # positions of one step
CHANNELS = 512  # channels of one step


def why_not(x, taps, filters, *_) -> str | None:
    """Why the kernels do not take this case."""
    if any(a.dtype not in (jnp.float32, jnp.bfloat16) for a in (x, taps, filters)):
        return "it reads float32 and bfloat16"
    if taps.shape[2] > NEAR:
        return f"it reads {NEAR} positions beside a block, fewer than filters of {taps.shape[2] + 1} need"
    if x.shape[2] < NEAR or 0 in x.shape:
        return f"it takes {NEAR} positions or more, and XLA is as fast for fewer"
    return None


def _block(length: int) -> int:
    return min(BLOCK, length // NEAR * NEAR)


def _float(ref):
    return ref[0, 0].astype(jnp.float32)


def _forward(near_ref, x_ref, taps_ref, filters_ref, bias_ref, out_ref):
    # Input: near [NEAR, C] before x [t, C]; taps [NEAR, C], the last of them used; filters [1, Kw, C]; bias [1, 1, C]
    # Output: [t, C]
    width, length = filters_ref.shape[1], x_ref.shape[2]
    before = jnp.where(pl.program_id(3) == 0, _float(taps_ref), _float(near_ref))
    read = jnp.concatenate([before, _float(x_ref)], axis=0)
    total = jnp.zeros(x_ref.shape[2:], jnp.float32)
    for k in range(width):
        start = NEAR - (width - 1) + k
        total = total + filters_ref[0, k : k + 1] * read[start : start + length]
    out_ref[0, 0] = (total + bias_ref[0]).astype(out_ref.dtype)


def _backward(near_ref, x_ref, taps_ref, filters_ref, dy_ref, behind_ref, dx_ref, df_ref, db_ref, *, total, fresh):
    # Input: as `_forward`; dy [t, C] and the NEAR positions behind it. total: positions of a row
    # Output: dx [t, C]; df [1, Kw, C] and db [1, 1, C], sums over all steps since `fresh` axes of the grid were all 0
    width, length, step = filters_ref.shape[1], x_ref.shape[2], pl.program_id(3)
    inside = lambda start, x: jnp.where(
        start + jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < total, x, 0.0
    )  # what lies past the end of a row may be anything
    x, dy = inside(step * length, _float(x_ref)), inside(step * length, _float(dy_ref))
    behind = inside((step + 1) * length, _float(behind_ref))
    read = jnp.concatenate([jnp.where(step == 0, _float(taps_ref), _float(near_ref)), x], axis=0)
    ahead = jnp.concatenate([dy, behind], axis=0)

    @pl.when(functools.reduce(jnp.logical_and, [pl.program_id(axis) == 0 for axis in fresh]))
    def _():
        df_ref[...] = jnp.zeros_like(df_ref)
        db_ref[...] = jnp.zeros_like(db_ref)

    dx = jnp.zeros(x.shape, jnp.float32)
    for k in range(width):
        dx = dx + filters_ref[0, k : k + 1] * ahead[width - 1 - k : width - 1 - k + length]
        start = NEAR - (width - 1) + k
        df_ref[0, k : k + 1] += (dy * read[start : start + length]).sum(axis=0, keepdims=True)
    dx_ref[0, 0] = dx.astype(dx_ref.dtype)
    db_ref[0] += dy.sum(axis=0, keepdims=True)


def _specs(x, taps, filters):
    """Grid (channel blocks, N, B, position blocks), and the blocks that both kernels read."""
    batch, heads, length, size = x.shape
    shared, block, channels = filters.shape[1] < heads, _block(length), min(size, CHANNELS)
    per, last = block // NEAR, (length - 1) // NEAR
    at = lambda positions, place: pl.BlockSpec(
        (1, 1, positions, channels), lambda c, n, b, t, place=place: (b, n, place(t), c)
    )
    own = lambda rows: pl.BlockSpec((1, rows, channels), lambda c, n, b, t: (0 if shared else n, 0, c))
    return {
        "grid": (pl.cdiv(size, channels), heads, batch, pl.cdiv(length, block)),
        "shared": shared,
        "near": at(NEAR, lambda t: jnp.maximum(t * per - 1, 0)),
        "behind": at(NEAR, lambda t: jnp.minimum((t + 1) * per, last)),
        "block": at(block, lambda t: t),
        "taps": at(NEAR, lambda t: 0),
        "filters": own(filters.shape[0]),
        "bias": own(1),
    }


def _inputs(taps, filters):
    """Taps [B, N, NEAR, H], zeros in front; filters [M, Kw, H] float32."""
    front = NEAR - taps.shape[2]
    return jnp.pad(taps, ((0, 0), (0, 0), (front, 0), (0, 0))), jnp.swapaxes(filters.astype(jnp.float32), 0, 1)


@functools.partial(jax.jit, static_argnames="interpret")
def _run_forward(x, taps, filters, bias, *, interpret):
    specs = _specs(x, taps, filters)
    return pl.pallas_call(
        _forward,
        grid=specs["grid"],
        in_specs=[specs[name] for name in ("near", "block", "taps", "filters", "bias")],
        out_specs=specs["block"],
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 4),
        cost_estimate=estimate([x, x, taps, filters, bias], flops=2 * filters.shape[0] * x.size),
        interpret=interpret,
        name="causal_conv",
    )(x, x, *_inputs(taps, filters), bias.astype(jnp.float32)[:, None])


@functools.partial(jax.jit, static_argnames="interpret")
def _run_backward(x, taps, filters, gradient, *, interpret):
    specs = _specs(x, taps, filters)
    taps, filters = _inputs(taps, filters)
    heads, _, size = filters.shape
    dx, df, db = pl.pallas_call(
        functools.partial(_backward, total=x.shape[2], fresh=(1, 2, 3) if specs["shared"] else (2, 3)),
        grid=specs["grid"],
        in_specs=[specs[name] for name in ("near", "block", "taps", "filters", "block", "behind")],
        out_specs=[specs[name] for name in ("block", "filters", "bias")],
        out_shape=[
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(filters.shape, jnp.float32),
            jax.ShapeDtypeStruct((heads, 1, size), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary" if specs["shared"] else "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=estimate([x, x, taps, filters, gradient], flops=4 * filters.shape[1] * x.size),
        interpret=interpret,
        name="causal_conv_backward",
    )(x, x, taps, filters, gradient, gradient)
    return dx, jnp.swapaxes(df, 0, 1), db[:, 0]


def forward(x, taps, filters, bias):
    return _run_forward(x, taps, filters, bias, interpret=False)


def backward(x, taps, filters, gradient):
    return _run_backward(x, taps, filters, gradient, interpret=False)


def forward_interpreted(x, taps, filters, bias):
    return _run_forward(x, taps, filters, bias, interpret=True)


def backward_interpreted(x, taps, filters, gradient):
    return _run_backward(x, taps, filters, gradient, interpret=True)
