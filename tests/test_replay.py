"""How a context and its replay are laid out in one row; what the policy makes of many small votes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from infer.replay import CHUNK, LEAST, with_replay
from jaxkv.policies import Replay
from jaxkv.quantization.base import from_bits, to_bits


def lay(rows, **options):
    return with_replay(
        rows, **{"start": 0, "window": 8192, "table": None, "repeat": [7, 8], "grid": lambda n: n} | options
    )


def test_by_hand():
    out = lay([[1, 2, 3], [4]])
    assert out["tokens"].tolist() == [[1, 2, 3, 7, 8, 1, 2, 3], [4, 7, 8, 4, 0, 0, 0, 0]]
    assert out["replay"].tolist() == [[0, 0, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 0, 0, 0]]
    assert out["segments"].tolist() == [[-1, -1, -1, 0, 0, 0, 0, 0], [-1, 0, 0, 0, 0, 0, 0, 0]]
    assert out["valid"].tolist() == [[True] * 8, [True] * 4 + [False] * 4]


def test_long_contexts_are_cut_and_each_chunk_starts_behind_the_context():
    row = list(range(CHUNK + 5))
    out = lay([row], repeat=[7])
    size = len(row)
    assert out["segments"][0, size:].tolist() == [0] * (CHUNK + 1) + [1] * 6
    assert out["replay"][0, size:].tolist() == [*range(1, CHUNK + 2), *range(1, 7)]
    assert out["tokens"][0, size:].tolist() == [7, *row[:CHUNK], 7, *row[CHUNK:]]


def test_near_the_windows_end_chunks_get_shorter_down_to_a_floor():
    row = list(range(1000))
    reach = lambda out, start: start + len(row) + out["replay"].max()
    assert reach(lay([row], start=600, window=2000), 600) == 2000
    assert lay([row], start=900, window=2000)["replay"].max() == LEAST + 2
    assert {int(x) for x in np.unique(lay([row], start=600, window=2000)["segments"])} == {-1, 0, 1, 2}


def test_nothing_stands_behind_a_table_of_positions():
    """Chunks are as short as they must be; asking is left out where it would take more than half, or all."""
    row = list(range(100))
    for room, size, ask in ((300, 100, 2), (102, 100, 2), (20, 18, 2), (4, 2, 2), (3, 3, 0), (1, 1, 0)):
        out = lay([row], start=7, window=200, table=107 + room)
        passages = np.split(out["tokens"][0, 100:], np.flatnonzero(out["replay"][0, 100:] == 1)[1:])
        assert out["replay"].max() == size + ask <= room
        assert all(x[:ask].tolist() == [7, 8][:ask] for x in passages)
        assert np.concatenate([x[ask:] for x in passages]).tolist() == row
    out = lay([row, [1]], start=7, window=200, table=107)
    assert lay([[1]], start=7, window=200, table=11)["tokens"].tolist() == [[1, 7, 8, 1]]
    assert out["replay"].max(axis=1).tolist() == [0, 3] and out["valid"].sum(axis=1).tolist() == [100, 4]


@pytest.mark.parametrize("vote", [0.01, 0.003, 0.0])
def test_small_votes_add_up(vote):
    """A score far above what a step adds to it: rounded to the nearest, 5.6 + 0.01 is 5.6 again in bfloat16."""
    policy, votes = Replay(memory=2**30), 2000  # nothing fades here
    added = jnp.asarray([[[vote, 0.0, 3 * vote]]])

    def step(slots, number):
        row = {"read": jnp.reshape(number, (1,))}
        return policy.absorb(slots, {"attention": added}, row, jnp.ones((1,), jnp.int32)), None

    start = {"attention": to_bits(jnp.asarray([[[5.6, 5.6, 0.0]]]))}
    slots, _ = jax.lax.scan(step, start, jnp.arange(votes, dtype=jnp.int32))
    first = float(from_bits(to_bits(jnp.asarray(5.6))))
    expected = np.asarray([first + votes * vote, first, 3 * votes * vote])
    two_steps = 2 * np.exp2(np.floor(np.log2(np.maximum(expected, 1e-9))) - 7)  # of bfloat16 there
    assert (np.abs(from_bits(slots["attention"])[0, 0] - expected) <= two_steps * (vote > 0)).all()
    nearest, _ = jax.lax.scan(
        lambda x, _: (from_bits(to_bits(x + added)), None), from_bits(start["attention"]), length=votes
    )
    assert vote == 0 or abs(nearest[0, 0, 0] - expected[0]) > 30 * two_steps[0]  # what this test is there to see
