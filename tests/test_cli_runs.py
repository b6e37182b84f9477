"""The command at work, in this process, on a tiny model that says the alphabet: what it prints, writes and leaves."""

import functools
import json
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import pytest
import tqdm
from command_harness import BLOCK, LETTERS, after, assert_refused

from infer.cli import main
from pallas_kernels import decode_attention, extend_attention
from pallas_kernels.dispatch import Implementation

# generate


@pytest.mark.parametrize("prompt", ["abc", "xyz", "é"])
def test_prompt_from_everywhere(generate, tmp_path, prompt):
    (tmp_path / "prompt").write_bytes(prompt.encode())
    expected = 0, after(prompt, 8) + "\n", ""
    assert generate(prompt) == expected
    assert generate("--file", str(tmp_path / "prompt")) == expected
    for arguments in ((), ("-",), ("--file", "-")):
        assert generate(*arguments, stdin=prompt.encode()) == expected


def test_note_says_what_the_cache_costs(command):
    code, out, err = command("generate", "abc", "--max-new-tokens", "8", "--cache", "full", "--budget", "11")
    assert (code, out) == (0, after("abc", 8) + "\n")
    before, after_it = err.splitlines()
    assert before.startswith("full cache: 8.3 KiB per sequence, 11 tokens")
    assert after_it.startswith("8 tokens, cache 8,492 bytes, ") and after_it.endswith(" tokens/s")


def test_json_and_logprobs(generate):
    code, out, err = generate("abc", "--json")
    row = json.loads(out)
    assert (code, err) == (0, "") and row["text"] == after("abc", 8) and row["logprobs"] is None
    assert len(row["token_ids"]) == row["stats"]["new_tokens"] == 8 and row["stats"]["prompt_tokens"] == 3
    assert row["stats"]["kernels"] == dict.fromkeys(("decode_attention", "extend_attention", "slots"), "xla")
    row = json.loads(generate("abc", "--json", "--logprobs")[1])
    assert len(row["logprobs"]) == 8 and all(-0.1 < x <= 0 for x in row["logprobs"])


def test_samples(generate):
    drawn = ("abc", "--temperature", "40", "--samples", "2", "--seed", "5")
    rows = json.loads(generate(*drawn, "--json")[1])
    assert len(rows) == 2 and rows[0]["text"] != rows[1]["text"]
    assert generate(*drawn)[1] == "\n\n".join(row["text"] for row in rows) + "\n"
    other = json.loads(generate(*drawn[:-1], "6", "--json")[1])
    assert other[0]["text"] == rows[1]["text"]


@pytest.mark.parametrize(("stops", "said"), [(["mn"], "defghijkl"), (["n", "hij"], "defg")])
def test_stop_strings(generate, stops, said):
    options = [part for stop in stops for part in ("--stop", stop)]
    assert generate("abc", *options, "--max-new-tokens", "40") == (0, said + "\n", "")
    row = json.loads(generate("abc", *options, "--max-new-tokens", "40", "--json")[1])
    assert row["text"] == said and row["stats"]["new_tokens"] < 14


def test_chat_template_around_the_prompt(generate):
    row = json.loads(generate("abc", "--chat", "--json")[1])
    assert row["stats"]["prompt_tokens"] == 1 + len("user\nabc") + 1 + len("\n") + 1 + len("assistant\n")


def test_output_is_replaced_whole(generate, tmp_path, monkeypatch):
    target, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(target)
    assert generate("abc", "--output", str(link)) == (0, "", "")
    assert target.read_text() == after("abc", 8) + "\n" and link.is_symlink()
    assert generate("xyz", "--json", "--output", str(target)) == (0, "", "")
    assert json.loads(target.read_text())["text"] == after("xyz", 8)

    def full(self, other):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert_refused(generate("abc", "--output", str(target)), "No space left")
    assert json.loads(target.read_text())["text"] == after("xyz", 8)
    assert sorted(tmp_path.iterdir()) == [link, target]


