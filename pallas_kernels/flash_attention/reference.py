"""Flash attention in float64 numpy: one query after another, and for each the keys that it sees."""

import numpy as np

from pallas_kernels.flash_attention.operands import DEAD, GLOBAL, NEG


def flash_attention(
    q, k, v, *, scale, causal, window=None, softcap=None, query_positions=None, key_positions=None, query_segments=None,
    key_segments=None, query_temperature=None, value_temperature=None, relative=None,
):  # fmt: skip
    """The arguments of `pallas_kernels.flash_attention`. Returns: out, log-sum-exp and the probabilities [B, K, G, T, S],
    numpy float64."""
    wide = lambda x: None if x is None else np.asarray(x, np.float64)
    q, k, v, query_temperature, value_temperature = map(wide, (q, k, v, query_temperature, value_temperature))
    relative_q, table = map(wide, relative or (None, None))
    batch, heads, group, length, _ = q.shape
    keys = k.shape[2]
    out = np.zeros((batch, heads, group, length, v.shape[3]))
    lse, probabilities = np.full(out.shape[:4], NEG), np.zeros((*out.shape[:4], keys))
    for b, h, i in np.ndindex(batch, heads, length):
        distance = i + keys - length - np.arange(keys)
        apart = distance if query_positions is None else query_positions[b, i] - of_head(key_positions, b, h)
        mine = GLOBAL if query_segments is None else query_segments[b, i]
        theirs = np.full(keys, GLOBAL) if key_segments is None else of_head(key_segments, b, h)
        see = np.flatnonzero(visible(causal, window, distance, apart, mine, theirs))
        for g in range(group if len(see) else 0):
            logits = k[b, h, see] @ q[b, h, g, i]
            if query_temperature is not None:
                logits = logits * shared(query_temperature, b, h, g)[i]
            if relative is not None:
                logits = logits + shared(table[None], 0, h, g)[distance[see]] @ relative_q[b, h, g, i]
            logits = logits * scale
            logits = logits if softcap is None else softcap * np.tanh(logits / softcap)
            top = logits.max()
            weights = np.exp(logits - top)
            lse[b, h, g, i] = top + np.log(weights.sum())
            probabilities[b, h, g, i, see] = weights / weights.sum()
            values = v[b, h, see]
            if value_temperature is not None:
                values = values * of_head(value_temperature, b, h)[see, None]
            out[b, h, g, i] = probabilities[b, h, g, i, see] @ values
    return out, lse, probabilities


def visible(causal, window, distance, apart, mine, theirs):
    """[S] bool: what one query sees, by its distances and segments."""
    behind, ahead = window if isinstance(window, tuple) else (window, window)
    see = (theirs == mine) | (theirs == GLOBAL) | (mine == GLOBAL)
    see &= (theirs != DEAD) & (mine != DEAD)
    if causal:
        see &= distance >= 0
    if behind is not None:
        see &= apart < behind
    if ahead is not None:
        see &= apart > -ahead
    return see


def of_head(x, b, h):
    """[S] of [B, S] or [B, K|1, S]."""
    return np.asarray(x[b]) if np.ndim(x) == 2 else np.asarray(x[b, h % x.shape[1]])


def shared(x, b, h, g):
    """[...] of [B, K|1, G|1, ...]."""
    return x[b, h % x.shape[1], g % x.shape[2]]
