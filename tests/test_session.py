"""Conversations: the `chat` command, and sessions as the library gives them."""

import dataclasses
import functools

import numpy as np
import pytest
from command_harness import BLOCK, LETTERS, assert_refused
from test_model import model
from test_tokenizer import SPACED

import infer
from infer.sampling import Sampling
from jaxkv.cache import StateFileError, pack_state

# chat


@pytest.fixture
def chat(command):
    return functools.partial(command, "chat", "--max-new-tokens", "3", "--max-tokens", "160", "--quiet")


def test_chat_from_standard_input_with_a_document(chat, heard, tmp_path):
    (tmp_path / "document").write_text("A naïve document. ")
    code, out, err = chat("--document", str(tmp_path / "document"), stdin="one\n\n  \ntwo é\n".encode())
    first = out.splitlines()[0]
    assert (code, err) == (0, "") and out == f"{first}\n{first}\n" and len(first) == 3 and first in LETTERS
    assert heard == [
        "<|start|>user\nA naïve document. ",
        "one<|end|>\n<|start|>assistant\n",
        f"{first[-1]}<|end|>\n<|start|>user\ntwo é<|end|>\n<|start|>assistant\n",
    ]


def test_a_question_that_does_not_fit_leaves_the_conversation(chat, heard):
    code, out, err = chat(stdin=b"one\n" + b"x" * 200 + b"\ntwo\n")
    assert code == 2 and len(out.splitlines()) == 2
    assert "question and answer need 2" in err and "of 160 left" in err and len(err.splitlines()) == 1
    assert [text.count("x") for text in heard] == [0, 0]


def test_chat_stops_at_stop_strings(chat):
    code, whole, _ = chat(stdin=b"one\n")
    assert chat("--stop", whole[1], stdin=b"one\n") == (0, whole[0] + "\n", "")


def test_refused_conversations(chat, tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "long").write_text("a" * 200)
    for arguments, stdin, message in (
        (["--document", str(tmp_path / "absent")], b"one\n", "No such file"),
        (["--document", str(tmp_path / "empty")], b"one\n", "is empty"),
        (["--document", str(tmp_path / "latin")], b"one\n", "is not UTF-8: byte 3"),
        (["--document", str(tmp_path / "long")], b"one\n", "the text needs 206 more positions"),
        (["--document", "-"], b"one\n", "standard input holds the questions"),
        (["--max-tokens", "9999"], b"one\n", "from 1 to 2048, the model's window, got 9999"),
        ([], b"caf\xe9\n", "standard input is not UTF-8"),
        (["--stop", ""], b"one\n", "--stop is empty"),
    ):
        assert_refused(chat(*arguments, stdin=stdin), message)
    assert chat("--max-tokens", "2049", "--streaming", stdin=b"one\n")[0] == 0


def test_ctrl_c_in_a_conversation(chat, interrupt):
    interrupt(BLOCK, 2)
    code, out, err = chat("--max-new-tokens", "100", stdin=b"one\ntwo\n")
    assert (code, err) == (0, "") and out.splitlines()[1:] == ["(interrupted; the conversation ends here)"]
    assert len(out.splitlines()[0].encode()) == 33
    interrupt("infer.session.read", 1)
    assert chat(stdin=b"one\n") == (130, "", "\njaxkv: interrupted\n")


# Sessions, as the library gives them


@pytest.fixture
def session(alphabet):
    return infer.load(alphabet).session(max_tokens=160)


def test_stream_is_ask_in_pieces(session):
    for stop in (None, ["st"]):
        session = session.lm.session(max_tokens=160)
        asked = session.ask("abc", max_new_tokens=70, stop=stop)
        *pieces, answer = session.stream("abc", max_new_tokens=70, stop=stop)
        assert "".join(pieces) == answer.text == asked.text and answer.token_ids == asked.token_ids


@pytest.mark.parametrize("kind", SPACED)
def test_what_is_known_together_is_one_text_to_the_tokenizer(kind, monkeypatch):
    """Of SentencePiece tokenizers too, which put a space before each text that they are given."""
    lm, reads = model(vocab_size=400), []
    lm.tokenizer, real = SPACED[kind](), infer.session.read
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[ab] ' + m.content + ' [/ab]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    read = lambda params, rows, *more, **options: reads.extend(rows) or real(params, rows, *more, **options)
    monkeypatch.setattr("infer.session.read", read)
    ask = dict(max_new_tokens=4, remember=True)
    session = lm.session(max_tokens=120)
    answer = session.ask("cab d", **ask)
    assert reads == [lm.tokenizer.encode("<s>[ab] cab d [/ab]")]
    session.ask("ab", **ask)
    whole = lm.tokenizer.encode("<s>[ab] cab d [/ab] c.</s>[ab] ab [/ab]")
    after = whole[whole.index(2) :]  # from the end of the answer on
    assert reads[1] == answer.token_ids[-1:] + after and answer.token_ids[-1] != 2
    reads.clear()
    session = lm.session(max_tokens=120)
    session.extend("cab d.")
    session.ask("[ab", **ask)
    assert [*reads[0], *reads[1]] == lm.tokenizer.encode("<s>[ab] cab d.[ab [/ab]")


