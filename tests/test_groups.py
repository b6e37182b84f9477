"""Tiers of groups (KIVI's keys, 32 tokens): the oracle by hand, real group sizes, and what edits make of groups."""

import dataclasses

import cache_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import MIXED, PARAMS, PLAIN, Case, assert_rows_equal, check_oracle, go_on, read, small
from cache_reference import Token, pass_down
from test_tiers import store_of

from jaxkv.cache import concat, drop, extend, fingerprint, pack_state, unpack_state
from jaxkv.cache.state import live_slots, plain_entries, tier_keys
from jaxkv.policies import Full
from jaxkv.rope import angles, rotate

PAIR = ("f32", ("kivi2", "int2"))  # bfloat16 would let float32 and float64 round apart: `test_tiers.py` has it
SLOTS = (40, 64)  # the first has room for 8 and for 31 that wait


def tokens_at(*positions):
    return [Token(at, np.zeros(1), np.zeros(1)) for at in positions]


def test_pass_down_by_hand():
    """Groups of two under a tier of two; the score is the position's last digit."""
    rank = lambda token, number: token.position % 10
    line = tokens_at(1, 2, 3)
    (first, new, _), (second, none, _) = pass_down([[], []], line, [2, 2], [1, 2], rank)
    assert [t.position for t in first] == [3, 2, 1] and not second and not none  # the surplus of one waits
    (first, new, _), (second, pair, edge) = pass_down([first, []], tokens_at(10), [2, 2], [1, 2], rank)
    assert [t.position for t in first] == [3, 2] and [[t.position for t in group] for group in pair] == [[1, 10]]
    assert edge is None and not new
    (first, _, _), (second, pair, edge) = pass_down([first, second], tokens_at(19, 18), [2, 2], [1, 2], rank)
    assert [t.position for t in first] == [19, 18] and [t.position for t in second] == [2, 3] and edge == (3, 1)
    (first, _, _), (second, pair, edge) = pass_down([first, second], tokens_at(0, 20), [2, 2], [1, 2], rank)
    assert [t.position for t in second] == [2, 3] and not pair and edge == (3, 0)  # the newcomers leave at once
    (first, _, _), (second, _, _) = pass_down([first, second[:1]], tokens_at(21), [2, 2], [1, 2], rank)
    assert len(first) == 3 and [t.position for t in second] == [2]  # half a group stays a group
    (first, _, _), _ = pass_down([first, []], tokens_at(28), [2, 0], [1, 2], rank)
    assert [t.position for t in first] == [19, 28]  # nothing waits where nothing can go


def long_case(limits, length=72, steps=40):
    """Two rows, the second ragged and with pauses."""
    rng = np.random.default_rng(5)
    valid, then_valid = np.ones((2, length), bool), np.ones((steps, 2), bool)
    valid[1], then_valid[:, 1] = rng.random(length) < 0.8, rng.random(steps) < 0.8
    tokens = lambda *shape: rng.integers(0, 64, shape).astype(np.int32)
    return Case(tokens(2, length), valid, tokens(steps, 2), then_valid, np.asarray(limits))


def run(name, case, config=MIXED):
    hidden, after = jax.device_get(read(small(name), case, config, slots=SLOTS, scheme=PAIR))
    return hidden, after, *go_on(case, after, config)


@pytest.mark.parametrize(
    "name", ["recency", *(pytest.param(n, marks=pytest.mark.slow) for n in ("h2o", "random", "scissorhands", "tova"))]
)
def test_groups_of_32_against_the_reference(name):
    case = long_case([[8, 8], [64, 32]])
    results = run(name, case)
    assert [t.keys.factors[0].shape[3] for t in results[4].layers[0].tiers if t.keys.factors] == [2]
    for row in range(2):
        same, margin = check_oracle(small(name), case, results, MIXED, row, stored=store_of(PAIR))
        assert same or margin < tolerances.STORED_MARGIN, f"row {row}, margin {margin}"


