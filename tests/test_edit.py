"""`drop` and `concat`: what they take out and put together is what a cache would hold that had never seen more."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import (
    MIXED,
    PARAMS,
    PLAIN,
    SLOTS,
    WINDOW,
    B,
    T,
    assert_same_contents,
    extend_jitted,
    kept_sets,
    make_case,
    new_state,
    numbers,
    read,
    small,
    standard,
    value_codes,
)

from jaxkv.cache import concat, drop, live_count
from jaxkv.cache.state import encode_keys, plain_entries, tier_keys
from jaxkv.policies import Full
from jaxkv.quantization import get_scheme
from jaxkv.rope import angles, rotate


def test_drop():
    case, (_, after, *_) = standard("full")
    start, stop = jnp.asarray([3, 0, 10, 5], jnp.int32), jnp.asarray([6, 4, 10, 1000], jnp.int32)
    state = drop(after, start=start, stop=stop)
    for layer, before in zip(kept_sets(state), kept_sets(after), strict=True):
        for b in range(B):
            for p in range(2):
                assert layer[b][p] == {x for x in before[b][p] if not start[b] <= x < stop[b]}
    np.testing.assert_array_equal(state.next_position, [*after.next_position[:3], 5])  # row 3 lost its end


def test_dropping_the_end_undoes_it():
    case, count = make_case(0), np.array([16, 9, 3, 1])
    whole = np.ones((B, T), bool)
    _, state = extend_jitted(PARAMS, case.tokens, new_state(Full(), case.limits, PLAIN), config=PLAIN, valid=whole)
    state = drop(state, start=jnp.asarray(count, jnp.int32), stop=state.next_position)
    short = np.arange(T)[None] < count[:, None]
    _, never = extend_jitted(PARAMS, case.tokens, new_state(Full(), case.limits, PLAIN), config=PLAIN, valid=short)
    assert_same_contents(state, never, atol=tolerances.ENTRIES)
    np.testing.assert_array_equal(state.next_position, never.next_position)


def test_concat_is_a_forward_in_two_segments():
    first, second = make_case(0), make_case(4)
    second = dataclasses.replace(second, valid=first.valid[::-1])
    question = np.array([[5, 6], [7, 8], [9, 1], [2, 3]], np.int32)
    states = [
        extend_jitted(PARAMS, c.tokens, new_state(Full(), c.limits), config=MIXED, valid=c.valid)[1]
        for c in (first, second)
    ]
    joined = concat(*states, config=MIXED)
    np.testing.assert_array_equal(joined.next_position, first.valid.sum(1) + second.valid.sum(1))
    hidden, state = extend_jitted(PARAMS, question, joined, config=MIXED)

    ones = np.ones((B, 1), np.int32)
    segments = np.concatenate([np.tile(0 * ones, T), np.tile(ones, T), np.tile(-ones, 2)], axis=1)
    tokens = np.concatenate([first.tokens, second.tokens, question], axis=1)
    valid = np.concatenate([first.valid, second.valid, np.ones((B, 2), bool)], axis=1)
    expected, whole = extend_jitted(
        PARAMS, tokens, new_state(Full(), np.full((1, B), SLOTS), slots=(2 * SLOTS,)), config=MIXED, valid=valid,
        segments=segments,
    )  # fmt: skip
    np.testing.assert_allclose(hidden, np.asarray(expected)[:, -2:], rtol=0, atol=2 * tolerances.HIDDEN)
    np.testing.assert_array_equal(state.next_position, whole.next_position)
    unmasked, _ = extend_jitted(
        PARAMS, tokens, new_state(Full(), np.full((1, B), SLOTS), slots=(2 * SLOTS,)), config=MIXED, valid=valid,
        segments=0 * segments,
    )  # fmt: skip
    assert np.abs(np.asarray(hidden) - np.asarray(unmasked)[:, -2:]).max() > tolerances.VISIBLE  # the mask matters


def test_concat_of_stored_bfloat16():
    """Keys are turned as numbers, not as the bits that they are stored in, and rounded once more."""
    cases = make_case(1, [[SLOTS] * B]), make_case(2, [[SLOTS] * B])
    wide, narrow = (
        concat(*(read(Full(), case, scheme=scheme)[1] for case in cases), config=MIXED) for scheme in ("f32", "bf16")
    )
    for layer, other in zip(wide.layers, narrow.layers, strict=True):
        (tier,), (same,) = layer.tiers, other.tiers
        np.testing.assert_array_equal(tier.positions, same.positions)
        live = np.asarray(tier.positions) >= 0
        keys = np.swapaxes(np.asarray(tier.keys.codes), 2, 3)[live]
        rounded = np.swapaxes(numbers(np.asarray(same.keys.codes)), 2, 3)[live]
        np.testing.assert_allclose(rounded, keys, rtol=0, atol=2 * tolerances.BF16_STEP * np.abs(keys).max())


def test_concat_keeps_local_layers_within_their_window():
    states = [read(Full(), make_case(seed, [[SLOTS] * B]))[1] for seed in (1, 2)]
    joined = concat(*states, config=MIXED)
    tier, newest = joined.layers[1].tiers[0], np.asarray(joined.next_position)[:, None, None] - 1
    assert int(tier.limit.max()) == WINDOW and int(live_count(tier).max()) <= WINDOW
    held = np.asarray(tier.positions)
    assert (newest + 1 - held < WINDOW)[held >= 0].all()
    assert int(live_count(joined.layers[0].tiers[0]).max()) > WINDOW


LISTED = ((6,) * B, (9,) * B)


def test_concat_of_quantized_tiers():
    """Tier by tier: values as they were, keys turned and encoded once more, positions behind the first's."""
    make = lambda seed, scheme: read(
        small("recency"), dataclasses.replace(make_case(seed, LISTED), valid=np.ones((B, T), bool)), PLAIN,
        slots=(16, 16), scheme=scheme,
    )[1]  # fmt: skip
    first, second = (make(seed, ("bf16", "rotated4")) for seed in (0, 1))
    both = concat(first, second, config=PLAIN)
    for a, b, joined in zip(first.layers, second.layers, both.layers, strict=True):
        for one, two, tier in zip(a.tiers, b.tiers, joined.tiers, strict=True):
            np.testing.assert_array_equal(tier.positions[..., 16:], np.where(two.positions >= 0, two.positions + T, -1))
            np.testing.assert_array_equal(tier.limit, one.limit + two.limit)
            np.testing.assert_array_equal(value_codes(tier)[:, :, :16], value_codes(one))
            np.testing.assert_array_equal(value_codes(tier)[:, :, 16:], value_codes(two))
            live, shift = np.asarray(two.positions) >= 0, jnp.full((B, 1), T, jnp.int32)
            turned = rotate(plain_entries(two, None)[0].reshape(B, 1, -1, 8), *angles(second.rotary[0], shift))
            again = encode_keys(two.scheme[0], turned.reshape(B, 2, 16, 8), None, live)
            expected = np.swapaxes(get_scheme(two.scheme[0]).decode(again, -1), 2, 3)
            found = np.asarray(tier_keys(tier))[..., 16:]
            live = np.broadcast_to(live[:, :, None], found.shape)
            np.testing.assert_array_equal(found[live], np.asarray(expected)[live])
    one, two = (make(seed, ("bf16", ("balanced-int4", "int4"))) for seed in (0, 1))
    with pytest.raises(ValueError, match="balances differ .layer 0."):
        concat(one, two, config=PLAIN)


def test_concat_refuses_what_does_not_match():
    roomy = [[SLOTS] * B]
    turned = new_state(Full(), roomy)
    faster = dataclasses.replace(turned.rotary[0], frequencies=2 * turned.rotary[0].frequencies)
    with pytest.raises(ValueError, match="different RoPE frequencies .default."):
        concat(new_state(Full(), roomy), dataclasses.replace(turned, rotary=(faster,)), config=MIXED)
    with pytest.raises(ValueError, match="different policies"):
        concat(new_state(Full(), roomy), new_state(small("random"), roomy), config=MIXED)
    with pytest.raises(ValueError, match="different rows"):
        concat(new_state(Full(), roomy), new_state(Full(), [[SLOTS]]), config=MIXED)
