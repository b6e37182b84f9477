"""Flash attention and column sums: every implementation against float64, its gradients, and its compilation for TPUs."""

import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flash_cases import CASES, Case, cast, make, never
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from tpu_compile import ENVIRONMENT

from pallas_kernels.column_sums import column_sums
from pallas_kernels.flash_attention import (
    checked_inputs,
    flash_attention,
    fold,
    operands,
    reference,
    tpu,
    tpu_backward,
)
from pallas_kernels.flash_attention import xla as in_xla

ROOT = pathlib.Path(__file__).parent.parent
LONGEST = ("interpret", 30)  # takes as long as all other quick cases
both = pytest.mark.parametrize("implementation", ["xla", "interpret"])


def each(quick):
    """Both implementations on all cases; those of which quick(implementation, number) is not true are exhaustive."""
    pairs = itertools.product(["xla", "interpret"], range(len(CASES)))
    late = lambda pair: pytest.mark.slow if pair == LONGEST else () if quick(*pair) else pytest.mark.exhaustive
    return pytest.mark.parametrize("implementation, number", [pytest.param(*p, marks=late(p)) for p in pairs])


def options_of(implementation):
    """Interpreters are compiled in haste: they run once."""
    return {"xla_backend_optimization_level": 0} if implementation == "interpret" else None


def test_every_pair_of_values_is_in_a_case():
    assert len(CASES) <= 40
    values = {f.name: sorted({getattr(c, f.name) for c in CASES}, key=str) for f in dataclasses.fields(Case)}
    assert values["group"] == [1, 3, 4, 7, 8] and values["size"] == [128, 256, 64, 80, 96]
    assert values["length"] == [1, 127, 128, 640] and values["batch"] == [1, 5]
    for one, other in itertools.combinations(values, 2):
        for x, y in itertools.product(values[one], values[other]):
            covered = any(getattr(c, one) == x and getattr(c, other) == y for c in CASES)
            assert covered or never({one: x, other: y}), (one, x, other, y)


def test_reference_by_hand():
    """Logits 0 and ln 3: shares 1/4 and 3/4; then each option on its own."""
    q = np.array([[[[[1.0, 0.0]]]]])
    k = np.array([[[[0.0, 7.0], [2 * math.log(3), 1.0]]]])
    v = np.array([[[[4.0, 0.0], [0.0, 4.0]]]])
    call = functools.partial(reference.flash_attention, q, k, v, causal=True)
    close = functools.partial(np.testing.assert_allclose, rtol=tolerances.BY_HAND)
    out, lse, p = call(scale=0.5)
    close(out[0, 0, 0, 0], [1.0, 3.0])
    close(lse[0, 0, 0, 0], math.log(4))
    close(p[0, 0, 0, 0], [0.25, 0.75])
    close(call(scale=0.5, softcap=1.0)[2][0, 0, 0, 0, 1], 1 / (1 + math.exp(-0.8)))  # tanh(ln 3) = 0.8
    close(call(scale=0.5, query_temperature=np.full((1, 1, 1, 1), 2.0))[2][0, 0, 0, 0], [0.1, 0.9])
    close(call(scale=0.5, value_temperature=np.array([[[1.0, -2.0]]]))[0][0, 0, 0, 0], [1.0, -6.0])
    table = np.array([[[[0.0], [2 * math.log(9)]]]])  # the one query is the second of two: distances 1 and 0
    close(call(scale=0.5, relative=(np.ones((1, 1, 1, 1, 1)), table))[2][0, 0, 0, 0], [0.75, 0.25])
    out, lse, p = call(scale=0.5, key_segments=np.array([[-2, -2]]))
    assert not out.any() and not p.any() and lse[0, 0, 0, 0] == operands.NEG


def shown(length, keys, **options):
    """Who sees whom, from the reference, as a matrix of 0 and 1."""
    zeros = np.zeros((1, 1, 1, length, 1))
    rows = np.zeros((1, 1, keys, 1))
    _, _, p = reference.flash_attention(zeros, rows, rows, scale=1.0, **{"causal": False} | options)
    return (p[0, 0, 0] > 0).astype(int).tolist()