@pytest.mark.parametrize("wrong", ["alone", "not in groups"])
def test_the_reference_sees(wrong):
    case, good = long_case([[8, 8], [64, 32]]), store_of(PAIR)
    alone = lambda number, keys, values, balance: (
        np.concatenate([good(number, key[None], values[:1], balance)[0] for key in keys]),
        good(number, keys, values, balance)[1],
    )
    results = run("recency", case)
    if wrong == "alone":
        with pytest.raises(AssertionError):
            check_oracle(small("recency"), case, results, MIXED, 0, stored=alone)
    else:
        reference = lambda *args, granules, **other: cache_reference.Reference(*args, **other)
        assert not check_oracle(small("recency"), case, results, MIXED, 0, reference, stored=good)[0]


def test_a_group_that_is_kept_is_never_moved_nor_encoded_again():
    _, after, _, _, final = run("recency", long_case([[8, 8], [64, 64]]))
    for before, later in zip(after.layers, final.layers, strict=True):
        old, new = before.tiers[1], later.tiers[1]
        stayed = (old.positions >= 0) & (old.positions == new.positions)
        assert stayed[0].any() or before is after.layers[1]
        group = stayed.reshape(*stayed.shape[:2], -1, 32)
        assert (group.all(axis=-1) == group.any(axis=-1)).all()
        for x, y in zip((old.keys.codes, *old.keys.factors), (new.keys.codes, *new.keys.factors), strict=True):
            mask = np.broadcast_to((stayed if x.shape[3] == 64 else group.all(axis=-1))[:, :, None], x.shape)
            np.testing.assert_array_equal(x[mask], y[mask])


def full_groups(seed, config=PLAIN):
    case = dataclasses.replace(long_case([[8, 8], [64, 64]]), valid=np.ones((2, 72), bool))
    case = dataclasses.replace(case, tokens=np.random.default_rng(seed).integers(0, 64, (2, 72)).astype(np.int32))
    return read(small("recency"), case, config, slots=SLOTS, scheme=PAIR)[1]


@pytest.mark.slow
def test_drop_leaves_the_rest_of_a_group_as_it_was():
    state = full_groups(0)
    before = jax.device_get(state)
    cut = drop(state, start=jnp.array([5, 0]), stop=jnp.array([30, 0]))
    for old, new in zip(before.layers, cut.layers, strict=True):
        at, live = np.asarray(old.tiers[1].positions), np.asarray(live_slots(new.tiers[1]))
        assert live[0].sum() == 2 * (64 - 25) and (live[1] == (at[1] >= 0)).all()
        np.testing.assert_array_equal(tier_keys(old.tiers[1]), tier_keys(new.tiers[1]))
    hidden, state = extend(PARAMS, jnp.zeros((2, 40), jnp.int32), cut, config=PLAIN)
    assert np.isfinite(np.asarray(hidden)).all()
    held = np.asarray(live_slots(state.layers[0].tiers[1]).reshape(2, 2, 2, 32).sum(axis=-1))
    assert (held == 32).all()  # the group with holes was the older one: it left


@pytest.mark.slow
def test_concat_turns_and_encodes_groups_once_more():
    first, second = full_groups(0), full_groups(1)
    second = drop(second, start=jnp.array([3, 0]), stop=jnp.array([9, 0]))  # dead members do not count in their group
    both = concat(first, second, config=PLAIN)
    for a, b, joined in zip(first.layers, second.layers, both.layers, strict=True):
        one, two, tier = a.tiers[1], b.tiers[1], joined.tiers[1]
        np.testing.assert_array_equal(tier.positions[..., 64:], np.where(two.positions >= 0, two.positions + 72, -1))
        np.testing.assert_array_equal(tier.limit, one.limit + two.limit)
        np.testing.assert_array_equal(tier_keys(tier)[..., :64], tier_keys(one))
        keys, values = plain_entries(two, None)
        turned = np.asarray(rotate(keys.reshape(2, 1, -1, 8), *angles(second.rotary[0], jnp.full((2, 1), 72))))
        turned = turned.reshape(2, 2, 64, 8)
        found, same = (np.asarray(x)[:, :, 64:] for x in plain_entries(tier, None))
        np.testing.assert_array_equal(same, values)
        live = np.asarray(live_slots(two))
        groups = np.where(live[..., None], turned, np.nan).reshape(2, 2, 2, 32, 8)
        step = (np.nanmax(groups, axis=3) - np.nanmin(groups, axis=3)) / 3
        error = np.abs(found - turned).reshape(groups.shape)[live.reshape(2, 2, 2, 32)]
        bound = np.broadcast_to(step[:, :, :, None], groups.shape)[live.reshape(2, 2, 2, 32)]
        assert (error <= bound * (0.5 + 2**-6) + 2**-8 * np.abs(turned).max()).all()
    hidden, _ = extend(PARAMS, jnp.zeros((2, 3), jnp.int32), both, config=PLAIN)
    assert np.isfinite(np.asarray(hidden)).all()


