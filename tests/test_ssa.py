"""Selective Self-Attention: the layer by hand, the whole model against a float64 reference, and the cache's promises.

`SsaReference` is `cache_reference.Reference` with temperatures written out once more from the paper's formula; by it the
suites that plain attention passes (policies, tiers, decode, ragged rows) are run on a model with temperatures.
"""

import dataclasses
import functools
import json
import math

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
    B,
    T,
    check_oracle,
    check_promises,
    go_on,
    kept_sets,
    make_case,
    new_state,
    run_case,
    small,
)
from test_model import PROMPT, model
from test_tiers import limits_of, options, store

from infer.cli import main
from jaxkv import decoder
from jaxkv.attention.ssa import ROLES, SelectiveAttention, from_gqa, temperature
from jaxkv.cache import drop, extend, forward
from jaxkv.causal import causal_forward
from jaxkv.checkpoints import CheckpointError, open_checkpoint, read_config, save
from jaxkv.checkpoints.huggingface_config import config_to_json, parse_config
from jaxkv.config import SsaConfig
from jaxkv.rope import angles, make_rotary
from jaxkv.types import Place

ALL = SsaConfig(queries="token+position", keys="token+position", values="token+position")
DEFAULT = SsaConfig()


def with_ssa(config, ssa):
    return dataclasses.replace(config, attention="ssa", ssa=ssa)


def stirred(config, seed=0, params=PARAMS, mild=False):
    """The tests' parameters with temperatures far from 1, and the same in float64.

    mild: nearer to 1, for quantized tiers: what sharpens logits also magnifies a code that float32 rounds the other way.
    """
    rng = np.random.default_rng(seed)
    plain = dataclasses.replace(config, attention="gqa", ssa=None)
    params, _ = from_gqa(params, plain, config.ssa, jax.random.key(seed))

    def stir(path, leaf):
        names = [key.key for key in path]
        if not any(name.endswith("_temperature") for name in names):
            return leaf
        noise = rng.normal(size=leaf.shape)
        value = noise * (0.2 if mild else 0.7) if "kernel" in names else noise * 0.5 - 2.0 if mild else noise
        return jnp.asarray(value, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(stir, params)
    return params, jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tau(params, ssa, role, x, projected, positions):
    """[T, heads or 1]: 1 + tanh f + g log n, by loops over the formula. projected [T, heads, H]."""
    total = np.ones((len(x), 1))
    terms = getattr(ssa, role)
    if terms == "none":
        return total
    p = params[f"{role}_temperature"]
    if "token" in terms:
        if ssa.features == "shared":
            f = np.stack([gelu(projected[:, h]) @ p["kernel"][:, h] for h in range(projected.shape[1])], axis=1)
            f = f if ssa.token_per_head else f.sum(axis=1, keepdims=True)
        else:
            f = (gelu(x @ p["hidden"]["kernel"]) if ssa.features == "mlp" else x) @ p["kernel"]
        total = total + np.tanh(f)
    if "position" in terms:
        g = 1 / (1 + np.exp(-p["alpha"])) if ssa.gate == "sigmoid" else np.exp(-np.exp(p["alpha"]))
        total = total + g * np.log(np.asarray(positions, float) + 1)[:, None]
    return total


class SsaReference(cache_reference.Reference):
    """One row through a model with temperatures. number: (position in the row, in the read) -> n - 1."""

    number = staticmethod(lambda position, index: position)

    def _project(self, params, x, positions):
        c, heads = self.config, super()._project(params, x, positions)
        counted = [self.number(position, index) for index, position in enumerate(positions)]
        parts = np.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1)
        scaled = [
            part * tau(params, c.ssa, role, x, part, counted)[..., None]
            for role, part in zip(ROLES, parts, strict=True)
        ]
        return np.concatenate(scaled, axis=1)


def reference_of(wide, config, ssa_reference=SsaReference):
    """A reference that keeps everything."""
    return ssa_reference(wide, config, small("full"), np.full((config.num_layers, 1), SLOTS))


# The formula


