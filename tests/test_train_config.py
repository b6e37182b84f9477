"""Recipes and the command line that changes them."""

import dataclasses
import json

import pytest

from train.config import (
    Compute,
    Data,
    Model,
    Optimizer,
    Recipe,
    TrainError,
    decoder_config,
    find_recipe,
    recipes,
)
from train.fields import changed_fields, fields, override, to_json

MODEL = Model(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64)
RECIPE = Recipe(
    model=MODEL, data=Data(train=("a.txt",), tokenizer="bytes"), optimizer=Optimizer(learning_rate=1e-3), steps=10,
    batch=4, sequence=16, out="out",
)  # fmt: skip


def test_every_field_is_set_by_its_path():
    words = (
        "--steps 20 --model.window=8 --data.train a.txt,b.jsonl --optimizer.clip none --compute.dtype bfloat16"
        " --optimizer.groups */temperature=0.5,head/*=2 --data.whole true --z-loss 1e-4 --evaluation.budget 25%"
    )
    changed = override(RECIPE, words.split())
    assert (changed.steps, changed.model.window, changed.data.train) == (20, 8, ("a.txt", "b.jsonl"))
    assert changed.optimizer.clip is None and changed.compute.dtype == "bfloat16" and changed.data.whole
    assert changed.optimizer.groups == (("*/temperature", 0.5), ("head/*", 2.0))
    assert changed.z_loss == 1e-4 and changed.evaluation.budget == "25%"
    untouched = dataclasses.replace(changed.model, window=None)
    assert untouched == MODEL


def test_every_field_can_be_set():
    """To the value that it has."""
    for path, (_, value) in fields(RECIPE).items():
        if path != "optimizer.groups":
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            assert override(RECIPE, [f"--{path}", text]) == RECIPE, path


@pytest.mark.parametrize(
    "words, message",
    [
        (["--optimizer.learning_rte", "1"], "no field --optimizer.learning_rte; did you mean optimizer.learning_rate"),
        (["--stepps", "1"], "did you mean steps"),
        (["--steps"], "--steps needs a value"),
        (["steps", "1"], "'steps' is not a field"),
        (["--steps", "many"], "--steps 'many' cannot be read; int is needed"),
        (["--data.whole", "maybe"], "true or false is needed"),
        (["--optimizer.clip", "x"], "float or none is needed"),
        (["--steps", "0"], "steps must be positive"),
        (["--sequence", "65"], "sequence 65 is longer than model.max_positions 64"),
        (["--compute.accumulation", "3"], "batch 4 is not a multiple of compute.accumulation 3"),
        (["--model.base", "smollm2"], "model.vocab_size|model.hidden_size"),
        (["--data.tokenizer", "base"], "needs model.base"),
        (["--compute.fsdp", "0"], "only one may be 0"),
        (["--compute.remat", "all"], "accepted: none, block, dots"),
        (["--lora.rank", "4"], "lora.rank needs model.base"),
        (["--data.train", ""], "names no text"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(TrainError, match=message):
        override(RECIPE, words)


def test_recipes_of_the_package():
    assert {"shakespeare", "finetune_smollm2", "pretrain_10m"} <= set(recipes())
    for name in recipes():
        recipe, text = find_recipe(name.replace("_", "-"))
        assert isinstance(recipe, Recipe) and f"python -m train {name}" in text
        assert "measured" in text or "seen" in text
    with pytest.raises(TrainError, match="'shakespear' does not exist; did you mean shakespeare"):
        find_recipe("shakespear")


def test_a_recipe_of_a_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from train.recipes.shakespeare import RECIPE\n")
    assert find_recipe(str(path))[0] == find_recipe("shakespeare")[0]
    path.write_text("RECIPE = 1\n")
    with pytest.raises(TrainError, match="has no RECIPE"):
        find_recipe(str(path))
    with pytest.raises(TrainError, match="does not exist"):
        find_recipe(str(tmp_path / "other.py"))


def test_what_may_change_when_a_run_goes_on():
    stored = json.loads(to_json(RECIPE))
    assert changed_fields(stored, RECIPE) == []
    free = dataclasses.replace(RECIPE, out="elsewhere", compute=Compute(accumulation=2, remat="none"))
    assert changed_fields(stored, free) == []
    other = override(RECIPE, ["--optimizer.learning_rate", "0.5", "--compute.dtype", "bfloat16"])
    assert changed_fields(stored, other) == [
        "optimizer.learning_rate: 0.001 -> 0.5",
        "compute.dtype: 'float32' -> 'bfloat16'",
    ]


def test_a_run_from_before_a_field_was_added_goes_on():
    stored = json.loads(to_json(RECIPE))
    del stored["z_loss"], stored["lora"], stored["optimizer"]["b2"]
    assert changed_fields(stored, RECIPE) == []
    assert changed_fields(stored, override(RECIPE, ["--z_loss", "0.1"])) == ["z_loss: 0.0 -> 0.1"]
    assert changed_fields(stored | {"gone": 3}, RECIPE) == ["gone: 3 -> None"]
    del stored["steps"]  # it has no default
    assert changed_fields(stored, RECIPE) == [f"steps: None -> {RECIPE.steps}"]


def test_the_decoder_of_a_model():
    config = decoder_config(MODEL, 65)
    assert (config.vocab_size, config.num_layers, config.head_dim, config.num_kv_heads) == (65, 2, 8, 2)
    assert decoder_config(dataclasses.replace(MODEL, window=8), 65).model_type == "mistral"
    with pytest.raises(TrainError, match="num_heads 4 is not a multiple of num_kv_heads 3"):
        decoder_config(dataclasses.replace(MODEL, num_kv_heads=3), 65)
