"""`infer.LanguageModel` on a tiny random model without a tokenizer: what needs no text."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import tolerances
from cache_harness import WHOLE, tiny

import infer
from infer.clock import MAKING, Clock
from infer.generate import times
from infer.model import LanguageModel
from infer.sampling import Sampling
from jaxkv.cache import extend
from jaxkv.checkpoints import Checkpoint
from jaxkv.checkpoints.generation_config import Generation
from jaxkv.config import RopeConfig
from jaxkv.decoder import init_params

DYNAMIC = RopeConfig(kind="dynamic", theta=100.0, rotary_dim=8, factor=2.0, original_max_positions=64)


def model(rope=None, **changes):
    config = dataclasses.replace(tiny(*[dataclasses.replace(WHOLE, rope=rope or WHOLE.rope)] * 4), **changes)
    checkpoint = Checkpoint(
        config=config,
        params=init_params(config, jax.random.key(1)),
        tokenizer=None,
        generation=Generation(),
        source=pathlib.Path(),
    )
    return LanguageModel(checkpoint, dtype="float32")


@pytest.fixture(scope="module")
def lm():
    return model()


PROMPT = list(range(3, 43))


def test_one_sampling_per_prompt(lm):
    """Each row draws as it would alone with its own settings."""
    ways = [Sampling(temperature=2.0, seed=5), Sampling(), Sampling(temperature=2.0, seed=6)]
    together = lm.generate([PROMPT] * 3, max_new_tokens=8, sampling=ways)
    alone = [lm.generate([PROMPT], max_new_tokens=8, sampling=way)[0] for way in ways]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert together[0].token_ids != together[2].token_ids
    with pytest.raises(ValueError, match="one per prompt: 3, got 2"):
        lm.generate([PROMPT] * 3, sampling=ways[:2])


@pytest.mark.parametrize(("cache", "budget"), [("h2o", 24), pytest.param("rotated-3", 48, marks=pytest.mark.slow)])
def test_generation_by_the_kernels(lm, cache, budget):
    """The TPU's kernels, interpreted, read the prompt and every token, and what they write is read again."""
    by_kernels = model(kernels="interpret")
    ways = [
        one.generate([PROMPT], max_new_tokens=10, cache=cache, budget=budget, logprobs=True)[0]
        for one in (lm, by_kernels)
    ]
    assert ways[0].token_ids == ways[1].token_ids
    np.testing.assert_allclose(ways[0].logprobs, ways[1].logprobs, rtol=0, atol=tolerances.LOGITS)


def test_kernels_of_another_platform():
    for name in ("tpu", "gpu"):
        wanted = f"kernels '{name}' need a {name.upper()}, and JAX runs on cpu here; 'interpret' runs"
        with pytest.raises(ValueError, match=wanted):
            infer.load("smollm2", kernels=name)
    with pytest.raises(ValueError, match="kernels 'cuda' are not known; accepted: tpu, gpu, interpret, xla"):
        infer.load("smollm2", kernels="cuda")


def test_logprobs_are_those_of_the_plain_forward(lm):
    out = lm.generate([PROMPT], max_new_tokens=6, logprobs=True)[0]
    logits = np.asarray(lm.logits([PROMPT + out.token_ids]), np.float64)[0, len(PROMPT) - 1 : -1]
    shares = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    expected = shares[np.arange(6), out.token_ids]
    np.testing.assert_allclose(out.logprobs, expected, rtol=0, atol=tolerances.LOGITS)
    assert lm.generate([PROMPT], max_new_tokens=2)[0].logprobs is None


@pytest.mark.parametrize("prompt", [[True, 2], [1.5], [[1]], ["a", 3]])
def test_ids_must_be_whole_numbers(lm, prompt):
    with pytest.raises(ValueError, match="neither a string nor a list of integer token ids"):
        lm.generate([prompt])


def test_memory_is_checked_for_all_samples(lm, monkeypatch):
    """Before anything is allocated, and for every copy that will be made."""
    lengths = [len(PROMPT) + 8]
    one = lm.plan("full", None, lengths=lengths).bytes_per_row
    monkeypatch.setattr("infer.prefill.free_bytes", lambda: 2 * one)
    monkeypatch.setattr("infer.model.read", lambda *a, **k: pytest.fail("read before the check"))
    with pytest.raises(MemoryError, match="3 sequences"):
        lm.generate([PROMPT], max_new_tokens=8, samples=3)
    with pytest.raises(MemoryError, match="5 sequences"):
        lm.generate([PROMPT] * 5, max_new_tokens=8)


def test_layer_weights(lm):
    """Later layers get less; the bytes stay those of a uniform cache, to the step of the allocation."""
    weights = [4, 3, 2, 1]
    planned = lm.plan("recency", 100, lengths=[1000], layer_weights=weights)
    assert planned.limits[:, 0, 0].tolist() == [160, 120, 80, 40]
    uniform = lm.plan("recency", 100, lengths=[1000])
    assert abs(planned.bytes_per_row / uniform.bytes_per_row - 1) < 0.05
    size = lm.plan("recency", "64KiB", lengths=[1000], layer_weights=weights)
    assert 0.7 * 2**16 < size.bytes_per_row <= 2**16
    assert (np.diff(size.limits[:, 0, 0]) < 0).all()
    whole = lm.plan("recency", None, lengths=[50], layer_weights=weights)
    assert (whole.limits == 50).all()
    out = lm.generate([PROMPT], max_new_tokens=4, cache="recency", budget=20, layer_weights=weights)
    assert len(out[0].token_ids) == 4 and "8 to 32 tokens" in out[0].stats["cache"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, 2], "4 numbers > 0, one per layer"),
        ([1, 1, 1, 0], "4 numbers > 0"),
        ([1, 1, 1, float("nan")], "4 numbers > 0"),
        ([9, 9, 9, 0.1], "gives layer 3 fewer than the"),
    ],
)
def test_layer_weights_refused(lm, weights, message):
    with pytest.raises(ValueError, match=message):
        lm.plan("recency", 20, lengths=[1000], layer_weights=weights)


