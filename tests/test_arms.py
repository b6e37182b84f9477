"""Arms of a comparison: what a row says of an arm is what its model does, and the first arm differs from itself by nothing."""

import math
import pathlib
import sys

import jax
import numpy as np
import pytest
import tolerances

from jaxkv import decoder
from jaxkv.causal import causal_forward
from train.config import Compute, Data, Model, Optimizer, Recipe
from train.optimizer import unflatten
from train.prepare import prepare

pytest.importorskip("grain")


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent.parent / "benchmarks"))
    import arms

    yield arms
    del sys.modules["arms"]


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcd \n"), 600)))
    return Recipe(
        model=Model(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_positions=32),
        data=Data(train=(str(path),), tokenizer="characters", validation_share=0.2), compute=Compute(remat="none"),
        optimizer=Optimizer(learning_rate=1e-2), steps=5, batch=3, sequence=8, out=str(tmp_path / "none"),
    )  # fmt: skip


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
