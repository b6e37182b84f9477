"""Keys and values read as codes, in XLA: nothing is unpacked into memory.

    x[h, s] = scale[s] * level(code[h, s]) + zero[s]

Scale and zero multiply logits and weights, one number per slot, and never the entries. A dot product with codes is a sum
over channels (keys), or over a few slices of the slots (values), written out, TERMS at a time: XLA then makes one loop of
it that takes codes from memory and computes on vectors of slots. On two CPU cores this takes about as long as the dot
product of float32 arrays, where unpacking first takes three to four times as long.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

TERMS = 16  # written-out terms of one sum: more save little memory traffic and cost seconds of compilation


class Packed(NamedTuple):
    """Codes of keys, [B, P, H', S], or of values, the same or (`slots_minor` False, 16 bits) [B, P, S, H].

    bits: of a code; 3 bits are a plane of 2 and a plane of 1, 16 are those of bfloat16. level: codes -> float32. scale,
    zero: [B, P, groups, S] with H / groups adjacent channels each, or None for 1 and 0; bfloat16 bits in uint16 as they are
    stored, or float32. granule: above 1, they are those of one channel of so many adjacent slots of keys, [B, P, H, S /
    granule].
    """

    codes: Any
    bits: int
    level: Callable[[Any], Any]
    scale: Any = None
    zero: Any = None
    slots_minor: bool = True
    granule: int = 1


def wide_factors(packed: Packed) -> Packed:
    """The same with float32 factors."""
    widen = lambda x: x if x is None or x.dtype != jnp.uint16 else jax.lax.bitcast_convert_type(x, jnp.bfloat16)
    wide = lambda x: None if x is None else widen(x).astype(jnp.float32)
    return packed._replace(scale=wide(packed.scale), zero=wide(packed.zero))


def logits(queries, keys: Packed):
    """queries [B, P, G, H] float32 times keys -> [B, P, G, S] float32."""
    keys, channels = wide_factors(keys), queries.shape[-1]
    if keys.granule > 1:
        zeros = jnp.einsum("bpgh,bphn->bpgn", queries, keys.zero)
        return _dot(queries, keys, range(channels)) + jnp.repeat(zeros, keys.granule, axis=-1)
    if keys.scale is None:
        return _dot(queries, keys, range(channels))
    size, total = channels // keys.scale.shape[2], []
    for group in range(keys.scale.shape[2]):
        wanted = range(group * size, (group + 1) * size)
        part = _dot(queries, keys, wanted) * keys.scale[:, :, group, None]
        if keys.zero is not None:
            own = queries[..., wanted.start : wanted.stop].sum(axis=-1, keepdims=True)
            part = part + own * keys.zero[:, :, group, None]
        total.append(part)
    return functools.reduce(operator.add, total)


def weighted(weights, values: Packed, channels: int):
    """weights [B, P, G, S] float32 times values -> [B, P, G, H] float32."""
    values = wide_factors(values)
    if values.scale is None:
        return _mean(weights, values, range(channels), channels)
    size, out = channels // values.scale.shape[2], []
    for group in range(values.scale.shape[2]):
        own = _mean(
            weights * values.scale[:, :, group, None], values, range(group * size, (group + 1) * size), channels
        )
        if values.zero is not None:
            own = own + (weights * values.zero[:, :, group, None]).sum(axis=-1, keepdims=True)
        out.append(own)
    return jnp.concatenate(out, axis=-1)


def _sum(terms):
    return functools.reduce(operator.add, terms)


def _planes(bits):
    """(width, first bit) of each plane."""
    return ((2, 0), (1, 2)) if bits == 3 else ((bits, 0),)


def _field(x, width, place, shift):
    """Bits `place * width`... of bytes, moved to bit `shift`; whole codes as they are."""
    if width >= 8:
        return x
    x = (x >> jnp.asarray(place * width).astype(x.dtype)) & jnp.asarray((1 << width) - 1, x.dtype)
    return x << jnp.asarray(shift, x.dtype) if shift else x


def _dot(queries, keys: Packed, wanted: range):
    """sum over the wanted channels h of queries[h] * level(code[h, s]), times scale[h, s] where slots share it."""
    size, channels = math.gcd(len(wanted), TERMS), queries.shape[-1]
    slots = keys.codes.shape[3:] if keys.granule == 1 else (keys.codes.shape[3] // keys.granule, keys.granule)

    def step(number, total):
        start = wanted.start + number * size
        rows = _block(keys, start, size, channels)
        own = jax.lax.dynamic_slice_in_dim(queries, start, size, axis=3)
        if keys.granule > 1:
            own = own[..., None] * jax.lax.dynamic_slice_in_dim(keys.scale, start, size, axis=2)[:, :, None]
        level = lambda h: keys.level(rows(h)).reshape(*queries.shape[:2], 1, *slots)
        return total + _sum([own[:, :, :, h, ..., None] * level(h) for h in range(size)])

    zeros = jnp.zeros((*queries.shape[:3], *slots), jnp.float32)
    total = jax.lax.fori_loop(0, len(wanted) // size, step, zeros)
    return total.reshape(*queries.shape[:3], -1)


def _block(packed: Packed, start, size: int, channels: int):
    """h -> codes [B, P, S] of channel start + h; `size` channels from `start`, a multiple of it, are whole bytes."""
    planes, first = [], 0
    for width, shift in _planes(packed.bits):
        per = max(1, 8 // width)
        rows = jax.lax.dynamic_slice_in_dim(packed.codes, first + start // per, size // per, axis=2)
        planes.append((rows, per, width, shift))
        first += channels // per

    def codes(h):
        fields = [_field(rows[:, :, h // per], width, h % per, shift) for rows, per, width, shift in planes]
        return functools.reduce(operator.or_, fields)

    return codes


def _mean(weights, values: Packed, wanted: range, channels: int):
    """sum over s of weights[s] * level(code[h, s]) for the wanted channels."""
    cut = lambda x, axis, i: jax.lax.slice_in_dim(x, i * width, (i + 1) * width, axis=axis)
    slots = weights.shape[-1]
    if not values.slots_minor:
        pieces = _pieces(slots, TERMS)
        width = slots // pieces
        terms = [
            cut(weights, 3, i)[..., None] * values.level(cut(values.codes, 2, i))[:, :, None] for i in range(pieces)
        ]
        return jnp.einsum("bpgsh,s->bpgh", _sum(terms), jnp.ones((width,), jnp.float32))
    per = max(1, 8 // _planes(values.bits)[-1][0])  # channels that share a byte of the narrowest plane
    pieces = _pieces(slots, TERMS)
    width, ones = slots // pieces, jnp.ones((slots // pieces,), jnp.float32)

    def one(place):
        codes = _every(values, place, per, wanted, channels)
        terms = [cut(weights, 3, i)[:, :, :, None] * values.level(cut(codes, 3, i))[:, :, None] for i in range(pieces)]
        return jnp.einsum("bpghs,s->bpgh", _sum(terms), ones)

    if per == 1:
        return one(0)
    out = jax.lax.map(one, jnp.arange(per, dtype=jnp.int32))  # a loop, so that it is compiled once
    return jnp.moveaxis(out, 0, -1).reshape(*weights.shape[:3], len(wanted))


def _every(packed: Packed, place, per: int, wanted: range, channels: int):
    """Codes [B, P, n, S] of channels place, place + per, ... among the wanted."""
    codes, first = None, 0
    for width, shift in _planes(packed.bits):
        here = max(1, 8 // width)
        rows = packed.codes[:, :, first + wanted.start // here : first + wanted.stop // here]
        if per > here:
            rows = rows.reshape(*rows.shape[:2], -1, per // here, rows.shape[3])
            rows = jax.lax.dynamic_index_in_dim(rows, place // here, axis=3, keepdims=False)
        rows = _field(rows, width, place % here, shift)
        codes = rows if codes is None else codes | rows
        first += channels // here
    return codes


def _pieces(slots: int, most: int) -> int:
    """Into how many slices the slots are cut: as many as allowed, of a multiple of 16 slots if that is possible."""
    unit = next(unit for unit in (16, 8, 1) if slots % unit == 0)
    return max(n for n in range(1, most + 1) if slots // unit % n == 0)
