"""The contract of the state, for every policy in the table, on a tiny model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.cache import compress, decode, empty_state, extend, forward, live_count
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.decoder import init_params
from jaxkv.policies import POLICIES, Full
from jaxkv.types import LayerSpec, TierSpec

ROPE = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
CONFIG = DecoderConfig(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
    layers=(LayerConfig(window=None, rope=ROPE), LayerConfig(window=12, rope=ROPE)), max_positions=512, norm_eps=1e-5,
    norm_offset=0.0, activation="silu", query_scale=8**-0.5, embedding_scale=1.0, tie_embeddings=True,
)  # fmt: skip
PARAMS = jax.tree.map(lambda x: x * 3, init_params(CONFIG, jax.random.key(0)))
OPTIONS = {
    "recency": {"sinks": 2}, "random": {"recent": 2}, "scissorhands": {"recent": 2, "window": 16},
    "scissorhands-reference": {"recent": 2, "window": 16}, "h2o": {}, "full": {},
}  # fmt: skip
BOUNDED = [name for name in POLICIES if name != "full"]
T, SLOTS = 24, 10


def policy_of(name):
    return POLICIES[name](**OPTIONS.get(name, {}))


def state_of(policy, slots, limit, batch=2):
    spec = tuple(
        LayerSpec(policy=policy, tiers=(TierSpec(slots=min(slots, kind.window or slots), scheme=("f32", "f32")),))
        for kind in CONFIG.layers
    )
    limits = np.array([[[min(limit, kind.window or limit)] * batch] for kind in CONFIG.layers])
    return empty_state(CONFIG, spec, limits=limits, lengths=[64] * batch)


def tokens_of(seed, length=T, batch=2):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 64)


def kept(state):
    """Positions held, as sets: [layer][row][head]."""
    return [
        [[set(h[h >= 0].tolist()) for h in row] for row in np.asarray(layer.tiers[0].positions)]
        for layer in state.layers
    ]


def by_position(state, layer, row, head):
    """{position: (key, value)} of one head."""
    tier = state.layers[layer].tiers[0]
    at = np.asarray(tier.positions)[row, head]
    keys, values = np.asarray(tier.keys.codes)[row, head], np.asarray(tier.values.codes)[row, head]
    return {int(p): (keys[:, s], values[s]) for s, p in enumerate(at) if p >= 0}


@functools.partial(jax.jit)
def one(token, state, valid):
    return decode(PARAMS, token, state, config=CONFIG, valid=valid)


RUNNING = jnp.ones((2,), bool)


@pytest.mark.parametrize("name", POLICIES)
def test_a_large_budget_keeps_all_and_changes_nothing(name):
    tokens = tokens_of(1)
    hidden, state = extend(PARAMS, tokens, state_of(policy_of(name), 32, 32), config=CONFIG)
    np.testing.assert_array_equal(hidden, forward(PARAMS, tokens, config=CONFIG))
    for layer, kind in zip(kept(state), CONFIG.layers, strict=True):
        first = T - (kind.window or T + 1) + 1
        assert all(head == set(range(max(first, 0), T)) for row in layer for head in row)


@pytest.mark.parametrize("name", BOUNDED)
def test_kept_entries_are_the_full_caches(name):
    tokens = tokens_of(2)
    _, full = extend(PARAMS, tokens, state_of(Full(), 32, 32), config=CONFIG)
    _, state = extend(PARAMS, tokens, state_of(policy_of(name), SLOTS, 7), config=CONFIG)
    for layer in range(2):
        assert (np.asarray(live_count(state.layers[layer].tiers[0])) == 7).all()
        for row in range(2):
            for head in range(2):
                want = by_position(full, layer, row, head)
                for position, pair in by_position(state, layer, row, head).items():
                    np.testing.assert_array_equal(pair, want[position])
                assert T - 1 in by_position(state, layer, row, head)


@pytest.mark.parametrize("name", BOUNDED)
def test_decode_equals_extend_by_one_and_never_revives(name):
    _, a = extend(PARAMS, tokens_of(3), state_of(policy_of(name), SLOTS, 7), config=CONFIG)
    b = jax.tree.map(jnp.copy, a)
    before = kept(a)
    for step in range(12):
        token = tokens_of(50 + step, 1)
        x, a = one(token[:, 0], a, RUNNING)
        y, b = extend(PARAMS, token, b, config=CONFIG)
        np.testing.assert_allclose(x, y[:, 0], atol=2e-5)
        assert kept(a) == kept(b)
        for old, new in zip(jax.tree.leaves(before, is_leaf=lambda s: isinstance(s, set)),
                            jax.tree.leaves(kept(a), is_leaf=lambda s: isinstance(s, set)), strict=True):  # fmt: skip
            assert new - {T + step} <= old and T + step in new and len(new) <= 7
        before = kept(a)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(y, np.float64), atol=2e-5)


@pytest.mark.parametrize("name", BOUNDED)
def test_compress_equals_the_direct_prefill(name):
    policy = policy_of(name)
    _, full = extend(PARAMS, tokens_of(4), state_of(Full(observe=(policy,)), 32, 32), config=CONFIG)
    _, direct = extend(PARAMS, tokens_of(4), state_of(policy, SLOTS, 7), config=CONFIG)
    small = compress(full, policy, slots=[SLOTS, SLOTS], limits=[[7, 7], [7, 7]])
    assert kept(small)[0] == kept(direct)[0]  # in the local layer the full state has already lost what left the window


@pytest.mark.parametrize("name", BOUNDED)
def test_mates_pads_and_dead_slots_change_no_bit(name):
    tokens, policy = np.array(tokens_of(5)), policy_of(name)
    valid = np.ones((2, T), bool)
    valid[0, 18:] = False
    other = tokens.copy()
    other[0, 18:], other[1] = 63, other[1][::-1]
    run = lambda t: extend(PARAMS, jnp.asarray(t), state_of(policy, SLOTS, 7), config=CONFIG, valid=jnp.asarray(valid))
    (x, a), (y, b) = run(tokens), run(other)
    np.testing.assert_array_equal(x[0, :18], y[0, :18])
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(left[0], right[0])

    def poison(tier):
        dead = np.asarray(tier.positions) < 0
        keys, values = np.array(tier.keys.codes), np.array(tier.values.codes)
        keys[np.broadcast_to(dead[:, :, None], keys.shape)] = np.nan
        values[dead] = 1e30
        put = lambda e, x: dataclasses.replace(e, codes=jnp.asarray(x))
        return dataclasses.replace(tier, keys=put(tier.keys, keys), values=put(tier.values, values))

    ill = dataclasses.replace(
        a, layers=tuple(dataclasses.replace(layer, tiers=(poison(layer.tiers[0]),)) for layer in a.layers)
    )
    token = tokens_of(6, 1)[:, 0]
    for _ in range(3):
        (x, a), (y, ill) = one(token, a, RUNNING), one(token, ill, RUNNING)
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", POLICIES)
def test_stopped_rows_keep_their_state(name):
    _, state = extend(PARAMS, tokens_of(7), state_of(policy_of(name), 32, 32 if name == "full" else 7), config=CONFIG)
    _, after = one(tokens_of(8, 1)[:, 0], state, jnp.array([False, True]))
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(old[0], new[0])


def test_a_full_state_without_room_is_refused():
    _, state = extend(PARAMS, tokens_of(9), state_of(Full(), 32, 26), config=CONFIG)
    with pytest.raises(ValueError, match="room for 2 more tokens and was given 5"):
        extend(PARAMS, tokens_of(10, 5), state, config=CONFIG)


def test_compress_without_the_statistics_is_refused():
    _, state = extend(PARAMS, tokens_of(9), state_of(Full(), 32, 32), config=CONFIG)
    with pytest.raises(ValueError, match="'h2o' needs attention that this state has not observed"):
        compress(state, policy_of("h2o"), slots=[8, 8], limits=[[8, 8], [8, 8]])


def test_decode_traces_once():
    count = []

    @jax.jit
    def step(token, state):
        count.append(1)
        return decode(PARAMS, token, state, config=CONFIG, valid=RUNNING)[1]

    _, state = extend(PARAMS, tokens_of(11), state_of(policy_of("h2o"), SLOTS, 7), config=CONFIG)
    for i in range(4):
        state = step(tokens_of(i, 1)[:, 0], state)
    assert len(count) == 1
