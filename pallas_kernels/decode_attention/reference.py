"""Decode attention in float64 numpy: one head after another, one slot after another."""

import math

import numpy as np


def decode_attention(sources, *, scale, softcap):
    """The arguments and results of `pallas_kernels.decode_attention`, as float64 numpy arrays."""
    sources = [
        (np.asarray(q, np.float64), np.asarray(k, np.float64), np.asarray(v, np.float64), np.asarray(live))
        for q, k, v, live, *_ in sources
    ]
    batch, rows, heads, size = sources[0][0].shape
    out = np.zeros((batch, rows, heads, size))
    probabilities = [np.zeros((batch, rows, heads, k.shape[3])) for _, k, _, _ in sources]
    for b, p, g in np.ndindex(batch, rows, heads):
        seen = [
            (number, slot, logit(q[b, p, g], k[b, p, :, slot], scale, softcap))
            for number, (q, k, _, live) in enumerate(sources)
            for slot in range(k.shape[3])
            if live[b, p, slot]
        ]
        for number, slot, share in softmax(seen):
            probabilities[number][b, p, g, slot] = share
            out[b, p, g] += share * sources[number][2][b, p, slot]
    return out, tuple(probabilities)


def logit(query, key, scale, softcap):
    """scale * q·k, capped."""
    x = float(query @ key) * scale
    return x if softcap is None else softcap * math.tanh(x / softcap)


def softmax(seen):
    """[(number, slot, logit)] -> [(number, slot, probability)]; nothing seen, nothing given."""
    top = max((x for _, _, x in seen), default=0.0)
    total = sum(math.exp(x - top) for _, _, x in seen)
    return [(number, slot, math.exp(x - top) / total) for number, slot, x in seen]
