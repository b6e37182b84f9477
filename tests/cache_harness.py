"""A tiny random model, its cases and what to look at in a state, for the tests of the cache; oracle: `cache_reference.py`.

Programs and shapes are few and shared: `run_case` reads a prompt of T tokens, then `take_steps` takes STEPS single ones.
"""

import collections
import dataclasses
import functools

import cache_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from jaxkv import decoder
from jaxkv.cache import decode, empty_state, extend
from jaxkv.cache.state import plain_entries
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.policies import H2O, POLICIES, Full, Policy, make_policy
from jaxkv.quantization import get_scheme
from jaxkv.rope import make_rotary
from jaxkv.types import Encoded, LayerSpec, Newcomers, State, TierSpec
from pallas_kernels.decode_attention.owners import to_rows

B, T, STEPS, SLOTS, WINDOW = 4, 24, 12, 40, 7
ROPE = RopeConfig(kind="default", theta=100.0, rotary_dim=8)
WHOLE, LOCAL = LayerConfig(window=None, rope=ROPE), LayerConfig(window=WINDOW, rope=ROPE)


def tiny(*layers):
    return DecoderConfig(
        model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
        layers=layers, max_positions=256, norm_eps=1e-6, norm_offset=0.0, activation="silu", query_scale=8**-0.5,
        embedding_scale=1.0, tie_embeddings=False,
    )  # fmt: skip


PLAIN, MIXED = tiny(WHOLE, WHOLE), tiny(WHOLE, LOCAL)
PARAMS = decoder.init_params(PLAIN, jax.random.key(3))  # both configurations have the same shapes
WIDE_PARAMS = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)


def small(name: str) -> Policy:
    """A policy of the table, its window and its protected tokens cut down to the size of the tests."""
    options = {field.name: field.default for field in dataclasses.fields(POLICIES[name])}
    cut = {"window": 16} if "window" in options else {}
    return make_policy(name, **cut, recent=min(3, options["recent"]))


EVICTING = [name for name in POLICIES if name != "full"]
QUICK = ("full", "recency", "random", "scissorhands", "h2o", "keydiff")  # the rest of a contract test is slow


def quick_or_slow(names, quick=QUICK, later=lambda name: pytest.mark.slow):
    """Names as parameters of a test: those that are not quick have the mark that `later` says."""
    return [name if name in quick else pytest.param(name, marks=later(name)) for name in names]


every_policy = pytest.mark.parametrize("name", quick_or_slow(POLICIES))
every_evicting = pytest.mark.parametrize("name", quick_or_slow(EVICTING))
# What they keep is like no other's
OWN = ("scissorhands", "scissorhands-reference", "keydiff", "expected-attention", "kvzip", "replay")


def of_each_kind(names, quick):
    """As `quick_or_slow`, of a test for which policies that are like another one are exhaustive."""
    return quick_or_slow(names, quick, lambda name: pytest.mark.slow if name in OWN else pytest.mark.exhaustive)


# Running


