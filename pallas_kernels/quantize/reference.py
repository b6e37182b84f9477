"""Codes in float64 numpy: one vector after another (or one channel of a group of tokens), the formulas as they are read."""

import numpy as np

from pallas_kernels.quantize.how import Codebook, Float8

FORMATS = {3: (7, 448.0), 2: (15, 57344.0)}  # bits of mantissa: bias and largest number of an fp8 format


def quantize(x, how):
    """x [B, P, S, H] finite -> codes [B, P, H, S] whole numbers, not packed; factors [B, P, groups, S], or [B, P, H, S /
    granule], as numbers; and how far each code is from being another one, [B, P, H, S], in steps."""
    x = np.asarray(x, np.float64)
    batch, rows, tokens, channels = x.shape
    if how.granule > 1:
        own = [(slice(s, s + how.granule), h) for s in range(0, tokens, how.granule) for h in range(channels)]
        shape = (batch, rows, tokens // how.granule, channels)
    else:
        size = getattr(how, "group", channels)
        size = size if channels % size == 0 else channels
        own = [(s, slice(h, h + size)) for s in range(tokens) for h in range(0, channels, size)]
        shape = (batch, rows, tokens, channels // size)
    codes, margins = np.zeros(x.shape, int), np.zeros(x.shape)
    factors = None
    for b, p in np.ndindex(batch, rows):
        for number, at in enumerate(own):
            found, factor, margin = one(x[b, p][at], how)
            codes[b, p][at], margins[b, p][at] = found, margin
            factors = np.zeros((len(factor), *shape)) if factors is None else factors
            factors[:, b, p].reshape(len(factor), -1)[:, number] = factor
    turned = lambda a: np.swapaxes(a, -1, -2)
    return turned(codes), tuple(map(turned, factors)), turned(margins)


def one(x, how):
    """Codes, factors and margins of numbers that share their factors."""
    if isinstance(how, Codebook):
        return by_codebook(x, how)
    if isinstance(how, Float8):
        levels = float8_numbers(how.mantissa)
        factor = least(np.abs(x).max(), levels[-1])
        codes, margins = nearest(np.abs(x) / (factor or 1.0), levels)
        return codes + 128 * (x < 0), (factor,), margins
    zero = near(x.min())
    scale = least(max(x.max() - zero, 0.0), 2.0**how.bits - 1)
    codes, margins = nearest((x - zero) / (scale or 1.0), np.arange(2.0**how.bits))
    return codes, (scale, zero), margins


def by_codebook(x, how):
    block = len(x) & -len(x)
    turned = np.concatenate([walsh(part) for part in (x * how.signs).reshape(-1, block)]) / np.sqrt(block)
    if not turned.any():
        return np.zeros(len(x), int), (0.0,), np.full(len(x), np.inf)
    levels = np.asarray(how.levels)
    first, _ = nearest(turned / np.sqrt(np.mean(turned**2)), levels)
    factor = near(how.unit * (turned @ levels[first]) / (levels[first] @ levels[first]))
    codes, margins = nearest(turned / factor, levels / how.unit)
    return codes, (factor,), margins


def walsh(x):
    """The Walsh-Hadamard transform, not normalized."""
    if len(x) == 1:
        return x
    a, b = walsh(x[: len(x) // 2]), walsh(x[len(x) // 2 :])
    return np.concatenate([a + b, a - b])


def nearest(x, levels):
    """Index of the nearest level, ties to the even index, and how far from the next edge x is."""
    edges = (levels[1:] + levels[:-1]) / 2
    below, upto = np.searchsorted(edges, x, "left"), np.searchsorted(edges, x, "right")
    margins = np.abs(np.asarray(x)[:, None] - edges).min(axis=1)
    return np.where(below % 2 == 0, below, upto), margins


def float8_numbers(mantissa):
    """The numbers >= 0 of an fp8 format, ascending: the code of each is its place."""
    bias, largest = FORMATS[mantissa]
    numbers = [m * 2.0 ** (1 - bias - mantissa) for m in range(2**mantissa)]
    for exponent in range(1, 32):
        numbers += [(1 + m / 2**mantissa) * 2.0 ** (exponent - bias) for m in range(2**mantissa)]
    return np.asarray([number for number in numbers if number <= largest])


def near(x):
    """The nearest bfloat16 number: 8 significant bits."""
    mantissa, exponent = np.frexp(x)
    return float(np.ldexp(np.rint(mantissa * 256), exponent - 8))


def least(x, n):
    """The smallest bfloat16 number that is x or more when multiplied by n."""
    mantissa, exponent = np.frexp(x / n)
    factor = float(np.ldexp(np.ceil(mantissa * 256 - 1e-9), exponent - 8))
    return factor
