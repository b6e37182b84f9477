"""Codes: the kernel and XLA to the bit, and both against the formulas in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from jaxkv.quantization import SCHEMES, get_scheme
from jaxkv.quantization.base import from_bits
from jaxkv.quantization.packing import unpack
from pallas_kernels.quantize import Codebook, Float8, Rounded, arithmetic, quantize, reference

ENCODED = [name for name, scheme in SCHEMES.items() if scheme.how]
SHAPES = {  # [B, P, S, H]
    "a token": (2, 3, 1, 128),
    "a group": (1, 2, 32, 64),
    "a prompt of two blocks": (1, 1, 544, 96),
}
every_scheme = pytest.mark.parametrize("name", ENCODED)


@functools.cache
def encode(how, implementation):
    return jax.jit(functools.partial(quantize, how=how, implementation=implementation))


def vectors(seed, shape):
    """Numbers of several sizes, some far off, with channels of their own size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * rng.uniform(0.1, 3, shape[-1]) + rng.choice([0.0, 5.0], (*shape[:-1], 1))
    return x.astype(np.float32)


def test_reference_by_hand():
    """0 .. 3 on a grid of 2 bits; halves go to the even code; 5 is between 4 and 8 steps of e4m3's smallest."""
    x = np.array([[[[0.0, 0.5, 1.5, 2.5, 3.0, 1.0, 0.5, 3.0]]]])
    codes, (scale, zero), margins = reference.quantize(x, Rounded(bits=2))
    assert codes[0, 0, :, 0].tolist() == [0, 0, 2, 2, 3, 1, 0, 3] and (scale.item(), zero.item()) == (1.0, 0.0)
    assert margins[0, 0, :, 0].tolist() == [0.5, 0, 0, 0, 0.5, 0.5, 0, 0.5]
    assert reference.float8_numbers(3)[[0, 1, 7, 8, 9, -1]].tolist() == [0, 2**-9, 7 * 2**-9, 2**-6, 9 * 2**-9, 448]
    assert len(reference.float8_numbers(2)) == 124 and reference.float8_numbers(2)[-1] == 57344
    codes, (factor,), _ = reference.quantize(np.array([[[[448.0, -1.0, 2**-9, 0.0]]]]), Float8(mantissa=3))
    assert codes[0, 0, :, 0].tolist() == [0x7E, 0x80 + 7 * 8, 1, 0] and factor.item() == 1.0
    assert reference.near(1 + 2**-8) == 1.0 and reference.near(1 + 3 * 2**-8) == 1 + 2**-6  # halfway: to even
    assert reference.least(3.0, 3) == 1.0 and reference.least(3.001, 3) == 1 + 2**-7
    assert reference.walsh(np.array([1.0, 2.0, 3.0, 5.0])).tolist() == [11, -3, -5, 1]
    # y = (6, 2, -2, -6) before the rotation is undone is exact with levels +-0.5, +-1.5 and factor 4
    how = Codebook(bits=2, levels=(-1.5, -0.5, 0.5, 1.5), signs=(1, 1, 1, -1))
    y = np.array([6.0, 2.0, -2.0, -6.0])
    x = reference.walsh(y) / 2 * np.array([1, 1, 1, -1])  # the transform is its own inverse
    codes, (factor,), _ = reference.quantize(x.reshape(1, 1, 1, 4), how)
    assert factor.item() == 4.0 and codes.ravel().tolist() == [3, 2, 1, 0]


def test_float8_is_the_formats_own():
    """Rounding by integers against the conversion of ml_dtypes, on every float32 with 12 bits of mantissa in range."""
    bits = np.arange(0x2F000000, 0x48000000, 1 << 11, dtype=np.int64).astype(np.uint32)
    x = np.concatenate([bits.view(np.float32), [0.0]]).astype(np.float32)
    for mantissa, dtype, largest in ((3, jnp.float8_e4m3fn, 448), (2, jnp.float8_e5m2, 57344)):
        inside = x[x <= largest]
        inside = np.concatenate([inside, -inside])
        found = np.asarray(jax.jit(arithmetic.float8, static_argnums=1)(inside, mantissa))
        expected = inside.astype(dtype).view(np.uint8)
        np.testing.assert_array_equal(found[inside != 0], expected[inside != 0])
        assert not found[inside == 0].any()


