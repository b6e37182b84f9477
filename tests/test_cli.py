"""The command: what it prints, and how it refuses."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from test_checkpoints import DOWN, copy_of, rewrite
from test_gguf import write_gguf

from infer.cli import main


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    """JAX keeps such a folder for the whole process."""
    monkeypatch.setattr("infer.cli.cache_folder", lambda: "")


def run(*arguments, cwd=None, text=None):
    command = [sys.executable, "-m", "infer", *arguments]
    return subprocess.run(command, cwd=cwd, input=text, capture_output=True, text=True, timeout=300, env=os.environ)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "", "--quiet"], "the prompt is empty"),
        (["generate", "a", "--cache", "lru"], "unknown cache 'lru'"),
        (["generate", "a", "--budget", "many"], "is not understood"),
        (["generate", "a", "--budget", "0"], "must be more than 0"),
        (["generate", "a", "--temperature", "-1"], "temperature must be"),
        (["generate", "a", "--top-p", "0"], "top_p must be in"),
        (["generate", "a", "--temperature", "nan"], "temperature must be"),
        (["generate", "a", "--top-p", "1.5"], "top_p must be in (0, 1]"),
        (["generate", "a", "--min-p", "1"], "min_p must be in"),
        (["generate", "a", "--seed", "-1"], "seed must be"),
        (["generate", "a", "--max-new-tokens", "-3"], "--max-new-tokens: must be at least 1 and below 10**9, got -3"),
        (["generate", "a", "--max-new-tokens", "1" * 30], "--max-new-tokens: must be at least 1"),
        (["generate", "a", "--samples", "0"], "--samples: must be at least 1"),
        (["generate", "a", "--top-k", "-1"], "--top-k: must be at least 0"),
        (["generate", "a", "--top-k", "few"], "--top-k: invalid whole number value: 'few'"),
        (["chat", "--max-tokens", "-3"], "--max-tokens: must be at least 1"),
        (["chat", "--cache", "lru"], "unknown cache 'lru'"),
        (["generate", "a", "--dtype", "int8"], "invalid choice: 'int8' (choose from"),
        (["generate", "a", "--model", "nobody/nothing", "--offline"], "is not in the local cache"),
        (["generate", "a", "--loud"], "unrecognized arguments: --loud; see jaxkv --help"),
        (["translate"], "invalid choice: 'translate' (choose from"),
        ([], "required: COMMAND"),
        (["generate", "a", "--model", "./no-such-dir/"], "accepted: a name (smollm2)"),
        (["generate", "a", "--output", "/no/such/folder/x"], "cannot write"),
        (["generate", "--file", "/no/such/file"], "No such file"),
        (["evaluate", "--text", "/no/such/file"], "No such file"),
        (["info", "--model", "missing.gguf"], "does not exist"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["generate", "--file"], ["generate", "--jsonl"], ["evaluate", "--text"]])
def test_not_utf8(tmp_path, capsys, arguments):
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    assert main([*arguments, str(tmp_path / "prompt")]) == 2
    assert "is not UTF-8: byte 3" in capsys.readouterr().err


def cut(path: pathlib.Path) -> pathlib.Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def truncated(folder):
    return cut(copy_of("llama2", folder) / "model.safetensors").parent


def wrong_json(folder):
    model = copy_of("llama2", folder)
    (model / "config.json").write_text('{"model_type": ')
    return model


def no_shard(folder):
    model = copy_of("llama3", folder)
    next(model.glob("*.safetensors")).unlink()
    return model


def changed(change):
    def make(folder):
        model = copy_of("llama2", folder)
        rewrite(model, change)
        return model

    return make


def pickled(folder):
    model = copy_of("llama2", folder)
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    return model


BAD_MODELS = [
    (lambda folder: folder / "absent", "does not exist; accepted: a name"),
    (lambda folder: folder, "has no config.json"),
    (truncated, "model.safetensors is damaged or cut short"),
    (wrong_json, "config.json is not valid JSON"),
    (no_shard, "shard 'model-0"),
    (changed(lambda tensors: tensors.update({DOWN: np.ones((3, 4), np.float32)})), "has shape [3, 4]"),
    (changed(lambda tensors: tensors.update({"odd.weight": np.ones(2)})), "'odd.weight' is unexpected"),
    (changed(lambda tensors: tensors.pop(DOWN)), f"{DOWN!r} is missing"),
    (changed(lambda tensors: tensors.update({DOWN: np.ones((32, 48), np.int8)})), "dtype I8; accepted: F32"),
    (pickled, "not safe to open"),
    (lambda folder: pickled(folder) / "pytorch_model.bin", "not safe to open"),
    (lambda folder: write_gguf(folder / "a.gguf", "mamba", "llama2"), "architecture 'mamba' is not supported"),
    (lambda folder: cut(write_gguf(folder / "a.gguf", "llama", "llama2")), "a.gguf is cut short"),
]


@pytest.mark.parametrize(("make", "message"), BAD_MODELS, ids=[message for _, message in BAD_MODELS])
def test_bad_models(tmp_path, capsys, make, message):
    """From each command that loads weights; nothing is written."""
    model = str(make(tmp_path))
    (tmp_path / "text").write_text("Some text.")
    text, before = str(tmp_path / "text"), sorted(tmp_path.iterdir())
    out = str(tmp_path / "out")
    for arguments in (
        ["generate", "a", "--output", out],
        ["generate", "--jsonl", text, "--output", out],
        ["chat", "--document", text],
        ["evaluate", "--text", text, "--json", out, "--plot", out],
    ):
        assert main([*arguments, "--model", model]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
    assert sorted(tmp_path.iterdir()) == before


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("jaxkv ")


def test_unusable_compilation_cache_is_no_obstacle(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "in").write_text('{"prompt": [3, 4]}')
    model = str(pathlib.Path(__file__).parent / "goldens" / "llama2")
    arguments = ["--jsonl", str(tmp_path / "in"), "--max-new-tokens", "2", "--model", model]
    assert main(["generate", *arguments, "--compilation-cache", str(tmp_path / "file")]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["prompt"] == [3, 4]
    assert f"{tmp_path / 'file'} is not used: File exists" in printed.err


def test_works_beside_other_peoples_modules(tmp_path):
    """Somebody's own train.py and infer.py in the folder do not shadow the command."""
    for name in ("train.py", "infer.py"):
        (tmp_path / name).write_text("raise SystemExit('shadowed')\n")
    script = os.path.join(os.path.dirname(sys.executable), "jaxkv")
    if not os.path.exists(script):
        pytest.fail("the package is not installed: run the tests through `make test`")
    done = subprocess.run([script, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("jaxkv ")


@pytest.mark.smollm2
def test_info(smollm2, capsys):
    assert main(["info", "--model", str(smollm2), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == 134_515_008
    assert facts["cache_bytes_per_1000_tokens"]["full"] >= 1000 * 46_080


@pytest.mark.smollm2
def test_jsonl_goes_on_after_a_bad_line(smollm2, tmp_path):
    (tmp_path / "in").write_text('{"prompt": "Once upon"}\nnot json\n{"prompt": ""}\n{"prompt": [1, 2, 3]}\n')
    done = run("generate", "--jsonl", str(tmp_path / "in"), "--max-new-tokens", "4", "--quiet", "--model", str(smollm2))
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    assert [("error" in line) for line in lines] == [False, True, True, False]
    assert "2 of 4 lines were refused" in done.stderr
