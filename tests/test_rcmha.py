"""Relative convolutional attention: by hand, the whole model against a float64 reference, training, files."""

import dataclasses
import functools

import cache_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import (
    MIXED,
    PARAMS,
    PLAIN,
    B,
    make_case,
    run_case,
    small,
)
from rcmha_harness import (
    DEFAULT,
    FAR,
    OPTIONS,
    reference_of,
    stirred,
    with_rcmha,
)

from jaxkv import decoder
from jaxkv.attention.rcmha import from_gqa
from jaxkv.cache import forward
from jaxkv.causal import causal_forward
from jaxkv.checkpoints import CheckpointError, open_checkpoint, save
from jaxkv.config import RcmhaConfig

# The layer


def test_by_hand():
    """One layer, one head of 2 channels, logits that only go by distance: the weights are those of exp S[distance]."""
    rope = dataclasses.replace(PLAIN.layers[0].rope, kind="none", rotary_dim=2)
    config = dataclasses.replace(
        with_rcmha(PLAIN, dataclasses.replace(DEFAULT, width=2)), hidden_size=2, num_heads=1, num_kv_heads=1, head_dim=2,
        vocab_size=3, intermediate_size=2, layers=(dataclasses.replace(PLAIN.layers[0], rope=rope),), query_scale=1.0,
    )  # fmt: skip
    params = jax.tree.map(jnp.zeros_like, decoder.init_params(config, jax.random.key(0)))
    table = np.array([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])  # of size 1 already, so that the norm changes nothing
    layer = params["layers_0"]["attention"]
    params["embedder"]["embedding"], params["final_norm"]["scale"] = jnp.asarray(table, jnp.float32), jnp.ones(2)
    params["layers_0"]["attention_norm"]["scale"] = jnp.ones(2)
    layer["qkv"]["kernel"] = jnp.zeros((2, 6)).at[:, 4:].set(jnp.eye(2))
    layer["output"]["kernel"] = jnp.eye(2)
    layer["values_convolution"] = {"filters": jnp.asarray([[0.5, 0.0], [1.0, 2.0]]), "bias": jnp.asarray([0.0, 10.0])}
    layer["distances"]["table"] = layer["distances"]["table"].at[0, :3, 2].set(jnp.log(jnp.asarray([1.0, 2.0, 3.0])))
    found = forward(params, jnp.asarray([[0, 1, 2]]), config=config)[0]
    values = np.array([[1.0, 12.0], [-1 + 0.5, 12.0], [1 - 0.5, 8.0]])
    weights = np.array([[1, 0, 0], [2 / 3, 1 / 3, 0], [3 / 6, 2 / 6, 1 / 6]])
    expected = cache_reference.norm(table + weights @ values, np.ones(2), config.norm_eps)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.HIDDEN)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_against_the_reference(name):
    """Read at once, in pieces, and by ragged rows with pads and pauses, one token at a time."""
    config = with_rcmha(MIXED, OPTIONS[name])
    params, wide = stirred(config, seed=1)
    case = make_case(0)
    hidden, _, hiddens, _, _ = run_case(small("full"), case, config, params=params)
    for row in range(B):
        reference = reference_of(wide, config)
        steps = np.flatnonzero(case.then_valid[:, row])
        expected = [reference.read(case.tokens[row][case.valid[row]])]
        expected += [reference.read(case.then[step, row : row + 1]) for step in steps]
        found = np.vstack([hidden[row][case.valid[row]], hiddens[steps, row]])
        np.testing.assert_allclose(found, np.vstack(expected), rtol=0, atol=tolerances.HIDDEN)