def test_past_the_window_only_if_asked():
    """RoPE is made for the length asked for: the dynamic kind then differs from the short one, as it must."""
    lm, long = model(DYNAMIC, max_positions=64), list(range(1, 61))
    with pytest.raises(ValueError, match="take 100 positions, the model's window is 64"):
        lm.generate([long], max_new_tokens=40)
    out = lm.generate([long], max_new_tokens=40, streaming=True)[0]
    assert len(out.token_ids) == 40
    with pytest.raises(ValueError, match="window is 64"):
        lm.logits([long + out.token_ids])
    logits = np.asarray(lm.logits([long + out.token_ids], streaming=True))
    assert logits.shape == (1, 100, 64)
    assert logits[0, 59:-1].argmax(axis=-1).tolist() == out.token_ids
    short = np.asarray(lm.logits([long]))
    assert np.abs(short[0, 50] - logits[0, 50]).max() > 1e-3


def test_stream_fills_the_stats(lm, monkeypatch):
    """After each piece they say what `generate` says of so many tokens."""
    monkeypatch.setattr(LanguageModel, "decode", lambda self, ids: "".join(chr(97 + i % 26) for i in ids))
    stats, seen = {}, []
    for _ in lm.stream(PROMPT, max_new_tokens=40, cache="h2o", budget=20, stats=stats):
        seen.append(stats["new_tokens"])
    whole = lm.generate([PROMPT], max_new_tokens=40, cache="h2o", budget=20)[0].stats
    assert seen == [1, 33, 40]
    assert stats.keys() == whole.keys()
    assert all(stats[k] == whole[k] for k in ("cache_bytes", "cache", "kernels", "prompt_tokens", "new_tokens"))
    assert stats["tokens_per_second"] >= 39 / stats["decode_seconds"]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["generate", "stream"])
def test_auto_without_a_second_reading(lm, monkeypatch, way):
    """`replay=False` hands each token of the prompt to the model once; the default twice."""
    monkeypatch.setattr(LanguageModel, "decode", lambda self, ids: str(ids))
    seen, prompt = [], (PROMPT * 4)[:150]

    def counted(params, tokens, state, *, valid, **options):
        seen.append((int(valid.sum()), "replay" in options))
        return extend(params, tokens, state, valid=valid, **options)

    monkeypatch.setattr("infer.prefill.extend", counted)
    for options in ({}, {"replay": False}):
        run = functools.partial(getattr(lm, way), max_new_tokens=5, cache="auto", budget="50%", policy_options=options)
        assert "".join(run(prompt)) if way == "stream" else len(run([prompt])[0].token_ids) == 5
    assert seen == [(300, True), (150, False)]


def test_speed_does_not_count_the_making_of_programs():
    """The first run takes its program's making out of the speed and of nothing else; the second has none to take out."""
    lm, untaken = model(norm_eps=1.25e-6), lambda stats: stats["decode_seconds"] - 39 / stats["tokens_per_second"]
    first, second = (lm.generate([PROMPT], max_new_tokens=40)[0].stats for _ in range(2))
    assert 0 < untaken(first) < first["decode_seconds"] and untaken(second) == pytest.approx(0, abs=1e-9)
    assert first["compile_seconds"] > 0 == second["compile_seconds"]


def test_times():
    assert times(1.0, 3.0, 8.0, 12, making=2.0) == {
        "time_to_first_token": 2.0, "decode_seconds": 5.0, "tokens_per_second": 4.0,
    }  # fmt: skip
    for decoded, making in ((0, 0.0), (3, 5.0)):
        assert times(1.0, 3.0, 8.0, decoded, making=making)["tokens_per_second"] is None


def test_the_clock_counts_each_moment_once(monkeypatch):
    clock, now = Clock(), 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    trace, lower, compiled = MAKING
    events = ((1.0, trace, 1.0), (2.5, trace, 0.5), (3.0, trace, 2.5), (4.0, lower, 1.0), (9.0, compiled, 2.0))
    for now, event, seconds in (*events, (9.5, "/jax/other", 0.5)):  # noqa: B007 the clock reads it
        clock.listen(event, seconds)
    assert (clock.making, clock.compiling) == (6.0, 2.0)  # 0 to 4, and 7 to 9


def test_numbers_out_of_range(lm):
    with pytest.raises(ValueError, match=r"more than 0 and below 10\*\*15"):
        lm.plan("recency", "9" * 400, lengths=[100])
    with pytest.raises(MemoryError, match="999999999 sequences"):
        lm.generate([PROMPT], samples=999_999_999)
    with pytest.raises(ValueError, match="no tokenizer.json, and a session takes text"):
        lm.session(max_tokens=0)
