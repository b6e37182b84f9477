"""Text to batches: boundaries by hand, the same order in every process, and refusals by name."""

import collections
import json
import pathlib
import pydoc_data.topics
import re
import sys
import types

import numpy as np
import pytest

from infer.evaluate.tasks import INTRO
from train.config import Data, TrainError
from train.data import (
    Corpus,
    Windows,
    check_vocabulary,
    first_batches,
    load_texts,
    make_batches,
    make_corpus,
    make_tokenizer,
)
from train.sources import ALL, read_documents


def corpus(*documents):
    lengths = [len(document) for document in documents]
    return Corpus(np.concatenate(documents).astype(np.int32), np.cumsum([0, *lengths[:-1]]))


def test_a_window_by_hand():
    windows = Windows(corpus([5, 6, 9], [7, 9], [8, 8, 8, 9]), sequence=6, whole=False, seed=None)
    assert len(windows) == 1
    expected = {
        "tokens": [5, 6, 9, 7, 9, 8],
        "targets": [6, 9, 0, 9, 0, 8],
        "segments": [1, 1, 1, 2, 2, 3],
        "positions": [0, 1, 2, 0, 1, 0],
        "weights": [1, 1, 0, 1, 0, 1],
    }
    for name, value in windows(0, 0).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_whole_documents_by_hand():
    """First fit: the rest of a document that is longer than a window goes beside the first; it learns across the cut."""
    windows = Windows(corpus([1, 2, 9], [3, 4, 5, 6, 7, 9], [8, 9]), sequence=5, whole=True, seed=None)
    rows = [windows(i, 0) for i in range(len(windows))]
    np.testing.assert_array_equal([row["tokens"] for row in rows], [[1, 2, 9, 9, 0], [3, 4, 5, 6, 7], [8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(rows[1]["targets"], [4, 5, 6, 7, 9])
    np.testing.assert_array_equal(rows[0]["segments"], [1, 1, 1, 2, 0])
    np.testing.assert_array_equal(rows[0]["positions"], [0, 1, 2, 0, 0])
    assert sum(row["weights"].sum() for row in rows) == 2 + 5 + 1


@pytest.mark.parametrize("whole", [False, True])
def test_every_token_is_seen_once_in_an_epoch(whole):
    rng = np.random.default_rng(0)
    documents = [np.arange(rng.integers(1, 40)) + 1 for _ in range(30)]
    made = corpus(*documents)
    windows = Windows(made, sequence=16, whole=whole, seed=3)
    for epoch in range(3):
        rows = [windows(i, epoch) for i in range(len(windows))]
        seen = np.concatenate([row["tokens"][row["segments"] > 0] for row in rows])
        if whole:
            assert sorted(seen) == sorted(made.tokens)
        else:
            text = ",".join(map(str, made.tokens)) + ","
            assert ",".join(map(str, seen)) + "," in text and len(seen) > len(made.tokens) - 32
        for row in rows:  # nothing is predicted over a boundary
            targets = row["targets"][row["weights"] > 0]
            np.testing.assert_array_equal(targets, row["tokens"][row["weights"] > 0] + 1)


def values(batches, count):
    iterator = iter(batches)
    return [next(iterator) for _ in range(count)]


def test_batches_resume_to_the_sample_and_do_not_depend_on_processes():
    windows = Windows(corpus(np.arange(200)), sequence=8, whole=False, seed=1)
    make = lambda **options: make_batches(windows, batch=4, seed=1, **options)
    straight = values(make(), 20)  # three epochs and more
    iterator = iter(make())
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    again = iter(make())
    again.set_state(state)
    for expected in straight[7:]:
        np.testing.assert_array_equal(next(again)["tokens"], expected["tokens"])
    halves = [values(make(process=i, processes=2), 20) for i in range(2)]
    for one, two, both in zip(*halves, straight, strict=True):
        rows = np.concatenate([one["tokens"], two["tokens"]])
        assert sorted(map(tuple, rows)) == sorted(map(tuple, both["tokens"]))
    orders = {tuple(batch["tokens"][:, 0]) for batch in straight}
    assert len(orders) == 20  # no batch comes twice, in whatever epoch
    with pytest.raises(TrainError, match="cannot be shared by 3 processes"):
        make(process=0, processes=3)


def test_validation_is_the_same_every_time_and_filled_up():
    windows = Windows(corpus(np.arange(50)), sequence=8, whole=False, seed=None)
    batches = list(first_batches(windows, batch=4, count=9))
    assert [batch["weights"].sum() for batch in batches] == [32, 16]  # 6 windows of the 49 tokens that have a next one
    assert batches[1]["targets"][1, -1] == 48 and not batches[1]["weights"][2:].any()
    assert len(Windows(corpus(np.arange(49)), sequence=8, whole=False, seed=None)) == 6
    assert len(Windows(corpus(np.arange(48)), sequence=8, whole=False, seed=None)) == 5  # the last token has no target


@pytest.mark.parametrize("spec", ["bytes", "characters", "bpe:280"])
def test_tokenizers_give_the_text_back(spec, tmp_path):
    text = "To be, or not to be.\n\nThat is — é ▁ the question " * 20
    tokenizer = make_tokenizer(spec, [text])
    text = text.replace("▁", "_") if spec == "characters" else text
    tokenizer = make_tokenizer(spec, [text])
    made = make_corpus([text], tokenizer)
    assert tokenizer.decode(made.tokens.tolist()) == text
    assert tokenizer.vocab_size == {"bytes": 257, "characters": len(set(text)), "bpe:280": 280}[spec]
    assert len(tokenizer.token_bytes()) == tokenizer.vocab_size
    tokenizer.save(tmp_path)
    again = make_tokenizer(str(tmp_path), ())
    np.testing.assert_array_equal(make_corpus([text], again).tokens, made.tokens)


def test_characters_that_are_not_there():
    tokenizer = make_tokenizer("characters", ["abc"])
    with pytest.raises(TrainError, match="validation text has characters that the tokenizer lacks: 'x' 'y'"):
        make_corpus(["abxyc"], tokenizer, what="validation text")


def test_jsonl(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\nlines"}\n')
    assert read_documents(str(path), field="text") == ["one", "two\nlines"]
    with pytest.raises(TrainError, match="line 1 has no text in field 'body'; set --data.field"):
        read_documents(str(path), field="body")
    path.write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(TrainError, match="a.jsonl line 2 is not JSON"):
        read_documents(str(path), field="text")


def test_generated_retrieval():
    """Every answer stands in the text before it is asked for; the texts of one seed are the same, of two are not."""
    made = read_documents("retrieval:60", field="text")
    assert made == read_documents("retrieval:60:0", field="text")
    assert not set(made) & set(read_documents("retrieval:60:1", field="text"))
    facts, asked = collections.Counter(), 0
    for text in made:
        assert text.startswith(INTRO)
        told, *questions = re.split(r"\n\n(?=The special magic number for \w+ is \d+\.\n|What is the pass key)", text)
        known = dict(re.findall(r"The special magic number for (\w+) is (\d{4})\. Remember it", told))
        known["pass key"] = re.search(r"The pass key is (\d{5})\. Remember it\.", told)[1]
        for question in questions:
            what, value = re.findall(r"The (?:special magic number for (\w+)|pass key) is (\d+)", question)[-1]
            assert known[what or "pass key"] == value
        assert 1 <= len(questions) <= len(known) and (len(text) <= ALL or len(questions) == 1)
        facts[len(known)] += 1
        asked += len(questions)
    assert facts[8] >= 20 and set(facts) > {1, 2, 3} and asked > 60


@pytest.mark.parametrize("spec", ["retrieval", "retrieval:0", "retrieval:x", "retrieval:1:2:3"])
def test_generated_texts_are_counted(spec):
    with pytest.raises(TrainError, match="is not retrieval:COUNT or retrieval:COUNT:SEED, such as retrieval:8000"):
        read_documents(spec, field="text")


def test_the_standard_library():
    texts = read_documents("python-library", field="text")
    assert len(texts) > 300 and any(pathlib.Path(json.__file__).read_text() == text for text in texts)
    assert pathlib.Path(pydoc_data.topics.__file__).read_text() not in texts  # half a megabyte of prose, and no module


def test_a_hub_dataset(monkeypatch, tmp_path):
    """The library itself on local files, where it is installed."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    assert read_documents(f"hf:{folder}:train", field="body") == ["one", "two"]
    with pytest.raises(TrainError, match="has no field 'text'; it has body"):
        read_documents(f"hf:{folder}:train", field="text")


def test_a_hub_dataset_by_the_calls_that_are_made(monkeypatch):
    fake, calls = types.ModuleType("datasets"), []

    class Rows(dict):
        column_names = ["text"]

    fake.exceptions = types.SimpleNamespace(DatasetsError=ZeroDivisionError)
    fake.load_dataset = lambda *args, **options: calls.append((args, options)) or Rows(text=["one", "two"])
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert read_documents("hf:owner/name:config:train", field="text") == ["one", "two"]
    assert calls == [(("owner/name", "config"), {"split": "train"})]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TrainError, match="needs the package datasets, which is not installed"):
        read_documents("hf:owner/name:train", field="text")
    with pytest.raises(TrainError, match="is not hf:ID:SPLIT"):
        read_documents("hf:owner/name", field="text")


def test_refusals(tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(TrainError, match="training text is empty"):
        load_texts(Data(train=(str(empty),)))
    tokenizer = make_tokenizer("bytes", ())
    with pytest.raises(TrainError, match="has 4 tokens, fewer than one sequence of 8"):
        Windows(make_corpus(["abc"], tokenizer), sequence=8, whole=False, seed=0)
    with pytest.raises(TrainError, match="vocabulary of 100, the tokenizer one of 257"):
        check_vocabulary(tokenizer, 100, exact=False)
    with pytest.raises(TrainError, match="vocabulary of 300, the tokenizer one of 257"):
        check_vocabulary(tokenizer, 300, exact=True)
    check_vocabulary(tokenizer, 300, exact=False)
    for spec, message in (("bpe:10", "at least 257"), ("words", "is not known"), (str(tmp_path), "no tokenizer.json")):
        with pytest.raises(TrainError, match=message):
            make_tokenizer(spec, ["abc"])


def test_the_end_of_the_text_validates(tmp_path):
    one = tmp_path / "one.txt"
    one.write_text("0123456789")
    assert load_texts(Data(train=(str(one),), validation_share=0.2)) == (["01234567"], ["89"])
    many = tmp_path / "many.jsonl"
    many.write_text("".join(json.dumps({"text": str(i) * 10}) + "\n" for i in range(10)))
    training, validation = load_texts(Data(train=(str(many),), validation_share=0.2))
    assert (len(training), len(validation)) == (8, 2)
    assert load_texts(Data(train=(str(one),), validation=(str(one),))) == (["0123456789"], ["0123456789"])
