"""What the cache promises, for every policy in the table, on a tiny random model; oracle: `cache_reference.py`."""

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
    SLOTS,
    STEPS,
    WIDE_PARAMS,
    WINDOW,
    B,
    Case,
    T,
    assert_contained,
    assert_memory_close,
    assert_rows_equal,
    assert_same_contents,
    budgets,
    check_oracle,
    check_promises,
    contents,
    every_evicting,
    every_policy,
    go_on,
    kept_sets,
    make_case,
    new_state,
    newcomers,
    poison,
    read,
    run_case,
    small,
    spec_of,
    standard,
)

from jaxkv.cache import compress, decode, empty_state, extend, forward
from jaxkv.cache.attend import retention
from jaxkv.policies import H2O, Full, Random, Scissorhands, ScissorhandsReference
from jaxkv.types import LayerSpec, Rows, TierSpec

# What policies keep


@every_policy
def test_against_the_reference(name):
    case, results = standard(name)
    check_promises(small(name), case, results, MIXED)
    for row in range(B):
        same, margin = check_oracle(small(name), case, results, MIXED, row)
        assert same, f"row {row}, margin {margin}"


@every_policy
def test_a_budget_for_everything_changes_nothing(name):
    """The first extend keeps all, each key and value bit for bit, and gives the plain forward pass."""
    case, _ = standard(name)
    roomy = np.full((1, B), SLOTS)
    hidden, state = read(small(name), dataclasses.replace(case, limits=roomy))
    _, full = read(Full(), dataclasses.replace(case, limits=roomy))
    plain = forward(PARAMS, jnp.asarray(case.tokens), config=MIXED, valid=jnp.asarray(case.valid))
    np.testing.assert_allclose(
        np.asarray(hidden)[case.valid], np.asarray(plain)[case.valid], rtol=0, atol=tolerances.HIDDEN
    )
    counts = case.valid.sum(axis=1)
    for index, rows in enumerate(kept_sets(state)):
        for b, heads in enumerate(rows):
            oldest = 0 if index == 0 else max(0, counts[b] + 1 - WINDOW)  # the local layer drops what no one will see
            assert heads == [set(range(oldest, counts[b]))] * 2
    assert_same_contents(state, full, atol=tolerances.ENTRIES, parts=2)
    first = lambda state: dataclasses.replace(state, layers=state.layers[:1])
    assert_same_contents(first(state), first(full), parts=2)  # deeper layers stand behind another program's rounding


@every_evicting
def test_kept_keys_and_values_are_those_of_the_roomy_cache(name):
    """Bit for bit: limits are data, so both come from one program."""
    case, (hidden, after, *_) = standard(name)
    roomy_hidden, roomy, *_ = run_case(small(name), dataclasses.replace(case, limits=np.full((1, B), SLOTS)))
    np.testing.assert_array_equal(hidden, roomy_hidden)
    assert_contained(after, roomy)
    assert sum(live.sum() for live, _ in contents(after)) < sum(live.sum() for live, _ in contents(roomy))


@every_policy
def test_extend_by_one_is_decode(name):
    case, (_, after, hiddens, _, final) = standard(name)
    found, _, state = go_on(case, after, by="extend")
    np.testing.assert_allclose(found[case.then_valid], hiddens[case.then_valid], rtol=0, atol=tolerances.HIDDEN)
    assert_same_contents(state, final, atol=tolerances.ENTRIES)
    assert_memory_close(state, final)
    np.testing.assert_array_equal(state.next_position, final.next_position)


@functools.cache
def observed():
    case, observe = make_case(0), tuple(small(name) for name in EVICTING)
    return read(Full(observe=observe), case)


@every_evicting
def test_compress_reaches_what_the_policy_would_have(name):
    case, (_, after, hiddens, *_) = standard(name)
    limits = budgets(small(name), case.limits)
    before = jax.tree.map(np.array, observed()[1])
    state = compress(observed()[1], spec_of(small(name)), limits=limits)
    assert_rows_equal(before, observed()[1], range(B))  # the source survives
    assert_same_contents(state, after, atol=tolerances.STATISTIC)
    assert_memory_close(state, after)
    found, _, _ = go_on(case, state)
    np.testing.assert_allclose(found[case.then_valid], hiddens[case.then_valid], rtol=0, atol=tolerances.HIDDEN)


def test_compress_refuses_what_it_has_not_seen():
    state = new_state(Full(observe=(small("h2o"),)), [[SLOTS] * B])
    with pytest.raises(ValueError, match="has not observed"):
        compress(state, spec_of(small("scissorhands")), limits=np.full((2, 1, B), 8))
    with pytest.raises(ValueError, match="under the full policy, got 'random'"):
        compress(new_state(small("random"), [[9] * B]), spec_of(small("h2o")), limits=np.full((2, 1, B), 8))