def test_reference_masks_by_hand():
    assert shown(2, 4, causal=True) == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert shown(3, 2, causal=True) == [[0, 0], [1, 0], [1, 1]]
    assert shown(3, 3, causal=True, window=2) == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert shown(3, 3, window=2) == [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    assert shown(3, 3, window=(2, None)) == [[1, 1, 1], [1, 1, 1], [0, 1, 1]]
    assert shown(3, 3, window=(None, 1)) == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    places = {"query_positions": np.array([[0, 5, 6]]), "key_positions": np.array([[0, 5, 6]])}
    assert shown(3, 3, window=2, **places) == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    mine, theirs = np.array([[0, 1, -1, -2]]), np.array([[0, 0, 1, -1, -2]])
    assert shown(4, 5, query_segments=mine, key_segments=theirs) == [
        [1, 1, 0, 1, 0], [0, 0, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0],
    ]  # fmt: skip
    assert shown(2, 3, key_segments=np.array([[0, -2, 5]])) == [[1, 0, 1], [1, 0, 1]]


@functools.cache
def expected(number: int):
    """Arguments of a case and what float64 makes of them as they are given, rounded or not."""
    case = CASES[number]
    q, k, v, options = cast(*make(case), jnp.dtype(case.dtype))
    out, lse, p = reference.flash_attention(q, k, v, **options)
    return (q, k, v, options), out, lse, p.sum((2, 3))


def split(options):
    """What of a case's options is an argument of the program, and what is fixed in it."""
    arrays = {name: x for name, x in options.items() if name == "relative" or isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in options.items() if name not in arrays}


@each(lambda implementation, number: number % 3 == (implementation == "xla"))
def test_forward(implementation, number):
    (q, k, v, options), out, lse, columns = expected(number)
    arrays, fixed = split(options)

    def run(q, k, v, arrays):
        out, lse = flash_attention(q, k, v, **arrays, **fixed, implementation=implementation)
        arrays = {name: x for name, x in arrays.items() if name != "value_temperature"}
        return out, lse, column_sums(q, k, lse, **arrays, **fixed, implementation=implementation)

    got, got_lse, sums = jax.jit(run, compiler_options=options_of(implementation))(q, k, v, arrays)
    assert got.dtype == v.dtype and got_lse.dtype == jnp.float32
    of_out, of_lse, of_sum = tolerances.FLASH[CASES[number].dtype]
    np.testing.assert_allclose(np.asarray(got, np.float64), out, rtol=0, atol=of_out)
    np.testing.assert_allclose(got_lse, lse, rtol=0, atol=of_lse)
    np.testing.assert_allclose(sums, columns, rtol=0, atol=of_sum * math.sqrt(q.shape[2] * q.shape[3]))


def dense(q, k, v, *, scale, causal, window=None, softcap=None, query_positions=None, key_positions=None,
          query_segments=None, key_segments=None, query_temperature=None, value_temperature=None, relative=None):  # fmt: skip
    """The same with all logits in memory, in jnp, to be differentiated by autodiff; dead keys must be finite."""
    length, keys = q.shape[3], k.shape[2]
    distance = (np.arange(length)[:, None] + keys - length - np.arange(keys))[None, None]
    by_head = lambda x: x if x.ndim == 3 else x[:, None]
    apart = distance
    if query_positions is not None:
        apart = query_positions[:, None, :, None] - by_head(key_positions)[:, :, None, :]
    behind, ahead = window if isinstance(window, tuple) else (window, window)
    seen = np.ones((1, 1, length, keys), bool) & (distance >= 0 if causal else True)
    seen = seen & (behind is None or apart < behind) & (ahead is None or -apart < ahead)
    if key_segments is not None:
        mine = -1 if query_segments is None else query_segments[:, None, :, None]
        theirs = by_head(key_segments)[:, :, None, :]
        seen = seen & ((mine == theirs) | (mine == -1) | (theirs == -1)) & (mine != -2) & (theirs != -2)
    product = functools.partial(jnp.einsum, precision="highest")
    logits = product("bkgth,bksh->bkgts", q, k)
    if query_temperature is not None:
        logits *= query_temperature[..., None]
    if relative is not None:
        table = jnp.broadcast_to(relative[1], (*q.shape[1:3], *relative[1].shape[2:]))
        terms = product("bkgth,kgrh->bkgtr", relative[0], table)
        at = np.broadcast_to(np.maximum(distance[:, :, None], 0), logits.shape)
        logits += jnp.take_along_axis(terms, at, axis=-1)
    logits *= scale
    logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
    some = seen.any(-1, keepdims=True)[:, :, None]
    logits = jnp.where(seen[:, :, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(jnp.where(some, logits, 0.0), axis=-1)
    p = jnp.where(some, jnp.exp(logits - lse[..., None]), 0.0)
    values = v if value_temperature is None else v * value_temperature[..., None]
    return product("bkgts,bksh->bkgth", p, values), jnp.where(some[..., 0], lse, 0.0)


def differentiable(number: int):
    """Floats of a case, float32 and dead keys finite, a loss of them and of what attends, and cotangents."""
    case = CASES[number]
    q, k, v, options = make(case)
    k, v = (np.where(np.isfinite(x), x, np.float32(9.0)) for x in (k, v))
    arrays, fixed = split(options)
    floats = {"q": q, "k": k, "v": v} | {n: x for n, x in arrays.items() if not n.endswith(("segments", "positions"))}
    integers = {name: x for name, x in arrays.items() if name not in floats}
    rng = np.random.default_rng(1)
    d_out, d_lse = (rng.standard_normal(s).astype(np.float32) for s in (q.shape[:4] + v.shape[3:], q.shape[:4]))

    def loss(attend, floats):
        out, lse = attend(**floats, **integers, **fixed)
        where = jnp.where if isinstance(lse, jax.Array) else np.where
        return (out * d_out).sum() + (where(lse > -1e29, lse, 0.0) * d_lse).sum()

    return floats, loss


@each(lambda implementation, number: number in ((4, 13, 18) if implementation == "xla" else (1, 9)))
def test_gradients_are_those_of_autodiff(implementation, number):
    floats, loss = differentiable(number)
    attend = functools.partial(flash_attention, implementation=implementation)
    gradient = lambda f: jax.grad(functools.partial(loss, f))
    got = jax.jit(gradient(attend), compiler_options=options_of(implementation))(floats)
    for name, one in flat(jax.jit(gradient(dense))(floats)).items():
        size = np.abs(one).max()
        np.testing.assert_allclose(flat(got)[name], one, rtol=0, atol=tolerances.FLASH_GRADIENT * size, err_msg=name)
        assert size > 0 or CASES[number].length == 1, name


def flat(floats):
    """{name: array}, the two of the relative term under names of their own."""
    out = {name: np.asarray(x) for name, x in floats.items() if name != "relative"}
    return out | dict(zip(("relative q", "table"), map(np.asarray, floats.get("relative", ())), strict=False))


SMALL = [
    Case(2, 8, 9, 4, 2, "float32", "causal", "ids", 1.5, "head", "row", "wide"),
    Case(1, 8, 11, 0, 5, "float32", "window", "dead", None, "row", "head", "head"),
    Case(3, 8, 6, 3, 1, "float32", "behind and ahead", "dead", None, "row", "head", None),
]


@both
@pytest.mark.parametrize("case", SMALL)
def test_gradients_are_finite_differences(case, implementation, monkeypatch):
    """Along a random direction for each argument, of the float64 reference."""
    monkeypatch.setattr(sys.modules[__name__], "CASES", [case])
    floats, loss = differentiable(0)
    attend = functools.partial(flash_attention, implementation=implementation)
    got = flat(jax.jit(jax.grad(functools.partial(loss, attend)), compiler_options=options_of(implementation))(floats))
    rng, step = np.random.default_rng(2), 1e-5
    of_reference = lambda floats: loss(lambda q, k, v, **more: reference.flash_attention(q, k, v, **more)[:2], floats)
    for name, x in flat(floats).items():
        way = rng.standard_normal(x.shape)

        def moved(by, name=name, way=way):
            values = flat(floats) | {name: flat(floats)[name] + by * way}
            if "relative" in floats:
                values["relative"] = values.pop("relative q"), values.pop("table")
            return of_reference(values)

        slope = (moved(step) - moved(-step)) / (2 * step)
        mine = (got[name] * way).sum()
        scale = np.sqrt((np.square(got[name]) * np.square(way)).sum())
        assert abs(mine - slope) <= tolerances.FLASH_SLOPE * scale, (name, mine, slope)


WRONG = ["keys as values", "mask off by one", "no mask", "scale dropped", "query temperature dropped", "no segments",
         "value temperature dropped", "table shifted", "window one longer", "window one shorter", "no cap", "other head",
         "zeros"]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_tolerances_see(wrong):
    """Each mistake exceeds the tolerances of bfloat16, the widest, many times; of gradients, those of theirs."""
    case = Case(2, 64, 40, 0, 1, "float32", "window", "ids", 1.5, "head", "head", "head")
    q, k, v, options = make(case)
    k, v = (np.where(np.isfinite(x), x, np.float32(0.0)) for x in (k, v))
    options["window"], bad = 5, {}
    bad_q, bad_k, bad_v = q, k, v
    if wrong == "keys as values":
        bad_v = k
    elif wrong == "mask off by one":
        bad_k, bad_v = np.roll(k, 1, axis=2), np.roll(v, 1, axis=2)
    elif wrong == "no mask":
        bad = {"causal": False, "relative": None}
        options["relative"] = None
    elif wrong == "scale dropped":
        bad = {"scale": 1.0}
    elif wrong == "no segments":
        bad = {"key_segments": None, "query_segments": None}
    elif wrong == "table shifted":
        bad = {"relative": (options["relative"][0], np.roll(options["relative"][1], 1, axis=2))}
    elif wrong.startswith("window"):
        bad = {"window": 6 if wrong.endswith("longer") else 4}
    elif wrong == "no cap":
        bad = {"softcap": None}
    elif wrong == "other head":
        bad_q = q[:, :, ::-1]
    elif wrong.endswith("temperature dropped"):
        bad = {wrong.removesuffix(" dropped").replace(" ", "_"): None}
    run = lambda q, k, v, o: dense(*map(jnp.asarray, (q, k, v)), **o)[0]
    good, other = run(q, k, v, options), run(bad_q, bad_k, bad_v, options | bad) * float(wrong != "zeros")
    assert np.abs(good - other).max() > tolerances.FLASH_VISIBLE > 3 * tolerances.FLASH["bfloat16"][0]
    slope = lambda q, k, v, o: jax.grad(lambda q: jnp.sin(3 * run(q, k, v, o)).sum())(jnp.asarray(q))
    good, other = slope(q, k, v, options), slope(bad_q, bad_k, bad_v, options | bad) * float(wrong != "zeros")
    assert np.abs(good - other).max() > 100 * tolerances.FLASH_GRADIENT * np.abs(good).max()


@pytest.mark.parametrize("seed", range(6))
def test_blocks_that_are_passed_over_hold_nothing(seed):
    """`needed` against the mask in whole: never too little; and no more than that where it is known from indices."""
    rng = np.random.default_rng(seed)
    length, keys, sizes = 23, 31, (4, 8)
    q, k = np.zeros((2, 1, 1, length, 1)), np.zeros((2, 1, keys, 1))
    options = {"causal": bool(seed % 2), "window": [None, 9, (7, None), (None, 3), (6, 2), 5][seed]}
    more = {}
    if seed > 2:
        ids = np.sort(rng.integers(-1, 3, (2, keys))).astype(np.int32)
        more = {"key_segments": np.where(rng.random((2, keys)) < 0.4, -2, ids), "query_segments": ids[:, -length:]}
    if seed > 3:
        places = np.sort(rng.integers(0, 40, (2, keys))).astype(np.int32)
        more |= {"key_positions": places, "query_positions": places[:, -length:]}
    inputs = NOTHING | {"softcap": None, "block": None} | more | options
    x, rule = checked_inputs(q, k, k, **inputs)
    needed = np.asarray(operands.needed(operands.pad(x, *sizes), rule, x.offset, *sizes))
    _, _, p = reference.flash_attention(q, k, k, scale=1.0, **options, **more)
    whole = np.pad(p[:, :, 0] > 0, ((0, 0), (0, 0), (0, 1), (0, 1)))
    holds = whole.reshape(2, 1, 6, 4, 4, 8).any((3, 5))
    assert not (holds & ~needed).any()
    if not more:
        assert (holds == needed).all() and isinstance(needed, np.ndarray)
    first, last = operands.span(holds)
    for at in np.ndindex(*first.shape):
        here = np.flatnonzero(holds[at])
        assert (first[at], last[at]) == ((here[0], here[-1]) if len(here) else (0, -1))


NOTHING = dict.fromkeys(["query_positions", "key_positions", "query_segments", "key_segments", "relative", "window"])


@both
def test_blocks_outside_the_mask_are_not_touched(implementation):
    """A product with a value that is not finite would show even where its weight is 0."""
    q, k, v, _ = make(Case(1, 8, 384, 0, 1, "float32", "causal", None, None, None, None, None))
    v[:, :, :128] = np.nan
    run = functools.partial(
        flash_attention, scale=1.0, causal=True, window=100, block=128, implementation=implementation
    )
    finite = np.isfinite(np.asarray(jax.jit(run)(q, k, v)[0]))
    assert finite[:, :, :, 256:].all() and not finite[:, :, :, 129:255].any()
    v[:, :, :128], v[:, :, 256:] = 0, np.nan
    finite = np.isfinite(np.asarray(jax.jit(run)(q, k, v)[0]))
    assert finite[:, :, :, :256].all() and not finite[:, :, :, 256:].any()


def test_block_size_changes_no_result():
    (q, k, v, options), out, lse, _ = expected(9)
    arrays, fixed = split(options)
    for block in (1, 40, 128, 1000):
        got = jax.jit(
            lambda *a, block=block: flash_attention(*a[:3], **a[3], **fixed, block=block, implementation="xla")
        )
        np.testing.assert_allclose(got(q, k, v, arrays)[0], out, rtol=0, atol=tolerances.FLASH["float32"][0])


def test_memory_is_that_of_blocks():
    """T = S = 4096: all logits of the 2 heads would be 134 MB."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1, 2, 4096, 16), (1, 1, 4096, 16), (1, 1, 4096, 16))]
    f = lambda q, k, v: flash_attention(q, k, v, scale=1.0, causal=True, implementation="xla")[0].sum()
    compiled = jax.jit(jax.grad(f, argnums=(0, 1, 2))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 12 << 20


def test_refusals():
    q, k = np.zeros((1, 1, 1, 4, 8), np.float32), np.zeros((1, 1, 4, 8), np.float32)
    call = functools.partial(flash_attention, scale=1.0, causal=True)
    with pytest.raises(ValueError, match="of one dtype; they are float32, float32, bfloat16"):
        call(q, k, k.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match=r"\(1, 1, 3, 8\) do not fit"):
        call(q, k, k[:, :, :3])
    with pytest.raises(ValueError, match="it needs causal=True"):
        call(q, k, k, causal=False, relative=(q, k[None, 0]))
    with pytest.raises(ValueError, match="must cover 4 distances"):
        call(q, k, k, relative=(q, k[:, :, :3]))
    with pytest.raises(ValueError, match="positions of both"):
        call(q, k, k, window=2, query_positions=np.zeros((1, 4), np.int32))
    with pytest.raises(ValueError, match=r"key_segments must be int32 of shape .*; it is int32 \(1, 5\)"):
        call(q, k, k, key_segments=np.zeros((1, 5), np.int32))
    with pytest.raises(ValueError, match="must be of q's dtype float32"):
        call(q, k, k, relative=(q, k.astype(jnp.bfloat16)))
    with pytest.raises(ValueError, match="every axis must have a length"):
        call(q, k[:, :, :0], k[:, :, :0])
    for args, more, reason in [
        ((q, k, k), {"block": 100}, "a block of 100 is not a multiple of 128 lanes"),
        ([x.astype(np.float16) for x in (q, k, k)], {}, "not float16"),
        ([np.zeros((*x.shape[:-1], 300), np.float32) for x in (q, k, k)], {}, "at most 256"),
    ]:
        with pytest.raises(NotImplementedError, match=reason):
            call(*args, **more, implementation="interpret")


def test_chips_without_strided_rotations(monkeypatch):
    q, k = np.zeros((1, 1, 1, 4, 8), np.float32), np.zeros((1, 1, 4, 8), np.float32)
    call = functools.partial(flash_attention, q, k, k, scale=1.0, causal=True, implementation="interpret")
    monkeypatch.setattr(tpu, "device_of", lambda platform: types.SimpleNamespace(device_kind="TPU v4"))
    call()
    with pytest.raises(NotImplementedError, match="a strided rotation, which the compiler for TPU v4 has not"):
        call(relative=(q, k))


def test_the_kernels_are_in_a_program_for_a_tpu_and_in_no_other():
    q, k = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 1, 1, 128, 64), (1, 1, 128, 64)))
    f = jax.grad(lambda q, k: flash_attention(q, k, k, scale=1.0, causal=True)[0].sum())
    for platform in ("tpu", "cpu"):
        text = jax.jit(f).trace(q, k).lower(lowering_platforms=(platform,)).as_text()
        assert ("@tpu_custom_call" in text) == (platform == "tpu"), platform


def test_both_ways_of_slanting_are_one():
    """The rotation of the compiled kernels, and what interpreters use for it."""
    x = jnp.arange(16 * 32, dtype=jnp.float32).reshape(16, 32)

    def slanted(interpret, shift):
        def kernel(x, out):
            out[...] = tpu.slanted(x[...], shift, interpret)

        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

    for shift in (0, 17):
        want = np.stack([np.roll(row, shift + number) for number, row in enumerate(np.asarray(x))])
        assert (slanted(False, shift) == want).all() and (slanted(True, shift) == want).all()


@pytest.mark.exhaustive
def test_bounds():
    """The TPU interpreter stops where a block lies outside its array."""
    q, k, v, options = make(Case(2, 16, 200, 60, 1, "float32", "window", "dead", None, None, None, "head"))
    arrays, fixed = split(options | {"block": 128})
    arrays.pop("query_temperature", None)
    inputs = NOTHING | {"softcap": None} | arrays | fixed
    scale = inputs.pop("scale")
    x, rule = checked_inputs(*map(jnp.asarray, (q, k, v)), **jax.tree.map(as_given, inputs))
    x = fold(scale, x, None, None)
    out, lse = tpu.forward(x, rule=rule, interpret=pltpu.InterpretParams())
    want, _, _ = reference.flash_attention(q, k, v, **options)
    np.testing.assert_allclose(out, want, rtol=0, atol=tolerances.FLASH["float32"][0])
    gradients = tpu_backward.backward(x, lse, (out * out).sum(-1), out, rule=rule, interpret=pltpu.InterpretParams())
    want = in_xla.backward(x, lse, (out * out).sum(-1), out, rule=rule)
    for name, one in gradients._asdict().items():
        if one is not None:
            size = np.abs(getattr(want, name)).max()
            np.testing.assert_allclose(one, getattr(want, name), rtol=0, atol=tolerances.FLASH_GRADIENT * size)


def as_given(x):
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize(
    "step, topologies",
    [
        pytest.param(3, ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"], marks=pytest.mark.exhaustive),
        pytest.param(1, ["v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"], marks=pytest.mark.exhaustive),
    ],
)
def test_tpu_programs_compile(compilers_python, step, topologies):
    place = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [compilers_python, str(ROOT / "tests" / "flash_compile.py"), str(step), *topologies],
        env=place, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in lines if line[3]] == [] and done.returncode == 0, done.stderr[-2000:]
    assert len(lines) == 2 * len(topologies) * len(CASES[::step])
    for _, name, kernels, _ in lines:
        number, what = name.split(" ", 1)
        wanted = 1 if what == "column sums" else 3 + (CASES[int(number)].relative is not None)
        assert kernels == wanted, name
