"""The pieces of a decoder that take another road for one token, or for many, must compute the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import PARAMS, PLAIN, SLOTS, B, small

from jaxkv.cache import decode, empty_state
from jaxkv.cache.extend import _by_tokens
from jaxkv.layers import SMALL, linear
from jaxkv.types import LayerSpec, TierSpec
from pallas_kernels.decode_attention import Source, decode_attention


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", [24, 33])  # 33 cannot be halved
@pytest.mark.parametrize("rows", [1, 3])
def test_linear(rows, inputs, bias):
    random = np.random.default_rng(rows * inputs)
    x, kernel, offset = random.normal(size=(1, rows, inputs)), random.normal(size=(inputs, 40)), random.normal(size=40)
    params = {"kernel": jnp.float32(kernel)} | ({"bias": jnp.float32(offset)} if bias else {})
    y = linear(params, jnp.float32(x))
    assert y.shape == (1, rows, 40) and y.dtype == jnp.float32
    np.testing.assert_allclose(y, x @ kernel + offset * bias, rtol=0, atol=tolerances.LINEAR)


def test_one_row_keeps_its_dtype_and_its_float32_sum():
    random = np.random.default_rng(0)
    x, kernel = jnp.bfloat16(random.normal(size=(1, 64))), jnp.bfloat16(random.normal(size=(64, 8)))
    y = linear({"kernel": kernel}, x)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.bfloat16(exact))  # rounded once, at the end


def test_large_kernels_stay_whole():
    """The halves are for what XLA would run on one thread; a head of 16 MiB is not."""
    program = lambda outputs: str(
        jax.make_jaxpr(lambda x, w: linear({"kernel": w}, x))(jnp.zeros((1, 64)), jnp.zeros((64, outputs)))
    )
    assert "2,32" in program(8) and "2,32" not in program(SMALL // 256)


@pytest.mark.parametrize("shape, largest", [((1, 7, 3), 7), ((2, 8, 3), 4), ((2, 9, 3), 4), ((3, 5, 3), 4)])
def test_by_tokens(shape, largest):
    """Whole blocks of four and a rest; fewer than two blocks go whole."""
    x, sizes = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape), []

    def double(rows):
        sizes.append(rows.shape[:2])
        return 2 * rows

    np.testing.assert_array_equal(_by_tokens(double, x, 4), 2 * x)
    assert max(rows * tokens for rows, tokens in sizes) == largest


def test_a_row_that_sees_nothing_gives_zeros_whatever_dead_slots_hold():
    shape = (1, 1, 2, 4)
    q, k, v = jnp.ones(shape), jnp.full((1, 1, 4, 5), jnp.nan), jnp.full((1, 1, 5, 4), 3e38)
    out, (p,) = decode_attention((Source(q, k, v, jnp.zeros((1, 1, 5), bool)),), scale=1.0, softcap=None)
    np.testing.assert_array_equal(out, np.zeros(shape))
    np.testing.assert_array_equal(p, np.zeros((1, 1, 2, 5)))


@pytest.mark.parametrize("name", ["full", "scissorhands"])
@pytest.mark.parametrize("rows", [1, B])
def test_a_decode_loop_writes_in_place(name, rows):
    """XLA must see that a slot may be overwritten; else it copies every layer's cache at every step."""
    slots = 64 * SLOTS
    spec = (LayerSpec(policy=small(name), tiers=(TierSpec(slots=slots, scheme=("f32", "f32")),)),) * PLAIN.num_layers
    limits = np.full((PLAIN.num_layers, 1, rows), slots, np.int32)
    state = empty_state(PLAIN, spec, limits=limits, lengths=[slots] * rows)

    @functools.partial(jax.jit, donate_argnums=(0,))
    def loop(state, token):
        body = lambda _, carry: decode(PARAMS, token, carry, config=PLAIN, valid=jnp.ones(rows, bool))[1]
        return jax.lax.fori_loop(0, 4, body, state)

    memory = loop.lower(state, jnp.zeros(rows, jnp.int32)).compile().memory_analysis()
    one_layer = sum(x.nbytes for x in jax.tree.leaves((state.layers[0].tiers[0].keys, state.layers[0].tiers[0].values)))
    assert memory.temp_size_in_bytes < one_layer