# Rows, pads and dead slots


@every_policy
def test_mates_and_pads_may_be_anything(name):
    """A row's results, bit for bit, when its pads hold other tokens and its mates are other rows altogether."""
    case, results = standard(name)
    other = make_case(1, limits=((9, 8, 30, 5),))
    for row in range(B):
        pads = lambda mine, valid, theirs: np.where(valid, mine, theirs)
        keep = lambda mine, theirs, row=row: np.where((np.arange(B) == row)[:, None], mine, theirs)
        changed = Case(
            tokens=keep(pads(case.tokens, case.valid, other.tokens), other.tokens),
            valid=keep(case.valid, np.roll(other.valid, 1, axis=0)),
            then=keep(pads(case.then, case.then_valid, other.then).T, other.then.T).T,
            then_valid=keep(case.then_valid.T, other.then_valid.T).T,
            limits=keep(case.limits.T, other.limits.T).T,
        )
        hidden, after, hiddens, positions, final = run_case(small(name), changed)
        np.testing.assert_array_equal(hidden[row][case.valid[row]], results[0][row][case.valid[row]])
        np.testing.assert_array_equal(
            hiddens[:, row][case.then_valid[:, row]], results[2][:, row][case.then_valid[:, row]]
        )
        assert_rows_equal(positions, results[3], [row], axis=1)
        assert_rows_equal(after, results[1], [row])
        assert_rows_equal(final, results[4], [row])


