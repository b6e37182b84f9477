"""Sampling against a plain numpy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from infer.sampling import Sampling, _allowed, make_sampling, sample

DRAW = jax.jit(sample, static_argnames="greedy")
ALLOWED = jax.jit(_allowed)
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 50)).astype(np.float32) * 3


def draw(logits, samplings, step, seen=None, greedy=False):
    step = jnp.full((len(samplings),), step, jnp.int32)
    token, logprob = DRAW(jnp.asarray(logits), make_sampling(samplings), step, seen, greedy=greedy)
    return np.asarray(token), np.asarray(logprob)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def allowed(logits, sampling):
    cost = logits.max(axis=1, keepdims=True) - logits
    return np.asarray(ALLOWED(jnp.asarray(cost), make_sampling([sampling] * len(logits))))


def allowed_oracle(x, s):
    """Sets of ids that top-k, then top-p, then min-p leave, one token at a time; equals at an edge stay together."""
    x = x.astype(np.float64)
    kept = range(len(x))
    if s.top_k:
        kept = [i for i in kept if (x > x[i]).sum() < s.top_k]
    p = dict(zip(kept, softmax(x[kept]), strict=True))
    if s.top_p < 1:
        kept = [i for i in kept if sum(p[j] for j in kept if x[j] > x[i]) < s.top_p]
    return {i for i in kept if p[i] >= s.min_p * max(p.values())}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=1.0, top_p=0.7),
        Sampling(temperature=1.0, min_p=0.2),
        Sampling(temperature=1.0, top_k=20, top_p=0.8, min_p=0.05),
        Sampling(temperature=1.0, top_p=1e-6),
        Sampling(temperature=1.0),
    ],
)
def test_filters_equal_the_oracle(sampling):
    for row, mask in zip(LOGITS, allowed(LOGITS, sampling), strict=True):
        assert set(np.flatnonzero(mask)) == allowed_oracle(row, sampling)


def test_equals_at_the_edge_stay_together():
    ties = np.array([[1.0, 2.0, 1.0, 0.0]], np.float32)
    assert allowed(ties, Sampling(temperature=1.0, top_k=2)).tolist() == [[True, True, True, False]]
    assert allowed(ties, Sampling(temperature=1.0, top_p=0.6)).tolist() == [[True, True, True, False]]
    assert allowed(ties, Sampling(temperature=1.0, top_k=9)).all()


def test_filters_that_are_off_leave_a_large_vocabulary_whole():
    """A float32 running sum over this row reaches 1 before its end, so `sum < top_p` alone drops the rarest tokens."""
    logits = RNG.normal(size=(1, 49152)).astype(np.float32) * 2
    assert allowed(logits, Sampling(temperature=1.0)).all()


def test_rows_keep_their_own_settings():
    """One batch with a different setting in each row, and infinitely unlikely tokens, against the oracle."""
    logits = LOGITS.copy()
    logits[:, 7] = -np.inf
    settings = [
        Sampling(temperature=0.7, top_k=4, repetition_penalty=1.3, seed=11),
        Sampling(temperature=1.5, top_p=0.6, repetition_penalty=0.8, seed=2**40 + 1),
        Sampling(temperature=0.0, repetition_penalty=3.0),
        Sampling(temperature=1.0, min_p=0.1, seed=2**64 - 1),
    ]
    seen = RNG.random(logits.shape) < 0.3
    arrays, steps = make_sampling(settings), [0, 1, 5, 900]
    token, logprob = DRAW(jnp.asarray(logits), arrays, jnp.array(steps, jnp.int32), jnp.asarray(seen), greedy=False)
    for row, s in enumerate(settings):
        x = logits[row]
        penalised = np.where(seen[row], np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty), x)
        score = penalised
        if s.temperature:
            score = penalised / s.temperature
            key = jax.random.wrap_key_data(arrays.key[row], impl="threefry2x32")
            noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, steps[row]), x.shape, jnp.float32))
            ids = sorted(allowed_oracle(score, s))
            score = np.full(x.shape, -np.inf)
            score[ids] = (penalised / s.temperature + noise)[ids]
        assert int(token[row]) == score.argmax()
        np.testing.assert_allclose(
            logprob[row], np.log(softmax(x.astype(np.float64))[token[row]]), rtol=tolerances.LOGPROB
        )


def test_keys_come_from_all_bits_of_the_seed():
    seeds = [0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**64 - 1]
    keys = np.asarray(make_sampling([Sampling(seed=s) for s in seeds]).key)
    assert len({tuple(key) for key in keys.tolist()}) == len(seeds)
    for seed, key in zip(seeds[:3], keys, strict=False):
        want = jax.random.key_data(jax.random.key(np.uint32(seed), impl="threefry2x32"))
        assert (key == np.asarray(want)).all()


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-37])
def test_cold_is_nearly_greedy(temperature):
    logits = np.array([[-30.0, -20.0, -25.0], [30.0, 40.0, 20.0]], np.float32)
    assert draw(logits, [Sampling(temperature=temperature, top_k=1)] * 2, 0)[0].tolist() == [1, 1]
    assert draw(logits, [Sampling(temperature=temperature, top_p=0.9)] * 2, 0)[0].tolist() == [1, 1]


def test_greedy_and_its_logprob():
    for greedy in (True, False):
        token, logprob = draw(LOGITS, [Sampling()] * 4, 0, greedy=greedy)
        assert (token == LOGITS.argmax(1)).all()
        want = [np.log(softmax(row.astype(np.float64)))[t] for row, t in zip(LOGITS, token, strict=True)]
        np.testing.assert_allclose(logprob, want, rtol=tolerances.LOGPROB)
    assert draw(np.zeros((1, 5), np.float32), [Sampling()], 0, greedy=True)[0] == 0  # ties: the lowest id


def test_repetition_penalty():
    seen = jnp.zeros((1, 3), bool).at[0, 0].set(True)
    logits = np.array([[2.0, 1.5, -1.0]], np.float32)
    assert draw(logits, [Sampling(repetition_penalty=1.0)], 0, seen)[0] == 0
    assert draw(logits, [Sampling(repetition_penalty=2.0)], 0, seen)[0] == 1
    negative = np.array([[-1.0, -1.5, -9.0]], np.float32)
    assert draw(negative, [Sampling(repetition_penalty=2.0)], 0, seen)[0] == 1


def test_a_row_does_not_depend_on_its_mates():
    warm = [Sampling(temperature=0.9, top_p=0.95, seed=s) for s in (5, 6, 7, 8)]
    together, _ = draw(LOGITS, warm, 3)
    alone = [draw(LOGITS[i : i + 1], warm[i : i + 1], 3)[0][0] for i in range(4)]
    assert together.tolist() == alone


def assert_drawn(token, probabilities):
    """Shares of the draws are the probabilities, give or take some standard errors; what has none is never drawn."""
    p = np.array(probabilities)
    error = np.sqrt(p * (1 - p) / len(token))
    off = np.abs(np.bincount(token, minlength=len(p)) / len(token) - p)
    assert (off <= tolerances.STANDARD_ERRORS * error).all()


def test_frequencies_follow_the_probabilities():
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    rows = 3000
    samplings = [Sampling(temperature=1.0, seed=s) for s in range(rows)]
    token, _ = draw(np.repeat(logits, rows, axis=0), samplings, 0)
    assert_drawn(token, [0.6, 0.3, 0.1])
    filtered = [Sampling(temperature=0.5, top_k=2, seed=s) for s in range(rows)]
    token, _ = draw(np.repeat(logits, rows, axis=0), filtered, 1)
    assert_drawn(token, [0.8, 0.2, 0.0])  # 0.36 : 0.09
    one = make_sampling([filtered[0]] * rows)  # one seed: the steps alone have to vary the draw
    token, _ = DRAW(
        jnp.repeat(jnp.asarray(logits), rows, axis=0), one, jnp.arange(rows, dtype=jnp.int32), None, greedy=False
    )
    assert_drawn(np.asarray(token), [0.8, 0.2, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a number from 0 to 1e6, got -0.1"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_k": 2.5}, "top_k must be an int >= 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be a finite number > 0, got inf"),
        ({"seed": -1}, r"seed must be an int from 0 to 2\*\*64 - 1, got -1"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
