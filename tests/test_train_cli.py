"""`python -m train` and `jaxkv train`: help, refusals, a dry run."""

import pathlib
import types

import numpy as np
import pytest

import infer.cli
from train.cli import add_command, main

TINY = """--model.hidden_size 16 --model.intermediate_size 24 --model.num_layers 2 --model.num_heads 2 --batch 4 --sequence 8
--steps 2 --schedule.warmup 1 --evaluation.tokens 0 --evaluation.batches 1 --logging.every 1 --logging.curves false
--compilation-cache=""".split()


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """JAX keeps such a folder for the whole process."""
    monkeypatch.setattr("infer.cli.cache_folder", lambda: "")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcd \n"), 400)))
    return path


def test_help(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "shakespeare" in out and "--dry-run" in out
    assert main(["shakespeare", "--help"]) == 0
    out = capsys.readouterr().out
    assert (
        "python -m train shakespeare" in out
        and "--optimizer.learning_rate 0.003" in out
        and "--model.window None" in out
    )
    assert main([]) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["shakespear"], "recipe 'shakespear' does not exist; did you mean shakespeare"),
        (["shakespeare", "--optimizer.learning_rte", "1"], "did you mean optimizer.learning_rate"),
        (["shakespeare", "--steps", "0"], "steps must be positive"),
        (["shakespeare", "--compile-for", "v5e:2x2"], "--compile-for needs --dry-run"),
        (["shakespeare", "--data.train", "no/such.txt"], "no/such.txt"),
    ],
)
def test_refusals_are_one_line(words, message, capsys):
    assert main([*words, "--compilation-cache", ""]) == 2
    out, err = capsys.readouterr()
    assert not out and message in err and len(err.splitlines()) == 1 and err.startswith("jaxkv: error: ")


def test_the_command_finds_it_by_entry_point(monkeypatch, capsys):
    asked = []
    entry = types.SimpleNamespace(load=lambda: add_command)
    monkeypatch.setattr(infer.cli.importlib.metadata, "entry_points", lambda group: asked.append(group) or [entry])
    assert infer.cli.main(["train", "shakespear", "--steps", "3"]) == 2
    assert "did you mean shakespeare" in capsys.readouterr().err and asked == ["jaxkv.commands"]
    pyproject = pathlib.Path(__file__).parent.parent / "pyproject.toml"
    assert '[project.entry-points."jaxkv.commands"]\ntrain = "train.cli:add_command"' in pyproject.read_text()


def test_a_dry_run_writes_nothing(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["shakespeare", "--data.train", str(text), "--out", str(out), *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "layers_*/attention/qkv/kernel" in said and "16x48" in said and "memory of a device" in said
    vocabulary, layer = 16 * 6, 16 * 48 + 16 * 16 + 16 * 48 + 24 * 16 + 2 * 16
    assert f"trained {vocabulary + 2 * layer + 16:,}, frozen 0; 32 tokens a step" in said
    assert not out.exists()


def test_a_run_says_what_happens(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["shakespeare", "--data.train", str(text), "--out", str(out), *TINY]) == 0
    said = capsys.readouterr().err
    assert "step 1/2  loss" in said and "tokens/s" in said and "step 2/2  validation loss" in said
    assert f"model in {out}/model" in said and "bits per byte" in said