def test_only_files_are_replaced(generate, tmp_path):
    """As root, renaming over it would replace /dev/null by a file."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for target, message in ((pipe, "not a writable file"), (tmp_path, "not a writable file"), ("", "cannot write")):
        assert_refused(generate("abc", "--output", str(target)), message)
    assert_refused(generate("abc", "--output", str(tmp_path / "absent" / "x")), "existing, writable folder")
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["caf\udce9"], "the prompt is not UTF-8"),
        (["abc", "--stop", "\udce9"], "--stop is not UTF-8"),
        (["abc", "--stop", ""], "--stop is empty"),
        (["abc", "--file", "x"], "give one of: a prompt, --file, --jsonl"),
        (["--file", ""], "Is a directory"),
        (["--jsonl", ""], "Is a directory"),
        (["abc", "--logprobs"], "--logprobs needs --json or --jsonl"),
        (["abc", "--max-new-tokens", "2046"], "2049 positions, the model's window is 2048"),
        (["abc", "--budget", "2", "--cache", "recency", "--max-new-tokens", "40"], "the least is 5 tokens"),
        (["abc", "--budget", "2"], "does not fit budget 2"),
        (["abc", "--samples", "9", "--seed", str(2**64 - 2)], "seed must be"),
    ],
)
def test_refused_prompts_and_options(generate, arguments, message):
    assert_refused(generate(*arguments), message)


def test_no_tokenizer_and_no_template(generate, command, alphabet, tmp_path):
    for name in os.listdir(alphabet):
        (tmp_path / name).symlink_to(alphabet / name)
    (tmp_path / "tokenizer_config.json").unlink()
    assert_refused(generate("abc", "--chat", "--model", str(tmp_path)), "no chat template")
    assert_refused(command("chat", "--model", str(tmp_path), stdin=b"abc\n"), "no chat template")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "text").write_text("abc")
    for arguments in (("generate", "abc"), ("chat",), ("evaluate", "--text", str(tmp_path / "text"))):
        assert_refused(command(*arguments, "--model", str(tmp_path)), "has no tokenizer.json")
    code, out, err = generate("--jsonl", "-", "--model", str(tmp_path), stdin=b'{"prompt": [67]}')
    assert (code, err) == (0, "") and len(json.loads(out)["completions"][0]["token_ids"]) == 8


# JSONL

BAD_LINES = {
    "[]": "must be an object",
    '{"text": "a"}': "must be an object",
    '{"prompt": 3}': "must be an object",
    '{"prompt": ""}': "empty",
    '{"prompt": []}': "empty",
    '{"prompt": [1, 2.5]}': "list of integer token ids",
    '{"prompt": [true]}': "list of integer token ids",
    '{"prompt": [[1]]}': "list of integer token ids",
    '{"prompt": [258]}': "token id 258 is outside the vocabulary, 0 to 257",
    '{"prompt": [-1]}': "token id -1",
    '{"prompt": "\\ud800"}': "not UTF-8",
    '{"prompt": "' + "a" * 2050 + '"}': "window is 2048",
    '{"prompt": "a"': "delimiter",
    "[" * 100_000: "recursion",
}


def test_bad_lines_spoil_only_themselves(generate, tmp_path):
    (tmp_path / "in").write_text("\n\n".join([*BAD_LINES, '{"prompt": "abc", "id": "\\ud800"}']))
    code, out, err = generate("--jsonl", str(tmp_path / "in"))
    *bad, good = map(json.loads, out.splitlines())
    assert [row["line"] for row in bad] == list(range(1, 2 * len(BAD_LINES), 2))
    for row, message in zip(bad, BAD_LINES.values(), strict=True):
        assert message in row["error"], row
    assert good["completions"][0]["text"] == after("abc", 8) and good["id"] == "\ud800"
    assert (code, err) == (0, f"jaxkv: {len(BAD_LINES)} of {len(BAD_LINES) + 1} lines were refused\n")
    code, out, err = generate("--jsonl", "-", stdin=b'{"prompt": [258]}\n{"prompt": [-1]}\n')
    assert code == 2 and len(out.splitlines()) == 2 and "2 of 2" in err


def test_lines_end_at_newlines_only(generate):
    """JSON strings may hold U+2028 and U+0085 as they are; Windows puts U+FEFF first and a carriage return last."""
    lines = '\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c\x85d"}\r\n'
    code, out, err = generate("--jsonl", "-", stdin=lines.encode())
    assert (code, err) == (0, "")
    texts = [json.loads(line)["completions"][0]["text"] for line in out.split("\n")[:-1]]
    assert texts == [after("b", 8), after("d", 8)]


def test_jsonl_options_and_output(generate, tmp_path):
    options = ("--samples", "2", "--temperature", "1", "--logprobs", "--chat", "--output", str(tmp_path / "out"))
    assert generate("--jsonl", "-", *options, stdin=b'{"prompt": "abc"}') == (0, "", "")
    row = json.loads((tmp_path / "out").read_text())
    assert row["prompt"] == "abc" and len(row["completions"]) == 2
    for completion in row["completions"]:
        assert len(completion["logprobs"]) == 8 and completion["stats"]["prompt_tokens"] == 22
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]
    code, out, _ = generate("--jsonl", "-", "--chat", stdin=b'{"prompt": [67]}')
    assert code == 2 and "--chat takes a prompt that is text" in out


# Interruption


def test_ctrl_c_while_streaming(alphabet):
    """A real process and a real signal; no limit of tokens is ever reached."""
    own_handler = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job ignores the signal
    start = [sys.executable, "-c", f"import signal, sys; {own_handler}; from infer.cli import main; sys.exit(main())"]
    options = "--max-new-tokens 900000000 --streaming --cache recency --budget 64 --compilation-cache".split()
    process = subprocess.Popen(
        [*start, "generate", "abc", "--model", str(alphabet), *options, ""],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,  # what a buffer holds, communicate() would not see
    )  # fmt: skip
    with process:
        first = b""
        while len(first) < 200:  # some blocks of tokens
            piece = process.stdout.read(64)
            assert piece, process.stderr.read()
            first += piece
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    said = (first + out).decode()
    assert process.returncode == 0 and said == after("abc", len(said.encode()) - 1) + "\n"
    assert err.decode().splitlines()[-1] == "interrupted" and b"Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_generated_is_printed(command, interrupt, tmp_path, number):
    before = signal.getsignal(number)
    long = ("generate", "abc", "--max-new-tokens", "100")
    for arguments in ((), ("--output", str(tmp_path / "out")), ("--json",)):
        interrupt(BLOCK, 2, number)
        code, out, err = command(*long, *arguments)
        assert code == 0 and err.splitlines()[-1] == "interrupted"
        text = (tmp_path / "out").read_text() if "--output" in arguments else out
        text = json.loads(text)["text"] + "\n" if "--json" in arguments else text
        assert text == after("abc", 33) + "\n"
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--output"], ["--jsonl", "-", "--output"]])
def test_nothing_is_written_if_nothing_came(generate, interrupt, tmp_path, number, expected, arguments):
    interrupt("infer.model.read", 1, number)
    output = [str(tmp_path / "out")] if "--output" in arguments else []
    prompt = [] if "--jsonl" in arguments else ["abc"]
    result = generate(*arguments, *output, *prompt, stdin=b'{"prompt": "abc"}')
    assert result == (expected, "", "\njaxkv: interrupted\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "call", "counts"), [(BLOCK, 5, [100, 1]), ("infer.generate._first", 2, [100])])
def test_interrupted_batch_keeps_what_it_has(generate, interrupt, tmp_path, name, call, counts):
    """After the first token of the second line, and before it; a line takes four blocks."""
    interrupt(name, call)
    lines = b'{"prompt": "abc"}\n' * 3
    code, out, err = generate("--jsonl", "-", "--max-new-tokens", "100", "--output", str(tmp_path / "out"), stdin=lines)
    texts = [json.loads(line)["completions"][0]["text"] for line in (tmp_path / "out").read_text().splitlines()]
    assert texts == [after("abc", count) for count in counts]
    assert (code, out, err) == (130, "", "") and list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_reader_goes_away(generate, monkeypatch):
    """`jaxkv generate ... | head`: no message, and none when Python ends either."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert generate("abc")[::2] == (141, "")
        assert generate("abc", "--json")[::2] == (0, "")  # the first call left it open on nothing


