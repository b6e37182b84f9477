"""The stop automaton against a search in the concatenated bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.stops import build_stops, step, trim


def first_stop(tokens, vocabulary, strings, ids):
    """How many tokens a row makes until it stops, by the obvious loop."""
    text = b""
    for count, token in enumerate(tokens, 1):
        text += vocabulary[token]
        if token in ids or any(s.encode() in text for s in strings):
            return count
    return None


def run(stops, tokens):
    state = jnp.zeros((1,), jnp.int32)
    for count, token in enumerate(tokens, 1):
        state, stopped = step(stops, state, jnp.array([token], jnp.int32))
        if bool(stopped[0]):
            return count
    return None


def test_random_vocabularies():
    rng = np.random.default_rng(1)
    for _ in range(60):
        vocabulary = [bytes(rng.choice(list(b"ab"), size=rng.integers(0, 4)).tolist()) for _ in range(12)]
        strings = ["".join(rng.choice(["a", "b"], size=rng.integers(1, 6))) for _ in range(rng.integers(0, 4))]
        ids = {int(i) for i in rng.choice(12, size=rng.integers(0, 2), replace=False)}
        stops = build_stops(vocabulary, strings, ids, 12)
        tokens = rng.integers(0, 12, size=15).tolist()
        assert run(stops, tokens) == first_stop(tokens, vocabulary, strings, ids), (vocabulary, strings, ids, tokens)


def test_batched_rows_over_all_bytes():
    """Rows of one batch stop on their own; a stopped row stays stopped; ids past token_bytes carry no bytes."""
    rng = np.random.default_rng(2)
    advance, size, length = jax.jit(step), 40, 30
    for _ in range(8):
        known = [bytes(rng.integers(0, 256, size=rng.integers(0, 6)).tolist()) for _ in range(size - 4)]
        known += ["h\u00e9h\u00e9".encode(), b"ehe"]
        vocabulary = known + [b"", b""]
        strings = ["h\u00e9", "heh", "\u00e9h\u00e9h", "\x00"]
        stops = build_stops(known, strings, {3, size - 1}, size)
        tokens = rng.integers(0, size, size=(16, length))
        state, counts = jnp.zeros((16,), jnp.int32), np.zeros(16, int)
        for place in range(length):
            state, stopped = advance(stops, state, jnp.asarray(tokens[:, place], jnp.int32))
            counts += ~np.asarray(stopped)
        want = [first_stop(row, vocabulary, strings, {3, size - 1}) or length + 1 for row in tokens.tolist()]
        assert (counts + 1).tolist() == want


def test_tokens_that_move_alike_share_a_class():
    stops = build_stops([b"x", b"y", b"zz", b"", b"a", b"xa"], ["ab"], {1}, 6)
    x, y, zz, empty, a, xa = stops.classes.tolist()
    assert x == zz and a == xa and len({x, y, empty, a}) == 4
    assert stops.table.shape[1] == 4 and stops.table.dtype == stops.classes.dtype == jnp.int32


def test_nothing_to_stop_at():
    assert run(build_stops([], [], set(), 5), [0, 1, 2, 3, 4]) is None
    assert run(build_stops([b"", b""], ["a"], set(), 2), [0, 1]) is None


def test_unicode_across_tokens():
    snowman = "\u2603".encode()
    stops = build_stops([snowman[:1], snowman[1:], b"x"], ["\u2603"], set(), 3)
    assert run(stops, [2, 0, 1]) == 3
    assert run(stops, [0, 2, 1]) is None


def test_refusals_and_trim():
    with pytest.raises(ValueError, match="a stop string is empty"):
        build_stops([b"a"], [""], set(), 1)
    with pytest.raises(ValueError, match="stop id 7 is outside"):
        build_stops([b"a"], [], {7}, 1)
    with pytest.raises(ValueError, match="stop strings need the bytes"):
        build_stops([], ["a"], set(), 1)
    assert trim("one two three", ["three", " t"]) == "one"
    assert trim("one", []) == "one"
