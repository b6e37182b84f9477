"""Flash attention in float64 numpy: one query after another, and for each the keys that it sees."""

import numpy as np

from pallas_kernels.flash_attention.operands import DEAD, GLOBAL, NEG


def flash_attention(q, k, v, **options):
    """The arguments of `pallas_kernels.flash_attention`. Returns: out, log-sum-exp and the probabilities [B, K, G, T, S],
    numpy float64."""
    wide = lambda x: np.asarray(x, np.float64)
    batch, heads, group, length, _ = np.shape(q)
    out = np.zeros((batch, heads, group, length, np.shape(v)[3]))
    lse = np.full((batch, heads, group, length), NEG)
    probabilities = np.zeros((batch, heads, group, length, np.shape(k)[2]))
    values = wide(v)
    if options.get("value_temperature") is not None:
        values = values * wide(options["value_temperature"])[..., None]
    for b, h, g, i in np.ndindex(batch, heads, group, length):
        at, logits = _row(wide(q), wide(k), b, h, g, i, **options)
        if not len(at):
            continue
        top = logits.max()
        weights = np.exp(logits - top)
        lse[b, h, g, i] = top + np.log(weights.sum())
        probabilities[b, h, g, i, at] = weights / weights.sum()
        out[b, h, g, i] = probabilities[b, h, g, i, at] @ values[b, h, at]
    return out, lse, probabilities


def _row(
    q, k, b, h, g, i, *, scale, causal, window=None, softcap=None, query_positions=None, key_positions=None,
    query_segments=None, key_segments=None, query_temperature=None, value_temperature=None, relative=None,
):  # fmt: skip
    """Which keys query i of one head sees, and their logits."""
    length, keys = q.shape[3], k.shape[2]
    of = lambda x, *at: np.asarray(x)[tuple(min(a, n - 1) for a, n in zip(at, np.shape(x), strict=False))]  # K|1, G|1
    by_head = lambda x: np.asarray(x) if np.ndim(x) == 3 else np.asarray(x)[:, None]
    behind, ahead = window if isinstance(window, tuple) else (window, window)
    seen = []
    for j in range(keys):
        distance = i + keys - length - j
        apart = distance
        if query_positions is not None:
            apart = int(np.asarray(query_positions)[b, i]) - int(of(by_head(key_positions), b, h, j))
        mine = GLOBAL if query_segments is None else np.asarray(query_segments)[b, i]
        theirs = GLOBAL if key_segments is None else of(by_head(key_segments), b, h, j)
        ours = (mine == theirs or GLOBAL in (mine, theirs)) and DEAD not in (mine, theirs)
        near = (behind is None or apart < behind) and (ahead is None or apart > -ahead)
        if ours and near and (distance >= 0 or not causal):
            seen.append(j)
    logits = k[b, h, seen] @ q[b, h, g, i]
    if query_temperature is not None:
        logits = logits * float(of(query_temperature, b, h, g, i))
    if relative is not None:
        table = np.asarray(of(relative[1], h, g), np.float64)
        logits = logits + table[[i + keys - length - j for j in seen]] @ np.asarray(relative[0], np.float64)[b, h, g, i]
    logits = logits * scale
    return seen, logits if softcap is None else softcap * np.tanh(logits / softcap)
