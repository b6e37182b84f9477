"""Tiers of any schemes under any policy: the chain downward, at the prompt and at decode, against the reference."""

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
    STEPS,
    B,
    Case,
    assert_rows_equal,
    budgets,
    check_entries,
    check_oracle,
    check_promises,
    go_on,
    kept_sets,
    make_case,
    new_state,
    poison,
    read,
    run_case,
    small,
    spec_of,
)

from jaxkv.cache import compress
from jaxkv.policies import Full
from jaxkv.quantization import SCHEMES, get_scheme, kivi

FOURS = {f"kivi{bits}-by-4": dataclasses.replace(kivi.scheme(bits, 4), name=f"kivi{bits}-by-4") for bits in (4, 2)}
LIMITS = ((8, 4, 16, 1), (9, 3, 8, 6), (6, 16, 0, 2))  # [tier][row]
SLOTS = 16
TIES = 2  # stored vectors of a row, of 48 or more, that float32 may round the other way
LISTS = {
    "exact over rotated": ("f32", "rotated4", "rotated2"),
    "three down": ("bf16", ("int4", "rotated3"), ("fp8_e5m2", "int2")),
    "groups over groups": (("int8", "int3"), ("balanced-kivi4-by-4", "fp8_e4m3"), ("kivi2-by-4", "int2")),
    "bf16 over int4": ("bf16", ("int4", "fp8_e4m3")),
    "keys and values apart": (("int8", "rotated3"), ("balanced-int2", "rotated2")),
    "groups of two sizes of codes": (("f32", "int3"), ("kivi4-by-4", "rotated4"), ("kivi2-by-4", "fp8_e5m2")),
    "one quantized tier": ("rotated3",),
    "balanced under rotation": (("balanced-rotated3", "rotated4"), ("balanced-int4", "int3")),
    "int8 over int2": ("int8", ("int2", "fp8_e5m2")),
    "groups between": ("f32", ("kivi4-by-4", "fp8_e4m3"), ("rotated2", "bf16")),
    "groups": ("bf16", ("kivi2-by-4", "int2")),
}
COVERS = (  # the lists of each have every scheme between them; policies take turns
    ("exact over rotated", "three down", "groups over groups"),
    ("bf16 over int4", "keys and values apart", "groups of two sizes of codes", "one quantized tier"),
    ("balanced under rotation", "int8 over int2", "groups between", "groups"),
)
PAIRS = [(name, tiers) for i, name in enumerate(EVICTING) for tiers in COVERS[i % len(COVERS)]]
QUICK = [(name, tiers) for name, tiers in PAIRS if not tiers.startswith("groups")][::6]


def or_later(mark):
    """All pairs: those that are not quick have that mark, those of three tiers, which compile longest, are slow."""
    quick = lambda tiers: pytest.mark.slow if len(LISTS[tiers]) > 2 else ()
    return [pytest.param(*pair, marks=quick(pair[1]) if pair in QUICK else mark) for pair in PAIRS]


every_pair = pytest.mark.parametrize("name, tiers", or_later(pytest.mark.slow))
some_pairs = pytest.mark.parametrize("name, tiers", or_later(pytest.mark.exhaustive))


def schemes_of(tiers):
    """Names of its schemes, for keys or values, balanced or not."""
    used = [one for tier in LISTS[tiers] for one in ((tier,) if isinstance(tier, str) else tier)]
    return {name.removeprefix("balanced-").removesuffix("-by-4") for name in used}


def test_every_policy_meets_every_scheme():
    met = {(name, scheme) for name, tiers in PAIRS for scheme in schemes_of(tiers)}
    assert met == {(name, scheme) for name in EVICTING for scheme in set(SCHEMES) - set(FOURS)}
    assert {tiers for _, tiers in PAIRS} == set(LISTS)


@pytest.fixture(autouse=True)
def groups_of_four(monkeypatch):
    """KIVI's keys in groups so small that a short text makes many."""
    for name, scheme in FOURS.items():
        monkeypatch.setitem(SCHEMES, name, scheme)


def granules(tiers):
    return [get_scheme(one if isinstance(one, str) else one[0]).granule for one in LISTS[tiers]]


