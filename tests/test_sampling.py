"""Sampling against a plain numpy oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

from infer.sampling import NEGATIVE, Sampling, _allowed, make_sampling, sample

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(4, 50)).astype(np.float32) * 3


def draw(logits, samplings, step, seen=None, greedy=False):
    step = jnp.full((len(samplings),), step, jnp.int32)
    token, logprob = sample(jnp.asarray(logits), make_sampling(samplings), step, seen, greedy=greedy)
    return np.asarray(token), np.asarray(logprob)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def allowed_oracle(x, s):
    """Sets of ids that top-k, then top-p, then min-p leave, one token at a time."""
    order = sorted(range(len(x)), key=lambda i: (-x[i], i))
    if s.top_k:
        order = order[: s.top_k]
    p, kept, total = softmax(x[order].astype(np.float64)), [], 0.0
    for index, share in zip(order, p, strict=True):
        if total < s.top_p:
            kept.append(index)
        total += share
    p = softmax(x[kept].astype(np.float64))
    return {i for i, share in zip(kept, p, strict=True) if share >= s.min_p * p[0]}


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
    got = np.asarray(_allowed(jnp.asarray(LOGITS), make_sampling([sampling] * 4)))
    for row, mask in zip(LOGITS, got, strict=True):
        assert set(np.flatnonzero(mask)) == allowed_oracle(row, sampling)


def test_greedy_and_its_logprob():
    for greedy in (True, False):
        token, logprob = draw(LOGITS, [Sampling()] * 4, 0, greedy=greedy)
        assert (token == LOGITS.argmax(1)).all()
        want = [np.log(softmax(row.astype(np.float64)))[t] for row, t in zip(LOGITS, token, strict=True)]
        np.testing.assert_allclose(logprob, want, rtol=1e-4)
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


def test_frequencies_follow_the_probabilities():
    logits = np.log(np.array([[0.6, 0.3, 0.1]], np.float32))
    rows = 3000
    samplings = [Sampling(temperature=1.0, seed=s) for s in range(rows)]
    token, _ = draw(np.repeat(logits, rows, axis=0), samplings, 0)
    share = np.bincount(token, minlength=3) / rows
    assert np.abs(share - [0.6, 0.3, 0.1]).max() < 0.04  # four standard errors
    assert NEGATIVE < -1e20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be a finite number >= 0, got -0.1"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, "top_p"),
        ({"min_p": 1.0}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
