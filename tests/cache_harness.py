"""A tiny random model, its cases and what to look at in a state, for `test_cache.py`; oracle: `cache_reference.py`.

Programs and shapes are few and shared: `run` reads a prompt of T tokens and then takes STEPS single ones.
"""

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
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.policies import H2O, POLICIES, Full, Policy, make_policy
from jaxkv.types import LayerSpec, TierSpec

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
every_policy = pytest.mark.parametrize("name", POLICIES)
every_evicting = pytest.mark.parametrize("name", EVICTING)

# Running


def budgets(policy, limits, config=MIXED):
    """int [L, tiers, B] from limits [tiers][B]: local layers never hold more than their window, `full` holds all."""
    limits = np.asarray(limits, np.int32)
    if isinstance(policy, Full):
        limits = np.full_like(limits, SLOTS)
    return np.stack([limits if c.window is None else np.minimum(limits, c.window) for c in config.layers])


def new_state(policy, limits, config=MIXED, slots=(SLOTS,)):
    tiers = tuple(TierSpec(slots=count, scheme=("f32", "f32")) for count in slots)
    spec = (LayerSpec(policy=policy, tiers=tiers),) * config.num_layers
    return empty_state(config, spec, limits=budgets(policy, limits, config), lengths=[T + STEPS] * len(limits[0]))


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


@functools.partial(jax.jit, static_argnames=("config",))
def run(tokens, valid, then, then_valid, state, *, config):
    """The prompt, then single tokens. Returns: hidden, the state, hidden of the steps, positions after each, the state."""
    hidden, after = extend(PARAMS, tokens, state, config=config, valid=valid)

    def step(state, given):
        hidden, state = decode(PARAMS, given[0], state, config=config, valid=given[1])
        return state, (hidden, [[tier.positions for tier in layer.tiers] for layer in state.layers])

    final, (hiddens, positions) = jax.lax.scan(step, after, (then, then_valid))
    return hidden, after, hiddens, positions, final


def run_case(policy, case: Case, config=MIXED, slots=(SLOTS,), offsets=None):
    state = new_state(policy, case.limits, config, slots)
    if offsets is not None:
        state = dataclasses.replace(state, offsets=tuple(jnp.full((B,), x, jnp.int32) for x in offsets))
    return jax.device_get(run(case.tokens, case.valid, case.then, case.then_valid, state, config=config))


take_one = jax.jit(decode, static_argnames=("config",))
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


def contents(state):
    """Every live slot of a one-tier state: {(layer, row, head, position): arrays of key, value and the policy's state}."""
    found = {}
    for index, layer in enumerate(jax.device_get(state.layers)):
        (tier,) = layer.tiers
        for b, p, s in zip(*np.nonzero(tier.positions >= 0), strict=True):
            slots = [x[b, p, s] for x in jax.tree.leaves(tier.slots)]
            key, value = tier.keys.codes[b, p, :, s], tier.values.codes[b, p, s]
            found[index, int(b), int(p), int(tier.positions[b, p, s])] = [key, value, *slots]
    return found


def assert_same_contents(one, other, atol=0.0):
    one, other = contents(one), contents(other)
    assert one.keys() == other.keys()
    for where, parts in one.items():
        for a, b in zip(parts, other[where], strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=0 if a.dtype.kind != "f" else atol, err_msg=str(where))


def assert_rows_equal(one, other, rows, axis=0):
    """Bit for bit, NaN included."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.take(a, rows, axis), np.take(b, rows, axis))


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
    limits = budgets(policy, case.limits, config)
    for index, kind in enumerate(config.layers):
        first = [np.asarray(tier.positions) for tier in after.layers[index].tiers]
        history = [first] + [[tier[i] for tier in steps[index]] for i in range(STEPS)]
        for b, p in np.ndindex(*first[0].shape[:2]):
            before = None
            for i, tiers in enumerate(history):
                sets = [live_set(tier[b, p]) for tier in tiers]
                assert all(len(held) <= limits[index, n, b] for n, held in enumerate(sets))
                held, newest = set().union(*sets), int(counts[i, b]) - 1
                assert sum(map(len, sets)) == len(held) and all(0 <= x <= newest for x in held)
                if kind.window is not None:
                    assert all(newest + 1 - x < kind.window for x in held)
                must = protected_positions(policy, limits[index, 0, b], newest, kind.window)
                assert len(must) > limits[index, 0, b] or must <= sets[0]
                if before is not None:
                    assert held <= before | {newest}  # nothing returns
                before = held
    np.testing.assert_array_equal(final.next_position, counts[-1])


def check_oracle(policy, case, results, config, row):
    """Whether the kept sets of one row are the reference's, and its margin; if they are, the numbers must be as well."""
    hidden, after, hiddens, steps, final = results
    reference = cache_reference.Reference(WIDE_PARAMS, config, policy, budgets(policy, case.limits, config)[..., row])
    expected = [reference.read(case.tokens[row][case.valid[row]])]
    found = [hidden[row][case.valid[row]]]
    same = all(
        live_set(np.asarray(tier.positions[row, p])) == {t.position for t in reference.layers[i][p][n]}
        for i, layer in enumerate(after.layers) for n, tier in enumerate(layer.tiers) for p in range(2)
    )  # fmt: skip
    for step in np.flatnonzero(case.then_valid[:, row]):
        expected.append(reference.read(case.then[step, row : row + 1]))
        found.append(hiddens[step, row : row + 1])
        same &= all(
            live_set(tier[step, row, p]) == {t.position for t in reference.layers[i][p][n]}
            for i, layer in enumerate(steps) for n, tier in enumerate(layer) for p in range(2)
        )  # fmt: skip
    if same:
        np.testing.assert_allclose(np.vstack(found), np.vstack(expected), rtol=0, atol=tolerances.HIDDEN)
        for i, layer in enumerate(final.layers):
            for n, tier in enumerate(layer.tiers):
                check_entries(tier, reference.layers[i], n, row)
    return same, reference.margin


def check_entries(tier, heads, number, row):
    for p, tiers in enumerate(heads):
        slot_of = {int(at): slot for slot, at in enumerate(tier.positions[row, p])}
        for token in tiers[number]:
            key, value = (
                tier.keys.codes[row, p, :, slot_of[token.position]],
                tier.values.codes[row, p, slot_of[token.position]],
            )
            np.testing.assert_allclose(key, token.key, rtol=0, atol=tolerances.ENTRIES)
            np.testing.assert_allclose(value, token.value, rtol=0, atol=tolerances.ENTRIES)
