"""Storage schemes: what they promise of single vectors. What a tier makes of them: `test_cache.py`."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.quantization import SCHEMES, get_scheme
from jaxkv.quantization.base import LARGEST
from jaxkv.quantization.packing import PLANES, pack, unpack
from jaxkv.quantization.rotated import BEND, CODEBOOK, UNIT, rotate, unrotate
from jaxkv.types import Encoded

every_scheme = pytest.mark.parametrize("name", SCHEMES)
QUANTIZED = [name for name in SCHEMES if SCHEMES[name].factors]
INTEGERS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
ROTATED = {"rotated4": 4, "rotated3": 3, "rotated2": 2}
KIVI = {"kivi4": 4, "kivi2": 2}  # the same rounding, along tokens
H = 64


@functools.cache
def programs(name):
    """encode, and encode then decode in the plain basis, jitted: [..., H] -> [..., H] float32."""
    scheme = get_scheme(name)
    back = lambda e: scheme.out_of_basis(scheme.decode(e, -1).astype(jnp.float32))
    return jax.jit(scheme.encode), jax.jit(lambda x: back(scheme.encode(x)))


def stored(name, x):
    """Vectors [n, H] -> what comes back; for a scheme that shares factors among tokens, a vector is a channel of H tokens."""
    if get_scheme(name).granule == 1:
        return np.asarray(programs(name)[1](jnp.asarray(x, jnp.float32)), np.float64)
    channels = np.pad(np.asarray(x, np.float32), ((0, -len(x) % 8), (0, 0)))  # whole bytes
    return np.asarray(programs(name)[1](jnp.asarray(channels.T)), np.float64).T[: len(x)]


def normals(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Oracles: the formulas of the docstrings in float64, one vector after another


def bf16(x):
    return float(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def up(x):
    near = jnp.asarray(x, jnp.bfloat16)
    if float(near.astype(jnp.float32)) < x:
        near = jnp.nextafter(near, jnp.asarray(jnp.inf, jnp.bfloat16))
    return float(near.astype(jnp.float32))


def integer_oracle(x, bits, size=64):
    """zero + scale * round((x - zero) / scale), per group."""
    out = np.empty(len(x))
    for start in range(0, len(x), size):
        group = x[start : start + size].astype(np.float64)
        zero = bf16(group.min())
        scale = up(np.float32(max(group.max() - zero, 0) / (2**bits - 1)))
        codes = np.clip(np.round((group - zero) / scale), 0, 2**bits - 1) if scale else np.zeros(len(group))
        out[start : start + size] = zero + scale * codes
    return out


def lloyd_max(bits: int) -> np.ndarray:
    """Levels [2**bits], ascending, of the least-squares quantizer of the standard normal distribution (Lloyd 1982)."""
    from math import erf, exp, inf, pi, sqrt

    density = lambda t: exp(-t * t / 2) / sqrt(2 * pi) if abs(t) < inf else 0.0
    below = lambda t: (1 + erf(t / sqrt(2))) / 2 if abs(t) < inf else float(t > 0)
    levels = np.linspace(-2.0, 2.0, 2**bits)
    for _ in range(10_000):  # each level is the mean of its cell; converges linearly
        edges = [-inf, *((levels[1:] + levels[:-1]) / 2).tolist(), inf]
        mean = [(density(a) - density(b)) / (below(b) - below(a)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
        moved, levels = np.abs(np.asarray(mean) - levels).max(), np.asarray(mean)
        if moved < 1e-13:
            break
    return (levels - levels[::-1]) / 2  # symmetric to the last bit


def rotated_oracle(x, bits):
    """In the rotated basis: nearest level, least squares, nearest level again, all in the units that codes are read in."""
    y = np.asarray(rotate(jnp.asarray(x)), np.float64)
    levels = CODEBOOK[bits] / UNIT[bits]
    nearest = lambda v: levels[np.abs(v[:, None] - levels).argmin(axis=1)]
    first = nearest(y / math.sqrt(np.mean(y * y)) / UNIT[bits])
    factor = bf16((y @ first) / (first @ first))
    return nearest(y / factor) * factor


def test_oracle_by_hand():
    """2 bits over 0..3 is exact; 0, 1, 2, 6 has steps of 2."""
    np.testing.assert_array_equal(integer_oracle(np.array([0.0, 1.0, 2.0, 3.0]), 2), [0, 1, 2, 3])
    np.testing.assert_array_equal(integer_oracle(np.array([0.0, 1.2, 2.0, 6.0]), 2), [0, 2, 2, 6])


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("channels", [H, 128, 16, 96])
def test_integers_follow_the_formula(name, channels):
    x = normals(1, 32, channels)
    groups = x.reshape(32, -1, 64) if channels % 64 == 0 else x[:, None]
    expected = np.stack([
        np.concatenate([whole_group(g, INTEGERS[name]) for g in row]) for row in groups
    ])  # fmt: skip
    np.testing.assert_allclose(stored(name, x), expected, atol=tolerances.QUANTIZED)


@pytest.mark.parametrize("name", KIVI)
@pytest.mark.parametrize("shape", [(32, 8), (96, 64), (2, 3, 64, 20)])
def test_kivi_follows_the_formula_per_channel(name, shape):
    """Channels apart, groups of 32 tokens apart, whatever stands in front of tokens and channels."""
    x = normals(11, *shape) * np.linspace(0.1, 50, shape[-1], dtype=np.float32)
    found = np.asarray(programs(name)[1](jnp.asarray(x)), np.float64)
    channels = np.moveaxis(x, -2, -1).reshape(-1, shape[-2])
    expected = np.stack([integer_oracle(channel, KIVI[name], 32) for channel in channels])
    np.testing.assert_allclose(
        found, np.moveaxis(expected.reshape(*shape[:-2], shape[-1], shape[-2]), -1, -2), atol=50 * tolerances.QUANTIZED
    )


def test_kivi_by_hand():
    """Small channels beside large ones: 2 bits are exact in all, where 2 bits per token leave nothing of the small ones."""
    tokens = np.arange(32) % 4
    x = np.stack([tokens, 256 - tokens, tokens - 256, tokens], axis=1)
    np.testing.assert_array_equal(programs("kivi2")[1](jnp.asarray(x, jnp.float32)), x)
    assert (np.abs(stored("int2", x) - x)[:, 0] > 80).all()


def whole_group(group, bits):
    """`integer_oracle` of one group of any length."""
    padded = np.concatenate([group, np.full(-len(group) % 64, group[0])]) if len(group) < 64 else group
    if len(group) <= 64:
        return integer_oracle(padded, bits)[: len(group)]
    zero = bf16(group.min())
    scale = up(np.float32((group.max() - np.float64(zero)) / (2**bits - 1)))
    return zero + scale * np.clip(np.round((group - zero) / scale), 0, 2**bits - 1)


@pytest.mark.parametrize("name", ROTATED)
def test_rotated_follows_the_formula(name):
    x, scheme = normals(2, 32, H), get_scheme(name)
    ours = scheme.decode(programs(name)[0](jnp.asarray(x)), -1)
    expected = np.stack([rotated_oracle(row, ROTATED[name]) for row in x])
    near = np.abs(np.asarray(ours) - expected) < tolerances.QUANTIZED
    assert near.mean() > 1 - tolerances.UNDECIDED_SHARE  # a channel within rounding of a cell's edge may go either way


def squared_error(levels):
    """Of rounding standard normal numbers to the nearest of ascending levels, exactly."""
    edges = [-math.inf, *((levels[1:] + levels[:-1]) / 2).tolist(), math.inf]
    below = lambda t: (1 + math.erf(t / math.sqrt(2))) / 2
    density = lambda t: math.exp(-t * t / 2) / math.sqrt(2 * math.pi)
    tail = lambda t: 0.0 if math.isinf(t) else t * density(t)
    total = 0.0
    for level, a, b in zip(levels, edges[:-1], edges[1:], strict=True):
        share, first = below(b) - below(a), density(a) - density(b)
        total += share + tail(a) - tail(b) - 2 * level * first + level**2 * share
    return total


def test_codebook_is_the_best_for_normals():
    """Known levels and errors (Max 1960, table I), no other level of a cell would do better; what is read instead loses what is
    said of it, and no other bend or unit loses less."""
    x, step = np.linspace(-12, 12, 2_000_001, retstep=True)
    published = {
        2: (0.1175, 1e-4),
        3: (0.03454, 1e-5),
    }  # and one unit of the last digit; for 4 bits Max has 0.009497, not 501
    for bits in (2, 3, 4):
        best = lloyd_max(bits)
        away = x - best[np.searchsorted((best[1:] + best[:-1]) / 2, x)]
        summed = (away**2 * np.exp(-(x**2) / 2)).sum() * step / math.sqrt(2 * math.pi)
        np.testing.assert_allclose(squared_error(best), summed, rtol=tolerances.INTEGRAL)
        if bits in published:
            np.testing.assert_allclose(summed, published[bits][0], rtol=0, atol=published[bits][1])
    np.testing.assert_allclose(lloyd_max(2), [-1.510, -0.4528, 0.4528, 1.510], atol=5e-4)
    np.testing.assert_allclose(lloyd_max(3)[4:], [0.2451, 0.7560, 1.344, 2.152], atol=5e-4)
    samples = np.random.default_rng(0).normal(size=400_000)
    for bits, levels in CODEBOOK.items():
        best = lloyd_max(bits)
        cells = np.abs(samples[:, None] - best).argmin(axis=1)
        means = [samples[cells == index].mean() for index in range(2**bits)]
        np.testing.assert_allclose(best, means, atol=0.02)
        loss = squared_error(levels) / squared_error(best) - 1
        assert loss == pytest.approx({4: 0.0197, 3: 0.0022, 2: 0.0116}[bits], abs=1e-4)
        others = [levels * 0.99, levels * 1.01]
        if bend := BEND[bits]:
            t = np.arange(2**bits) - (2**bits - 1) / 2
            for wrong in (0.9, 1.1):
                other = t * (t * t + wrong * bend)
                others += [other * (levels[-1] / other[-1]) * scale for scale in np.linspace(0.95, 1.05, 41)]
        assert all(squared_error(other) > squared_error(levels) for other in others)


@pytest.mark.parametrize("channels", [64, 128, 96, 80, 2, 6])
def test_rotation_is_orthogonal(channels):
    x, y = normals(3, 2, 5, channels)
    np.testing.assert_allclose(unrotate(rotate(x)), x, atol=tolerances.ROTATION * 4)
    np.testing.assert_allclose((rotate(x) * rotate(y)).sum(-1), (x * y).sum(-1), atol=tolerances.ATTENTION * 4)


# Properties of all


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(-20, 20), shift=st.floats(-4, 4))
def test_error_bound(seed, size, shift):
    """The worst channel of any group, over its range (integers), its magnitude (fp8), or the vector's norm (rotated)."""
    x = ((normals(seed, 8, H) + np.float32(shift)) * np.float32(2.0**size)).astype(np.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    largest = np.abs(x).max(-1, keepdims=True)
    for name, bits in (INTEGERS | KIVI).items():
        step = (high - low + np.abs(low) / 256) / (2**bits - 1) * (1 + 2**-7)
        bound = np.maximum(step / 2, np.abs(low) / 256) * (1 + 1e-5)  # half a step, or what zero's rounding cut off
        assert (np.abs(stored(name, x) - x) <= bound).all(), name
    for name, relative in (("bf16", 2**-8), ("f32", 0.0)):
        assert (np.abs(stored(name, x) - x) <= relative * np.abs(x)).all(), name
    for name, relative, least in (("fp8_e4m3", 2**-4, 2**-9 / 448), ("fp8_e5m2", 2**-3, 2**-16 / 57344)):
        assert (np.abs(stored(name, x) - x) <= relative * np.abs(x) + least * largest * 1.01).all(), name
    for name, share in (("rotated4", 0.2), ("rotated3", 0.35), ("rotated2", 0.55)):
        error = np.linalg.norm(stored(name, x) - x, axis=-1) / np.linalg.norm(x, axis=-1)
        assert (error < share).all(), name


def test_error_falls_with_bits():
    x = normals(5, 512, H)
    errors = {name: float(((stored(name, x) - x) ** 2).mean()) for name in SCHEMES}
    for family in (
        ["int2", "int3", "int4", "int8", "bf16", "f32"],
        ["rotated2", "rotated3", "rotated4", "fp8_e4m3"],
        ["int2", "kivi2", "int4", "kivi4", "int8"],  # half the group, half the range
    ):
        ordered = [errors[name] for name in family]
        assert ordered == sorted(ordered, reverse=True) and len(set(ordered)) == len(ordered)
    assert errors["rotated2"] < errors["int2"] and errors["rotated3"] < errors["int3"]
    for bits, theory in (
        (2, 0.1175),
        (3, 0.03454),
        (4, 0.009497),
    ):  # Max 1960: the distortion of a normal of variance 1
        assert 0.8 * theory < errors[f"rotated{bits}"] < 1.02 * theory


@every_scheme
def test_what_is_on_the_grid_stays(name):
    """Decoding and encoding again changes nothing more; of int8, whose steps are finer than the rounding of its zero, half a
    step of each vector's own at most; of rotated schemes next to nothing."""
    once = stored(name, normals(6, 64, H))
    twice = stored(name, once)
    if name in ROTATED:
        assert np.abs(twice - once).mean() < 0.01 * np.abs(once).mean()
    elif name == "int8":
        step = (once.max(-1, keepdims=True) - once.min(-1, keepdims=True)) / 255
        assert (np.abs(twice - once) <= 0.501 * step).all()
    else:
        np.testing.assert_array_equal(twice, once)


@every_scheme
@pytest.mark.parametrize("bad", ["zeros", "constant", "nan", "inf", "-inf", "huge", "tiny"])
def test_odd_numbers_by_rule(name, bad):
    """Zeros and a constant stay; NaN counts as 0, an infinity as the largest; neighbours in the batch are untouched."""
    x = normals(7, 3, H)
    clean = stored(name, x)
    value = {"zeros": 0.0, "constant": 3.0, "nan": np.nan, "inf": np.inf, "-inf": -np.inf, "huge": 3e38, "tiny": 1e-38}
    x[1] = value[bad] if bad in ("zeros", "constant") else x[1]
    x[1, 5] = value[bad]
    out = stored(name, x)
    np.testing.assert_array_equal(out[[0, 2]], clean[[0, 2]])
    if name in ("f32", "bf16"):
        return
    assert np.isfinite(out).all()
    if bad == "zeros":
        np.testing.assert_array_equal(out[1], 0.0)
    if bad == "constant" and name not in ROTATED:
        np.testing.assert_allclose(
            out[1], 3.0, rtol=0.0 if name in INTEGERS | KIVI else 2**-8
        )  # fp8: its factor's rounding
    if bad in ("inf", "huge"):
        assert out[1, 5] > LARGEST / 4
    if bad == "-inf":
        assert out[1, 5] < -LARGEST / 4


@every_scheme
def test_bytes_and_carrier(name):
    scheme, x = get_scheme(name), jnp.zeros((3, 64, H))
    e = jax.eval_shape(scheme.encode, x)
    assert e.codes.dtype == scheme.carrier and len(e.factors) == scheme.factors
    assert math.prod(e.codes.shape) * e.codes.dtype.itemsize == 3 * 64 * H * scheme.bits / 8  # 3 bits take 3 bits
    shared = (3, 2, H) if name in KIVI else (3, 64, 1)
    assert all(f.dtype == jnp.uint16 and f.shape == shared for f in e.factors)
    assert scheme.bytes_per_vector(H) == H * scheme.bits / 8 + 2 * scheme.factors * math.prod(shared) / (3 * 64)
    if scheme.multiple > 1:
        with pytest.raises(ValueError, match=f"{name}.*multiples of {scheme.multiple}, got 7"):
            scheme.check(7)
    else:
        scheme.check(7)


@every_scheme
def test_slots_minor_decodes_the_same(name):
    """Tiers keep channels before slots."""
    scheme, x = get_scheme(name), normals(8, 2, 3, 64, H)
    e = programs(name)[0](jnp.asarray(x))
    turned = Encoded(codes=jnp.swapaxes(e.codes, -1, -2), factors=tuple(jnp.swapaxes(f, -1, -2) for f in e.factors))
    np.testing.assert_array_equal(jnp.swapaxes(scheme.decode(turned, -2), -1, -2), scheme.decode(e, -1))


@every_scheme
def test_batch_mates_do_not_matter(name):
    x = normals(9, 6, H)
    np.testing.assert_array_equal(stored(name, x)[2:5], stored(name, x[2:5]))


def random_shape(seed):
    rng = np.random.default_rng(seed)
    return (*rng.integers(1, 6, rng.integers(1, 4)).tolist(), 8 * int(rng.integers(1, 9)))


RANDOM_SHAPES = [random_shape(seed) for seed in range(5)]


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("shape", [(8,), (1, 1, 128), *RANDOM_SHAPES])
def test_pack_round_trip(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape).astype(np.uint8)
    packed = pack(jnp.asarray(codes), bits)
    assert packed.dtype == jnp.uint8 and packed.shape == (*shape[:-1], shape[-1] * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, -1), codes)
    if len(shape) > 1:
        turned = unpack(jnp.swapaxes(packed, -1, -2), bits, -2)
        np.testing.assert_array_equal(jnp.swapaxes(turned, -1, -2), codes)


def test_packing_by_hand():
    """The layout that files and kernels rely on."""
    codes = jnp.asarray([1, 2, 3, 0, 3, 3, 0, 1], jnp.uint8)
    assert pack(codes, 2).tolist() == [0b00111001, 0b01001111]
    assert pack(codes, 4).tolist() == [0x21, 0x03, 0x33, 0x10]
    wide = jnp.asarray([1, 6, 3, 4, 7, 3, 0, 5], jnp.uint8)
    assert pack(wide, 3).tolist() == [0b00111001, 0b01001111, 0b10011010]


def test_unknown_scheme():
    with pytest.raises(ValueError, match="unknown storage scheme 'int5'; known: f32, bf16"):
        get_scheme("int5")