def test_the_chain_of_models_that_it_grew_from():
    """A convolution that passes the newest token on, and tables of zeros, change no bit of the plain model."""
    tokens = jnp.asarray(make_case(0).tokens)
    plain, base = np.asarray(forward(PARAMS, tokens, config=MIXED)), dataclasses.replace(MIXED, max_positions=FAR)
    for rcmha in (DEFAULT, OPTIONS["filters of each head"], OPTIONS["MDHA"], OPTIONS["RMHA"]):
        params, config = from_gqa(PARAMS, base, rcmha, jax.random.key(0))
        np.testing.assert_allclose(forward(params, tokens, config=config), plain, rtol=0, atol=tolerances.HIDDEN)
    with_table, config = stirred(with_rcmha(MIXED, OPTIONS["RMHA"]))[0], with_rcmha(MIXED)
    started, _ = from_gqa(PARAMS, base, DEFAULT, jax.random.key(0))
    for name in ("layers_0", "layers_1"):
        started[name]["attention"]["distances"] = with_table[name]["attention"]["distances"]
    relative = np.asarray(forward(with_table, tokens, config=with_rcmha(MIXED, OPTIONS["RMHA"])))
    np.testing.assert_array_equal(forward(started, tokens, config=config), relative)
    assert np.abs(relative - plain).max() > tolerances.VISIBLE
    with pytest.raises(ValueError, match="attention 'gqa', got 'rcmha'"):
        from_gqa(started, config, DEFAULT, jax.random.key(0))
    with pytest.raises(ValueError, match="does not reach over the 256 tokens"):
        from_gqa(PARAMS, MIXED, DEFAULT, jax.random.key(0))


def test_only_distances_count():
    """Without RoPE, with the convolution's edge behind: the same tokens later in the row give the same heads."""
    bare = dataclasses.replace(PLAIN.layers[0], window=5, rope=dataclasses.replace(PLAIN.layers[0].rope, kind="none"))
    config = with_rcmha(dataclasses.replace(PLAIN, layers=(bare,) * 2))
    params, _ = stirred(config)
    rng = np.random.default_rng(0)
    tail = rng.integers(0, 64, 20)
    ends = [forward(params, jnp.asarray([[*rng.integers(0, 64, n), *tail]]), config=config)[0, -4:] for n in (3, 16)]
    np.testing.assert_allclose(*ends, rtol=0, atol=tolerances.HIDDEN)


def test_no_token_sees_what_follows():
    config = with_rcmha(MIXED)
    params, _ = stirred(config)
    table, tokens = params["embedder"]["embedding"], jnp.arange(5, dtype=jnp.int32)[None]
    read = lambda rows: forward({**params, "embedder": {"embedding": table.at[:5].set(rows)}}, tokens, config=config)
    jacobian = np.abs(np.asarray(jax.jit(jax.jacrev(lambda rows: read(rows)[0]))(table[:5]))).max(axis=(1, 3))
    assert (jacobian[np.triu_indices(5, 1)] == 0).all() and (jacobian[np.tril_indices(5)] > 1e-6).all()


def packed(lengths, rng):
    size = sum(lengths)
    at, segments = np.concatenate([np.arange(n) for n in lengths]), np.repeat(np.arange(1, len(lengths) + 1), lengths)
    whole = lambda x: jnp.asarray(x, jnp.int32)[None]
    return whole(rng.integers(0, 64, size)), whole(at), whole(segments)


@pytest.mark.parametrize("name", OPTIONS)
def test_packed_training_is_each_text_alone(name):
    config = with_rcmha(MIXED, OPTIONS[name])
    params, wide = stirred(config)
    tokens, positions, segments = packed((9, 1, 7), np.random.default_rng(0))
    found = causal_forward(params, tokens, config=config, positions=positions, segments=segments, remat="none")[0]
    alone = [reference_of(wide, config).read(part) for part in np.split(np.asarray(tokens[0]), (9, 10))]
    np.testing.assert_allclose(found, np.vstack(alone), rtol=0, atol=tolerances.HIDDEN)