def test_a_stream_closed_early_is_remembered(session, heard):
    stream = session.stream("abc", max_new_tokens=70)
    said = next(stream) + next(stream)
    stream.close()
    session.ask("def", max_new_tokens=3, remember=True)
    assert heard[1].startswith(said[-1] + "<|end|>\n<|start|>user\ndef")
    assert session.position == int(session.state.next_position[0])


def test_what_is_refused_or_not_remembered_changes_nothing(session, interrupt):
    session.ask("abc", max_new_tokens=3, remember=True)
    before = session.position, session._pending, session._before
    for arguments, message in (({"stop": [""]}, "stop string"), ({"max_new_tokens": 0}, "max_new_tokens must be")):
        with pytest.raises(ValueError, match=message):
            session.ask("def", remember=True, **arguments)
    interrupt(BLOCK, 1)
    with pytest.raises(KeyboardInterrupt):
        session.ask("def", max_new_tokens=70)
    assert (session.position, session._pending, session._before) == before
    assert session.position == int(session.state.next_position[0])
    assert session.ask("def", max_new_tokens=3, remember=True).text


def test_the_repetition_penalty_sees_all_that_was_read(session, tmp_path):
    """Penalised beyond any logit, the model says nothing that is in document, questions or answers, if it is remembered."""
    options = dict(sampling=Sampling(repetition_penalty=1e6), max_new_tokens=4)
    document, first, second = "abcdefg", "hij", "vwx"
    free = session.ask(second, **options)
    session.extend(document)
    one = session.ask(first, remember=True, **options)
    forgotten = session.ask("k", **options)
    session.save(tmp_path / "state")
    asked = [s.ask(second, **options) for s in (session, session.lm.load_session(tmp_path / "state"))]
    assert asked[0].token_ids == asked[1].token_ids
    read = set(session.lm.tokenizer.encode(document + first + one.text))
    assert not read & set(asked[0].token_ids) and not read & set(forgotten.token_ids) and read & set(free.token_ids)
    session.stream(second, **options).close()  # nothing was read
    assert session.ask(second, **options).token_ids == asked[0].token_ids


def test_a_lost_state_is_said(session, interrupt):
    interrupt("infer.prefill.extend", 1)
    with pytest.raises(KeyboardInterrupt):
        session.extend("abc")
    for call in (session.ask, session.extend):
        with pytest.raises(ValueError, match="was interrupted .* make a new one"):
            call("abc")


def test_sessions_within_the_window(session):
    for length in (0, -1, 2049):
        with pytest.raises(ValueError, match=f"from 1 to 2048, the model's window, got {length}"):
            infer.Session(session.lm, max_tokens=length)
    assert infer.Session(session.lm, max_tokens=2049, streaming=True).ask("abc", max_new_tokens=2).text


@pytest.mark.parametrize(
    "cache, budget", [("full", None), pytest.param("auto", 120, marks=pytest.mark.slow), ("mikv", 90)]
)
def test_a_saved_session_goes_on_elsewhere(alphabet, tmp_path, cache, budget):
    mine = infer.load(alphabet).session(cache=cache, budget=budget, max_tokens=160)
    mine.extend("abcdef" * 12)
    mine.save(tmp_path / "state")
    other = infer.load(alphabet).load_session(tmp_path / "state")  # as another process would
    assert other.cache_bytes == mine.cache_bytes and other.position == mine.position
    assert other.plan.describe() == mine.plan.describe() and other.plan.bytes_per_row == mine.plan.bytes_per_row
    for field in dataclasses.fields(mine.plan):
        np.testing.assert_equal(*(np.asarray(getattr(s.plan, field.name), object) for s in (other, mine)))
    for remember in (False, True):
        one, two = (s.ask("xyz", max_new_tokens=4, remember=remember) for s in (mine, other))
        assert one.token_ids == two.token_ids and len(one.token_ids) == 4
    other.save(tmp_path / "again")
    assert infer.load(alphabet).load_session(tmp_path / "again").position == other.position


def test_a_saved_session_of_another_model_is_refused(session, tmp_path):
    session.save(tmp_path / "state")
    other = infer.LanguageModel.__new__(infer.LanguageModel)
    other.config, other.params = session.lm.config, {"head": {"kernel": session.lm.params["head"]["kernel"] + 1}}
    with pytest.raises(StateFileError, match="of another model"):
        infer.Session.load(other, tmp_path / "state")
    (tmp_path / "state-alone").write_bytes(pack_state(session.state, model=session.lm.fingerprint, extra={}))
    with pytest.raises(StateFileError, match="of no session of this version; it lacks .*'plan'"):
        session.lm.load_session(tmp_path / "state-alone")
    (tmp_path / "text").write_text("not a state")
    with pytest.raises(StateFileError, match="cut short, or not a saved state"):
        session.lm.load_session(tmp_path / "text")
    before = (tmp_path / "state").read_bytes()
    with pytest.raises(OSError, match="No such file"):
        session.save(tmp_path / "absent" / "state")
    assert (tmp_path / "state").read_bytes() == before
