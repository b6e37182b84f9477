"""A tiny model with relative convolutional attention and its oracle, for `test_rcmha.py` and `test_rcmha_cache.py`.

`RcmhaReference` is `cache_reference.Reference` with the convolution and the relative term written out once more, token by
token; by it the suites that plain attention passes (policies, tiers, ragged rows) are run on a model that has them.
"""

import dataclasses

import cache_reference
import jax
import jax.numpy as jnp
import numpy as np
from cache_harness import PARAMS, SLOTS, small

from jaxkv.attention.rcmha import from_gqa, sinusoids
from jaxkv.cache import extend
from jaxkv.config import RcmhaConfig

FAR = 64
DEFAULT = RcmhaConfig(distances=FAR)
OPTIONS = {
    "RCMHA": DEFAULT,
    "filters of each head": dataclasses.replace(DEFAULT, convolution="heads", width=4),
    "sinusoidal": dataclasses.replace(DEFAULT, relative="sinusoidal"),
    "RMHA": dataclasses.replace(DEFAULT, convolution="none"),
    "MDHA": RcmhaConfig(relative="none", convolution="heads"),
    "queries of a read": dataclasses.replace(DEFAULT, query_context="segment"),
}
ROLES = ("queries", "keys", "values")


def with_rcmha(config, rcmha=DEFAULT):
    return dataclasses.replace(config, attention="rcmha", rcmha=rcmha, max_positions=FAR)


def stirred(config, seed=0):
    """The tests' parameters with filters, biases and tables far from their start, and the same in float64."""
    plain = dataclasses.replace(config, attention="gqa", rcmha=None)
    params, _ = from_gqa(PARAMS, plain, config.rcmha, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    ours = lambda path: any(key.key == "distances" or key.key.endswith("_convolution") for key in path)
    stir = lambda path, x: x + jnp.asarray(rng.normal(size=x.shape) * 0.2, x.dtype) if ours(path) else x
    params = jax.tree_util.tree_map_with_path(stir, params)
    return params, jax.tree.map(lambda x: np.asarray(x, np.float64), params)


class RcmhaReference(cache_reference.Reference):
    """One row of a model with convolutions and a relative term."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.bare = {}  # of each layer, the projections of all tokens that were read

    def _project(self, params, x, positions):
        c, r = self.config, self.config.rcmha
        heads = super()._project(params, x, positions)
        if r.convolution != "none":
            past = self.bare.setdefault(id(params), [])
            first = len(past)
            past += list(heads)
            heads = np.stack([self._convolved(params, past, at, first) for at in range(first, len(past))])
        self.plain = heads[:, : c.num_heads].copy()  # what meets distances
        if r.relative != "none":
            heads = heads.copy()
            heads[:, : c.num_heads] += params["distances"]["query_bias"]
        self.now = params.get("distances"), positions
        return heads

    def _convolved(self, params, past, at, first):
        c, r, parts, start = self.config, self.config.rcmha, [], 0
        for role, count in zip(ROLES, (c.num_heads, c.num_kv_heads, c.num_kv_heads), strict=True):
            p, begin = params[f"{role}_convolution"], first if role == "queries" and r.query_context == "segment" else 0
            y = np.zeros((count, c.head_dim)) + p["bias"]
            for back in range(r.width):
                if at - back >= begin:
                    y = y + p["filters"][r.width - 1 - back] * past[at - back][start : start + count]
            parts.append(y)
            start += count
        return np.concatenate(parts)

    def distance(self, step, token, crowd):
        return step - token.position

    def _logits(self, head, number, query, crowd, step):
        p, positions = self.now
        logits = super()._logits(head, number, query, crowd, step)
        if p is None:
            return logits
        c, behind = self.config, [self.distance(step, token, crowd) for token in crowd]
        index = head * (c.num_heads // c.num_kv_heads) + number
        mine = self.plain[positions.index(step), index]
        if c.rcmha.relative == "learned":
            term = p["table"][index][behind] @ np.append(mine, 1.0)
        else:
            waves = sinusoids(FAR, c.hidden_size).astype(float)[behind] @ p["kernel"]
            term = waves.reshape(len(crowd), c.num_heads, -1)[:, index] @ (mine + p["distance_bias"][index])
        return logits + term * c.query_scale


def oracle_of(wide, reference=RcmhaReference):
    return lambda _, config, *rest, **more: reference(wide, config, *rest, **more)


def reference_of(wide, config, reference=RcmhaReference):
    """A reference that keeps everything."""
    return reference(wide, config, small("full"), np.full((config.num_layers, 1), SLOTS))


def read_all(params, tokens, state, config):
    return extend(params, jnp.asarray(tokens), state, config=config)
