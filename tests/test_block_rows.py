"""Heads that own different numbers of block rows: who takes which token, against the reference, and who may own what."""

import dataclasses
import functools

import cache_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import (
    EVICTING,
    MIXED,
    PARAMS,
    PLAIN,
    B,
    T,
    assert_rows_equal,
    check_oracle,
    go_on,
    kept_sets,
    make_case,
    new_state,
    of_each_kind,
    owners_of,
    poison,
    quick_or_slow,
    read,
    run_case,
    small,
    spec_of,
)
from test_tiers import store_of

from jaxkv.cache import compress, concat, drop, empty_state, extend, pack_state, unpack_state
from jaxkv.cache.extend import _attend_layer
from jaxkv.policies import Full, Recency
from pallas_kernels.decode_attention.owners import max_by_head, of_head, sum_by_head, to_rows, turns

ROWS = (0, 1, 1, 0, 1)  # two block rows of head 0, three of head 1
LIMITS = ((4, 3, 7, 1), (5, 2, 4, 3))  # [tier][row], of each block row
OPTIONS = {"slots": (8, 8), "scheme": ("f32", ("rotated4", "int3")), "rows": ROWS}
QUICK = ("h2o",)
NAMES = [name for name in EVICTING if name != "random"]
every_policy = pytest.mark.parametrize("name", quick_or_slow(NAMES, QUICK))
some_policies = pytest.mark.parametrize("name", of_each_kind(NAMES, QUICK))


@functools.cache
def ran(name):
    case = make_case(0, limits=LIMITS)
    return case, run_case(small(name), case, **OPTIONS)


def test_between_heads_and_rows_by_hand():
    owner = jnp.asarray([[0, 1, 1, 0, -1]], jnp.int16)
    x = jnp.asarray([[[1.0], [2.0], [4.0], [8.0], [99.0]]])
    np.testing.assert_array_equal(sum_by_head(x, owner, 2), [[[9.0], [6.0]]])
    np.testing.assert_array_equal(max_by_head(x, owner, 2, -1.0), [[[8.0], [4.0]]])
    np.testing.assert_array_equal(to_rows(jnp.asarray([[[5.0], [7.0]]]), owner)[0, :4, 0], [5, 7, 7, 5])
    np.testing.assert_array_equal(np.stack(turns(owner))[:, 0, :4], [[0, 0, 1, 1], [2, 2, 2, 2]])
    np.testing.assert_array_equal(of_head(jnp.asarray([[1, 2, 4, 8, 99]]), owner)[0, :4], [9, 6, 6, 9])


def test_each_row_keeps_its_newest():
    """Recency over two rows of head 0 and three of head 1, by hand: row r of n holds the newest positions = r mod n."""
    _, state = read(Recency(recent=1, sinks=0), make_case(0, limits=((4,) * B,)), PLAIN, slots=(8,), rows=ROWS)
    positions = np.sort(np.asarray(state.layers[0].tiers[0].positions[0]))[:, -4:]
    assert T == 24
    np.testing.assert_array_equal(
        positions, [[16, 18, 20, 22], [12, 15, 18, 21], [13, 16, 19, 22], [17, 19, 21, 23], [14, 17, 20, 23]]
    )


@every_policy
def test_against_the_reference(name):
    case, results = ran(name)
    decided = 0
    for row in range(B):
        same, margin = check_oracle(
            small(name), case, results, MIXED, row, stored=store_of(OPTIONS["scheme"]), ties=2, rows=ROWS
        )
        assert same or margin < tolerances.STORED_MARGIN, f"row {row}, margin {margin}"
        decided += same
    assert decided >= B - 2


def test_the_reference_sees_other_owners():
    case, results = ran("h2o")
    wrong = (1, 0, 0, 1, 0)
    assert not check_oracle(
        small("h2o"), case, results, MIXED, 0, stored=store_of(OPTIONS["scheme"]), ties=2, rows=wrong
    )[0]


@some_policies
def test_extend_by_one_is_decode_and_dead_slots_do_not_matter(name):
    case, (_, after, hiddens, _, final) = ran(name)
    found, _, state = go_on(case, after, by="extend")
    np.testing.assert_allclose(found[case.then_valid], hiddens[case.then_valid], rtol=0, atol=tolerances.HIDDEN)
    assert kept_sets(state) == kept_sets(final)
    found, _, state = go_on(case, poison(after))
    np.testing.assert_array_equal(found[case.then_valid], hiddens[case.then_valid])


@some_policies
def test_compress_is_reading(name):
    case, (_, after, hiddens, *_) = ran(name)
    _, source = observed()
    limits = np.stack([np.minimum(case.limits, c.window or 8) for c in MIXED.layers])
    state = compress(source, spec_of(small(name), **OPTIONS), limits=limits, owners=owners_of(ROWS))
    assert kept_sets(state) == kept_sets(after)
    found, _, _ = go_on(case, state)
    np.testing.assert_allclose(found[case.then_valid], hiddens[case.then_valid], rtol=0, atol=tolerances.HIDDEN)


@functools.cache
def observed():
    return read(Full(observe=tuple(small(name) for name in EVICTING if name != "random"), balance=True), make_case(0))


