"""Decode attention in float64 numpy: one head after another, over the slots that are live."""

import math

import numpy as np

from pallas_kernels.decode_attention.packed import Packed


def decode_attention(sources, *, scale, softcap, scores=True):
    """The arguments and results of `pallas_kernels.decode_attention`, as float64 numpy arrays."""
    batch, heads, group, size = sources[-1].queries.shape
    out = np.zeros((batch, heads, group, size))
    probabilities = [np.zeros((*s.queries.shape[:3], s.live.shape[2])) for s in sources]
    plain = [(plain_keys(s.keys, size), plain_values(s.values, size)) for s in sources]
    for b, head, g in np.ndindex(batch, heads, group):
        seen = []  # (source, block row, slots, their logits)
        for number, (s, (keys, _)) in enumerate(zip(sources, plain, strict=True)):
            for row in rows_of(s.owner, b, head):
                slots = np.flatnonzero(s.live[b, row])
                x = np.asarray(s.queries[b, row, g], np.float64) @ keys[b, row][:, slots] * scale
                if s.bias is not None:
                    x = x + np.asarray(s.bias[b, row, g], np.float64)[slots]
                seen.append((number, row, slots, x if softcap is None else softcap * np.tanh(x / softcap)))
        top = max((x.max() for *_, x in seen if x.size), default=0.0)
        total = sum(np.exp(x - top).sum() for *_, x in seen)
        for number, row, slots, x in seen:
            share = np.exp(x - top) / total if x.size else x
            probabilities[number][b, row, g, slots] = share
            mean = share @ plain[number][1][b, row][slots]
            out[b, head, g] += np.asarray(sources[number].finish(mean), np.float64)
    return out, tuple(probabilities) if scores else None


def rows_of(owner, b, head):
    """The block rows of a head."""
    return [head] if owner is None else np.flatnonzero(np.asarray(owner)[b] == head)


def plain_keys(keys, channels):
    """float64 [B, P, H, S] of keys, packed or not."""
    if not isinstance(keys, Packed):
        return np.asarray(keys, np.float64)
    x = _levels(keys, channels)
    for factor, apply in ((keys.scale, np.multiply), (keys.zero, np.add)):
        if factor is None:
            continue
        wide = bfloat16(factor)
        if keys.granule > 1:
            x = apply(x, np.repeat(wide, keys.granule, axis=3))
        else:
            x = apply(x, np.repeat(wide, channels // wide.shape[2], axis=2))
    return x


def plain_values(values, channels):
    """float64 [B, P, S, H] of values, packed or not."""
    if not isinstance(values, Packed):
        return np.asarray(values, np.float64)
    return np.swapaxes(plain_keys(values, channels), 2, 3) if values.slots_minor else _levels(values, channels)


def bfloat16(bits):
    """float64 of bfloat16 bits in uint16; other numbers as they are."""
    bits = np.asarray(bits)
    if bits.dtype != np.uint16:
        return bits.astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _levels(packed: Packed, channels):
    """Codes one channel after another, and what they stand for."""
    codes = np.asarray(packed.codes)
    if packed.bits == 16:
        return bfloat16(codes)
    if packed.bits < 8:
        field = lambda rows, width, h: (rows[:, :, h * width // 8] >> (h * width % 8)) & (2**width - 1)
        low = 2 if packed.bits == 3 else packed.bits
        one = [field(codes, low, h) for h in range(channels)]
        if packed.bits == 3:
            one = [x + 4 * field(codes[:, :, channels // 4 :], 1, h) for h, x in enumerate(one)]
        codes = np.stack(one, axis=2)
    return np.asarray(packed.level(codes), np.float64)


def logit(query, key, scale, softcap):
    """scale * q·k of one query and one key, capped."""
    x = float(query @ key) * scale
    return x if softcap is None else softcap * math.tanh(x / softcap)


def softmax(seen):
    """[(number, slot, logit)] -> [(number, slot, probability)]; nothing seen, nothing given."""
    top = max((x for _, _, x in seen), default=0.0)
    total = sum(math.exp(x - top) for _, _, x in seen)
    return [(number, slot, math.exp(x - top) / total) for number, slot, x in seen]