def limits_of(tiers):
    """LIMITS in whole groups where a tier has those."""
    return np.stack([np.asarray(row) // g * g for row, g in zip(LIMITS, granules(tiers), strict=False)])


def options(tiers):
    slots = [SLOTS] * len(LISTS[tiers])
    slots[0] += 4 * (max(granules(tiers)) > 1)  # room to wait
    return {"slots": tuple(slots), "scheme": LISTS[tiers], "positions": "int16"}


@functools.cache
def ran(name, tiers, seed=0):
    case = make_case(seed, limits=limits_of(tiers))
    return case, run_case(small(name), case, **options(tiers))


@functools.cache
def stored(name):
    scheme = get_scheme(name)
    return jax.jit(lambda x: scheme.out_of_basis(scheme.decode(scheme.encode(x), -1).astype(jnp.float32)))


def store(tiers):
    """What each tier makes of keys and values of the reference that enter together."""
    return store_of(LISTS[tiers])


def store_of(schemes):
    """The same for a list that has no name."""
    pairs = [(one, one) if isinstance(one, str) else one for one in schemes]

    def once(name, x):
        whole = np.concatenate([x, np.repeat(x[:1], -len(x) % get_scheme(name).granule, axis=0)])
        return np.asarray(stored(name)(jnp.asarray(whole, jnp.float32)), np.float64)[: len(x)]

    bf16 = lambda x: np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), np.float64)

    def one(number, keys, values, balance):
        scheme, other = pairs[number]
        factor = bf16(balance) if scheme.startswith("balanced-") else 1.0
        return once(scheme.removeprefix("balanced-"), keys * factor) / factor, once(other, values)

    return one


@every_pair
def test_against_the_reference(name, tiers):
    case, results = ran(name, tiers)
    check_promises(small(name), case, results, MIXED)
    decided = 0
    for row in range(B):
        same, margin = check_oracle(small(name), case, results, MIXED, row, stored=store(tiers), ties=TIES)
        assert same or margin < tolerances.STORED_MARGIN, f"row {row}, margin {margin}"
        decided += same
    assert decided >= B - 2  # the others kept the same, up to a tie


@pytest.mark.parametrize(
    "given, step, tied", [(1.25, 2**-7, 1), (1.26, 2**-7, None), (1.5, 2**-7, None), (1.25, 0.0, None)]
)
def test_a_code_may_differ_only_where_what_was_given_lies_in_the_middle(given, step, tied):
    """The oracle's own rule: stored 1.0 where the reference has 1.5 is a tie of 1.25, and of nothing else."""
    _, state = read(small("recency"), make_case(0), MIXED)
    tier = jax.tree.map(np.array, state.layers[0].tiers[0])
    slot = int(np.argmax(tier.positions[0, 0] >= 0))
    key, value = tier.keys.codes[0, 0, :, slot].copy(), tier.values.codes[0, 0, slot]
    tier.keys.codes[0, 0, 0, slot] = 1.0
    other = np.array([1.5, *key[1:]], np.float32)
    told = cache_reference.Token(
        position=int(tier.positions[0, 0, slot]), key=other, value=value, given=(np.array([given, *key[1:]]), value)
    )
    if tied is None:
        with pytest.raises(AssertionError):
            check_entries(tier, None, [[told]], 0, step)
    else:
        assert check_entries(tier, None, [[told]], 0, step) == tied


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["not stored", "values as keys", "one tier late"])
def test_the_reference_sees(wrong):
    name, tiers = "recency", "exact over rotated"
    case, results = ran(name, tiers)
    good = store(tiers)
    bad = {
        "not stored": lambda number, key, value, balance: (key, value),
        "values as keys": lambda number, key, value, balance: good(number, key, value, balance)[::-1],
        "one tier late": lambda number, key, value, balance: good(max(0, number - 1), key, value, balance),
    }[wrong]
    with pytest.raises(AssertionError):
        check_oracle(small(name), case, results, MIXED, 0, stored=bad, ties=TIES)


@some_pairs
def test_extend_by_one_is_decode(name, tiers):
    case, (_, after, hiddens, steps, final) = ran(name, tiers)
    found, positions, state = go_on(case, after, by="extend")
    if not np.allclose(found[case.then_valid], hiddens[case.then_valid], rtol=0, atol=tolerances.HIDDEN):
        check_ties(case, after)
    assert kept_sets(state) == kept_sets(final)
    for one, other in zip(jax.tree.leaves(positions), jax.tree.leaves(steps), strict=True):
        np.testing.assert_array_equal(np.sort(one), np.sort(other))


def check_ties(case, after):
    """Both ways step by step: hidden states of a row differ only while it holds a bfloat16 code that is one apart."""
    ways, before = [after, after], np.zeros(B, int)
    for step in range(STEPS):
        one = dataclasses.replace(case, then=case.then[step : step + 1], then_valid=case.then_valid[step : step + 1])
        (a, _, ways[0]), (b, _, ways[1]) = (
            go_on(one, s, by=by) for s, by in zip(ways, ("decode", "extend"), strict=True)
        )
        off = np.abs(a[0] - b[0]).max(axis=-1) * one.then_valid[0]
        assert (off <= np.where(before > 0, tolerances.HIDDEN_TIED, tolerances.HIDDEN)).all()
        before = np.zeros(B, int)
        for x, y in zip(
            *(jax.tree.leaves([[(t.keys, t.values) for t in z.tiers] for z in s.layers]) for s in ways), strict=True
        ):
            differ = (x != y).reshape(B, -1).sum(axis=-1)
            assert not differ.any() or x.dtype == np.uint16 and np.abs(x.astype(int) - y).max() == 1
            before += differ
        assert before.max() <= TIES


