"""Generation, streaming and sessions on the real model, against golden tokens and against each other."""

import pathlib

import numpy as np
import pytest
import tolerances

import infer
from infer.sampling import Sampling

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "smollm2.npz"
pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def lm(smollm2):
    return infer.load(smollm2)


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_golden_prompts(lm, golden, index):
    """48 greedy tokens and the last logits of transformers; prompt 2 is 1,500 tokens long."""
    prompt, greedy = golden[f"prompt_{index}"].tolist(), golden[f"greedy_{index}"].tolist()
    assert golden[f"margin_{index}"] > 0.05
    last = np.asarray(lm.logits([prompt]))[0, -1]
    assert np.abs(last - golden[f"logits_{index}"]).max() < tolerances.SMOLLM2_LOGITS
    lm_without_end = greedy[:-1] if greedy[-1] in lm.eos_ids else greedy
    out = lm.generate([prompt], max_new_tokens=48)[0]
    assert out.token_ids == lm_without_end[: len(out.token_ids)]
    assert len(out.token_ids) == len(lm_without_end)


@pytest.mark.slow
def test_batch_equals_alone(lm):
    prompts = ["The capital of France is", "Once upon a time there was a little girl who"]
    together = lm.generate(prompts, max_new_tokens=12)
    alone = [lm.generate(p, max_new_tokens=12)[0] for p in prompts]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


@pytest.mark.slow
def test_stream_equals_generate(lm):
    whole = lm.generate("Once upon a time", max_new_tokens=40)[0].text
    assert "".join(lm.stream("Once upon a time", max_new_tokens=40)) == whole


@pytest.mark.slow
def test_stop_string_ends_the_row(lm):
    text = lm.generate("Once upon a time", max_new_tokens=40)[0].text
    stop = text[10:14]
    out = lm.generate("Once upon a time", max_new_tokens=40, stop=[stop])[0]
    assert out.text == text[: text.index(stop)]
    assert out.stats["new_tokens"] < 40


@pytest.mark.exhaustive  # test_model.py has it of a small model
def test_samples_do_not_depend_on_the_batch(lm):
    sampling = Sampling(temperature=1.0, top_p=0.9, seed=3)
    both = lm.generate(["A list of animals:", "My name is"], max_new_tokens=10, sampling=sampling, samples=2)
    one = lm.generate("My name is", max_new_tokens=10, sampling=sampling, samples=2)
    assert [c.token_ids for c in both[2:]] == [c.token_ids for c in one]
    assert one[0].token_ids != one[1].token_ids


@pytest.mark.slow
def test_budget_is_kept_and_reported(lm):
    prompt = "The quick brown fox jumps over the lazy dog. " * 20
    out = lm.generate(prompt, max_new_tokens=8, cache="scissorhands", budget=64)[0]
    full = lm.generate(prompt, max_new_tokens=8)[0]
    assert out.stats["cache_bytes"] < full.stats["cache_bytes"] / 2
    assert "64 tokens" in out.stats["cache"]


@pytest.mark.slow
def test_session_questions_meet_the_same_memory(lm):
    chat = lm.session(cache="h2o", budget=128, max_tokens=512)
    chat.extend("My dog is called Rex. My cat is called Tom. " * 3)
    first = chat.ask("What is my dog called?", max_new_tokens=8)
    other = chat.ask("What is my cat called?", max_new_tokens=8)
    again = chat.ask("What is my dog called?", max_new_tokens=8)
    assert first.token_ids == again.token_ids
    assert first.stats["copy_bytes"] == chat.cache_bytes == chat.plan.bytes_per_row
    assert other.text
    kept = chat.ask("What is my dog called?", max_new_tokens=8, remember=True)
    assert kept.token_ids == first.token_ids and kept.stats["copy_bytes"] == 0
    with pytest.raises(ValueError, match="make it with a larger max_tokens"):
        chat.ask("word " * 600)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": ""}, "prompt 0 is empty"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[49152]]}, "outside the vocabulary, 0 to 49151"),
        ({"prompts": [[-1]]}, "token id -1"),
        ({"prompts": "a", "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompts": "a", "cache": "lru"}, "unknown cache 'lru'"),
        ({"prompts": "a", "budget": "20 parsecs"}, "unknown unit 'parsecs'"),
        ({"prompts": "a", "max_new_tokens": 9000}, "window is 8192"),
        ({"prompts": "a b c d e f g h", "cache": "recency", "budget": 2}, "the least is 5 tokens"),
        ({"prompts": "a", "cache": "full", "budget": 2}, "does not fit budget 2"),
        ({"prompts": "a", "stop": [""]}, "stop string is empty"),
    ],
)
def test_bad_input_is_refused(lm, arguments, message):
    with pytest.raises(ValueError, match=message):
        lm.generate(arguments.pop("prompts"), **{"max_new_tokens": 16, **arguments})
