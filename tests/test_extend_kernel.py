"""Extend attention by kernels, interpreted, on the cases and against the reference of `test_attention_ops`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hopper_compile import compile_for_hopper
from test_attention_ops import ADD, EXTEND, call_extend, make_extend, make_source

from pallas_kernels.decode_attention import Source
from pallas_kernels.extend_attention import TierSource, by_flash, extend_attention, gpu
from pallas_kernels.extend_attention import reference as extend_reference
from pallas_kernels.flash_attention import gpu as flash_gpu

QUICK = ("group, ragged", "window and tiers", "segments", "all dead")
HASTE = {"xla_backend_optimization_level": 0}  # an interpreter runs once


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.exhaustive) for n in EXTEND])
def test_extend(name):
    arguments, options = make_extend(EXTEND[name], len(name))
    length = EXTEND[name].shape[3]
    weights = np.random.default_rng(1).random(length).astype(np.float32)
    padded = jnp.pad(jnp.asarray(weights), (0, length))

    def row_statistic(p, visible, live, start, own):
        rows = padded[start + jnp.arange(p.shape[3])]
        crowd = jnp.where(visible, live[..., None], 0).astype(jnp.float32)
        share = jnp.einsum("bpgts,t->bps", p, rows)
        return {"share": share, "crowd": jnp.einsum("bpts,t->bps", crowd, rows)}

    call = functools.partial(
        call_extend, arguments, options, block=EXTEND[name].block, row_statistic=row_statistic, merge=ADD,
        implementation="interpret",
    )  # fmt: skip
    out, statistics = jax.jit(call, compiler_options=HASTE)()
    expected, shares, visible = extend_reference.extend_attention(*arguments, **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION)
    live = sum(see.sum(axis=-1) for see in visible)
    for statistic, share, see in zip(statistics, shares, visible, strict=True):
        summed = np.einsum("bpgts,t->bps", share, weights)
        np.testing.assert_allclose(statistic["share"], summed, rtol=0, atol=tolerances.STATISTIC)
        crowd = np.einsum("bpts,t->bps", see * live[..., None], weights)
        np.testing.assert_allclose(statistic["crowd"], crowd, rtol=tolerances.CROWD, atol=tolerances.STATISTIC)


def test_owned_rows_and_a_basis_of_their_own():
    """As XLA does it: rows that one head owns several of, values that are turned back after they are summed."""
    rng, length = np.random.default_rng(3), 6
    owner = jnp.asarray([[1, 0, 1], [0, 1, -1]], jnp.int16)
    _, k, v, live = (jnp.asarray(x) for x in make_source(rng, 2, 3, 2, 8, 7, 0.7)[:4])
    live = live & (owner >= 0)[..., None]
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    tier = Source(normal(2, 3, 2, length, 8), k, v, live, finish=lambda x: x[..., ::-1] * 2, owner=owner)
    call = lambda implementation: extend_attention(
        normal_queries, keys, values, (TierSource(tier, jnp.zeros(live.shape, jnp.int32)),), segments=None, causal=True,
        positions=jnp.broadcast_to(jnp.arange(9, 9 + length, dtype=jnp.int32), (2, length)), window=None, scale=0.6,
        valid=jnp.ones((2, length), bool), softcap=1.5, merge=lambda a, b: a + b, block=3, implementation=implementation,
        row_statistic=lambda p, visible, live, start, own: p.sum(axis=(2, 3)) + live.sum(axis=-1).astype(p.dtype)[..., None],
    )  # fmt: skip
    normal_queries, keys, values = normal(2, 2, 2, length, 8), normal(2, 2, length, 8), normal(2, 2, length, 8)
    run = jax.jit(call, static_argnums=0, compiler_options=HASTE)
    (out, of), (want, wanted) = run("interpret"), run("xla")
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerances.ATTENTION)
    for one, other, here in zip(of, wanted, (owner >= 0, jnp.ones((2, 2), bool)), strict=True):
        np.testing.assert_allclose(one[here], other[here], rtol=0, atol=tolerances.STATISTIC)


@pytest.mark.exhaustive
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the GPU interpreter of this JAX lacks the kernel's operations"
)
def test_on_a_gpu_tiers_of_bfloat16_are_the_kernels_and_others_are_not():
    """Against XLA on the same numbers: owned rows, a ragged batch, a window that goes by positions, the policies' sums."""
    rng, length, size = np.random.default_rng(5), 20, 64
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    owner, places = jnp.asarray([[1, 0, 1], [0, 1, -1]], jnp.int16), jnp.arange(70, 70 + length, dtype=jnp.int32)
    queries, keys, values = normal(2, 2, 2, length, size), normal(2, 2, length, size), normal(2, 2, length, size)

    def tier(dtype, slots):
        k, v = normal(2, 3, size, slots).astype(dtype), normal(2, 3, slots, size).astype(dtype)
        live = jnp.asarray(rng.random((2, 3, slots)) < 0.6) & (owner >= 0)[..., None]
        at = jnp.asarray(rng.integers(0, 70, (2, 3, slots)), jnp.int32)
        return TierSource(Source(normal(2, 3, 2, length, size), k, v, live, owner=owner), at)

    def row_statistic(p, visible, live, start, own):
        there = start + jnp.arange(p.shape[3]) < length
        return jnp.einsum("bpgts,t->bps", p, there.astype(jnp.float32))

    tiers = (tier("bfloat16", 100), tier("float32", 48))
    options = {
        "positions": jnp.broadcast_to(places, (2, length)), "valid": jnp.asarray([[True] * length, [True] * 13 + [False] * 7]),
        "segments": None, "causal": True, "window": 40, "scale": 0.125, "softcap": None, "merge": lambda a, b: a + b,
        "row_statistic": row_statistic, "block": 8,
    }  # fmt: skip
    asked = []

    def interpreted(op, table, x, *, rule):
        assert flash_gpu.why_not(x) is None
        return flash_gpu.forward(x, rule=rule, interpret=True)

    def kernels(dtype):
        asked.append(dtype)
        return interpreted if gpu.kernels(dtype) == "gpu" else "xla"

    out, sums = by_flash.extend_attention(queries, keys, values, tiers, kernels=kernels, **options)
    want, wanted = extend_attention(queries, keys, values, tiers, implementation="xla", **options)
    assert asked == [jnp.bfloat16, jnp.float32, jnp.bfloat16]
    valid = np.asarray(options["valid"])[:, None, None, :, None]
    out, want = (np.where(valid, np.asarray(x, np.float32), 0) for x in (out, want))
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerances.FLASH_GPU)
    for one, other in zip(sums, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerances.STATISTIC)
    other, _ = extend_attention(queries, values, keys, tiers, implementation="xla", **options)
    assert np.abs(np.where(valid, np.asarray(other, np.float32), 0) - want).max() > 10 * tolerances.FLASH_GPU


def test_which_flash_attention_a_gpu_takes():
    shape = lambda *axes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((1, 1, *axes), dtype)
    of = lambda dtype: [shape(2, 20, 64, dtype=dtype), shape(20, 64, dtype=dtype), shape(20, 64, dtype=dtype)]
    assert gpu.why_not(*of(jnp.bfloat16), ()) is None
    assert "must be bfloat16, got float32" in gpu.why_not(*of(jnp.float32), ())
    assert "relative positions" in gpu.why_not(*of(jnp.bfloat16), (), relative=(shape(2, 20, 64), shape(1, 40, 64)))
    assert [gpu.kernels(jnp.dtype(name)) for name in ("bfloat16", "float32")] == ["gpu", "xla"]


@pytest.mark.exhaustive
def test_machine_code(compilers_python):
    """A tier of bfloat16 has a kernel of its own, codes of 4 bits are XLA's; the new tokens always have one."""
    found = compile_for_hopper(compilers_python, ["extend:bf16,128", "extend:int4,64"])
    assert [one.error for one in found.values()] == [None, None]
    assert [one.kernels for one in found.values()] == [2, 1]
    assert all(set(one.spills) == {0} for one in found.values())