def test_the_temperature_by_hand():
    positions = jnp.asarray([[0, 1, 7]])
    token, alpha = jnp.asarray([[[0.0], [0.5], [-2.0]]]), jnp.asarray([0.0, 1.0])
    found = temperature(token, alpha, positions, gate="sigmoid")
    expected = 1 + np.tanh([[0.0], [0.5], [-2.0]]) + np.log([[1], [2], [8]]) * [0.5, 1 / (1 + math.exp(-1))]
    np.testing.assert_allclose(found[0], expected, rtol=tolerances.BY_HAND_FLOAT32)
    released = temperature(None, jnp.asarray([1.5]), positions, gate="exp-exp")[0, :, 0]
    np.testing.assert_allclose(
        released, 1 + 0.01131 * np.log([1, 2, 8]), rtol=tolerances.PUBLISHED
    )  # of the paper's GPT-2 file
    off = (temperature(token * 0, jnp.asarray([x]), positions, gate=gate) for gate, x in
           (("sigmoid", -np.inf), ("exp-exp", np.inf)))  # fmt: skip
    assert all((x == 1.0).all() for x in off)


def test_dilution():
    """The share of the largest of n random logits falls with n, and stays where it is under a position temperature."""
    rng, plain, sharp = np.random.default_rng(0), [], []
    for n, count in ((16, 4000), (256, 2000), (4096, 400)):
        logits = rng.standard_normal((count, n))
        factor = float(temperature(None, jnp.zeros(1), jnp.full((1, 1), n - 1), gate="sigmoid")[0, 0, 0])
        for shares, scale in ((plain, 1.0), (sharp, factor)):
            weights = np.exp(scale * (logits - logits.max(axis=1, keepdims=True)))
            shares.append((weights.max(axis=1) / weights.sum(axis=1)).mean())
    np.testing.assert_allclose(plain, [0.245, 0.042, 0.006], atol=tolerances.DILUTION[0])
    np.testing.assert_allclose(sharp, [0.53, 0.46, 0.48], atol=tolerances.DILUTION[1])


# The layer


def projected(config, params, x, start=0):
    """What the module hands to attention at positions from `start`: queries [T, N, H], keys, values [T, K, H]."""
    positions = jnp.arange(start, start + x.shape[1], dtype=jnp.int32)[None]
    at = angles(make_rotary(config.layers[0].rope, jnp.asarray([64])), positions)
    found = SelectiveAttention(config).apply(
        {"params": params["layers_0"]["attention"]}, x, Place(positions, at, (at,)), method="project"
    )
    return [np.asarray(part[0], np.float64) for part in (*found.queries, found.keys, found.values)]


