"""Expected attention: its rotations, its statistics beyond one prompt, and what the oracle of the cache does not vary."""

import dataclasses

import cache_reference
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import MIXED, PARAMS, SLOTS, WIDE_PARAMS, new_state, newcomers, small, spec_of

from jaxkv.cache import compress, extend
from jaxkv.policies import Full, make_policy
from jaxkv.policies.expected import plain_queries
from jaxkv.quantization.base import from_bits
from jaxkv.rope import angles, mean_angles, rotate
from jaxkv.types import Rotary

POLICY = make_policy("expected-attention", sinks=2, n_future=9)


@pytest.mark.parametrize("count", [1, 2, 9, 512])
def test_mean_angles_are_the_mean_of_angles(count):
    """Also of a channel that does not turn."""
    frequencies = jnp.asarray([[1.0, 0.3, 1e-7, 0.0]] * 2, jnp.float32)
    rotary, start = Rotary(frequencies=frequencies, scale=jnp.asarray([1.0, 1.3])), jnp.asarray([0, 700], jnp.int32)
    at = start[:, None] + jnp.arange(count, dtype=jnp.int32)[None]
    for one, many in zip(mean_angles(rotary, start, count), angles(rotary, at), strict=True):
        np.testing.assert_allclose(one[:, 0], many.mean(axis=1), rtol=0, atol=tolerances.FAR_ANGLES)


def tokens(seed, count=11, offset=0, scale=1.3, rotary_dim=6, group=3):
    """Newcomers of two rows with partial, scaled RoPE, rotated at positions - offset; and their queries before it."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((2, 2, *shape)), jnp.float32)
    plain, keys, values = normal(group, count, 8), normal(count, 8), normal(count, 8)
    new = newcomers(keys, values, plain, scale=0.4)
    frequencies = jnp.asarray([[1.0, 0.2, 0.05]] * 2, jnp.float32)[:, : rotary_dim // 2]
    rotary = Rotary(frequencies=frequencies, scale=jnp.full((2,), scale, jnp.float32))
    offset = jnp.full((2,), offset, jnp.int32)
    turn = lambda x: jnp.moveaxis(rotate(jnp.moveaxis(x, 2, 1), *angles(rotary, new.positions - offset[:, None])), 1, 2)
    queries = turn(plain.reshape(2, 2 * group, count, 8)).reshape(plain.shape)
    return dataclasses.replace(new, queries=queries, keys=turn(keys), offset=offset, rotary=rotary), np.asarray(plain)


def scores(policy, new):
    return np.asarray(from_bits(policy.enter(new, policy.advance(policy.enter_row((2, 2, 8), 0), new))["expected"]))


def test_queries_before_rope():
    new, plain = tokens(0, offset=5)
    np.testing.assert_allclose(
        plain_queries(new), np.moveaxis(plain, 3, 1), rtol=0, atol=10 * tolerances.ROTATION * np.abs(plain).max()
    )


@pytest.mark.parametrize("epsilon", [0.0, 0.02])
def test_the_first_score_is_the_papers(epsilon):
    """With its rotations written out, future by future, in float64."""
    new, plain = tokens(1)
    found, frequencies = scores(dataclasses.replace(POLICY, epsilon=epsilon), new), np.array([1.0, 0.2, 0.05])
    rotation = np.zeros((8, 8))
    for at in range(11, 20):
        cos, sin = np.diag(np.cos(at * frequencies)), np.diag(np.sin(at * frequencies))
        rotation[:6, :6] += 1.3 * np.block([[cos, -sin], [sin, cos]]) / 9
        rotation[6:, 6:] += np.eye(2) / 9
    for b, p in np.ndindex(2, 2):
        keys, shares = np.asarray(new.keys[b, p, 2:], np.float64), 0
        for g in range(3):
            queries = plain[b, p, g, 2:].astype(np.float64)
            spread = rotation @ np.cov(queries, rowvar=False, bias=True) @ rotation.T
            z = 0.4 * keys @ (rotation @ queries.mean(axis=0)) + 0.08 * np.einsum("ni,ij,nj->n", keys, spread, keys)
            shares = shares + cache_reference.softmax(z) / 3
        expected = (shares + epsilon) * np.linalg.norm(new.values[b, p, 2:], axis=-1)
        np.testing.assert_allclose(found[b, p, 2:], expected, rtol=2**-8 + 10 * tolerances.STATISTIC)


def test_the_frame_of_a_tier_changes_nothing():
    one, other = (scores(POLICY, tokens(2, offset=offset)[0]) for offset in (0, -6))
    np.testing.assert_allclose(one, other, rtol=tolerances.BF16_STEP)


def test_a_second_text_is_judged_by_the_mean_of_all_queries():
    """Three extends of more than one token, against the reference: H x H statistics serve the first alone."""
    policy, texts = small("expected-attention"), np.random.default_rng(3).integers(0, 64, (3, 8)).astype(np.int32)
    state = new_state(policy, [[9]])
    reference = cache_reference.Reference(WIDE_PARAMS, MIXED, policy, [[9], [7]])
    for text in texts:
        hidden, state = extend(PARAMS, jnp.asarray(text[None]), state, config=MIXED)
        np.testing.assert_allclose(hidden[0], reference.read(text), rtol=0, atol=tolerances.HIDDEN)
        for layer, heads in zip(state.layers, reference.layers, strict=True):
            for p, (tier,) in enumerate(heads):
                held = np.asarray(layer.tiers[0].positions[0, p])
                found = np.asarray(from_bits(layer.tiers[0].slots["expected"]))[0, p]
                expected = {token.position: token.expected for token in tier}
                assert set(held[held >= 0].tolist()) == set(expected)
                for slot in np.flatnonzero(held >= 4):
                    np.testing.assert_allclose(found[slot], expected[int(held[slot])], rtol=tolerances.BF16_STEP)


def test_nothing_as_big_as_a_covariance_is_kept():
    state = new_state(POLICY, [[SLOTS]])
    row, tier = state.layers[0].row, state.layers[0].tiers[0]
    assert {name: x.shape for name, x in row.items()} == {"queries": (1, 2, 8), "heard": (1,), "total": (1, 2)}
    assert tier.slots["expected"].dtype == jnp.uint16 and tier.slots["expected"].shape == (1, 2, SLOTS)


def test_other_sinks_or_futures_are_other_statistics():
    state = new_state(Full(observe=(POLICY,)), [[SLOTS]])
    limits = np.full((2, 1, 1), 8)
    assert compress(state, spec_of(dataclasses.replace(POLICY, recent=5)), limits=limits).layers
    for change in ({"sinks": 3}, {"n_future": 10}, {"epsilon": 0.1}):
        with pytest.raises(ValueError, match="has not observed"):
            compress(state, spec_of(dataclasses.replace(POLICY, **change)), limits=limits)


@pytest.mark.parametrize("option, value", [("n_future", 0), ("epsilon", -0.1), ("epsilon", float("nan"))])
def test_refused_options(option, value):
    with pytest.raises(ValueError, match=option):
        make_policy("expected-attention", **{option: value})