def test_a_saved_state_of_groups_goes_on():
    case, state = long_case([[8, 8], [64, 32]]), full_groups(0, MIXED)
    model = fingerprint(MIXED, PARAMS)
    back, _ = unpack_state(pack_state(state, model=model, extra={}), config=MIXED, model=model, where="here")
    assert_rows_equal(back, state, range(2))
    one, other = go_on(case, back), go_on(case, state)
    assert_rows_equal(one[2], other[2], range(2))


@pytest.mark.slow
def test_a_full_cache_of_groups_counts_what_waits():
    """31 more than the places fit; in place of a token that was dropped from a group, nothing does."""
    limits = [[8, 8], [64, 64]]
    make = lambda: new_state_of(limits)
    tokens = jnp.zeros((2, 8 + 64 + 31), jnp.int32)
    _, state = extend(PARAMS, tokens, make(), config=PLAIN)
    held = sum(np.asarray(live_slots(tier)).sum(axis=-1) for tier in state.layers[0].tiers)
    assert (held == 103).all()
    with pytest.raises(ValueError, match="room for 0 more tokens and was given 1"):
        extend(PARAMS, tokens[:, :1], state, config=PLAIN)
    with pytest.raises(ValueError, match="room for 103 more tokens and was given 104"):
        extend(PARAMS, jnp.zeros((2, 104), jnp.int32), make(), config=PLAIN)
    holes = drop(state, start=jnp.array([3, 3]), stop=jnp.array([9, 9]))
    with pytest.raises(ValueError, match="room for 0 more"):
        extend(PARAMS, tokens[:, :1], holes, config=PLAIN)


def new_state_of(limits):
    from cache_harness import spec_of

    from jaxkv.cache import empty_state

    return empty_state(
        PLAIN, spec_of(Full(), SLOTS, PAIR), limits=np.stack([limits] * 2).astype(np.int32), lengths=[112, 112]
    )


@pytest.mark.slow
def test_a_bfloat16_model_decodes_from_groups():
    """By decode and by extend, and near what a float32 model makes of the same tokens."""
    case = long_case([[8, 8], [64, 32]])
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)

    def steps(params, by):
        _, after = read(small("recency"), case, slots=SLOTS, scheme=("bf16", ("kivi4", "int4")), params=params)
        hidden, positions, _ = go_on(case, after, by=by, params=params)
        return np.asarray(hidden[case.then_valid], np.float32), jax.tree.leaves(positions)

    (found, at), (other, same), (exact, _) = steps(half, "decode"), steps(half, "extend"), steps(PARAMS, "decode")
    np.testing.assert_allclose(found, other, rtol=0, atol=tolerances.HIDDEN_BF16_MODEL)
    for one, two in zip(at, same, strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(two))
    assert np.abs(found - exact).mean() < tolerances.HIDDEN_BF16_MODEL / 2  # codes near an edge may fall either way
    assert np.abs(found - np.roll(exact, 1, axis=0)).mean() > 2 * tolerances.HIDDEN_BF16_MODEL