@pytest.mark.parametrize("shape", SHAPES)
@every_scheme
def test_against_the_formulas(name, shape):
    """Factors but for those within rounding of the next bfloat16 number; codes wherever the factors agree, but for those
    within rounding of an edge."""
    shape, scheme = SHAPES[shape], get_scheme(name)
    if shape[2] % scheme.granule:
        return
    how, x = scheme.how(shape[3]), vectors(1, shape)
    codes, factors = encode(how, "xla")(jnp.asarray(x))
    found = np.asarray(unpack(codes, how.bits, -2), int)
    expected, wanted, margins = reference.quantize(x, how)
    assert codes.shape == (*shape[:2], shape[3] * how.bits // 8, shape[2])
    agree = np.ones(wanted[0].shape, bool)
    for factor, want in zip(factors, wanted, strict=True):
        agree &= np.asarray(from_bits(factor)) == want
    assert agree.mean() > 1 - tolerances.UNDECIDED_SHARE
    for axis in (2, 3):
        agree = np.repeat(agree, found.shape[axis] // agree.shape[axis], axis=axis)
    wrong = (found != expected) & agree
    assert not (wrong & (margins > tolerances.MARGIN * 100)).any()  # codes up to 255, in float32: steps of 2**-16
    assert wrong.mean() < tolerances.UNDECIDED_SHARE


@pytest.mark.parametrize("shape", SHAPES)
@every_scheme
def test_kernel_and_xla_agree_to_the_bit(name, shape):
    """Also on numbers that are none, on ties, and inside of another program."""
    shape, scheme = SHAPES[shape], get_scheme(name)
    if shape[2] % scheme.granule:
        return
    how, x = scheme.how(shape[3]), vectors(2, shape)
    x.flat[:8] = [np.nan, np.inf, -np.inf, 3e38, 0.0, -0.0, 1e-38, -1e30]
    last = x[-1, -1]
    last[-1] = np.round(last[-1] * 2) / 2  # ties
    if shape[2] > 8:
        last[-32:-4] = 0.0
        last[-4] = 3.0
        last[-3] = np.arange(shape[3]) % 7 * 0.5
        last[-2] *= 1e-37
    for dtype in (jnp.float32, jnp.bfloat16) if shape[2] == 32 else (jnp.float32,):
        given = jnp.asarray(x, dtype)
        results = [encode(how, "xla")(given), encode(how, "interpret")(given)]
        if shape[2] == 32 and dtype == jnp.float32:
            halved = jax.jit(lambda x: quantize(x * 0.5, how=how, implementation="xla"))
            results.append(halved(given * 2))
        for other in results[1:]:
            for one, two in zip(jax.tree.leaves(results[0]), jax.tree.leaves(other), strict=True):
                assert one.dtype == two.dtype
                np.testing.assert_array_equal(one, two)


@every_scheme
def test_a_token_is_encoded_as_in_a_prompt(name):
    """What is stored does not depend on how many tokens came at once, nor on the other rows."""
    scheme = get_scheme(name)
    how, x = scheme.how(64), jnp.asarray(vectors(3, (2, 2, 64, 64)))
    one = slice(32, 32 + scheme.granule)
    for implementation in ("xla", "interpret"):
        whole, alone = encode(how, implementation)(x), encode(how, implementation)(x[1:, :, one])
        np.testing.assert_array_equal(whole[0][1:, ..., one], alone[0])
        for all_, own in zip(whole[1], alone[1], strict=True):
            at = slice(1, 2) if scheme.granule > 1 else one
            np.testing.assert_array_equal(all_[1:, ..., at], own)


@every_scheme
def test_schemes_store_what_the_operation_gives(name):
    scheme, x = get_scheme(name), jnp.asarray(vectors(4, SHAPES["a group"]))
    codes, factors = encode(scheme.how(64), "xla")(x)
    stored = jax.jit(scheme.encode)(x)
    np.testing.assert_array_equal(jnp.swapaxes(stored.codes, -1, -2), codes)
    for one, two in zip(stored.factors, factors, strict=True):
        np.testing.assert_array_equal(jnp.swapaxes(one, -1, -2), two)


MISTAKES = {  # of someone who reads or writes codes wrongly: (codes, factors) [.., H, S] -> the same
    "channels off by one": lambda codes, factors: (np.roll(codes, 1, axis=2), factors),
    "slots off by one": lambda codes, factors: (codes, [np.roll(f, 1, axis=3) for f in factors]),
    "scale dropped": lambda codes, factors: (codes, [np.ones_like(factors[0]), *factors[1:]]),
    "zero dropped": lambda codes, factors: (codes, [factors[0], np.zeros_like(factors[0])][: len(factors)]),
    "codes one step up": lambda codes, factors: (codes + 1, factors),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", ["int8", "int4", "int2", "fp8_e4m3", "rotated4"])
def test_mistakes_are_visible(name, mistake):
    """Grid points from the right codes are those of the reference to QUANTIZED; from wrong ones, far off."""
    how, x = get_scheme(name).how(64), vectors(5, SHAPES["a group"])
    if mistake == "zero dropped" and not isinstance(how, Rounded):
        return
    codes, factors = encode(how, "interpret")(jnp.asarray(x))
    codes, factors = np.asarray(unpack(codes, how.bits, -2), int), [np.asarray(from_bits(f)) for f in factors]
    expected, wanted, _ = reference.quantize(x, how)

    def points(codes, factors):
        if isinstance(how, Float8):
            numbers = np.zeros(256)
            values = reference.float8_numbers(how.mantissa)
            numbers[: len(values)], numbers[128 : 128 + len(values)] = values, -values
            return numbers[codes % 256] * factors[0]
        if isinstance(how, Codebook):
            return np.asarray(how.levels)[np.minimum(codes, len(how.levels) - 1)] / how.unit * factors[0]
        return codes * factors[0] + factors[1]

    right = np.abs(points(codes, factors) - points(expected, wanted))
    assert (right < tolerances.QUANTIZED).mean() > 1 - tolerances.UNDECIDED_SHARE
    wrong = np.abs(points(*MISTAKES[mistake](codes, factors)) - points(expected, wanted))
    assert (wrong > tolerances.VISIBLE).mean() > 0.5


def test_what_is_refused():
    how = get_scheme("rotated4").how(64)
    for shape, given, message in (
        ((4, 64), how, r"takes \[B, P, S, H\], got \(4, 64\)"),
        ((1, 1, 4, 6), Rounded(bits=2), "2 bits take multiples of 4 channels and of 1 tokens, got 6 and 4"),
        (
            (1, 1, 40, 64),
            Rounded(bits=4, granule=32),
            "4 bits take multiples of 2 channels and of 32 tokens, got 64 and 40",
        ),
        ((1, 1, 4, 32), how, "for 32 channels has 16 levels and 32 signs, got 16 and 64"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(jnp.zeros(shape), how=given)
    with pytest.raises(NotImplementedError, match="it reads float32 and bfloat16, not float16"):
        quantize(jnp.zeros((1, 1, 4, 64), jnp.float16), how=how, implementation="interpret")
    with pytest.raises(NotImplementedError, match="codebooks rotate heads of up to 256 channels, not 512"):
        wide = get_scheme("rotated4").how(512)
        quantize(jnp.zeros((1, 1, 4, 512)), how=wide, implementation="interpret")
    assert quantize(jnp.zeros((1, 1, 0, 64)), how=how)[0].shape == (1, 1, 32, 0)
