"""How vectors become codes: static, hashable descriptions. Which of them exist under what name, `jaxkv.quantization` says."""

from typing import NamedTuple


class Rounded(NamedTuple):
    """Round to nearest between the least and the largest number: code = round((x - zero) / scale) in 0 .. 2**bits - 1.

    group: adjacent channels of one token that share scale and zero; a head no longer, or no multiple of it, is one group.
    granule: above 1, scale and zero are those of one channel of so many adjacent tokens, and `group` is not used.
    """

    bits: int
    group: int = 64
    granule: int = 1


class Float8(NamedTuple):
    """An 8-bit float of so many bits of mantissa, 3 (e4m3fn) or 2 (e5m2), times a factor per group of channels."""

    mantissa: int
    group: int = 64
    bits: int = 8
    granule: int = 1


class Codebook(NamedTuple):
    """A rotation, then the nearest level: y = Hadamard (signs * x) / sqrt(block), code = nearest(y / factor).

    levels: 2**bits numbers, ascending and symmetric, for numbers of variance 1. signs: one +1 or -1 per channel. Heads that
    are no power of two are rotated in blocks of the largest power of two that divides them. unit: of the levels that codes are
    read as, levels / unit; the factor is stored for those.
    """

    bits: int
    levels: tuple[float, ...]
    signs: tuple[int, ...]
    unit: float = 1.0
    granule: int = 1


How = Rounded | Float8 | Codebook


def groups(how: How, channels: int) -> int:
    """Groups of channels that a vector has factors for."""
    size = getattr(how, "group", 0)
    return channels // size if size and channels % size == 0 else 1


def factors(how: How) -> int:
    """Factors per group."""
    return 2 if isinstance(how, Rounded) else 1