def test_closed_standard_streams(alphabet, monkeypatch, capsys):
    for name in ("stdin", "stdout"):
        monkeypatch.setattr(sys, name, None)
    assert main(["generate", "--model", str(alphabet)]) == 2
    assert "the prompt is empty" in capsys.readouterr().err
    sys.stdin.close()
    sys.stdout.close()


# Memory


def test_too_little_memory_is_said_before_allocation(command, generate, monkeypatch, tmp_path):
    monkeypatch.setattr("infer.prefill.free_bytes", lambda: 8748 + 100)  # one sequence of 3 + 8 tokens, no more
    assert generate("abc")[0] == 0
    monkeypatch.setattr("infer.prefill.empty_state", None)
    text = tmp_path / "text"
    text.write_text(LETTERS * 99)
    for arguments in (
        ("generate", "abc", "--max-new-tokens", "2000"),
        ("generate", "abc", "--max-new-tokens", "2000", "--json", "--output", str(tmp_path / "out")),
        ("generate", "abc", "--max-new-tokens", "8", "--samples", "3"),
        ("generate", "abc", "--max-new-tokens", "900000000", "--streaming"),
        ("chat",),
        ("evaluate", "--text", str(text), "--samples", "0", "--context", "500"),
    ):
        assert_refused(command(*arguments, "--quiet"), "the cache needs")
    code, out, _ = generate("--jsonl", "-", "--max-new-tokens", "2000", stdin=b'{"prompt": "abc"}')
    assert code == 2 and "the cache needs" in json.loads(out)["error"]
    assert list(tmp_path.iterdir()) == [text]


