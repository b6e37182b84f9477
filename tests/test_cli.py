"""The command: what it prints, and how it refuses."""

import json
import os
import subprocess
import sys

import pytest

from infer.cli import main


def run(*arguments, cwd=None, text=None):
    command = [sys.executable, "-m", "infer", *arguments]
    return subprocess.run(command, cwd=cwd, input=text, capture_output=True, text=True, timeout=300, env=os.environ)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "", "--quiet"], "the prompt is empty"),
        (["generate", "a", "--cache", "lru"], "unknown cache policy 'lru'"),
        (["generate", "a", "--budget", "many"], "is not understood"),
        (["generate", "a", "--budget", "0"], "must be more than 0"),
        (["generate", "a", "--temperature", "-1"], "temperature must be"),
        (["generate", "a", "--top-p", "0"], "top_p must be in"),
        (["generate", "a", "--max-new-tokens", "-3"], "must be at least 1, got -3"),
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


def test_not_utf8(tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    assert main(["generate", "--file", str(tmp_path / "prompt")]) == 2
    assert "is not UTF-8: byte 3" in capsys.readouterr().err


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
