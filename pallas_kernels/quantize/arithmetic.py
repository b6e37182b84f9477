"""The arithmetic of codes, for XLA and for kernels alike: the same numbers in, the same bits out.

Two programs that round differently would store different caches, so nothing here depends on how it is compiled:

- sums run over whole numbers that float32 or int32 hold exactly, so that their order does not matter and a multiplication
  that is fused with an addition changes nothing;
- nothing is divided by a constant (XLA multiplies by its inverse instead): what the quotient is for is checked by
  multiplying, which is exact for bfloat16 factors;
- bfloat16 and fp8 are rounded to by integer arithmetic, since XLA may leave out a conversion there and back.

Functions take float32 arrays and the axis of the numbers that share a factor, and return that axis with length 1.
"""

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = 1e30  # what an infinite number is stored as; its range still fits bfloat16
TINY = float(np.finfo(np.float32).tiny)  # smaller numbers are zero on some platforms, and therefore here
FINE = 10  # bits behind the point of the first part of a level; the second has as many more


def finite(x):
    """float32 with NaN as 0 and infinities as +-LARGEST, so that one bad number spoils one group, not a row; no -0, of which
    a minimum may or may not be made."""
    x = x.astype(jnp.float32)
    return jnp.clip(jnp.where((x != x) | (jnp.abs(x) < TINY), 0.0, x), -LARGEST, LARGEST)


def bits_of(x):
    """int32 bits of float32."""
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def of_bits(x):
    """float32 of int32 bits."""
    return jax.lax.bitcast_convert_type(x, jnp.float32)


def to_bfloat16(x):
    """The nearest bfloat16 number, ties to even, as float32. Finite numbers only."""
    bits = bits_of(x)
    return of_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000)


def least_multiple(x, n: int):
    """The smallest bfloat16 factor with factor * n >= x, as float32, for x >= 0 and n of at most 16 significant bits; 0
    where x is 0 or factors would be too small for float32."""
    near = to_bfloat16(jnp.maximum(x * np.float32(1 / n), TINY))
    below, above = of_bits(bits_of(near) - 0x10000), of_bits(bits_of(near) + 0x10000)
    n = np.float32(n)
    factor = jnp.where(below * n >= x, below, jnp.where(near * n >= x, near, above))
    return jnp.where(x >= n * np.float32(TINY), factor, 0.0)


def inverse(factor):
    """1 / factor, 0 for 0."""
    return jnp.where(factor > 0, 1.0 / jnp.where(factor > 0, factor, 1.0), 0.0)


def fit_integers(x, bits: int, axis: int):
    """Codes, float32 whole numbers in the shape of x, and (scale, zero)."""
    zero = to_bfloat16(x.min(axis=axis, keepdims=True))
    scale = least_multiple(jnp.maximum(x.max(axis=axis, keepdims=True) - zero, 0.0), 2**bits - 1)
    codes = jnp.clip(jnp.round((x - zero) * inverse(scale)), 0.0, float(2**bits - 1))
    return codes, (scale, zero)


def fit_float8(x, mantissa: int, axis: int):
    """Codes, int32 in the shape of x, and (factor,)."""
    factor = least_multiple(jnp.abs(x).max(axis=axis, keepdims=True), {3: 448, 2: 57344}[mantissa])
    return float8(x * inverse(factor), mantissa), (factor,)


def float8(x, mantissa: int):
    """int32 bits of the nearest e4m3fn (3 bits of mantissa) or e5m2 (2) number, ties to even; x within their range."""
    cut, bias = 23 - mantissa, {3: 7, 2: 15}[mantissa]
    bits = bits_of(jnp.abs(x))
    rounded = (bits + ((1 << (cut - 1)) - 1) + ((bits >> cut) & 1)) >> cut
    normal = rounded - ((127 - bias) << mantissa)
    step = 2.0 ** (1 - bias - mantissa)  # of numbers below the least normal one, whose bits are that many steps
    small = jnp.round(jnp.abs(x) * np.float32(1 / step)).astype(jnp.int32)
    magnitude = jnp.where(jnp.abs(x) < 2.0 ** (1 - bias), small, normal)
    return magnitude | jnp.where(x < 0, 0x80, 0)


