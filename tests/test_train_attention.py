"""Recipes with selective temperatures or RCMHA: from the start, on a checkpoint, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

import infer
from jaxkv.config import SsaConfig
from train.config import Data, Evaluation, Logging, Lora, Model, Optimizer, Rcmha, Recipe, TrainError
from train.fields import override
from train.loop import _report, train
from train.optimizer import flatten, make_optimizer
from train.prepare import prepare

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
    with pytest.raises(TrainError, match="model.attention 'rope' is not known; accepted: None, gqa, ssa, rcmha"):
        Model(base=str(alphabet), attention="rope")
    with pytest.raises(TrainError, match="model.ssa is given, but model.attention is None; make it 'ssa'"):
        Model(base=str(alphabet), ssa=SsaConfig(keys="token"))
    with pytest.raises(TrainError, match="adapters do not reach the temperatures"):
        make(text, tmp_path, Model(base=str(alphabet), attention="ssa"), lora=Lora(rank=2))


SMALL = dict(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_positions=32)
ARMS = {  # of RCMHA's comparison (arXiv 2308.03429); what each has that plain attention has not
    "MHA": ("--model.rope none --model.learned_positions 32", set()),
    "MDHA": (
        "--model.rope none --model.learned_positions 32 --model.attention rcmha --model.rcmha.relative none"
        " --model.rcmha.convolution heads --model.activation relu_squared --model.mlp_gate false",
        {"convolution"},
    ),
    "RMHA": ("--model.rope none --model.attention rcmha --model.rcmha.convolution none", {"distances"}),
    "RCMHA": (
        "--model.rope none --model.attention rcmha --model.activation relu --model.mlp_gate false",
        {"distances", "convolution"},
    ),
}


def arm_of(text, out, name):
    return override(make(text, out, Model(**SMALL)), ARMS[name][0].split())


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_of_rcmhas_comparison_is_a_recipe(text, tmp_path, name):
    """And weights decay in it where they are matrices: not in filters, biases and tables of distances."""
    prepared = prepare(arm_of(text, tmp_path / "run", name))
    added = {
        path.split("/")[2].rpartition("_")[2]
        for path in prepared.shapes.trained
        if path.startswith("layers_0/attention/")
    }
    assert added - {"qkv", "output"} == ARMS[name][1]
    ones = {path: jnp.ones(x.shape) for path, x in prepared.shapes.trained.items()}
    optimizer = make_optimizer(Optimizer(learning_rate=0.5), lambda step: 0.5, ones)
    moved, _ = optimizer.update(jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones), ones)
    decayed = {path for path, x in moved.items() if (x != 0).any()}
    spared = {path for path in ones if path not in decayed}
    assert all(("convolution" in path or "distances" in path or "norm" in path) for path in spared)
    assert not any("convolution" in path or "distances" in path for path in decayed) and "head/kernel" in decayed


@pytest.mark.slow
@pytest.mark.parametrize("name", ARMS)
def test_every_arm_trains_and_is_exported(text, tmp_path, name):
    """What is new in it moves from its start, and a small cache serves it."""
    start = arm_of(text, tmp_path / "run", name)
    result = train(prepare(start), quiet=True)
    lm = infer.load(result.model)
    found = flatten(lm.params)
    for path, x in found.items():
        if path.endswith(("distances/table", "distances/query_bias")):
            assert np.abs(x).max() > 0  # they start at 0
    assert lm.config.learned_positions == (32 if "learned_positions" in ARMS[name][0] else None)
    assert lm.generate("ab", max_new_tokens=4, cache="h2o", budget="8")[0].token_ids


@pytest.mark.slow
def test_rcmha_on_a_checkpoint(text, tmp_path, alphabet):
    """With all else frozen, the convolution and the table are what is trained."""
    frozen = tuple(x for x in ALL_BUT_TEMPERATURES)
    recipe = make(
        text, tmp_path / "run", Model(base=str(alphabet), attention="rcmha"),
        optimizer=Optimizer(learning_rate=1e-2, frozen=frozen),
    )  # fmt: skip
    prepared = prepare(recipe)
    assert all("_convolution/" in path or "/distances/" in path for path in prepared.shapes.trained)
    before, after = infer.load(alphabet), infer.load(train(prepared, quiet=True).model)
    assert after.config.rcmha.distances == before.config.max_positions
    old, new = before.params["layers_0"]["attention"], after.params["layers_0"]["attention"]
    np.testing.assert_array_equal(old["qkv"]["kernel"], new["qkv"]["kernel"])
    assert np.abs(new["distances"]["table"]).max() > 0 and np.abs(new["keys_convolution"]["filters"][0]).max() > 0


def test_refusals_of_rcmha(text, tmp_path, alphabet):
    with pytest.raises(TrainError, match="model.rcmha is given, but model.attention is None; make it 'rcmha'"):
        Model(rcmha=Rcmha(width=4), **SMALL)
    with pytest.raises(TrainError, match="sequence 8 is longer than the model's table of 6; lower it"):
        make(text, tmp_path, Model(attention="rcmha", rcmha=Rcmha(distances=6), **SMALL | {"max_positions": 8}))
    with pytest.raises(TrainError, match="model: a relative table of 9 distances does not reach over the 32 tokens"):
        prepare(make(text, tmp_path, Model(attention="rcmha", rcmha=Rcmha(distances=9), **SMALL)))
    with pytest.raises(TrainError, match="model: a relative table of 9 distances does not reach over"):
        prepare(make(text, tmp_path, Model(base=str(alphabet), attention="rcmha", rcmha=Rcmha(distances=9))))
    with pytest.raises(TrainError, match="adapters do not reach the convolutions and tables"):
        make(text, tmp_path, Model(base=str(alphabet), attention="rcmha"), lora=Lora(rank=2))
    with pytest.raises(TrainError, match="model.rope is that of the base checkpoint"):
        Model(base=str(alphabet), rope="none")


def test_a_table_of_positions_is_not_multiplied_by(text, tmp_path):
    prepared = prepare(arm_of(text, tmp_path / "run", "MHA"))
    assert prepared.shapes.trained["positions/embedding"].shape == (32, 16)
    (tmp_path / "run").mkdir()
    counts = []
    flops = lambda config, *, trained, frozen, **_: counts.append((trained, frozen)) or 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.step_flops", flops)
        _report(prepared, 0, True).close()
    layer = 16 * 3 * 16 + 16 * 16 + 16 * 2 * 24 + 24 * 16
    assert counts == [(layer + 16 * prepared.config.vocab_size, 0)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssa", "rcmha"])
def test_adapters_on_a_checkpoint_with_more_than_plain_attention(text, tmp_path, name):
    """They train its kernels, those of temperatures and sinusoids among them; the rest of what it added stays as it is."""
    more = {"ssa": "--model.ssa.keys token", "rcmha": "--model.rcmha.relative sinusoidal"}[name]
    start = override(make(text, tmp_path / "base", Model(**SMALL)), f"--model.attention {name} {more}".split())
    base = str(train(prepare(start), quiet=True).model)
    recipe = make(text, tmp_path / "run", Model(base=base), lora=Lora(rank=2))
    prepared = prepare(recipe)
    own = {"ssa": "_temperature/kernel.lora_a", "rcmha": "distances/kernel.lora_a"}[name]
    assert any(path.endswith(own) for path in prepared.shapes.trained)
    result = train(prepared, quiet=True)
    before, after = infer.load(base), infer.load(result.model)
    adapted = infer.load(base, adapter=tmp_path / "run" / "adapter")
    ids = [[1, 2, 3, 4]]
    np.testing.assert_allclose(
        adapted.logits(ids), after.logits(ids), rtol=tolerances.ADAPTED_LOGITS, atol=tolerances.ADAPTED_LOGITS
    )
    old, new = flatten(before.params), flatten(after.params)
    moved = {path for path in old if (np.asarray(old[path]) != np.asarray(new[path])).any()}
    assert moved == {path.removesuffix(".lora_a") for path in prepared.shapes.trained if path.endswith(".lora_a")}