def budgets(policy, limits, config=MIXED, granules=None):
    """int [L, tiers, B] from limits [tiers][B]: local layers never hold more than their window, `full` holds all."""
    limits = np.asarray(limits, np.int32)
    if isinstance(policy, Full):
        limits = np.full_like(limits, SLOTS)
    size = np.asarray(granules or [1] * len(limits))[:, None]
    return np.stack(
        [limits if c.window is None else np.minimum(limits, c.window) // size * size for c in config.layers]
    )


def granules_of(state):
    """Of its tiers."""
    return [get_scheme(tier.scheme[0]).granule for tier in state.layers[0].tiers]


def spec_of(policy, slots=(SLOTS,), scheme="f32", positions="int32", rows=None):
    """Two layers alike. scheme: one for all tiers, or one per tier, each for keys and values or a pair. rows: the kv head of
    each block row."""
    schemes = (scheme,) * len(slots) if isinstance(scheme, str) else scheme
    pairs = [(s, s) if isinstance(s, str) else s for s in schemes]
    tiers = tuple(
        TierSpec(slots=count, scheme=pair, positions=positions) for count, pair in zip(slots, pairs, strict=True)
    )
    return (LayerSpec(policy=policy, tiers=tiers, rows=None if rows is None else len(rows)),) * 2


def owners_of(rows, batch=B):
    """`owners` of `empty_state` for the two layers of `spec_of`."""
    return None if rows is None else [np.tile(np.asarray(rows), (batch, 1))] * 2


def new_state(policy, limits, config=MIXED, slots=(SLOTS,), scheme="f32", positions="int32", rows=None):
    spec, batch = spec_of(policy, slots, scheme, positions, rows), len(limits[0])
    limits = budgets(policy, limits, config, [get_scheme(tier.scheme[0]).granule for tier in spec[0].tiers])
    return empty_state(config, spec, limits=limits, lengths=[T + STEPS] * batch, owners=owners_of(rows, batch))


@dataclasses.dataclass(frozen=True)
class Case:
    """tokens, valid [B, T]; then, then_valid [STEPS, B]; limits [tiers][B]."""

    tokens: np.ndarray
    valid: np.ndarray
    then: np.ndarray
    then_valid: np.ndarray
    limits: np.ndarray


def make_case(seed, limits=((SLOTS, 12, 7, 20),)):
    """Row 0 is whole, row 1 padded on the left, row 2 on the right, row 3 anywhere and with pauses."""
    rng = np.random.default_rng(seed)
    valid, then_valid = np.ones((B, T), bool), np.ones((STEPS, B), bool)
    valid[1, :5], valid[2, -9:], valid[3] = False, False, rng.random(T) < 0.7
    then_valid[:, 3] = rng.random(STEPS) < 0.7
    tokens = rng.integers(0, 64, (B, T)).astype(np.int32)
    return Case(tokens, valid, rng.integers(0, 64, (STEPS, B)).astype(np.int32), then_valid, np.asarray(limits))


def read(
    policy, case: Case, config=MIXED, slots=(SLOTS,), offsets=None, params=PARAMS, scheme="f32", positions="int32",
    rows=None,
):  # fmt: skip
    """The prompt, as users' programs read it: eagerly, layer by layer, on an empty state. Returns: hidden, the state."""
    state = new_state(policy, case.limits, config, slots, scheme, positions, rows)
    if offsets is not None:
        state = dataclasses.replace(state, offsets=tuple(jnp.full((B,), x, jnp.int32) for x in offsets))
    return extend(params, jnp.asarray(case.tokens), state, config=config, valid=jnp.asarray(case.valid))


TRACES = collections.Counter()  # of `take_steps`: how often each program was traced


@functools.partial(jax.jit, static_argnames=("config", "by"))
def take_steps(params, then, then_valid, state, *, config, by):
    """Single tokens, by "decode" or by "extend". Returns: hidden of the steps, positions after each, the state; and all of
    them, one after another along axis 0."""
    kinds = jax.tree.map(lambda x: (x.shape, x.dtype.name), (params["final_norm"], then, state))
    TRACES[by, config, str(kinds)] += 1

    def step(state, given):
        token, valid = given
        if by == "decode":
            hidden, state = decode(params, token, state, config=config, valid=valid)
        else:
            hidden, state = extend(params, token[:, None], state, config=config, valid=valid[:, None])
            hidden = hidden[:, 0]
        return state, (hidden, state)

    final, (hiddens, states) = jax.lax.scan(step, state, (then, then_valid))
    return hiddens, [[tier.positions for tier in layer.tiers] for layer in states.layers], final, states


def go_on(case: Case, state, config=MIXED, by="decode", params=PARAMS):
    """`take_steps` on the host's side, without the states between."""
    return jax.device_get(take_steps(params, case.then, case.then_valid, state, config=config, by=by)[:3])


class Results(tuple):
    """What `run_case` returns; states: after each step, one after another along axis 0."""

    states: State


def run_case(policy, case: Case, config=MIXED, **options):
    """Returns: hidden of the prompt, the state after it, hidden of the steps, positions after each, the last state."""
    hidden, after = jax.device_get(read(policy, case, config, **options))
    steps = take_steps(options.get("params", PARAMS), case.then, case.then_valid, after, config=config, by="decode")
    *steps, states = jax.device_get(steps)
    results = Results((hidden, after, *steps))
    results.states = states
    return results


def newcomers(keys, values=None, queries=None, positions=None, scale=1.0):
    """All n tokens of an extend, valid: keys, values [B, P, n, H]; queries [B, P, G, n, H]; from position 0 unless given."""
    batch, _, count, size = keys.shape
    at = jnp.arange(count, dtype=jnp.int32)[None] if positions is None else positions
    return Newcomers(
        queries=keys[:, :, None] if queries is None else queries,
        keys=keys,
        values=keys if values is None else values,
        positions=jnp.broadcast_to(at, (batch, count)),
        valid=jnp.ones((batch, count), bool),
        count=jnp.full((batch,), count, jnp.int32),
        offset=jnp.zeros((batch,), jnp.int32),
        rotary=make_rotary(RopeConfig(kind="default", theta=100.0, rotary_dim=size), jnp.full((batch,), count)),
        scale=scale,
    )


extend_jitted = jax.jit(extend, static_argnames=("config",))


@functools.cache
def standard(name):
    """Case and results that many tests look at."""
    case = make_case(0)
    return case, run_case(small(name), case)


# Looking


def live_set(positions):
    """positions [S] -> the set of those that are there."""
    found = positions[positions >= 0].tolist()
    assert len(found) == len(set(found))
    return set(found)


def kept_sets(state):
    """[layer][row][head] -> the set of positions held by all tiers."""
    rows, heads = state.layers[0].tiers[0].limit.shape
    return [
        [[set().union(*(live_set(np.asarray(t.positions[b, p])) for t in layer.tiers)) for p in range(heads)]
         for b in range(rows)]
        for layer in state.layers
    ]  # fmt: skip


def value_codes(tier):
    """Codes of values with slots at axis 2, however they lie."""
    return np.swapaxes(tier.values.codes, 2, 3) if get_scheme(tier.scheme[1]).slots_minor else tier.values.codes


def numbers(codes):
    """What a carrier means, as float32."""
    return np.asarray(codes.view(jnp.bfloat16), np.float32) if codes.dtype == np.uint16 else codes


def contents(state):
    """Per layer of a one-tier state: live [B, P, position], and keys, values and the policy's state laid out like it."""
    found = []
    for layer in jax.device_get(state.layers):
        (tier,) = layer.tiers
        b, p, s = np.nonzero(tier.positions >= 0)
        at = tier.positions[b, p, s]
        live = np.zeros((*tier.positions.shape[:2], 2 * SLOTS), bool)
        live[b, p, at] = True
        parts = []
        for part in (np.swapaxes(tier.keys.codes, 2, 3), value_codes(tier), *jax.tree.leaves(tier.slots)):
            placed = np.zeros((*live.shape, *part.shape[3:]), part.dtype)
            placed[b, p, at] = part[b, p, s]
            parts.append(placed)
        found.append((live, parts))
    return found


def assert_contained(some, everything, atol=0.0, parts=None, rows=slice(None)):
    """Whatever `some` holds, `everything` holds as well, and alike. parts: 2 = keys and values only. rows: an index."""
    for number, ((live, mine), (room, theirs)) in enumerate(zip(contents(some), contents(everything), strict=True)):
        live, room = live[rows], room[rows]
        assert not (live & ~room).any()
        for index, (a, b) in enumerate(zip(mine[:parts], theirs[:parts], strict=parts is None)):
            rounded = index >= 2 and a.dtype == np.uint16 and atol > 0  # scores as bfloat16 bits: some a step apart
            a, b, slack = a[rows][live], b[rows][live], atol if a.dtype.kind == "f" else float(rounded)
            assert not rounded or (a != b).sum() <= max(2, tolerances.ROUNDED_SHARE * a.size)
            np.testing.assert_allclose(a, b, rtol=0, atol=slack, err_msg=f"layer {number}")


def assert_same_contents(one, other, atol=0.0, parts=None, rows=slice(None)):
    assert_contained(one, other, atol, parts, rows)
    for (live, _), (also, _) in zip(contents(one), contents(other), strict=True):
        np.testing.assert_array_equal(live[rows], also[rows])


def poison(state):
    """The state with garbage in its dead slots: NaN keys, large finite values, all bits set in what the policy keeps."""

    def filled(x, dead, garbage):
        dead = dead.reshape(dead.shape + (1,) * (x.ndim - dead.ndim))
        return np.where(dead, np.asarray(garbage, x.dtype), x)

    def spoil(tier):
        dead = tier.positions < 0
        minor = np.broadcast_to(dead[:, :, None], (*dead.shape[:2], 1, dead.shape[2]))
        ones = lambda x: filled(x, dead, np.nan if x.dtype.kind == "f" else np.iinfo(x.dtype).max)

        def garbage(encoded, slots_minor, floats):
            """Some codes, finite also as fp8, and large factors; floats: where codes are float32, and bfloat16's bits."""
            number = {"float32": floats[0], "uint16": floats[1], "uint8": 0x7B}[encoded.codes.dtype.name]
            of_groups = lambda x: minor.reshape(*minor.shape[:3], x.shape[3], -1).all(axis=-1)
            factors = tuple(filled(x, np.broadcast_to(of_groups(x), x.shape), 0x7149) for x in encoded.factors)
            where = np.broadcast_to(minor, encoded.codes.shape) if slots_minor else dead
            return Encoded(codes=filled(encoded.codes, where, number), factors=factors)

        return dataclasses.replace(
            tier,
            keys=garbage(tier.keys, True, (np.nan, 0x7FC0)),
            values=garbage(tier.values, get_scheme(tier.scheme[1]).slots_minor, (1e30, 0x7149)),
            slots=jax.tree.map(ones, tier.slots),
        )

    layers = (
        dataclasses.replace(layer, tiers=tuple(map(spoil, layer.tiers))) for layer in jax.device_get(state.layers)
    )
    return dataclasses.replace(state, layers=tuple(layers))


def assert_rows_equal(one, other, rows, axis=0):
    """Bit for bit, NaN included."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.take(a, rows, axis), np.take(b, rows, axis))


def assert_memory_close(one, other):
    """What policies keep once per row."""
    for a, b in zip(*(jax.tree.leaves([layer.row for layer in s.layers]) for s in (one, other)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerances.STATISTIC if a.dtype.kind == "f" else 0)


def protected_positions(policy, limit, newest, window):
    recent = max(policy.recent, int(limit * policy.recent_share)) if isinstance(policy, H2O) else policy.recent
    chosen = set(range(max(0, newest + 1 - recent), newest + 1)) | set(range(min(policy.sinks, newest + 1)))
    return {x for x in chosen if window is None or newest + 1 - x < window}


def check_promises(policy, case, results, config):
    """Limits, protection, and that what left stays away, after the prompt and after every step."""
    _, after, _, steps, final = results
    counts = case.valid.sum(axis=1) + np.cumsum(
        np.vstack([np.zeros((1, B), int), case.then_valid]), axis=0
    )  # [step, B]
    granules = granules_of(after)
    limits, group = budgets(policy, case.limits, config, granules), max(granules)
    for index, kind in enumerate(config.layers):
        first = [np.asarray(tier.positions) for tier in after.layers[index].tiers]
        history = [first] + [[tier[i] for tier in steps[index]] for i in range(STEPS)]
        for b, p in np.ndindex(*first[0].shape[:2]):
            before = None
            for i, tiers in enumerate(history):
                sets = [live_set(tier[b, p]) for tier in tiers]
                waits = [  # for a group to be whole
                    (group - 1) * (size == 1 and granules[n + 1 : n + 2] == [group] and limits[index, n + 1 :, b].any())
                    for n, size in enumerate(granules)
                ]
                assert all(len(held) <= limits[index, n, b] + waits[n] for n, held in enumerate(sets))
                held, newest = set().union(*sets), int(counts[i, b]) - 1
                assert sum(map(len, sets)) == len(held) and all(0 <= x <= newest for x in held)
                if kind.window is not None:
                    assert all(newest + 1 - x < kind.window for x in held)
                else:  # what there is room for stays
                    room = limits[index, :, b].sum()
                    assert min(room, newest + 1) <= len(held) <= room + sum(waits)
                must = sorted(protected_positions(policy, limits[index, 0, b], newest, kind.window), reverse=True)
                assert sets[0] >= set(must[: limits[index, 0, b]])  # the newest of them, where not all fit
                if before is not None:
                    assert held <= before | {newest}  # nothing returns
                before = held
    np.testing.assert_array_equal(final.next_position, counts[-1])


def check_survivors(results):
    """What stays is neither moved nor encoded again."""
    for before, after in zip(results[1].layers, results[4].layers, strict=True):
        for old, new in zip(before.tiers, after.tiers, strict=True):
            stayed = (old.positions >= 0) & (old.positions == new.positions)
            for b, p in np.ndindex(*stayed.shape[:2]):
                assert not live_set(old.positions[b, p][~stayed[b, p]]) & live_set(new.positions[b, p])
            np.testing.assert_array_equal(value_codes(old)[stayed], value_codes(new)[stayed])
            keys = (np.swapaxes(tier.keys.codes, 2, 3)[stayed] for tier in (old, new))
            np.testing.assert_array_equal(*keys)


def check_oracle(policy, case, results, config, row, oracle=cache_reference.Reference, ties=0, **more):
    """Whether the kept sets of one row are the reference's, and its margin; if they are, the numbers must be as well.

    ties: how many stored vectors of the last state may be rounded the other way in float32. Where numbers differ and ties
    may be, the row is undecided if it held one before the first number that differs.
    """
    hidden, after, hiddens, steps, final = results
    if max(granules := granules_of(after)) > 1:
        more["granules"] = granules
    new = lambda: oracle(WIDE_PARAMS, config, policy, budgets(policy, case.limits, config, granules)[..., row], **more)
    reference = new()
    block_rows = range(len(reference.rows))
    expected = _read_prompt(reference, case, row, hidden)
    found = [hidden[row][case.valid[row]]]
    same = all(
        live_set(np.asarray(tier.positions[row, p])) == {t.position for t in reference.held(i, p, n)}
        for i, layer in enumerate(after.layers) for n, tier in enumerate(layer.tiers) for p in block_rows
    )  # fmt: skip
    for step in np.flatnonzero(case.then_valid[:, row]):
        expected.append(reference.read(case.then[step, row : row + 1]))
        found.append(hiddens[step, row : row + 1])
        same &= all(
            live_set(tier[step, row, p]) == {t.position for t in reference.held(i, p, n)}
            for i, layer in enumerate(steps) for n, tier in enumerate(layer) for p in block_rows
        )  # fmt: skip
    if not same:
        return False, reference.margin
    try:
        assert _count_ties(final, reference, row, ties) <= ties
        np.testing.assert_allclose(np.vstack(found), np.vstack(expected), rtol=0, atol=tolerances.HIDDEN)
    except AssertionError as error:
        if not ties or not _first_is_a_tie(new(), case, results, row):
            raise error
        return False, 0.0
    return True, reference.margin


def _read_prompt(reference, case, row, hidden):
    prompt = case.valid[row]
    return [reference.read(case.tokens[row][prompt])] if prompt.any() else [np.zeros((0, hidden.shape[-1]))]


def _count_ties(state, reference, row, ties):
    """Stored vectors of a row that are not the reference's; fails where one is no tie."""
    return sum(
        check_entries(
            tier, None if layer.balance is None else to_rows(layer.balance, layer.owner),
            [reference.held(i, p, n) for p in range(len(reference.rows))], row, tolerances.BF16_STEP if ties else 0.0,
        )
        for i, layer in enumerate(state.layers) for n, tier in enumerate(layer.tiers)
    )  # fmt: skip


def _first_is_a_tie(reference, case, results, row):
    """Whether a stored vector of the row is rounded the other way before any number of it differs by more than that explains.

    What follows from a tie is not bounded: the other code goes down to coarser tiers, and into what later layers store.
    """
    hidden, state, hiddens, *_ = results
    expected = _read_prompt(reference, case, row, hidden)
    np.testing.assert_allclose(hidden[row][case.valid[row]], expected[0], rtol=0, atol=tolerances.HIDDEN)
    for step in np.flatnonzero(case.then_valid[:, row]):
        if _count_ties(state, reference, row, 1):
            return True
        wanted = reference.read(case.then[step, row : row + 1])
        np.testing.assert_allclose(hiddens[step, row : row + 1], wanted, rtol=0, atol=tolerances.HIDDEN)
        state = jax.tree.map(lambda x, step=step: x[step], results.states)
    return bool(_count_ties(state, reference, row, 1))


def check_entries(tier, balance, held, row, step):
    """Keys and values of a tier are the reference's, or within `step` of them; further only with a step, and where what was
    given to the tier lies in the middle between both, as far as float32 can tell. Returns: how many vectors differ."""
    keys, values = (np.asarray(x, np.float32) for x in plain_entries(tier, balance))
    tied = 0
    for p, tokens in enumerate(held):
        slot_of = {int(at): slot for slot, at in enumerate(tier.positions[row, p])}
        for token in tokens:
            for side, (stored, expected) in enumerate(((keys, token.key), (values, token.value))):
                found = stored[row, p, slot_of[token.position]]
                far = ~np.isclose(found, expected, rtol=step, atol=tolerances.ENTRIES)
                if step and token.given:
                    middle = np.where(far, (found + expected) / 2, token.given[side])
                    far = ~np.isclose(middle, token.given[side], rtol=0, atol=tolerances.ENTRIES)
                assert not far.any(), (found, expected)
                tied += not np.allclose(found, expected, rtol=0, atol=tolerances.ENTRIES)
    return tied