def grid_bits(block: int) -> int:
    """Bits of whole numbers of which `block` add up exactly in float32."""
    return 24 - (block.bit_length() - 1)


def to_grid(x, top: int, axis: int):
    """Whole numbers up to 2**top in float32, and the powers of two that x was multiplied by, and their inverses."""
    exponent = jnp.maximum(bits_of(jnp.abs(x).max(axis=axis, keepdims=True)) >> 23, top)
    up, down = of_bits((top + 253 - exponent) << 23), of_bits((exponent - top + 1) << 23)
    return jnp.round(x * up), up, down


def fit_codebook(y, levels: tuple[float, ...], axis: int, pick):
    """The factor, not rounded, that is best (least squares) for the levels nearest to y over its root mean square. y: whole
    numbers in float32, see `to_grid`. pick: as `pick_in_turn`.

    y and levels are each the sum of two whole numbers of different weight, so that products are right to 20 bits.
    """
    channels = y.shape[axis]
    top = min(11, (31 - channels.bit_length()) // 2)
    high, up, down = to_grid(y, top, axis)
    y = y * up
    low, high = jnp.round((y - high) * np.float32(2**top)).astype(jnp.int32), high.astype(jnp.int32)
    total = lambda x: x.sum(axis=axis, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    square = total(high * high) + total(high * low) * np.float32(2 ** (1 - top))
    deviation = jnp.sqrt(square * np.float32(1 / channels))
    whole = pick(y, deviation, edges_of(levels), [round(level * 4**FINE) for level in levels])
    level = (whole + (1 << (FINE - 1))) >> FINE
    rest = whole - (level << FINE)
    products = (
        total(high * level) + total(low * level) * np.float32(2**-top) + total(high * rest) * np.float32(2**-FINE)
    )
    squares = total(level * level) + total(level * rest) * np.float32(2 ** (1 - FINE))
    return products / squares * np.float32(2**FINE) * down


def pick_in_turn(y, factor, edges, values):
    """int32 values[i] where i of the edges, times the factor, lie below y: one comparison after the other."""
    picked = jnp.full(y.shape, values[0], jnp.int32)
    for edge, value in zip(edges, values[1:], strict=True):
        picked = jnp.where(y > factor * edge, value, picked)
    return picked


def edges_of(levels) -> np.ndarray:
    """Midpoints between levels, float32."""
    levels = np.asarray(levels, np.float64)
    return ((levels[1:] + levels[:-1]) / 2).astype(np.float32)


def hadamard(signs: tuple[int, ...]) -> tuple[np.ndarray, int]:
    """[H, H] float32 of +-1 and 0 such that x @ it is rotated but for 1 / sqrt(block), and the block."""
    channels = len(signs)
    block = channels & -channels
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    whole = np.kron(np.eye(channels // block), matrix)
    return (np.asarray(signs, np.float64)[:, None] * whole).astype(np.float32), block


def codebook(x, rotate, how, block: int, axis: int, pick=pick_in_turn):
    """Codes, int32 in the shape of x, and (factor,). rotate: whole numbers times the matrix of `hadamard`. how: `Codebook`."""
    whole, up, down = to_grid(x, grid_bits(block), axis)
    y = rotate(whole)
    found = fit_codebook(y, how.levels, axis, pick) * np.float32(how.unit / np.sqrt(block)) * down
    factor = jnp.where(found >= TINY, to_bfloat16(found), 0.0)
    edges = edges_of(np.asarray(how.levels) / how.unit)
    codes = pick(y, factor * np.float32(np.sqrt(block)) * up, edges, range(2**how.bits))
    return codes, (factor,)
