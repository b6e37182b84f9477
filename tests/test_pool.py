"""Storing one step's tokens in many layers at once is storing them in each."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_harness import EVICTING, PARAMS, PLAIN, WHOLE, B, T, make_case, small

from jaxkv.cache import attend_decode, empty_state, extend, make_context, store
from jaxkv.cache.pool import store_all
from jaxkv.quantization import SCHEMES, kivi
from jaxkv.types import LayerSpec, Projected, TierSpec

LISTS = {
    "one tier": ((16, "bf16", "bf16"),),
    "down": ((8, "f32", "f32"), (16, "rotated3", "int4")),
    "three down": ((8, "bf16", "bf16"), (8, "balanced-int4", "rotated4"), (8, "int2", "int2")),
    "groups": ((12, "bf16", "bf16"), (16, "kivi2-by-4", "int2")),
}
ROWS = {"a row for each head": (None, None), "rows of their own": ((0, 1, 1, 0, 1), (1, 0, 1))}
CASES = [(name, tuple(LISTS)[i % 4], tuple(ROWS)[i // 2 % 2]) for i, name in enumerate(EVICTING[::2])]
ALL = [(name, tiers, rows) for name in EVICTING for tiers in LISTS for rows in ROWS]
late = lambda case: () if case in CASES[1:2] else pytest.mark.slow if case in CASES else pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch):
    """KIVI's keys in groups so small that a step fills one."""
    monkeypatch.setitem(SCHEMES, "kivi2-by-4", dataclasses.replace(kivi.scheme(2, 4), name="kivi2-by-4"))


def filled(policy, tiers, rows):
    """A state of two layers that has read a prompt, and will have to displace."""
    spec = tuple(TierSpec(slots=slots, scheme=tuple(pair), positions="int16") for slots, *pair in LISTS[tiers])
    layers = tuple(LayerSpec(policy=policy, tiers=spec, rows=None if r is None else len(r)) for r in ROWS[rows])
    limits = [[4] * B for _ in spec]
    owners = None if None in ROWS[rows] else [np.tile(r, (B, 1)) for r in ROWS[rows]]
    state = empty_state(PLAIN, layers, limits=[limits] * 2, lengths=[T + 8] * B, owners=owners)
    case = make_case(0)
    return extend(PARAMS, jnp.asarray(case.tokens), state, config=PLAIN, valid=jnp.asarray(case.valid))[1]


def both(layers, state, key):
    """The layers after a step of random queries, keys and values, in which row 2 has stopped: at once, and one by one.

    Not jitted, so that both round alike: a compiler fuses them differently.
    """
    valid = jnp.ones((B, 1), bool).at[2].set(False)
    context = make_context(state, valid, valid, None)
    draw = lambda key, heads: jax.random.normal(key, (B, 1, heads, PLAIN.head_dim))
    attend = functools.partial(attend_decode, context=context, config=PLAIN, kind=WHOLE)
    news = []
    for number, layer in enumerate(layers):
        keys = jax.random.split(jax.random.fold_in(key, number), 3)
        q, k, v = (draw(*pair) for pair in zip(keys, (4, 2, 2), strict=True))
        news.append(attend(Projected((q,) * len(layer.tiers), k, v), layer)[1])
    at_once = store_all(layers, news, context, config=PLAIN)
    each = tuple(store(layer, new, context, config=PLAIN, kind=WHOLE) for layer, new in zip(layers, news, strict=True))
    return at_once, each, context.newest + 1


@pytest.mark.parametrize("name, tiers, rows", [pytest.param(*case, marks=late(case)) for case in ALL])
def test_at_once_is_one_by_one(name, tiers, rows):
    state = filled(small(name), tiers, rows)
    layers, before = state.layers, state.layers
    for key in jax.random.split(jax.random.key(1), 2):
        layers, each, position = both(layers, state, key)
        assert jax.tree.structure(layers) == jax.tree.structure(each)
        jax.tree.map(np.testing.assert_array_equal, layers, each)
        state = type(state)(layers=layers, offsets=state.offsets, rotary=state.rotary, next_position=position)
    first = lambda layers: [layer.tiers[0].positions for layer in layers]
    assert all((one != other).any() for one, other in zip(first(before), first(layers), strict=True))