@some_pairs
def test_garbage_in_dead_slots_changes_nothing(name, tiers):
    case, (_, after, hiddens, _, final) = ran(name, tiers)
    found, _, state = go_on(case, poison(after))
    np.testing.assert_array_equal(found[case.then_valid], hiddens[case.then_valid])
    assert kept_sets(state) == kept_sets(final)


@some_pairs
def test_compress_walks_the_same_chain(name, tiers):
    case, (_, after, hiddens, *_) = ran(name, tiers)
    _, source = observed()
    spec = spec_of(small(name), **options(tiers))
    limits = budgets(small(name), case.limits, MIXED, granules(tiers))
    state = compress(source, spec, limits=limits)
    moved = 0
    for mine, theirs in zip(kept_sets(state), kept_sets(after), strict=True):
        moved += sum(
            len(a ^ b) for row, other in zip(mine, theirs, strict=True) for a, b in zip(row, other, strict=True)
        )
    assert not moved
    found, _, _ = go_on(case, state)
    np.testing.assert_allclose(found[case.then_valid], hiddens[case.then_valid], rtol=0, atol=tolerances.HIDDEN)


@functools.cache
def observed():
    return read(Full(observe=tuple(small(name) for name in EVICTING), balance=True), make_case(0))


@some_pairs
def test_rows_do_not_depend_on_their_mates(name, tiers):
    case, (hidden, after, hiddens, *_) = ran(name, tiers)
    other = make_case(1)
    keep = np.arange(B) == 2
    mixed = Case(
        np.where(keep[:, None], case.tokens, other.tokens), np.where(keep[:, None], case.valid, other.valid),
        np.where(keep, case.then, other.then), np.where(keep, case.then_valid, other.then_valid), case.limits,
    )  # fmt: skip
    _, then, found, *_ = run_case(small(name), mixed, **options(tiers))
    assert_rows_equal(after, then, [2])
    assert_rows_equal(found, hiddens, [2], axis=1)


def test_an_entry_is_encoded_once_per_tier_and_only_moves_down():
    """What stays in a tier keeps its codes, and what was demoted is the lower scheme's image of the upper one's."""
    case, (_, after, _, steps, final) = ran("recency", "exact over rotated")
    for before, later in zip(after.layers, final.layers, strict=True):
        for old, new in zip(before.tiers, later.tiers, strict=True):
            stayed = (old.positions >= 0) & (old.positions == new.positions)
            for a, b in ((old.keys, new.keys), (old.values, new.values)):
                for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                    mask = stayed if x.shape[2] == SLOTS and x.shape[:3] == stayed.shape else stayed[:, :, None]
                    mask = mask[..., None] if mask.ndim == 3 else mask
                    mask = np.broadcast_to(mask, x.shape)
                    np.testing.assert_array_equal(x[mask], y[mask])
        tier_of = lambda tiers, b, p: {int(x): n for n, t in enumerate(tiers) for x in t.positions[b, p] if x >= 0}
        for b, p in np.ndindex(B, 2):
            was, now = tier_of(before.tiers, b, p), tier_of(later.tiers, b, p)
            assert all(now[x] >= was[x] for x in now.keys() & was.keys())
            assert any(now[x] > was[x] for x in now.keys() & was.keys()) or b in (1, 3) or before is after.layers[1]


def test_the_state_of_one_tier_list_is_never_wider_than_its_schemes():
    """Codes of a low-bit tier take its bits: nothing is stored wide."""
    state = new_state(small("recency"), LIMITS[:2], slots=(SLOTS, SLOTS), scheme=("int3", "int2"))
    for tier, bits in zip(state.layers[0].tiers, (3, 2), strict=True):
        for encoded in (tier.keys, tier.values):
            assert encoded.codes.dtype == jnp.uint8 and encoded.codes.nbytes * 8 == B * 2 * SLOTS * 8 * bits


def test_the_displaced_entry_of_a_full_chain_leaves_for_good():
    case, (_, after, _, _, final) = ran("recency", "bf16 over int4")
    newest = case.valid.sum(axis=1) + case.then_valid.sum(axis=0) - 1
    for row in range(B):
        room = sum(limit[row] for limit in LIMITS[:2])
        held = kept_sets(final)[0][row][0]
        first = set(range(min(4, room)))
        assert held == first | set(range(int(newest[row]) + 1 - max(0, room - 4), int(newest[row]) + 1))
