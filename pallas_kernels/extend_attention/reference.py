"""Extend attention in float64 numpy: one query after another, and for each the list of what it sees."""

import numpy as np

from pallas_kernels.decode_attention.reference import logit, softmax


def extend_attention(
    queries, keys, values, tiers, *, positions, valid, segments, causal, window, scale, softcap
):  # fmt: skip
    """The arguments of `pallas_kernels.extend_attention`, in whole instead of in blocks.

    Returns: out [B, P, G, T, H]; probabilities, one [B, P, G, T, S] per tier and one [B, P, G, T, T] for the new tokens;
    visible, the same without G. All numpy, float64 and bool.
    """
    wide = lambda x: np.asarray(x, np.float64)
    queries, keys, values = wide(queries), wide(keys), wide(values)
    tiers = [(*map(wide, t.source[:3]), np.asarray(t.positions), np.asarray(t.source.live)) for t in tiers]
    positions, valid = np.asarray(positions), np.asarray(valid)
    batch, rows, heads, length, size = queries.shape
    widths = [tier[3].shape[2] for tier in tiers] + [length]
    out = np.zeros((batch, rows, heads, length, size))
    probabilities = [np.zeros((batch, rows, heads, length, width)) for width in widths]
    visible = [np.zeros((batch, rows, length, width), bool) for width in widths]
    for b, p, i in np.ndindex(batch, rows, length):
        for number, (_, _, _, at, live) in enumerate(tiers):
            for slot in range(widths[number]):
                near = window is None or positions[b, i] - at[b, p, slot] < window
                visible[number][b, p, i, slot] = live[b, p, slot] and near
        for j in range(length):
            near = window is None or abs(positions[b, i] - positions[b, j]) < window
            ours = segments is None or segments[b, i] == segments[b, j] or segments[b, i] < 0 or segments[b, j] < 0
            visible[-1][b, p, i, j] = valid[b, j] and (j <= i or not causal) and near and ours
        for g in range(heads):
            seen = [
                (number, slot, logit(tiers[number][0][b, p, g, i], tiers[number][1][b, p, :, slot], scale, softcap))
                for number in range(len(tiers))
                for slot in np.flatnonzero(visible[number][b, p, i])
            ] + [
                (-1, j, logit(queries[b, p, g, i], keys[b, p, j], scale, softcap))
                for j in np.flatnonzero(visible[-1][b, p, i])
            ]
            for number, slot, share in softmax(seen):
                probabilities[number][b, p, g, i, slot] = share
                value = values[b, p, slot] if number == -1 else tiers[number][2][b, p, slot]
                out[b, p, g, i] += share * value
    return out, tuple(probabilities), tuple(visible)