# evaluate and info


@pytest.fixture
def evaluate(command, tmp_path):
    """Two caches on one short excerpt and one question."""
    text = "".join(f"{word} {LETTERS}. " for word in LETTERS)
    (tmp_path / "text").write_text(text)
    question = {"task": "next", "question": "say", "prefix": " abc", "answer": "def"}
    contexts = [{"id": "1", "context": text[:60], "questions": [question, question | {"answer": "dex"}]}]
    (tmp_path / "samples").write_text(json.dumps({"contexts": contexts}))
    options = "--context 64 --next 4 --excerpts 1 --caches full,recency --budgets 50%".split()
    files = ("--text", str(tmp_path / "text"), "--samples-file", str(tmp_path / "samples"))
    return functools.partial(command, "evaluate", *options, *files)


KEYS = "cache budget bytes share kl_mean kl_p99 top1 bits_per_byte accuracy tokens_per_second".split()


def test_evaluate_writes_rows_and_a_picture(evaluate, tmp_path):
    code, out, err = evaluate("--json", str(tmp_path / "rows"), "--plot", str(tmp_path / "picture"))
    rows = json.loads((tmp_path / "rows").read_text())
    assert code == 0 and [(row["cache"], row["budget"]) for row in rows] == [("full", "100%"), ("recency", "50%")]
    for row in rows:
        assert set(KEYS) <= set(row) and None not in [row[key] for key in KEYS]
        assert row["accuracy"] == {"next": 0.5} and row["tokens_per_second"] > 0
    assert rows[1]["bytes"] < rows[0]["bytes"] and rows[0]["share"] > 2.0 and rows[1]["share"] <= 0.5
    assert (tmp_path / "picture").read_bytes().startswith(b"\x89PNG")
    assert out.splitlines()[0].split()[:3] == ["cache", "budget", "bytes"] and len(out.splitlines()) > 4
    assert err == f"picture: {tmp_path / 'picture'}\n"
    assert evaluate("--json", str(tmp_path / "other.json"), "--quiet")[0] == 0  # the picture lies beside the rows
    assert (tmp_path / "other.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caches", "lru"], "unknown cache 'lru'; known: full"),
        (["--budgets", "50%,lots"], "'lots' is not understood"),
        (["--tasks", "quiz"], "unknown task 'quiz'; known: passkey, magic"),
        (["--protocol", "guess"], "invalid choice: 'guess' (choose from"),
        (["--samples-file", "/no/such/file"], "No such file"),
        (["--context", "-5"], "--context: must be at least 1"),
        (["--next", "0"], "--next: must be at least 1"),
        (["--excerpts", "-1"], "--excerpts: must be at least 0"),
        (["--samples", "-1"], "--samples: must be at least 0"),
        (["--json", "/no/such/folder/x"], "cannot write"),
        (["--plot", "/no/such/folder/x"], "cannot write"),
    ],
)
def test_evaluate_refuses_before_it_loads(evaluate, monkeypatch, arguments, message):
    monkeypatch.setattr("infer.load", None)
    assert_refused(evaluate(*arguments), message)


