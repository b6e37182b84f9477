"""Codes by a kernel of our own: tokens come in as they are, [S, H], and leave packed and slots-minor, [H', S].

    x [bs, H] ─ transposed ─> [H, bs] ─ codes ─> [H, bs] whole numbers ─ powers of two ─> [H', bs] bytes

Bytes are packed by a matrix product: byte r = sum of code[h] * 2**place[h] over its channels, at most 255, and exact. The
rotation of a codebook is a product of whole numbers with +-1, also exact. Everything else is `arithmetic`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.cost import estimate
from pallas_kernels.quantize import arithmetic
from pallas_kernels.quantize.how import Codebook, Float8, factors, groups
from pallas_kernels.quantize.xla import PLANES

BLOCK = 512  # tokens of one step
LANES = 128


def why_not(x, *, how) -> str | None:
    """Why the kernel does not take this case."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it reads float32 and bfloat16, not {x.dtype.name}"
    if 0 in x.shape:
        return "there is nothing to encode"
    if isinstance(how, Codebook) and x.shape[3] > 256:
        return f"codebooks rotate heads of up to 256 channels, not {x.shape[3]}"
    return None


def packing(bits: int, channels: int) -> list[np.ndarray]:
    """One [H', H] of powers of two per plane: bytes = the sum over planes of matrix @ fields."""
    total, first, matrices = channels * bits // 8, 0, []
    for width in PLANES[bits]:
        per = 8 // width
        matrix, channel = np.zeros((total, channels), np.float32), np.arange(channels)
        matrix[first + channel // per, channel] = 2.0 ** (width * (channel % per))
        matrices.append(matrix)
        first += channels // per
    return matrices


def _product(a, b, precision=None):
    return jax.lax.dot_general(
        a, b, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )  # fmt: skip


def _kernel(*refs, how, inputs):
    # Input: x [bs, H]; matrices [H', H] bfloat16, one per plane; of codebooks the rotation [H, H] float32
    # Output: codes [H', bs] uint8; factors [groups, bs] bfloat16 each, or [bs / granule, H]
    (x_ref, *constants), (codes_ref, *factor_refs) = refs[:inputs], refs[inputs:]
    x = arithmetic.finite(x_ref[0, 0])
    if how.granule > 1:
        tokens, channels = x.shape
        codes, found = arithmetic.fit_integers(x.reshape(-1, how.granule, channels), how.bits, 1)
        codes, found = codes.reshape(tokens, channels).T, [factor[:, 0] for factor in found]
    else:
        codes, found = _per_token(x.T, how, constants)
    codes_ref[0, 0] = _packed(codes, how.bits, constants).astype(jnp.int32).astype(jnp.uint8)
    for ref, factor in zip(factor_refs, found, strict=True):
        ref[0, 0] = factor.astype(jnp.bfloat16)


def _per_token(x, how, constants):
    """Codes [H, bs], and factors [groups, bs] each, of x [H, bs]."""
    if isinstance(how, Codebook):
        rotate = lambda whole: _product(constants[-1][...], whole, "highest")
        block = len(how.signs) & -len(how.signs)
        return arithmetic.codebook(x, rotate, how, block, 0)
    count = groups(how, x.shape[0])
    parts = x.reshape(count, -1, x.shape[1])
    fit = (
        functools.partial(arithmetic.fit_float8, mantissa=how.mantissa)
        if isinstance(how, Float8)
        else functools.partial(arithmetic.fit_integers, bits=how.bits)
    )
    codes, found = fit(parts, axis=1)
    return codes.reshape(x.shape), [factor[:, 0] for factor in found]


def _packed(codes, bits, matrices):
    """float32 [H', bs] of codes [H, bs]."""
    if bits == 8:
        return codes
    if bits != 3:
        return _product(matrices[0][...], codes.astype(jnp.bfloat16))
    codes = codes.astype(jnp.int32)
    fields = (codes & 3, codes >> 2)
    return sum(
        _product(m[...], field.astype(jnp.float32).astype(jnp.bfloat16))
        for m, field in zip(matrices, fields, strict=False)
    )


@functools.partial(jax.jit, static_argnames=("how", "interpret"))
def _call(x, *, how, interpret):
    batch, rows, tokens, channels = x.shape
    if how.granule == 1 and tokens < LANES:  # few tokens a row: the rows' vectors make the lanes
        codes, found = _run(x.reshape(1, 1, -1, channels), how, interpret)
        back = lambda y: jnp.moveaxis(y.reshape(-1, batch, rows, tokens), 0, 2)
        return back(codes), tuple(map(back, found))
    return _run(x, how, interpret)


def _run(x, how, interpret):
    batch, rows, tokens, channels = x.shape
    block = min(BLOCK, tokens)
    constants = [jnp.asarray(m, jnp.bfloat16) for m in packing(how.bits, channels)] if how.bits < 8 else []
    if isinstance(how, Codebook):
        constants.append(jnp.asarray(arithmetic.hadamard(how.signs)[0].T))
    whole = lambda shape: pl.BlockSpec(shape, lambda b, p, s: (0, 0))
    minor = lambda count: pl.BlockSpec((1, 1, count, block), lambda b, p, s: (b, p, 0, s))
    major = lambda count: pl.BlockSpec((1, 1, count, channels), lambda b, p, s: (b, p, s, 0))
    out = lambda dtype, *axes: jax.ShapeDtypeStruct((batch, rows, *axes), dtype)
    bytes_ = channels * how.bits // 8
    if how.granule > 1:
        shape, spec = out(jnp.bfloat16, tokens // how.granule, channels), major(block // how.granule)
    else:
        shape, spec = out(jnp.bfloat16, groups(how, channels), tokens), minor(groups(how, channels))
    shapes = [out(jnp.uint8, bytes_, tokens), *[shape] * factors(how)]
    products = sum(c.size for c in constants)  # of a token: rotation and packing
    codes, *found = pl.pallas_call(
        functools.partial(_kernel, how=how, inputs=1 + len(constants)),
        grid=(batch, rows, pl.cdiv(tokens, block)),
        in_specs=[major(block), *(whole(c.shape) for c in constants)],
        out_specs=[minor(bytes_), *[spec] * factors(how)],
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        cost_estimate=estimate([x, *constants, *shapes], flops=2 * products * batch * rows * tokens),
        interpret=interpret,
        name="quantize",
    )(x, *constants)
    if how.granule > 1:  # one number per channel and 32 tokens: turned by XLA, since so few lanes make no block
        found = [jnp.swapaxes(factor, -1, -2) for factor in found]
    return codes, tuple(jax.lax.bitcast_convert_type(factor, jnp.uint16) for factor in found)


def quantize(x, *, how):
    return _call(x, how=how, interpret=False)


def interpreted(x, *, how):
    return _call(x, how=how, interpret=True)
