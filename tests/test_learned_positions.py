"""What models of the comparison have in place of rotary positions and gated MLPs: learned positions, and squared ReLU."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import PARAMS, PLAIN, SLOTS, new_state, small, spec_of

from infer import prefill
from jaxkv import decoder
from jaxkv.cache import concat, decode, empty_state, extend, forward
from jaxkv.checkpoints import open_checkpoint, save
from jaxkv.quantization.base import from_bits

TABLE = 40
CONFIG = dataclasses.replace(PLAIN, learned_positions=TABLE, max_positions=TABLE)
ROWS = np.random.default_rng(0).standard_normal((TABLE, 32)).astype(np.float32)
LEARNED = {**PARAMS, "positions": {"embedding": jnp.asarray(ROWS)}}
TOKENS = np.random.default_rng(1).permutation(64)[: TABLE + 1].astype(np.int32)  # no token comes twice


def no_rope(config):
    """Without rotary positions."""
    turned = lambda layer: dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, kind="none"))
    return dataclasses.replace(config, layers=tuple(map(turned, config.layers)))


def expected(count):
    """By a model without a table, which has the position of each token in the token's own embedding."""
    table = np.array(PARAMS["embedder"]["embedding"])
    table[TOKENS[:count]] += ROWS[:count]
    params = {**PARAMS, "embedder": {"embedding": jnp.asarray(table)}}
    return np.asarray(forward(params, jnp.asarray(TOKENS[None, :count]), config=PLAIN))[0]


def test_positions_are_added_where_the_token_stands():
    """At the prompt, behind pads on the left, and at decode; a full row that has stopped stays finite."""
    wanted, jitted = expected(24), jax.jit(decode, static_argnames=("config",))
    tokens, valid = np.full((2, 20), 63, np.int32), np.ones((2, 20), bool)
    tokens[0], tokens[1, 6:], valid[1, :6] = TOKENS[:20], TOKENS[:14], False
    state = new_state(small("full"), ((SLOTS, SLOTS),), CONFIG)
    hidden, state = extend(LEARNED, jnp.asarray(tokens), state, config=CONFIG, valid=jnp.asarray(valid))
    np.testing.assert_allclose(hidden[0], wanted[:20], rtol=0, atol=tolerances.HIDDEN)
    np.testing.assert_allclose(hidden[1, 6:], wanted[:14], rtol=0, atol=tolerances.HIDDEN)
    for step in range(4):
        token = jnp.asarray([TOKENS[20 + step], TOKENS[14 + step]])
        hidden, state = jitted(LEARNED, token, state, config=CONFIG, valid=jnp.ones(2, bool))
        np.testing.assert_allclose(hidden, wanted[[20 + step, 14 + step]], rtol=0, atol=tolerances.HIDDEN)
    full = dataclasses.replace(state, next_position=jnp.asarray([TABLE, TABLE], jnp.int32))
    hidden, _ = jitted(LEARNED, token, full, config=CONFIG, valid=jnp.asarray([False, True]))
    assert (
        np.isfinite(hidden[0]).all() and np.isnan(hidden[1]).all()
    )  # and beyond the table nothing looks like a result


def test_positions_beyond_the_table_are_refused():
    too_many = jnp.asarray(TOKENS[None])
    with pytest.raises(ValueError, match="rows of 41 tokens: the model has learned 40 positions"):
        forward(LEARNED, too_many, config=CONFIG)
    make = lambda: empty_state(CONFIG, spec_of(small("recency")), limits=np.full((2, 1, 1), 8), lengths=[TABLE])
    with pytest.raises(ValueError, match="41 positions are needed; the model has learned 40"):
        extend(LEARNED, too_many, make(), config=CONFIG)
    _, state = extend(LEARNED, too_many[:, :38], make(), config=CONFIG)
    with pytest.raises(ValueError, match="41 positions are needed"):
        extend(LEARNED, too_many[:, :3], state, config=CONFIG)
    with pytest.raises(ValueError, match="cannot move"):
        concat(state, state, config=CONFIG)
    with pytest.raises(ValueError, match="max_positions 41 exceeds the table of 40"):
        dataclasses.replace(CONFIG, max_positions=41)
    with pytest.raises(ValueError, match="give them"):
        decoder.embed(LEARNED, too_many, config=CONFIG)


@pytest.mark.parametrize("length", [36, 39, TABLE])
def test_a_replay_near_the_tables_end(length):
    """The context is read again in passages that fit, if it leaves room for any."""
    state = new_state(small("kvzip"), ((SLOTS,),), CONFIG)
    hidden, state = prefill.read(LEARNED, [TOKENS[:length].tolist()], state, config=CONFIG, repeat=[1, 2])
    np.testing.assert_allclose(hidden[0], expected(length)[-1], rtol=0, atol=tolerances.HIDDEN)
    assert int(state.next_position[0]) == length
    seen = np.unique(np.asarray(from_bits(state.layers[0].tiers[0].slots["attention"])))
    assert (len(seen) > 1) == (length < TABLE)


def test_without_rotary_positions_only_order_of_sight_counts():
    """In one layer the last token does not tell in which order the others stood; with rotary positions it does."""
    one = dataclasses.replace(PLAIN, layers=PLAIN.layers[:1])
    moved = np.concatenate([TOKENS[8:0:-1], TOKENS[:1], TOKENS[9:10]])
    differences = []
    for config in (no_rope(one), one):
        last = [np.asarray(forward(PARAMS, jnp.asarray(x[None]), config=config))[0, -1] for x in (TOKENS[:10], moved)]
        differences.append(np.abs(last[0] - last[1]).max())
    assert differences[0] < tolerances.HIDDEN and differences[1] > tolerances.VISIBLE


@pytest.mark.parametrize("activation", ["relu", "relu_squared"])
@pytest.mark.parametrize("gate", [True, False])
def test_mlp_by_hand(activation, gate):
    config = dataclasses.replace(PLAIN, activation=activation, mlp_gate=gate)
    x = np.random.default_rng(2).standard_normal((1, 3, 32)).astype(np.float32)
    params = decoder.MLP(config).init(jax.random.key(0), jnp.asarray(x))["params"]
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    power = {"relu": 1, "relu_squared": 2}[activation]
    if gate:
        first, up = np.split(x @ wide["gate_up"]["kernel"], 2, axis=-1)
    else:
        first, up = x @ wide["up"]["kernel"], 1.0
    wanted = (np.maximum(first, 0) ** power * up) @ wide["down"]["kernel"]
    found = decoder.MLP(config).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerances.HIDDEN)


@pytest.mark.parametrize("gate", [True, False])
def test_saved_and_loaded(gate, tmp_path):
    config = no_rope(dataclasses.replace(CONFIG, activation="relu_squared", mlp_gate=gate))
    params = decoder.init_params(config, jax.random.key(0))
    assert params["positions"]["embedding"].shape == (TABLE, 32)
    save(tmp_path / "model", config, params)
    back = open_checkpoint(tmp_path / "model", dtype="float32")
    assert back.config == config
    assert jax.tree.structure(back.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