@every_policy
def test_padding_on_either_side(name):
    case, _ = standard(name)
    count, limits = 17, np.array([[11] * B])
    rows = [case.tokens[0, :count], case.tokens[1, :count]]
    tokens, valid = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    where = [slice(0, count), slice(T - count, T), slice(3, 3 + count), slice(0, count)]  # of rows 0, 0, 0, 1
    for b, part in enumerate(where):
        tokens[b, part], valid[b, part] = rows[b // 3], True
    then, always = np.repeat(case.then[:, :1], B, axis=1), np.ones((STEPS, B), bool)
    hidden, after, hiddens, _, final = run_case(small(name), Case(tokens, valid, then, always, limits))
    for b in (1, 2):
        np.testing.assert_allclose(hidden[b, where[b]], hidden[0, where[0]], rtol=0, atol=tolerances.HIDDEN)
        np.testing.assert_allclose(hiddens[:, b], hiddens[:, 0], rtol=0, atol=tolerances.HIDDEN)
    for state in (after, final):
        for layer in kept_sets(state):
            assert layer[0] == layer[1] == layer[2]


@every_policy
def test_dead_slots_may_hold_anything(name):
    case, (_, after, hiddens, _, final) = standard(name)
    assert all((tier.positions < 0).any() for layer in after.layers for tier in layer.tiers)
    clean = {"decode": (hiddens, final), "extend": go_on(case, after, by="extend")[::2]}
    for by, (expected, last) in clean.items():
        found, _, state = go_on(case, poison(after), by=by)
        np.testing.assert_array_equal(found[case.then_valid], expected[case.then_valid])
        assert_same_contents(state, last)


@every_policy
def test_stopped_rows_neither_insert_nor_evict(name):
    case, (_, after, *_) = standard(name)
    running = np.array([True, False, True, False])
    stopped = dataclasses.replace(case, then_valid=np.broadcast_to(running, (STEPS, B)))
    for by in ("decode", "extend"):
        _, _, state = go_on(stopped, after, by=by)
        assert_rows_equal(after, state, [1, 3])
        np.testing.assert_array_equal(state.next_position, after.next_position + STEPS * running)


@every_policy
def test_a_decode_step_traces_once(name):
    case, (_, state, *_) = standard(name)
    traces = []

    @functools.partial(jax.jit, donate_argnums=1)
    def step(token, state, valid):
        traces.append(token.shape)
        return decode(PARAMS, token, state, config=MIXED, valid=valid)

    state = jax.tree.map(jnp.array, state)
    for token, valid in zip(case.then, case.then_valid, strict=True):
        _, state = step(jnp.asarray(token), state, jnp.asarray(valid))
    limits = jax.tree.map(jnp.array, new_state(small(name), [[5] * B]))  # another budget, the same program
    step(jnp.asarray(case.then[0]), limits, jnp.ones(B, bool))
    assert traces == [(B,)]


def test_tokens_that_only_look():
    """Not a candidate: it takes a position and sees, and is seen in the same extend, but is not stored."""
    case, (hidden, after, *_) = standard("full")
    candidates = np.broadcast_to(np.arange(T) % 3 > 0, (B, T))
    same, state = extend(
        PARAMS, jnp.asarray(case.tokens), new_state(Full(), case.limits), config=MIXED, valid=case.valid,
        candidates=candidates,
    )  # fmt: skip
    np.testing.assert_array_equal(np.asarray(same)[case.valid], hidden[case.valid])
    np.testing.assert_array_equal(state.next_position, after.next_position)
    everything, some = kept_sets(after)[0], kept_sets(state)[0]
    for b in range(B):
        at = (np.cumsum(case.valid[b]) - 1)[case.valid[b] & ~candidates[b]]
        assert some[b] == [everything[b][0] - set(at.tolist())] * 2


def test_random_does_not_depend_on_the_batch_index():
    case = dataclasses.replace(make_case(2, limits=((9,) * B,)), valid=np.ones((B, T), bool))
    layers = kept_sets(run_case(small("random"), case)[1])
    for layer in layers:
        assert all(row == layer[0] for row in layer)  # tokens differ, positions and draws do not
    assert layers[0][0][0] != layers[0][0][1]  # heads draw for themselves
    at = jnp.arange(SLOTS, dtype=jnp.int32)[None, None]
    draws = lambda policy: policy.score((), policy.enter_row((1, 2, 4), 0), at)
    first, again, other = (draws(Random(seed=seed)) for seed in (0, 0, 1))
    assert (first == again).all() and (first != other).mean() > 0.9


# Worked by hand

HAND = np.zeros((8, 8), np.float32)  # row i: what query i gives; uniform share 1 / (i + 1)
HAND[0, :1] = [1.0]
HAND[1, :2] = [0.5, 0.5]
HAND[2, :3] = [0.5, 0.16, 0.34]
HAND[3, :4] = [0.5, 0.1, 0.3, 0.1]
HAND[4, :5] = [0.5, 0.05, 0.3, 0.05, 0.1]
HAND[5, :6] = [0.5, 0.01, 0.3, 0.01, 0.01, 0.17]
HAND[6, :7] = [0.5, 0.04, 0.3, 0.04, 0.04, 0.04, 0.04]
HAND[7, :8] = [0.5, 0.03, 0.3, 0.03, 0.03, 0.03, 0.04, 0.04]
LOW = [0, 6, 0, 5, 4, 2, 2, 1]  # of token j: in how many rows it got less than the uniform share


def kept_by_hand(policy, limit):
    """Positions that the policy keeps of eight tokens whose attention was HAND, and its slots before that."""
    count = jnp.asarray([8], jnp.int32)
    rows = Rows(
        remaining=jnp.arange(7, -1, -1, dtype=jnp.int32)[None], valid=jnp.ones((1, 8), bool), count=count,
        live=jnp.arange(1, 9, dtype=jnp.int32)[None, None], replay=jnp.zeros((1, 8), bool), own=True,
    )  # fmt: skip
    new = newcomers(jnp.zeros((1, 1, 8, 4)))
    row = policy.enter_row((1, 1, 4), 0)
    statistic = policy.row_statistic(
        jnp.asarray(HAND)[None, None, None], jnp.tril(jnp.ones((8, 8), bool))[None, None], rows, row
    )
    slots = policy.absorb(policy.enter(new, row), statistic, row, count)
    row = policy.advance(row, new)
    positions, limits = jnp.arange(8, dtype=jnp.int32)[None, None], jnp.full((1, 1), limit, jnp.int32)
    score = np.asarray(retention(policy, slots, row, positions, limits, count - 1))[0, 0]
    best = sorted(range(8), key=lambda i: (score[i], i), reverse=True)[:limit]
    return set(best), slots, policy.score(slots, row, positions)[0, 0]


@pytest.mark.parametrize("policy", [Scissorhands(window=8, recent=1), ScissorhandsReference(window=8, recent=1)])
def test_scissorhands_by_hand(policy):
    kept, slots, score = kept_by_hand(policy, 4)
    assert kept == {0, 2, 6, 7}  # 7 is protected; 0 and 2 were never low; 5 and 6 tie, the newer stays
    assert kept_by_hand(policy, 5)[0] == {0, 2, 5, 6, 7}
    np.testing.assert_array_equal(score, -np.array(LOW, np.float32))
    if isinstance(policy, Scissorhands):  # token 1 was low in rows 7 6 | 5 4 | 3 2, not in 1 0
        assert int(slots["low"][0, 0, 1]) == 0x00_02_02_02
    else:  # bit i = row i
        assert int(slots["low"][0, 0, 1, 0]) == 0b1111_1100


def test_h2o_by_hand():
    assert kept_by_hand(H2O(), 4)[0] == {0, 2, 6, 7}  # 6 and 7 are the newest half
    kept, slots, _ = kept_by_hand(H2O(), 6)
    assert kept == {0, 1, 2, 5, 6, 7}
    np.testing.assert_allclose(slots["attention"][0, 0], HAND.sum(axis=0), rtol=0, atol=tolerances.STATISTIC)
    assert kept_by_hand(H2O(recent_share=0.0), 6)[0] == {0, 1, 2, 3, 5, 7}


def test_both_scissorhands_agree_after_a_prompt_of_a_window_or_more():
    short, exact = (kept_sets(standard(name)[1][1]) for name in ("scissorhands", "scissorhands-reference"))
    counts = standard("scissorhands")[0].valid.sum(axis=1)
    rows = np.flatnonzero(counts >= 16)
    assert len(rows) >= 2
    for mine, theirs in zip(short, exact, strict=True):
        assert [mine[b] for b in rows] == [theirs[b] for b in rows]


# Two tiers


CHAIN = {name: small(name) for name in EVICTING} | {"h2o": H2O(recent_share=0.0)}


@pytest.mark.parametrize("name", ["random", "scissorhands", "h2o"])
def test_two_tiers_hold_the_best_of_both_limits(name):
    policy, case = CHAIN[name], make_case(0, limits=((5, 7, 12, 3), (6, 20, 0, 4)))
    results = run_case(policy, case, slots=(12, 24))
    check_promises(policy, case, results, MIXED)
    one = dataclasses.replace(case, limits=case.limits.sum(axis=0, keepdims=True))
    for row in range(B):
        same, margin = check_oracle(policy, case, results, MIXED, row)
        assert same, f"row {row}, margin {margin}"
        reference = cache_reference.Reference(WIDE_PARAMS, MIXED, policy, budgets(policy, one.limits)[..., row])
        reference.read(case.tokens[row][case.valid[row]])
        for p in range(2):
            found = kept_sets(results[1])[0][row][p]
            assert found == {token.position for token in reference.layers[0][p][0]}


def test_offsets_of_tiers_are_only_a_frame():
    """Stored positions and keys are shifted, and nothing else changes."""
    case = make_case(0, limits=((5, 7, 12, 3), (6, 20, 0, 4)))
    hidden, after, hiddens, _, final = run_case(CHAIN["random"], case, slots=(12, 24))
    moved = run_case(CHAIN["random"], case, slots=(12, 24), offsets=(-2, -7))
    np.testing.assert_allclose(moved[0][case.valid], hidden[case.valid], rtol=0, atol=tolerances.HIDDEN)
    np.testing.assert_allclose(moved[2][case.then_valid], hiddens[case.then_valid], rtol=0, atol=2 * tolerances.HIDDEN)
    for layer, other in zip(final.layers, moved[4].layers, strict=True):
        for tier, shifted, by in zip(layer.tiers, other.tiers, (2, 7), strict=True):
            np.testing.assert_array_equal(np.where(tier.positions >= 0, tier.positions + by, -1), shifted.positions)


# Bad input


def test_extend_refuses_what_does_not_fit():
    tokens, state = jnp.zeros((B, T), jnp.int32), new_state(Full(), [[SLOTS] * B])
    with pytest.raises(ValueError, match="2 rows, the state has 4"):
        extend(PARAMS, tokens[:2], state, config=MIXED)
    with pytest.raises(ValueError, match="unknown visibility 'all'; known: causal, bidirectional"):
        extend(PARAMS, tokens, state, config=MIXED, visibility="all")
    with pytest.raises(ValueError, match=r"valid must be \[B, T\]"):
        extend(PARAMS, tokens, state, config=MIXED, valid=jnp.ones((B, 2), bool))


@pytest.mark.parametrize("limits, slots, room", [
    ([[[SLOTS, SLOTS, SLOTS, 20]]] * 2, (SLOTS,), 20),
    ([[[SLOTS] * B], [[SLOTS, SLOTS, SLOTS, 18]]], (SLOTS,), 18),  # only the second layer is short
    ([[[12] * B, [4, 4, 3, 4]]] * 2, (12, 12), 15),
])  # fmt: skip
def test_a_full_cache_is_never_cut_in_silence(limits, slots, room):
    spec = (LayerSpec(policy=Full(), tiers=tuple(TierSpec(slots=n, scheme=("f32", "f32")) for n in slots)),) * 2
    fresh = lambda: empty_state(PLAIN, spec, limits=np.asarray(limits), lengths=[T] * B)
    tokens = jnp.zeros((B, T), jnp.int32)
    with pytest.raises(ValueError, match=f"room for {room} more tokens and was given 24"):
        extend(PARAMS, tokens, fresh(), config=PLAIN)
    fits = jnp.broadcast_to(jnp.arange(T) < room, (B, T))
    _, state = extend(PARAMS, tokens, fresh(), config=PLAIN, valid=fits)
    assert all(len(held) == room for layer in kept_sets(state) for row in layer for held in row)
