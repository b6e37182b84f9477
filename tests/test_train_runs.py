"""Whole runs of a very small model: stopping, going on, damage, refusals, and what infer makes of the result."""

import dataclasses
import json
import pathlib
import resource
import shutil
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import infer
from train.checkpoint import Checkpoints
from train.config import (
    Checkpoints as Keeping,
)
from train.config import Data, Evaluation, Logging, Model, Optimizer, Recipe, Schedule, TrainError
from train.fields import override
from train.loop import train
from train.prepare import prepare
from train.report import read_metrics
from train.step import TrainState

STEPS = 6


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    rng = np.random.default_rng(0)
    path.write_text("".join(rng.choice(list("abcd \n"), 600)))
    return path


@pytest.fixture(scope="module")
def recipe(text):
    return Recipe(
        model=Model(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_positions=32),
        data=Data(train=(str(text),), tokenizer="characters"),
        optimizer=Optimizer(learning_rate=1e-2),
        schedule=Schedule(warmup=2),
        steps=STEPS, batch=4, sequence=8, out="none",
        checkpoints=Keeping(every=2, keep=2),
        evaluation=Evaluation(every=3, batches=2, prompt="ab", tokens=4, cache="recency", budget="8"),
        logging=Logging(every=1, curves=False),
    )  # fmt: skip


def run(recipe, out, *words):
    return train(prepare(override(dataclasses.replace(recipe, out=str(out)), list(words))), quiet=True)