def test_evaluate_refuses_or_ends_without_files(evaluate, interrupt, monkeypatch, tmp_path):
    before = sorted(tmp_path.iterdir())
    files = ("--json", str(tmp_path / "rows"), "--plot", str(tmp_path / "picture"), "--quiet")
    assert_refused(evaluate(*files, "--context", "4000"), "exceed the model's 2048 positions")
    assert_refused(evaluate(*files, "--excerpts", "99"), "give a longer text")
    interrupt("infer.evaluate.run.compress", 1)
    assert evaluate(*files) == (130, "", "\njaxkv: interrupted\n")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(evaluate(*files), "pip install jaxkv[demo]")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("call", "number", "measured"), [
    (2, signal.SIGINT, [("full", True, 0)]),  # in the excerpts
    (4, signal.SIGTERM, [("full", True, 0), ("recency", True, 0)]),  # in the questions, of which none is complete
    (6, signal.SIGTERM, [("full", True, 2), ("recency", True, 2)]),  # in a second context
])  # fmt: skip
def test_an_interrupted_evaluation_keeps_its_rows(evaluate, interrupt, monkeypatch, tmp_path, call, number, measured):
    samples = json.loads((tmp_path / "samples").read_text())
    (tmp_path / "samples").write_text(json.dumps({"contexts": 2 * samples["contexts"]}))
    monkeypatch.setattr("infer.evaluate.run.TOGETHER", 1)
    interrupt("infer.evaluate.run.compress", call, number)
    code, out, err = evaluate("--json", str(tmp_path / "rows"), "--plot", str(tmp_path / "picture"), "--seeds", "2")
    rows = json.loads((tmp_path / "rows").read_text())
    assert [(row["cache"], row["kl_mean"] is not None, row["asked"].get("next", 0)) for row in rows] == measured
    assert all(row["partial"] and row["seeds"] == [0, 1] for row in rows)
    table = out.splitlines()
    assert code == 128 + number and [line.split()[0] for line in table[2:-5]] == [row["cache"] for row in rows], out
    assert "partial: the run was interrupted; what is missing was not measured" in table
    assert err == f"interrupted; {len(rows)} rows were measured, in part or whole, and no picture was drawn\n"
    assert not (tmp_path / "picture").exists()


def test_info(command):
    code, out, err = command("info", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "") and (facts["layers"], facts["vocabulary"], facts["window"]) == (2, 258, 2048)
    assert facts["parameters"] == 57_920 and facts["cache_bytes_per_1000_tokens"]["full"] > 1000 * 2 * 2 * 2 * 8 * 4
    code, out, err = command("info")
    assert (code, err) == (0, "") and "parameters   57,920" in out


def test_info_asks_the_kernels(command, monkeypatch):
    """Each is offered this model's shapes, and one that refuses them is not named."""
    asked = []
    refuse = lambda *args, **options: asked.append(args) or "not on a Thursday"
    picky = {"picky": Implementation(run=None, why_not=refuse)}
    for module in (decode_attention, extend_attention):
        monkeypatch.setattr(module, "IMPLEMENTATIONS", picky | module.IMPLEMENTATIONS)
    facts = json.loads(command("info", "--json", "--dtype", "bfloat16")[1])
    assert facts["implementations"] == {"decode_attention": "xla", "extend_attention": "xla"}
    for ((tier, own),) in (args for args in asked if len(args) == 1):
        assert tier.queries.shape == own.queries.shape == (1, 2, 2, 8) and own.queries.dtype == jnp.bfloat16
        assert tier.keys.codes.shape == tier.values.codes.shape == (1, 2, 8, tier.live.shape[2])
    for queries, keys, _, (tier,) in (args for args in asked if len(args) == 4):
        assert queries.shape[:3] == (1, 2, 2) and keys.shape[:2] == (1, 2) and queries.dtype == jnp.bfloat16
        assert tier.source.keys.shape[:3] == (1, 2, 8)
    assert {len(args) for args in asked} == {1, 4}


# Progress


def test_bars_on_a_terminal(command, evaluate, monkeypatch, tmp_path):
    monkeypatch.setattr("tqdm.tqdm", functools.partial(tqdm.tqdm, miniters=1, mininterval=0, ncols=90))
    short, line = ("--max-new-tokens", "8"), b'{"prompt": "abc"}\n'
    for arguments in (
        ("generate", "abc"),
        ("generate", "abc", "--json"),
        ("generate", "--jsonl", "-"),
        ("chat", "--document", str(tmp_path / "text")),
    ):
        code, out, err = command(*arguments, *short, stdin=line, terminal=True)
        assert code == 0 and "reading" not in out and "loading" not in out
        for bar in ("loading:   0%", "loading: 100%", "reading:   0%", "reading: 100%"):
            assert bar in err, (arguments, bar)
    code, out, err = evaluate(terminal=True)
    assert code == 0 and "evaluating" not in out
    for bar in ("loading: 100%", "evaluating:  17%", "evaluating: 100%"):
        assert bar in err
    assert command("generate", "abc", *short, "--quiet", terminal=True) == (0, after("abc", 8) + "\n", "")
    assert len(command("generate", "abc", *short)[2].splitlines()) == 2  # what the cache takes, what came out