@pytest.mark.parametrize("name", ["RCMHA", "sinusoidal"])
def test_gradients_by_finite_differences(name):
    """Of training's pass over packed texts, against central differences of the float64 reference."""
    config = with_rcmha(MIXED, OPTIONS[name])
    params, wide = stirred(config)
    rng = np.random.default_rng(3)
    (tokens, positions, segments), weights = packed((6, 5), rng), rng.standard_normal((11, 32))
    run = functools.partial(causal_forward, config=config, positions=positions, segments=segments, remat="block")
    gradient = jax.jit(jax.grad(lambda p: (run(p, tokens)[0] * jnp.asarray(weights, jnp.float32)).sum()))(params)

    def loss(p):
        texts = np.split(np.asarray(tokens[0]), [6])
        return (np.vstack([reference_of(p, config).read(text) for text in texts]) * weights).sum()

    learned = (("table", (1, 3, 4)), ("table", (2, 1, 8)))
    places = [
        *(
            ("distances", n, i)
            for n, i in (learned if name == "RCMHA" else (("kernel", (3, 5)), ("distance_bias", (1, 2))))
        )
    ]
    places += [("distances", "query_bias", (3, 1)), ("keys_convolution", "filters", (0, 2))]
    places += [("queries_convolution", "filters", (1, 5)), ("values_convolution", "bias", (3,))]
    for owner, leaf, index in places:
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(np.copy, wide)
            moved["layers_0"]["attention"][owner][leaf][index] += sign * 1e-5
            ends.append(loss(moved))
        found = gradient["layers_0"]["attention"][owner][leaf][index]
        expected = (ends[0] - ends[1]) / 2e-5
        np.testing.assert_allclose(found, expected, rtol=tolerances.GRADIENT, atol=tolerances.GRADIENT)


# Configurations and files


def test_configurations_that_cannot_be():
    for given, message in (
        ({"relative": "alibi"}, "rcmha relative 'alibi' is not supported; supported: learned, sinusoidal, none"),
        ({"distances": 8, "convolution": "full"}, "rcmha convolution 'full'"),
        ({"distances": 8, "query_context": "none"}, "rcmha query_context 'none'"),
        ({}, "goes with one; got None with relative 'learned'"),
        ({"relative": "none", "distances": 8}, "goes with one; got 8 with relative 'none'"),
        ({"relative": "none", "convolution": "none"}, 'use attention="gqa"'),
        ({"distances": 0}, "at least 1, got 0"),
        ({"distances": 8, "width": 1}, "at least 2 tokens, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RcmhaConfig(**given)
    with pytest.raises(ValueError, match='attention="rcmha" and an RcmhaConfig go together'):
        dataclasses.replace(PLAIN, attention="rcmha")
    assert with_rcmha(MIXED).most_positions == FAR and MIXED.most_positions is None
    local = dataclasses.replace(MIXED, layers=(MIXED.layers[1],) * 2, attention="rcmha", rcmha=RcmhaConfig(distances=7))
    assert local.most_positions is None  # windows end where the table does
    with pytest.raises(ValueError, match="a relative table of 6 distances does not reach over the 7 tokens"):
        dataclasses.replace(local, rcmha=RcmhaConfig(distances=6))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_checkpoint_is_the_model(name, tmp_path):
    config = with_rcmha(PLAIN, OPTIONS[name])
    params, _ = stirred(config)
    save(tmp_path / "model", config, params)
    back = open_checkpoint(tmp_path / "model", dtype="float32")
    assert back.config == config
    jax.tree.map(np.testing.assert_array_equal, back.params, params)


def test_a_checkpoint_that_lacks_a_field_is_refused(tmp_path):
    config = with_rcmha(PLAIN)
    save(tmp_path / "model", config, stirred(config)[0])
    path = tmp_path / "model" / "config.json"
    path.write_text(path.read_text().replace('"width"', '"breadth"'))
    with pytest.raises(CheckpointError, match="section 'jaxkv', rcmha: field 'breadth' is not known"):
        open_checkpoint(tmp_path / "model", dtype="float32")