@pytest.fixture(scope="module")
def straight(recipe, tmp_path_factory):
    """A run without interruption: (folder, its result)."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    return folder, run(recipe, folder)


@pytest.fixture
def copy(straight, tmp_path):
    return pathlib.Path(shutil.copytree(straight[0], tmp_path / "copy"))


def test_what_a_run_leaves(straight, recipe):
    folder, result = straight
    assert result.step == STEPS and list(result.losses) == list(range(1, STEPS + 1))
    lines = read_metrics(str(folder))
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, STEPS + 1)) and {line["step"]: line["loss"] for line in lines if "loss" in line} == (
        result.losses
    )
    judged = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in judged] == [3, 6]
    assert all(line["sample"].startswith("ab") and len(line["sample"]) == 6 for line in judged)
    assert json.loads((folder / "recipe.json").read_text())["steps"] == STEPS
    kept = sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    assert kept == [4, 6]
    lm = infer.load(result.model)
    loss = np.asarray(lm.logits([lm.encode("abcd")]))
    assert np.isfinite(loss).all() and lm.generate("ab", max_new_tokens=3)[0].text


def test_a_stopped_run_goes_on_to_the_same_bits(straight, recipe, tmp_path, monkeypatch):
    """Stopped by a signal between checkpoints, then once more; losses, samples and parameters are those of the other."""
    import train.loop

    real, count = train.loop.put_batch, iter(range(1, 100))

    def stopping(batch, mesh):
        if next(count) == 3:  # no validation batch before it
            signal.raise_signal(signal.SIGINT)
        return real(batch, mesh)

    monkeypatch.setattr(train.loop, "put_batch", stopping)
    first = run(recipe, tmp_path / "run")
    monkeypatch.undo()
    assert (first.step, first.model) == (3, None)
    second = run(recipe, tmp_path / "run")
    folder, result = straight
    assert first.losses | second.losses == result.losses and list(second.losses) == [4, 5, 6]
    samples = lambda out: [line.get("sample") for line in read_metrics(str(out)) if line["step"] == 6]
    assert samples(tmp_path / "run") == samples(folder)
    one, two = (infer.load(out / "model").params for out in (folder, tmp_path / "run"))
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), one, two)))


def test_a_truncated_newest_checkpoint(copy, straight, recipe, capsys):
    """Is said and put aside; the one before leads to the same end."""
    newest = copy / "checkpoints" / "6"
    victim = max(
        (path for path in newest.rglob("*") if path.is_file() and "arrays" in path.parts),
        key=lambda p: p.stat().st_size,
    )
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    result = run(recipe, copy)
    said = capsys.readouterr().err
    assert "the checkpoint of step 6 is damaged" in said and (copy / "damaged" / "6").is_dir()
    assert result.losses == {step: straight[1].losses[step] for step in (5, 6)}
    steps = [line["step"] for line in read_metrics(str(copy)) if "loss" in line]
    assert steps == list(range(1, STEPS + 1))


def test_a_finished_run_has_nothing_left_to_do(copy, recipe):
    result = run(recipe, copy)
    assert result.losses == {} and result.step == STEPS and infer.load(result.model)


def test_refusals_of_a_folder(copy, recipe, tmp_path, text):
    with pytest.raises(TrainError, match=r"another recipe \(optimizer.learning_rate: 0.01 -> 0.02\)"):
        run(recipe, copy, "--optimizer.learning_rate", "0.02")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(TrainError, match="not empty .it has 'thesis.tex'. and holds no run"):
        run(recipe, tmp_path / "foreign")
    with pytest.raises(TrainError, match="is a file; --out must be a folder"):
        run(recipe, text)
    (copy / "recipe.json").write_text("{")
    with pytest.raises(TrainError, match="recipe.json is damaged"):
        run(recipe, copy)


def test_another_text_under_the_same_name(copy, recipe, monkeypatch):
    name = dataclasses.replace(recipe.data, train=("moved",))
    stored = json.loads((copy / "recipe.json").read_text())
    stored["data"]["train"] = ["moved"]
    (copy / "recipe.json").write_text(json.dumps(stored))
    monkeypatch.setattr("train.prepare.load_texts", lambda data: (["abcd" * 200], ["abcd" * 40]))
    with pytest.raises(TrainError, match="the training text changed since the checkpoint"):
        run(dataclasses.replace(recipe, data=name), copy)


def test_a_checkpoint_of_another_model(copy, recipe):
    prepared = prepare(dataclasses.replace(recipe, out=str(copy)))
    trained = prepared.shapes.trained
    wrong = {path: jax.ShapeDtypeStruct((3, *x.shape[1:]), x.dtype) for path, x in trained.items()}
    checkpoints = Checkpoints(str(copy), keep=2)
    with pytest.raises(TrainError, match="is of another model: trained.*is needed"):
        checkpoints.restore(dataclasses.replace(prepared.shapes, trained=wrong))
    checkpoints.close()


def test_no_number_stops_the_run(recipe, tmp_path, monkeypatch):
    """At the step, with the last good checkpoint named; nothing after it is stored."""
    import train.loop

    real, count = train.loop.put_batch, iter(range(1, 100))

    def poison(batch, mesh):
        return real(batch | ({"weights": batch["weights"] * np.float32("nan")} if next(count) == 3 else {}), mesh)

    monkeypatch.setattr(train.loop, "put_batch", poison)
    with pytest.raises(TrainError, match=r"step 3: \w+ is nan; the last good checkpoint is of step 2 in"):
        run(recipe, tmp_path / "run", "--checkpoints.every", "1", "--evaluation.every", "0")
    kept = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()]
    assert max(kept) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (("--evaluation.prompt", "xyz"), "evaluation.prompt 'xyz' has characters that the tokenizer lacks"),
        (("--evaluation.tokens", "31"), "take 33 positions, the model has 32"),
        (("--evaluation.cache", "lru"), "unknown cache 'lru'"),
        (
            ("--evaluation.cache", "full", "--evaluation.budget", "5"),
            "evaluation.cache 'full' with evaluation.budget 5: .*full",
        ),
        (("--evaluation.budget", "1"), "evaluation.cache 'recency' with evaluation.budget 1: .*the least is 5 tokens"),
        (
            ("--evaluation.budget", "9B"),
            "evaluation.cache 'recency' with evaluation.budget 9B: .*the least is 5 tokens",
        ),
        (("--compute.data", "3", "--compute.fsdp", "1"), "does not fit 1 device"),
        (("--model.vocab_size", "99"), "vocabulary of 99, the tokenizer one of 6"),
        (("--optimizer.frozen", "*"), "leaves nothing to train"),
        (("--schedule.warmup", "6"), "leaves none of the 6 steps"),
        (("--data.tokenizer", "words"), "'words' is not known"),
        (("--sequence", "32", "--data.validation_share", "0.999"), "fewer than one sequence of 32"),
    ],
)
def test_refusals_before_anything_is_written(recipe, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(recipe, tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed(recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(TrainError, match="logging.tensorboard needs tensorboardX: pip install"):
        run(recipe, tmp_path / "run", "--logging.tensorboard", "true")


def small_state(step):
    return TrainState(
        step=jnp.int32(step), trained={"a": jax.random.normal(jax.random.key(step), (1 << 18,))}, frozen={}, optimizer=(),
        key=jnp.zeros(2, jnp.uint32),
    )  # fmt: skip


def test_the_newest_and_the_best_stay(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=1)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 1.5), (4, None)):
        checkpoints.save(small_state(step), {"data": {}}, loss=loss)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()


# What orbax's other writers raise when one has failed is collected by no one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk(tmp_path):
    """Files may not grow beyond what the second checkpoint needs: a named error, and the first is still there."""
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    checkpoints.save(small_state(1), {"data": {}}, loss=None)
    checkpoints.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, before[1]))
    try:
        with pytest.raises(TrainError, match="cannot be written to .*; the last good one is of step 1"):
            checkpoints.save(small_state(2), {"data": {}}, loss=None)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    again = Checkpoints(str(tmp_path), keep=2)
    found, meta = again.restore(small_state(0))
    assert int(found.step) == 1 and (found.trained["a"] == small_state(1).trained["a"]).all() and meta["data"] == {}
    again.close()
