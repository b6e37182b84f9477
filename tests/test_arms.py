"""Arms of a comparison: what a row says of an arm is what its model does, and the first arm differs from itself by nothing."""

import math
import pathlib
import sys

import jax
import numpy as np
import pytest
import tolerances

from jaxkv import decoder
from jaxkv.attention import ATTENTION
from jaxkv.causal import _attend, causal_forward
from train.config import Compute, Data, Model, Optimizer, Recipe, decoder_config
from train.optimizer import unflatten
from train.prepare import prepare


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    import arms

    yield arms
    for name in ("arms", "common", "quality", "ssa_arms"):
        sys.modules.pop(name, None)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcd \n"), 600)))
    return Recipe(
        model=Model(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_positions=32),
        data=Data(train=(str(path),), tokenizer="characters", validation_share=0.2), compute=Compute(remat="none"),
        optimizer=Optimizer(learning_rate=1e-2), steps=5, batch=3, sequence=8, out=str(tmp_path / "none"),
    )  # fmt: skip


@pytest.mark.slow
def test_two_arms_that_are_one(arms, recipe):
    """Rows after each seed; the order of turns changes nothing, and seeds differ."""
    written = []
    arms.compare({"one": recipe, "two": recipe}, seeds=2, block=2, write=written.append)
    assert [[row["seeds"] for row in rows] for rows in written] == [[1, 1], [2, 2]]
    one, two = written[-1]
    assert one["bits per byte"] == two["bits per byte"] and two["less than the first arm's"].startswith(
        "0.0000 [0.0000,"
    )
    mean, low, high = (float(x.strip("[],")) for x in one["bits per byte"].split())
    assert low < high and low - 1e-4 <= mean <= high + 1e-4 and one["step time over the first arm's"] == 1.0
    assert written[0][0]["bits per byte"].split()[0] in (f"{low:.4f}", f"{high:.4f}")


def test_a_validation_by_hand(arms, recipe, monkeypatch):
    """All windows of the text, whatever the batch, by logits of the whole."""
    states = []
    arm, validate = arms.Arm(recipe), arms.Arm._validate
    monkeypatch.setattr(arms.Arm, "_validate", lambda self, p, state: states.append(state) or validate(self, p, state))
    *_, last = arm.run(seed=3, block=5)
    prepared, (state,) = prepare(recipe), states
    count = len(prepared.validation)
    rows = [prepared.validation(i, 0) for i in range(count)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    params = unflatten(state.trained)
    hidden = causal_forward(
        params, batch["tokens"], config=prepared.config, positions=batch["positions"], segments=batch["segments"],
        remat="none",
    )  # fmt: skip
    logits = decoder.logits(params, hidden, config=prepared.config)
    at_target = np.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)
    np.testing.assert_allclose(last.bits, -at_target.mean() / math.log(2), rtol=tolerances.LOSS)
    right = np.argmax(logits, -1) == batch["targets"]
    np.testing.assert_allclose(last.accuracy, right.mean(), rtol=tolerances.LOSS)
    assert count % recipe.batch  # the last batch is not full


@pytest.mark.slow
def test_signals_among_noise(arms):
    """What is drawn is what the optimal guess assumes; a layer is the models' own attention, for the last tokens."""
    import ssa_arms

    x, s, told = ssa_arms.draw(jax.random.key(0), 2000, 64)
    marked = np.asarray(x[..., 0]) > 0
    assert (marked.sum(axis=1) == ssa_arms.SIGNALS).all() and (told == np.cumsum(marked, axis=1)).all()
    share, far = ssa_arms.SIGNALS / 64, tolerances.STANDARD_ERRORS
    np.testing.assert_allclose(marked.mean(axis=0), share, rtol=0, atol=far * math.sqrt(share * (1 - share) / 2000))
    apart = (np.asarray(x[..., 2:]) - np.asarray(s)[:, None])[marked]
    np.testing.assert_allclose(apart.std(), ssa_arms.NOISE, rtol=far / math.sqrt(2 * apart.size))
    noise, found = ssa_arms.NOISE**2, ssa_arms.without_learning(4096)
    for best, mean in zip(found["Bayes"].values(), found["mean of the signals"].values(), strict=True):
        spread = far * math.sqrt(2 / (4096 * ssa_arms.CHANNELS))
        np.testing.assert_allclose(best, noise / (ssa_arms.SIGNALS + noise), rtol=spread)
        assert mean > best * (1 + 1.5 * spread)  # no spread would let the guess that is no better pass: it is 6 % off
    model = Model(hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, max_positions=64, rope="none",
                  attention="ssa")  # fmt: skip
    config = decoder_config(model, 2)
    module, x, rng = ATTENTION["ssa"](config), x[:3, :20], np.random.default_rng(0)
    params = module.init(jax.random.key(0), x, ssa_arms.place_of(x), 20, method=ssa_arms.layer)
    params = jax.tree.map(lambda y: y + 0.3 * rng.standard_normal(y.shape).astype(np.float32), params)
    found = module.apply(params, x, ssa_arms.place_of(x), 4, method=ssa_arms.layer)

    def own(module, x, place):
        p = module.project(x, place)
        options = dict(
            length=20, unmet=0, segments=place.positions * 0, config=config, kind=config.layers[0], spread=None
        )
        return module.output(_attend(p, **options)[0])

    expected = module.apply(params, x, ssa_arms.place_of(x), method=own)[:, -4:]
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.HIDDEN)