def test_rows_of_a_batch_may_own_differently():
    """Row 1 of a batch whose owners differ is the row that a batch of its like gives; block rows of none hold nothing."""
    case = make_case(0, limits=LIMITS)
    other = (1, 0, -1, -1, 0)
    spec, limits = spec_of(small("h2o"), **OPTIONS), np.asarray([LIMITS] * 2).clip(max=np.array([8, 7])[:, None, None])

    def reading(owners):
        state = empty_state(MIXED, spec, limits=limits, lengths=[64] * B, owners=owners)
        _, state = extend(PARAMS, jnp.asarray(case.tokens), state, config=MIXED, valid=jnp.asarray(case.valid))
        return go_on(case, jax.device_get(state))

    mixed = [np.asarray([ROWS, other, ROWS, ROWS])] * 2
    one, two = reading(mixed), reading(owners_of(other))
    assert_rows_equal(one[0], two[0], [1], axis=1)
    assert_rows_equal(one[2], two[2], [1])
    assert (one[2].layers[0].tiers[0].positions[1, 2:4] == -1).all()
    assert_rows_equal(one[0], reading(owners_of(ROWS))[0], [0, 2, 3], axis=1)


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        (None, "its spec has rows 5, and owners say None"),
        ([np.zeros((B, 5), int)] * 2, "name each of 2 kv heads"),
        ([np.tile([0, 1, 2, 0, 1], (B, 1))] * 2, "name each of 2 kv heads"),
        ([np.tile([0, 1], (B, 1))] * 2, r"\[B, rows\] = \(4, 5\)"),
    ],
)
def test_owners_that_are_refused(owners, message):
    with pytest.raises(ValueError, match=message):
        empty_state(
            MIXED, spec_of(small("h2o"), **OPTIONS), limits=np.full((2, 2, B), 4), lengths=[T] * B, owners=owners
        )


def test_full_takes_one_row_per_head():
    with pytest.raises(ValueError, match="full policy"):
        new_state(Full(), [[8] * B], rows=ROWS)


def test_a_prompt_is_one_program_whatever_its_layers_own():
    case = make_case(0, limits=((8,) * B,))
    one = lambda rows: read(small("h2o"), case, PLAIN, slots=(8,), rows=rows)
    one(ROWS)
    before = _attend_layer._cache_size()
    one((0, 1, 1, 0, 1, 1, 0))
    one((0, 1, 1))
    assert _attend_layer._cache_size() == before


def test_owners_survive_a_file():
    case, (_, after, hiddens, *_) = ran("h2o")
    packed = pack_state(after, model="m", extra={})
    state, _ = unpack_state(packed, config=MIXED, model="m", where="here")
    assert_rows_equal(state, after, range(B))
    found, _, _ = go_on(case, jax.device_get(state))
    np.testing.assert_array_equal(found[case.then_valid], hiddens[case.then_valid])


def test_dropping_reaches_every_row_of_a_head():
    _, state = read(small("recency"), make_case(0, limits=((4,) * B,)), PLAIN, slots=(8,), rows=ROWS)
    shorter = drop(state, start=jnp.full(B, 20, jnp.int32), stop=jnp.full(B, 22, jnp.int32))
    for before, after in zip(state.layers, shorter.layers, strict=True):
        held = np.asarray(before.tiers[0].positions)
        np.testing.assert_array_equal(after.tiers[0].positions, np.where((held == 20) | (held == 21), -1, held))


@pytest.mark.parametrize(
    ("slots", "limit", "message"), [((8, 8), 9, "do not fit 8 slots"), ((8, 8), -1, "do not fit 8 slots")]
)
def test_compress_refuses_what_empty_state_refuses(slots, limit, message):
    spec = spec_of(small("h2o"), slots=slots, scheme=("f32", "f32"))
    with pytest.raises(ValueError, match=message):
        compress(observed()[1], spec, limits=np.full((2, 2, B), limit))
    with pytest.raises(ValueError, match=r"limits must be \[L, tiers, B\]"):
        compress(observed()[1], spec, limits=np.full((2, 1, B), 4))


def test_concat_needs_equal_owners():
    """Positions and keys of a joined state are those of both; states whose heads own different rows are refused."""
    case = make_case(0, limits=((8,) * B,))
    one = lambda rows: read(small("recency"), case, PLAIN, slots=(8,), rows=rows)[1]
    joined = concat(one(ROWS), one(ROWS), config=PLAIN)
    assert joined.layers[0].tiers[0].limit.tolist() == [[16] * 5] * B
    roomy = dataclasses.replace(case, limits=np.full((1, B), T))
    per_head = lambda: read(small("recency"), roomy, PLAIN)[1]  # has all that any block row has
    alone = concat(per_head(), per_head(), config=PLAIN)
    for mine, whole in zip(joined.layers, alone.layers, strict=True):
        at, there = (np.asarray(layer.tiers[0].positions) for layer in (mine, whole))
        keys, wanted = (np.asarray(layer.tiers[0].keys.codes) for layer in (mine, whole))
        for b, p, slot in zip(*np.nonzero(at >= 0), strict=True):
            (found,) = np.flatnonzero(there[b, ROWS[p]] == at[b, p, slot])
            np.testing.assert_allclose(
                keys[b, p, :, slot], wanted[b, ROWS[p], :, found], rtol=0, atol=tolerances.ENTRIES
            )
    with pytest.raises(ValueError, match="own different block rows"):
        concat(one(ROWS), one((0, 1, 1, 1, 0)), config=PLAIN)


def test_the_oracle_of_rows_is_the_oracle():
    """One row per head is the plain reference."""
    assert cache_reference.Reference({}, MIXED, small("h2o"), [[1], [1]]).rows == (0, 1)
