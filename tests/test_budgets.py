"""Budgets: spelling, exactness, bytes against the compiled program, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkv.cache import decode, empty_state
from jaxkv.cache.budgets import parse_budget, plan, slot_grid, tree_bytes
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.decoder import init_params
from jaxkv.policies import POLICIES, Full, Recency, make_policy

ROPE = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
CONFIG = DecoderConfig(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
    layers=(LayerConfig(window=None, rope=ROPE), LayerConfig(window=16, rope=ROPE)), max_positions=512, norm_eps=1e-5,
    norm_offset=0.0, activation="silu", query_scale=8**-0.5, embedding_scale=1.0, tie_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        (1024, "tokens", 1024), ("512", "tokens", 512), ("64MiB", "bytes", 64 * 2**20), ("1.5kb", "bytes", 1500),
        ("20%", "share", 0.2), ("12.5 %", "share", 0.125), (None, "share", 1.0),
    ],
)  # fmt: skip
def test_spellings(text, kind, amount):
    got = parse_budget(text)
    assert (got.kind, got.amount) == (kind, pytest.approx(amount))


@pytest.mark.parametrize("text", ["", "abc", "-5", 0, "0%", "120%", "3 parsecs", "1.5", True, "5 %%"])
def test_refused_spellings(text):
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text)


def test_slot_grid_is_small_and_covers():
    sizes = {slot_grid(n) for n in range(1, 8193)}
    assert all(slot_grid(n) >= n for n in range(1, 8193)) and len(sizes) < 60
    assert all(slot_grid(n, down=True) <= n for n in range(32, 8193))


@pytest.mark.parametrize(("name", "share"), [(n, s) for n in POLICIES for s in (1.0, 0.3) if n != "full" or s == 1.0])
def test_bytes_are_the_compiled_programs(name, share):
    """What is reported is what the program takes: its arguments without parameters, token and flag."""
    policy = make_policy(name)
    planned = plan(CONFIG, policy, f"{share:.0%}", lengths=[200], dtype="float32")
    params = init_params(CONFIG, jax.random.key(0))
    state = empty_state(CONFIG, planned.spec, limits=planned.limits, lengths=[200])
    step = jax.jit(functools.partial(decode, config=CONFIG), donate_argnums=2)
    token, valid = jnp.zeros((1,), jnp.int32), jnp.ones((1,), bool)
    compiled = step.lower(params, token, state, valid=valid).compile()
    arguments = compiled.memory_analysis().argument_size_in_bytes - tree_bytes((params, token, valid))
    assert tree_bytes(state) == planned.bytes_per_row
    assert 0.99 <= planned.bytes_per_row / arguments <= 1.01


@pytest.mark.parametrize("asked", ["20kb", "40kb", "80kb"])
@pytest.mark.parametrize("name", [n for n in POLICIES if n != "full"])
def test_bytes_are_never_exceeded(name, asked):
    planned = plan(
        CONFIG, make_policy(name, **({"recent": 1} if name != "recency" else {})), asked, lengths=[500], dtype="float32"
    )
    assert planned.bytes_per_row <= parse_budget(asked).amount


def test_local_layers_never_hold_more_than_their_window():
    planned = plan(CONFIG, Full(), None, lengths=[200], dtype="float32")
    assert planned.limits[:, 0, 0].tolist() == [200, 16]


def test_ragged_shares_are_per_row():
    planned = plan(CONFIG, Recency(), "10%", lengths=[100, 400], dtype="float32")
    assert planned.limits[0, 0].tolist() == [10, 40]


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        (Recency(), 3, "gives 3 tokens .* less than the 5 that 'recency' protects .* the least is 5 tokens"),
        (Recency(), "1kb", "the least"),
        (Full(), "50%", "does not fit budget 50%"),
    ],
)
def test_impossible_budgets_name_the_least(policy, budget, message):
    with pytest.raises(ValueError, match=message):
        plan(CONFIG, policy, budget, lengths=[200], dtype="float32")


def test_more_than_everything_is_full_and_said_so():
    planned = plan(CONFIG, Recency(), 4000, lengths=[200], dtype="float32")
    assert planned.limits[0, 0, 0] == 200 and "nothing is evicted" in planned.note
    assert "raised" in plan(CONFIG, Recency(), "1%", lengths=[200], dtype="float32").note


def test_limits_that_do_not_fit_are_refused():
    planned = plan(CONFIG, Recency(), 64, lengths=[200], dtype="float32")
    with pytest.raises(ValueError, match="do not fit"):
        empty_state(CONFIG, planned.spec, limits=np.full((2, 1, 1), 999), lengths=[200])