@pytest.mark.slow
def test_neighbours_in_a_graph(arms):
    """Degrees and rows of the matrix; what a layer points at is its attention to the nodes; ranks as by hand."""
    import ssa_arms

    matrix, degrees = map(np.asarray, ssa_arms.draw_graph(jax.random.key(0)))
    assert ((matrix > 0).sum(axis=1) == degrees).all() and not matrix.diagonal().any()
    np.testing.assert_array_equal(matrix, (matrix > 0) / degrees[:, None].astype(np.float32))
    assert np.bincount(degrees).tolist() == [0, *[8] * 8]
    assert (matrix != np.asarray(ssa_arms.draw_graph(jax.random.key(1))[0])).any()
    assert ssa_arms.rank_correlation(np.array([3.0, 1.0, 2.0]), np.array([5, 1, 4])) == pytest.approx(1)
    assert ssa_arms.rank_correlation(np.array([1.0, 2.0, 2.0, 3.0]), np.array([4, 3, 2, 1])) == pytest.approx(
        -0.9486833
    )
    model = Model(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, head_dim=4, max_positions=64, rope="none",
                  attention="ssa")  # fmt: skip
    module, rng = ATTENTION["ssa"](decoder_config(model, 2)), np.random.default_rng(0)
    x = rng.standard_normal((3, 10, 8)).astype(np.float32)
    params = module.init(jax.random.key(0), x, ssa_arms.place_of(x), method=ssa_arms.pointed)
    params = jax.tree.map(lambda y: y + 0.3 * rng.standard_normal(y.shape).astype(np.float32), params)
    log_p, tau = module.apply(params, x, ssa_arms.place_of(x), method=ssa_arms.pointed)
    bare = module.apply(params, x, method=lambda module, x: module.split(x))
    queries, keys = (np.asarray(heads, np.float64)[:, :, 0] for heads in bare[:2])
    alpha, kernel = (
        np.asarray(params["params"]["queries_temperature"][name], np.float64) for name in ("alpha", "kernel")
    )
    features = np.asarray(jax.nn.gelu(bare[0][:, -1, 0], approximate=False), np.float64)
    by_hand = 1 + np.tanh(features @ kernel[:, 0]) + np.log(10) / (1 + np.exp(-alpha))  # the tenth token
    np.testing.assert_allclose(tau, by_hand, rtol=0, atol=tolerances.HIDDEN)
    assert np.ptp(by_hand) > tolerances.VISIBLE  # it depends on the token

    def logs(factor, others):
        logits = np.einsum("bh,bsh->bs", queries[:, -1] * factor, others) / math.sqrt(4)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    np.testing.assert_allclose(log_p, logs(by_hand[:, None], keys[:, :-1]), rtol=0, atol=tolerances.HIDDEN)
    for wrong in (logs(1.0, keys[:, :-1]), logs(by_hand[:, None], keys[:, 1:])):  # no temperature; one token further
        assert np.abs(np.asarray(log_p) - wrong).max() > tolerances.VISIBLE
    with jax.numpy_dtype_promotion("standard"):  # optax counts in integers
        assert ssa_arms.walk("token", 0, 3)[1] is not None