def mixed(queries, keys, values, scale, sharpness=1.0, form="logits"):
    """Causal attention [T, N, H], row i of the logits times sharpness[i, h], or a softmax of temperature 1 / sharpness."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    logits = np.einsum("thc,shc->hts", queries, keys) * scale
    rows = np.broadcast_to(sharpness, queries.shape[:2]).T[..., None]
    logits = logits * rows if form == "logits" else logits / (1 / rows)
    logits = np.where(np.tri(len(queries), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("hts,shc->thc", weights / weights.sum(axis=-1, keepdims=True), values)


def plain_heads(config, wide, x, start):
    """Queries, keys, values of plain attention, normed and rotated, by hand; and the bare projections."""
    p, positions = wide["layers_0"]["attention"], range(start, start + len(x))
    heads = (x @ p["qkv"]["kernel"]).reshape(len(x), -1, config.head_dim)
    bare = np.split(heads, [config.num_heads, config.num_heads + config.num_kv_heads], axis=1)
    q, k, v = bare
    if config.qk_norm:
        q, k = (
            cache_reference.norm(y, p[f"{n}_norm"]["scale"], config.norm_eps) for y, n in ((q, "query"), (k, "key"))
        )
    turned = [
        np.stack([[cache_reference.rotate(head, at, config.layers[0].rope) for head in row]
                  for at, row in zip(positions, y, strict=True)])
        for y in (q, k)
    ]  # fmt: skip
    return (*turned, v), bare


@pytest.mark.parametrize("qk_norm", [False, True])
def test_scaled_queries_are_scaled_rows_of_logits_and_a_softmax_temperature(qk_norm):
    config = with_ssa(dataclasses.replace(PLAIN, qk_norm=qk_norm), DEFAULT)
    base = decoder.init_params(dataclasses.replace(PLAIN, qk_norm=qk_norm), jax.random.key(5)) if qk_norm else PARAMS
    params, wide = stirred(config, params=base)
    x = np.random.default_rng(1).standard_normal((9, 32))
    found = mixed(*projected(config, params, jnp.asarray(x[None], jnp.float32), start=3), config.query_scale)
    (q, k, v), bare = plain_heads(config, wide, x, 3)
    taus = [
        tau(wide["layers_0"]["attention"], DEFAULT, role, x, part, range(3, 12))
        for role, part in zip(ROLES, bare, strict=True)
    ]
    weighed = v * taus[2][..., None]  # out = weights @ diag(tau_v) v
    for form in ("logits", "temperature"):
        expected = mixed(q, k, weighed, config.query_scale, taus[0], form)
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.HIDDEN)
    after = mixed(q, k, v, config.query_scale, taus[0]) * np.repeat(taus[2], 2, axis=1)[..., None]
    assert np.abs(found - after).max() > tolerances.VISIBLE  # scaling the output is another function
    unscaled = mixed(q, k, weighed, config.query_scale)
    assert np.abs(found - unscaled).max() > tolerances.VISIBLE


@pytest.mark.parametrize("gate", ["sigmoid", "exp-exp"])
def test_the_released_codes_formula(gate):
    """Row i = 1, 2, ... of the logits times 1 + g log i, one g per layer, nothing else."""
    config = with_ssa(PLAIN, SsaConfig(queries="position", values="none", gate=gate))
    params, wide = stirred(config)
    x = np.random.default_rng(2).standard_normal((12, 32))
    found = mixed(*projected(config, params, jnp.asarray(x[None], jnp.float32)), config.query_scale)
    beta = float(wide["layers_0"]["attention"]["queries_temperature"]["alpha"][0])
    g = 1 / (1 + math.exp(-beta)) if gate == "sigmoid" else math.exp(-math.exp(beta))
    heads, _ = plain_heads(config, wide, x, 0)
    rows = np.array([[1 + g * math.log(i)] for i in range(1, 13)])
    np.testing.assert_allclose(found, mixed(*heads, config.query_scale, rows), rtol=0, atol=tolerances.HIDDEN)


# The model


@pytest.mark.parametrize(
    "ssa",
    [
        ALL,
        dataclasses.replace(ALL, token_per_head=False, alpha_per_head=True),
        dataclasses.replace(ALL, features="linear", gate="exp-exp"),
        dataclasses.replace(ALL, features="linear", token_per_head=False),
        dataclasses.replace(ALL, features="mlp"),
    ],
    ids=["shared", "one for the layer", "linear", "linear, one for the layer", "mlp"],
)
def test_every_option_against_the_reference(ssa):
    config = with_ssa(PLAIN, ssa)
    params, wide = stirred(config, seed=1)
    tokens = np.random.default_rng(0).integers(0, 64, 11).astype(np.int32)
    found = forward(params, jnp.asarray(tokens[None]), config=config)[0]
    np.testing.assert_allclose(found, reference_of(wide, config).read(tokens), rtol=0, atol=tolerances.HIDDEN)


def test_temperatures_of_one_are_plain_attention():
    tokens = jnp.asarray(make_case(0).tokens)
    plain = np.asarray(forward(PARAMS, tokens, config=MIXED))
    for ssa, off in ((DEFAULT, -np.inf), (dataclasses.replace(ALL, features="mlp", gate="exp-exp"), np.inf)):
        params, config = from_gqa(PARAMS, MIXED, ssa, jax.random.key(0), alpha=off)
        np.testing.assert_array_equal(forward(params, tokens, config=config), plain)
    far = lambda **start: np.abs(
        np.asarray(forward(from_gqa(PARAMS, MIXED, DEFAULT, jax.random.key(0), **start)[0], tokens, config=config))
        - plain
    ).mean()
    config = with_ssa(MIXED, DEFAULT)
    params, _ = from_gqa(PARAMS, MIXED, DEFAULT, jax.random.key(0))
    assert 0 < far() < far(alpha=0.0) / 4  # the start for fine-tuning is near
    assert far(alpha=-20.0) < tolerances.HIDDEN
    alphas = [params[f"layers_{i}"]["attention"]["queries_temperature"]["alpha"] for i in range(2)]
    assert all(float(alpha[0]) == -4.0 for alpha in alphas)
    fresh = decoder.init_params(config, jax.random.key(0))["layers_0"]["attention"]["queries_temperature"]
    assert float(fresh["alpha"][0]) == 0.0 and not fresh["kernel"].any()  # and the start from scratch, g = 1/2
    with pytest.raises(ValueError, match="attention 'gqa', got 'ssa'"):
        from_gqa(params, config, DEFAULT, jax.random.key(0))


def test_bfloat16_temperatures_are_computed_in_float32():
    config = with_ssa(PLAIN, DEFAULT)
    params, _ = stirred(config)
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tokens = jnp.asarray(make_case(0).tokens[:1])
    found = forward(low, tokens, config=config)
    assert found.dtype == jnp.bfloat16
    whole = forward(jax.tree.map(lambda x: x.astype(jnp.float32), low), tokens, config=config)
    np.testing.assert_allclose(np.asarray(found, np.float32), whole, rtol=0, atol=tolerances.HIDDEN_BF16_MODEL)


def test_no_token_sees_what_follows():
    """The Jacobian of hidden state i by embedding j is exactly zero for j > i, and is not for j <= i."""
    config = with_ssa(MIXED, ALL)
    params, _ = stirred(config)
    table, tokens = params["embedder"]["embedding"], jnp.arange(5, dtype=jnp.int32)[None]
    hidden = lambda rows: forward({**params, "embedder": {"embedding": table.at[:5].set(rows)}}, tokens, config=config)[
        0
    ]
    jacobian = np.abs(np.asarray(jax.jit(jax.jacrev(hidden))(table[:5]))).max(axis=(1, 3))
    assert (jacobian[np.triu_indices(5, 1)] == 0).all() and (jacobian[np.tril_indices(5)] > 1e-6).all()


def test_gradients_by_finite_differences():
    """Of every alpha and of a kernel, against central differences of the float64 reference."""
    config = with_ssa(PLAIN, ALL)
    params, wide = stirred(config)
    rng = np.random.default_rng(3)
    tokens, weights = rng.integers(0, 64, 9).astype(np.int32), rng.standard_normal((9, 32))
    loss = lambda p: (forward(p, jnp.asarray(tokens[None]), config=config)[0] * jnp.asarray(weights, jnp.float32)).sum()
    gradient = jax.jit(jax.grad(loss))(params)
    for role, name, index in (*((role, "alpha", (0,)) for role in ROLES), ("queries", "kernel", (3, 1))):
        owner, step = ("layers_0", "attention", f"{role}_temperature", name), 1e-5
        ends = []
        for sign in (1, -1):
            moved = jax.tree.map(np.copy, wide)
            functools.reduce(lambda node, key: node[key], owner, moved)[index] += sign * step
            ends.append((reference_of(moved, config).read(tokens) * weights).sum())
        expected = (ends[0] - ends[1]) / (2 * step)
        found = functools.reduce(lambda node, key: node[key], owner, gradient)[index]
        np.testing.assert_allclose(found, expected, rtol=tolerances.GRADIENT, atol=tolerances.GRADIENT)


# Positions are the token's own


def of_row(case, row):
    """All valid tokens of one row, prompt and steps."""
    return np.concatenate([case.tokens[row][case.valid[row]], case.then[case.then_valid[:, row], row]])


def test_decode_is_the_forward_pass_at_every_position():
    """Rows padded on the left, on the right and anywhere, whole or in pieces, and steps with pauses."""
    config = with_ssa(PLAIN, ALL)
    params, _ = stirred(config)
    case = make_case(0)
    hidden, _, hiddens, _, final = run_case(small("full"), case, config, params=params)
    for row in range(B):
        whole = np.asarray(forward(params, jnp.asarray(of_row(case, row)[None]), config=config)[0])
        found = np.vstack([hidden[row][case.valid[row]], hiddens[case.then_valid[:, row], row]])
        np.testing.assert_allclose(found, whole, rtol=0, atol=tolerances.HIDDEN)
    state, pieces = new_state(small("full"), case.limits, config), []
    for piece in range(0, T, 8):
        cut = lambda x, piece=piece: jnp.asarray(x[:, piece : piece + 8])
        out, state = extend(params, cut(case.tokens), state, config=config, valid=cut(case.valid))
        pieces.append(np.asarray(out))
    np.testing.assert_allclose(np.hstack(pieces)[case.valid], hidden[case.valid], rtol=0, atol=tolerances.HIDDEN)
    again, _, _ = go_on(case, state, config, params=params)
    np.testing.assert_allclose(again[case.then_valid], hiddens[case.then_valid], rtol=0, atol=tolerances.HIDDEN)


@pytest.mark.parametrize("wrong", ["rows of the read", "from 0", "pads counted"])
def test_a_wrong_position_is_seen(wrong):
    config = with_ssa(MIXED, DEFAULT)
    params, wide = stirred(config)
    case = make_case(0)
    number = {
        "rows of the read": lambda position, index: index,  # as the released code counts: 1 at every decode step
        "from 0": lambda position, index: max(position - 1, 0),
        "pads counted": lambda position, index: position + 5,
    }[wrong]
    bad = type("Wrong", (SsaReference,), {"number": staticmethod(number)})
    results = run_case(small("recency"), case, config, params=params)
    check = functools.partial(check_oracle, small("recency"), case, results, config, 1)
    assert check(oracle=given(wide))[0]
    with pytest.raises(AssertionError):
        check(oracle=given(wide, bad))


@pytest.mark.slow
def test_what_follows_a_dropped_end_counts_from_there():
    config = with_ssa(PLAIN, ALL)
    params, _ = stirred(config)
    rng = np.random.default_rng(4)
    tokens, more = (rng.integers(0, 64, (2, n)).astype(np.int32) for n in (T, 6))
    state = new_state(small("full"), ((SLOTS, SLOTS),), config)
    _, state = extend(params, jnp.asarray(tokens), state, config=config)
    state = drop(state, start=jnp.asarray([10, 20]), stop=jnp.asarray([T, T]))
    found, _ = extend(params, jnp.asarray(more), state, config=config)
    for row, kept in ((0, 10), (1, 20)):
        whole = np.concatenate([tokens[row, :kept], more[row]])
        expected = forward(params, jnp.asarray(whole[None]), config=config)[0, kept:]
        np.testing.assert_allclose(found[row], expected, rtol=0, atol=tolerances.HIDDEN)


@pytest.mark.slow
def test_packed_documents_are_sequences_of_their_own():
    """In the forward pass of training, positions begin again with each."""
    config = with_ssa(MIXED, ALL)
    params, _ = stirred(config)
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, 64, (2, 20)).astype(np.int32)
    sizes = [5, 9, 2, 4]
    segments = np.repeat([[0, 1, 2, 3], [7, 8, 9, 2]], sizes, axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(size) for size in sizes])[None].repeat(2, axis=0).astype(np.int32)
    found = causal_forward(
        params, jnp.asarray(tokens), config=config, positions=jnp.asarray(positions), segments=jnp.asarray(segments),
        remat="none",
    )  # fmt: skip
    for row, start, size in [(row, *one) for row in range(2) for one in ((0, 5), (5, 9), (14, 2), (16, 4))]:
        stop = start + size
        alone = forward(params, jnp.asarray(tokens[row, start:stop][None]), config=config)[0]
        np.testing.assert_allclose(np.asarray(found)[row, start:stop], alone, rtol=0, atol=tolerances.HIDDEN)


# The cache


def given(wide, ssa_reference=SsaReference):
    """An oracle for `check_oracle`, which brings parameters of its own."""
    return lambda _, config, *rest, **more: ssa_reference(wide, config, *rest, **more)


@pytest.mark.parametrize(
    "name, tiers",
    [
        ("recency", None),
        pytest.param("scissorhands", "balanced under rotation", marks=pytest.mark.slow),
        pytest.param("scissorhands", "keys and values apart", marks=pytest.mark.exhaustive),
        pytest.param("h2o", "bf16 over int4", marks=pytest.mark.exhaustive),
        *(pytest.param(name, None, marks=pytest.mark.exhaustive) for name in EVICTING if name != "recency"),
        pytest.param("keydiff", "exact over rotated", marks=pytest.mark.exhaustive),
        pytest.param("expected-attention", "groups between", marks=pytest.mark.exhaustive),
        pytest.param("snapkv", "int8 over int2", marks=pytest.mark.exhaustive),
        pytest.param("tova", "three down", marks=pytest.mark.exhaustive),
    ],
)
def test_policies_and_schemes_on_a_model_with_temperatures(name, tiers):
    """Limits, protection, kept sets and numbers, at the prompt and at decode; and a step of `extend` is one of `decode`."""
    config = with_ssa(MIXED, ALL)
    params, wide = stirred(config, mild=tiers is not None)
    more = {} if tiers is None else options(tiers)
    case = make_case(0) if tiers is None else make_case(0, limits=limits_of(tiers))
    results = run_case(small(name), case, config, params=params, **more)
    check_promises(small(name), case, results, config)
    kept = {} if tiers is None else {"stored": store(tiers), "ties": 2}
    margin = tolerances.MARGIN if tiers is None else tolerances.STORED_MARGIN
    decided = 0
    for row in range(B):
        same, least = check_oracle(small(name), case, results, config, row, oracle=given(wide), **kept)
        assert same or least < margin, f"row {row}, margin {least}"
        decided += same
    assert decided >= B - 2
    if tiers is None:
        found, _, state = go_on(case, results[1], config, by="extend", params=params)
        there = case.then_valid
        np.testing.assert_allclose(found[there], results[2][there], rtol=0, atol=tolerances.HIDDEN)
        assert kept_sets(state) == kept_sets(results[4])


@pytest.mark.parametrize(
    "cache, budget", [("full", None), pytest.param("scissorhands", 100, marks=pytest.mark.exhaustive)]
)
def test_generating(cache, budget):
    """`infer` needs to know nothing of it: greedy tokens are those of the plain forward pass, where all of it is kept."""
    lm = model(attention="ssa", ssa=DEFAULT)
    out = lm.generate([PROMPT], max_new_tokens=6, cache=cache, budget=budget)[0]
    logits = np.asarray(lm.logits([PROMPT + out.token_ids]))[0, len(PROMPT) - 1 : -1]
    assert logits.argmax(axis=-1).tolist() == out.token_ids


# Configuration, checkpoints, size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "ssa"}, "go together"),
        ({"ssa": DEFAULT}, "go together; got 'gqa'"),
    ],
)
def test_the_variant_and_its_options_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"queries": "tokens"}, "queries 'tokens' is not supported; supported: none, token, position"),
        ({"features": "conv"}, "features 'conv'"),
        ({"gate": None}, "gate None"),
        ({"token_per_head": 1}, "token_per_head must be True or False, got 1"),
        ({"queries": "none", "values": "none"}, "without any temperature"),
    ],
)
def test_options_that_cannot_be(fields, message):
    with pytest.raises(ValueError, match=message):
        SsaConfig(**fields)


@pytest.mark.parametrize("features", ["shared", "linear", "mlp"])
def test_saved_and_loaded(features, tmp_path, capsys):
    config = with_ssa(PLAIN, dataclasses.replace(ALL, features=features, alpha_per_head=True, gate="exp-exp"))
    params, _ = stirred(config)
    save(tmp_path / "model", config, params)
    back = open_checkpoint(tmp_path / "model", dtype="float32")
    assert back.config == config == read_config(tmp_path / "model")
    assert jax.tree.structure(back.params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert main(["info", "--model", str(tmp_path / "model"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["attention"] == "ssa" and facts["parameters"] == sum(x.size for x in jax.tree.leaves(params))


WRITTEN = config_to_json(with_ssa(PLAIN, DEFAULT), dtype="float32")


def test_no_reader_of_the_family_takes_the_variant_for_it():
    assert WRITTEN["model_type"] == "jaxkv" and WRITTEN["architectures"] == ["JaxkvForCausalLM"]
    assert WRITTEN["jaxkv"]["model_type"] == "llama" and parse_config(WRITTEN) == with_ssa(PLAIN, DEFAULT)
    assert "jaxkv" not in config_to_json(PLAIN, dtype="float32")


@pytest.mark.parametrize(
    ("changes", "section", "ssa", "message"),
    [
        ({"jaxkv": None}, {}, {}, "needs a section 'jaxkv'"),
        ({"model_type": "llama", "architectures": None}, {}, {}, "field 'jaxkv'.*not known"),
        ({"architectures": ["LlamaForCausalLM"]}, {}, {}, "'LlamaForCausalLM' is not 'JaxkvForCausalLM'"),
        ({"residual_multiplier": 2.0}, {}, {}, "residual_multiplier"),
        ({}, {"model_type": "jaxkv"}, {}, "that of a family"),
        ({}, {"model_type": "mamba"}, {}, "model_type 'mamba' is not supported"),
        ({}, {"attention": "linear"}, {}, "attention 'linear' is not known; known: gqa, ssa"),
        ({}, {"attention": ["ssa"]}, {}, "'attention' must be a string"),
        ({}, {"attention": "gqa"}, {}, "go together"),
        ({}, {"ssa": None}, {}, "go together"),
        ({}, {"ssa": [1]}, {}, "'ssa' must be an object"),
        ({}, {"window": 4}, {}, "field 'window' is not known"),
        ({}, {"rope": "linear"}, {}, "rope 'linear' is not known"),
        ({}, {"activation": "tanh"}, {}, "activation 'tanh' is not supported"),
        ({}, {"learned_positions": 8}, {}, "max_positions 256 exceeds the table of 8"),
        ({}, {}, {"temper": 1}, "ssa: field 'temper' is not known"),
        ({}, {}, {"gate": None}, "gate None is not supported"),
        ({}, {}, {"keys": ["token"]}, "keys \\['token'\\] is not supported"),
    ],
)
def test_sections_that_are_refused(changes, section, ssa, message):
    fields = WRITTEN["jaxkv"] | ({"ssa": WRITTEN["jaxkv"]["ssa"] | ssa} if ssa else {}) | section
    with pytest.raises(CheckpointError, match=message):
        parse_config(WRITTEN | {"jaxkv": fields} | changes)


def test_a_section_must_say_every_option():
    short = {name: value for name, value in WRITTEN["jaxkv"]["ssa"].items() if name != "gate"}
    with pytest.raises(CheckpointError, match="ssa lacks gate"):
        parse_config(WRITTEN | {"jaxkv": WRITTEN["jaxkv"] | {"ssa": short}})


# name: (published parameters, layers, hidden, heads, kv heads)
SHAPES = {
    "GPT-2": (124_439_808, 12, 768, 12, 12),
    "Pythia-160M": (162_322_944, 12, 768, 12, 12),
    "Pythia-410M": (405_334_016, 24, 1024, 16, 16),
    "Llama-3-8B": (8_030_261_248, 32, 4096, 32, 8),
}
# (features, token_per_head): new parameters of queries and values of one layer without alpha, and their share in per cent
DESIGNS = {
    ("shared", True): (lambda d, n, k, h: (n + k) * h, (0.015, 0.0114, 0.0121, 0.002)),
    ("linear", False): (lambda d, n, k, h: 2 * d, (0.015, 0.0114, 0.0121, 0.0033)),
    ("linear", True): (lambda d, n, k, h: (n + k) * d, (0.18, 0.14, 0.19, 0.065)),
    ("mlp", False): (lambda d, n, k, h: 2 * (d * d + d), (11.4, 8.7, 12.4, 13.4)),
}


@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_new_parameters(design):
    """Below half a per cent of published models, but for the hidden layer of its own that sharing replaces."""
    formula, shares = DESIGNS[design]
    ssa = SsaConfig(features=design[0], token_per_head=design[1])
    for (total, layers, d, n, k), share in zip(SHAPES.values(), shares, strict=True):
        plain = dataclasses.replace(
            PLAIN, hidden_size=d, num_heads=n, num_kv_heads=k, head_dim=d // n, layers=PLAIN.layers[:1]
        )
        one, other = (
            sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda c=c: decoder.init_params(c, jax.random.key(0)))))
            for c in (with_ssa(plain, ssa), plain)
        )
        assert one - other == formula(d, n, k, d // n) + 1
        percent = 100 * layers * (one - other) / total
        assert percent == pytest.approx(share, rel=0.05)
        assert (percent < 0.5) == (design[0] != "mlp")
