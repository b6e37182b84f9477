"""Keys and values read as codes, in XLA: a block of slots at a time.

    entry[h, s] = scale[s] * level(code[h, s]) + zero[s]

A loop decodes a block to float32 entries, few enough to stay in a processor's cache, and multiplies these as any matrix: no
tier is decoded as a whole unless it is one block. On two CPU cores this takes about as long as reading float32 arrays from
memory. (Sums written out over the codes, which decode nothing into memory, took half as long again, and up to 25 times as
long where slots are no power of two or lie in short rows.)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

CACHED = 2**19  # entries of a block on CPU: 2 MiB. Each block costs a few launches, and each row of it one
LARGE = 2**24  # elsewhere: 64 MiB, since large operations alone fill a device
ALIGNED = 32  # blocks begin at multiples of this, and so of every granule


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


def logits(queries, keys: Packed):
    """queries [B, P, G, H] float32 times keys -> [B, P, G, S] float32."""
    return _by_platform(_logits, queries, keys)


def weighted(weights, values: Packed, channels: int):
    """weights [B, P, G, S] float32 times values -> [B, P, G, H] float32."""
    return _by_platform(functools.partial(_weighted, channels=channels), weights, values)


def _by_platform(run, rows, packed: Packed):
    """run(rows, packed, most entries of a block), on [B * P, ...]."""
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    arrays = {"codes": packed.codes, "scale": packed.scale, "zero": packed.zero}
    stored = {name: flat(x) for name, x in arrays.items() if x is not None}
    of = lambda most: lambda rows, stored: run(rows, packed._replace(**stored), most)
    out = lax.platform_dependent(flat(rows), stored, cpu=of(CACHED), default=of(LARGE))
    return out.reshape(*rows.shape[:2], *out.shape[1:])


def _logits(queries, keys: Packed, most: int):
    (rows, group, channels), slots = queries.shape, keys.codes.shape[-1]
    cut = _blocks(rows, slots, channels, most)
    queries = _by_place(queries, _places(keys.bits))

    def step(number, out):
        row, slot, _ = cut.at(number)
        own = lax.dynamic_slice_in_dim(queries, row, cut.rows, axis=0)
        part = _product("rgh,rhs->rgs", own, _entries(keys, row, slot, cut, channels))
        return lax.dynamic_update_slice(out, part, (row, 0, slot))

    return lax.fori_loop(0, cut.number, step, jnp.zeros((rows, group, slots), jnp.float32))


def _weighted(weights, values: Packed, most: int, *, channels: int):
    rows, group, slots = weights.shape
    cut = _blocks(rows, slots, channels, most)
    form = "rgs,rhs->rhg" if values.slots_minor else "rgs,rsh->rhg"  # XLA:CPU is twice as fast for these as for rgh

    def step(number, out):
        row, slot, seen = cut.at(number)
        own = lax.dynamic_slice(weights, (row, 0, slot), (cut.rows, group, cut.slots))
        if cut.across > 1:
            own = jnp.where((slot + jnp.arange(cut.slots) >= seen)[None, None], own, 0.0)
        part = _product(form, own, _entries(values, row, slot, cut, channels))
        if cut.across > 1:
            part = part + lax.dynamic_slice(out, (row, 0, 0), part.shape)
        return lax.dynamic_update_slice(out, part, (row, 0, 0))

    out = lax.fori_loop(0, cut.number, step, jnp.zeros((rows, channels, group), jnp.float32))
    return _in_order(jnp.swapaxes(out, 1, 2), _places(values.bits))


_product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)  # else a TPU rounds both sides to bfloat16


class _Blocks(NamedTuple):
    """How rows and slots are cut: blocks of so many; `across` blocks hold all slots, `number` everything."""

    rows: int
    slots: int
    across: int
    number: int
    total: tuple[int, int]

    def at(self, number):
        """First row and slot of a block, and the first slot that no block before it has: the last ones are moved back to
        be whole."""
        seen = number % self.across * self.slots
        row = jnp.minimum(number // self.across * self.rows, self.total[0] - self.rows)
        return row, jnp.minimum(seen, self.total[1] - self.slots), seen


def _blocks(rows: int, slots: int, channels: int, most: int) -> _Blocks:
    across = -(-slots * channels // most)
    width = min(slots, -(-slots // (across * ALIGNED)) * ALIGNED)
    across = -(-slots // width)
    height = min(rows, max(1, most // (width * channels))) if across == 1 else 1
    return _Blocks(height, width, across, -(-rows // height) * across, (rows, slots))


def _entries(packed: Packed, row, slot, cut: _Blocks, channels: int):
    """Decoded, [rows, H by place, slots] float32, or [rows, slots, H] as they are stored."""
    if not packed.slots_minor:
        codes = lax.dynamic_slice(packed.codes, (row, slot, 0), (cut.rows, cut.slots, channels))
        return lax.optimization_barrier(packed.level(codes))
    size, places = packed.granule, _places(packed.bits)
    read = lambda first, number: lax.dynamic_slice(packed.codes, (row, first, slot), (cut.rows, number, cut.slots))
    codes = _codes(read, packed.codes.shape[1], packed.bits)
    x = packed.level(codes).reshape(cut.rows, places, channels // places, -1, size)

    def factor(stored):
        groups = stored.shape[1]
        own = _wide(lax.dynamic_slice(stored, (row, 0, slot // size), (cut.rows, groups, cut.slots // size)))
        if size > 1:  # one of each channel
            return jnp.swapaxes(own.reshape(cut.rows, -1, places, cut.slots // size), 1, 2)[..., None]
        return jnp.repeat(own, x.shape[2] // groups, axis=1)[:, None, ..., None]

    if packed.scale is not None:
        x = x * factor(packed.scale)
    if packed.zero is not None:
        x = x + factor(packed.zero)
    # Else the decoding becomes part of the product, which XLA:CPU then makes without its library
    return lax.optimization_barrier(x.reshape(cut.rows, channels, cut.slots))


def _wide(factor):
    """float32, also of bfloat16 bits in uint16."""
    if factor.dtype == jnp.uint16:
        factor = lax.bitcast_convert_type(factor, jnp.bfloat16)
    return factor.astype(jnp.float32)


def _places(bits: int) -> int:
    """How many adjacent channels share a byte, of the wider plane: channel h is in place h % places of byte h // places."""
    return {4: 2, 3: 4, 2: 4}.get(bits, 1)


def _by_place(x, places: int):
    """Channels, the last axis: those of the first place, then those of the second, ..."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], -1, places), -1, -2).reshape(x.shape)


def _in_order(x, places: int):
    """The inverse of `_by_place`."""
    return jnp.swapaxes(x.reshape(*x.shape[:-1], places, -1), -1, -2).reshape(x.shape)


def _codes(read, bytes_: int, bits: int):
    """Codes [rows, places, H / places, slots]. read(first, number): so many of `bytes_` bytes of each slot of the block."""
    if bits >= 8:
        return read(0, bytes_)[:, None]
    places = np.arange(_places(bits))[None, :, None, None]
    if bits != 3:
        return _field(read(0, bytes_)[:, None], bits * places, bits)
    wide = bytes_ * 2 // 3
    bit = places + 4 * (np.arange(wide) % 2)[:, None]
    low, high = read(0, wide), jnp.repeat(read(wide, bytes_ - wide), 2, axis=1)
    return _field(low[:, None], 2 * places, 2) | _field(high[:, None], bit, 1) << jnp.uint8(2)


def _field(x, first, width: int):
    return (x >> jnp.asarray(first, x.dtype)) & jnp.asarray((1 << width) - 1, x.dtype)
