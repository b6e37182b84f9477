"""Recipes with selective temperatures: from the start, on a checkpoint, and what is refused."""

import numpy as np
import pytest

import infer
from jaxkv.config import SsaConfig
from train.config import Data, Evaluation, Logging, Lora, Model, Optimizer, Recipe, TrainError
from train.fields import override
from train.loop import train
from train.prepare import prepare

pytest.importorskip("grain")
ALL_BUT_TEMPERATURES = ("*/qkv/*", "*/attention/output/*", "*/mlp/*", "*norm/*", "embedder/*", "head/*")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcd "), 600)))
    return str(path)


def make(text, out, model, **options):
    return Recipe(
        model=model, data=Data(train=(text,), tokenizer="characters" if model.base is None else "base"),
        steps=4, batch=2, sequence=8, out=str(out), logging=Logging(every=1, curves=False),
        evaluation=Evaluation(every=4, batches=1, prompt="ab", tokens=4, cache="recency", budget="8"),
        optimizer=options.pop("optimizer", Optimizer(learning_rate=1e-2)), **options,
    )  # fmt: skip


def temperatures(lm):
    """role -> parameters of the first layer."""
    found = lm.params["layers_0"]["attention"]
    return {name: found[name] for name in found if name.endswith("_temperature")}


def test_a_model_from_the_start(text, tmp_path):
    """Its shape is set field by field; the trained temperatures are in the exported model, which a small cache serves."""
    plain = Model(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_positions=32)
    words = "--model.attention ssa --model.ssa.keys token --model.ssa.alpha_per_head true".split()
    result = train(prepare(override(make(text, tmp_path / "run", plain), words)), quiet=True)
    lm = infer.load(result.model)
    assert lm.config.attention == "ssa" and lm.config.ssa == SsaConfig(keys="token", alpha_per_head=True)
    found = temperatures(lm)
    assert set(found) == {"queries_temperature", "keys_temperature", "values_temperature"}
    assert all(np.abs(one["kernel"]).max() > 0 for one in found.values())  # they start at 0
    assert found["queries_temperature"]["alpha"].shape == (2,) and (found["queries_temperature"]["alpha"] != 0).all()
    assert lm.generate("ab", max_new_tokens=4, cache="h2o", budget="8")[0].token_ids


@pytest.mark.slow
def test_temperatures_alone_on_a_checkpoint(text, tmp_path, alphabet):
    """All else is frozen and stays as it was to the last bit."""
    recipe = make(
        text, tmp_path / "run", Model(base=str(alphabet), attention="ssa"),
        optimizer=Optimizer(learning_rate=1e-2, frozen=ALL_BUT_TEMPERATURES),
    )  # fmt: skip
    prepared = prepare(recipe)
    assert all("_temperature/" in path for path in prepared.shapes.trained)
    before, after = infer.load(alphabet), infer.load(train(prepared, quiet=True).model)
    assert after.config.ssa == SsaConfig()
    for layer in ("layers_0", "layers_1"):
        old, new = before.params[layer], after.params[layer]
        np.testing.assert_array_equal(old["attention"]["qkv"]["kernel"], new["attention"]["qkv"]["kernel"])
        np.testing.assert_array_equal(old["mlp"]["down"]["kernel"], new["mlp"]["down"]["kernel"])
    assert np.abs(temperatures(after)["values_temperature"]["kernel"]).max() > 0
    again = Model(base=str(tmp_path / "run" / "model"))  # goes on with the attention that the base has
    assert prepare(make(text, tmp_path / "more", again)).config.attention == "ssa"
    with pytest.raises(TrainError, match="'ssa' cannot be made of the base checkpoint's 'ssa'; leave it out"):
        prepare(make(text, tmp_path / "more", Model(base=again.base, attention="ssa")))


def test_refusals(text, tmp_path, alphabet):
    with pytest.raises(TrainError, match="model.attention 'rope' is not known; accepted: None, gqa, ssa"):
        Model(base=str(alphabet), attention="rope")
    with pytest.raises(TrainError, match="model.ssa is given, but model.attention is None; make it 'ssa'"):
        Model(base=str(alphabet), ssa=SsaConfig(keys="token"))
    with pytest.raises(TrainError, match="adapters do not reach the temperatures"):
        make(text, tmp_path, Model(base=str(alphabet), attention="ssa"), lora=Lora(rank=2))
