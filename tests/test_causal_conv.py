"""The causal convolution against its reference: results, gradients, pads, and one token at a time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from pallas_kernels.causal_conv import BACKWARD, IMPLEMENTATIONS, carry, causal_conv, reference, step

EVERY = ("xla", "interpret")


def test_reference_by_hand():
    """The picture in the docstring: taps y z = 10, 20, tokens 1, 2, (pad), 3, filters 1, 0.1, 0.01."""
    x = np.array([1.0, 2.0, np.nan, 3.0]).reshape(1, 1, 4, 1)
    taps = np.array([10.0, 20.0]).reshape(1, 1, 2, 1)
    filters, bias = np.array([1.0, 0.1, 0.01]).reshape(3, 1, 1), np.array([[100.0]])
    valid = np.array([[True, True, False, True]])
    y, left = reference.causal_conv(x, filters, bias, taps, valid=valid)
    np.testing.assert_allclose(y.ravel(), [112.01, 120.12, 0.0, 101.23], rtol=tolerances.BY_HAND)
    assert left.ravel().tolist() == [2.0, 3.0]
    for implementation in (None, *EVERY[:1]):
        ours = causal_conv(
            *map(jnp.asarray, (x, filters[:, 0], bias[0], taps)), valid=valid, implementation=implementation
        )
        np.testing.assert_allclose(ours[0].ravel(), y.ravel(), rtol=tolerances.BY_HAND_FLOAT32)


def test_reference_gradients_by_differences():
    given, valid, out_gradient, taps_gradient = make_case("per head, pads anywhere")
    found = reference.gradients(*given, valid=valid, out_gradient=out_gradient, taps_gradient=taps_gradient)
    given = [np.nan_to_num(np.asarray(a, np.float64)) for a in given]

    def loss(*arrays):
        y, left = reference.causal_conv(*arrays, valid=valid)
        return (y * out_gradient).sum() + (left * taps_gradient).sum()

    for number, gradient in enumerate(found):
        picks = np.random.default_rng(number).choice(gradient.size, min(6, gradient.size), replace=False)
        for pick in picks:
            moved = []
            for way in (1e-4, -1e-4):
                arrays = [a.copy() for a in given]
                arrays[number].flat[pick] += way
                moved.append(loss(*arrays))
            assert abs((moved[0] - moved[1]) / 2e-4 - gradient.flat[pick]) < tolerances.DIFFERENCES


CASES = {  # B, N, T, H, Kw, filters per head, which tokens are valid
    "one token": (1, 1, 1, 4, 3, False, "all"),
    "shorter than the filters": (2, 2, 2, 4, 5, True, "all"),
    "RCMHA: 3 filters shared by heads": (2, 4, 40, 16, 3, False, "all"),
    "no taps": (2, 2, 17, 8, 1, True, "all"),
    "left-padded": (3, 2, 33, 8, 3, False, "right"),
    "right-padded": (3, 2, 33, 8, 4, True, "left"),
    "per head, pads anywhere": (3, 2, 19, 5, 3, True, "some"),
    "nothing valid": (2, 1, 18, 4, 3, False, "none"),
    "several blocks": (2, 2, 1100, 4, 4, True, "all"),
    "several blocks, pads": (2, 2, 1040, 4, 3, False, "left"),
    "many channels": (1, 1, 32, 600, 3, False, "all"),
}


def make_case(name):
    """((x, filters, bias, taps), valid, gradients of both results); what is not valid is NaN."""
    batch, heads, length, size, width, per_head, kind = CASES[name]
    rng = np.random.default_rng(len(name))
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    index, count = np.arange(length)[None], rng.integers(1, length + 1, (batch, 1))
    valid = {
        "all": index >= 0 * count, "none": index < 0 * count, "left": index < count, "right": index >= length - count,
        "some": rng.random((batch, length)) < 0.6,
    }[kind]  # fmt: skip
    x = np.where(valid[:, None, :, None], normal(batch, heads, length, size), np.float32(np.nan))
    filters, bias = normal(width, heads if per_head else 1, size), normal(heads if per_head else 1, size)
    taps = normal(batch, heads, width - 1, size)
    shared = lambda a: np.broadcast_to(a, (*a.shape[:-2], heads, size))
    given = (x, shared(filters), shared(bias), taps)
    return given, valid, normal(*x.shape), normal(*taps.shape)


def ours(name, implementation, dtype=jnp.float32):
    """The case as it is called: shared filters once, no mask where all are valid. Returns: function, its arrays."""
    (x, filters, bias, taps), valid, *_ = make_case(name)
    if not CASES[name][5]:
        filters, bias = filters[:, 0], bias[0]
    call = functools.partial(
        causal_conv, valid=None if valid.all() else jnp.asarray(valid), implementation=implementation
    )
    return call, [jnp.asarray(a, dtype) for a in (x, filters, bias, taps)]


def takes(name, implementation):
    return implementation == "xla" or CASES[name][2] >= 16


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients(name, implementation):
    call, given = ours(name, implementation)
    if not takes(name, implementation):
        with pytest.raises(NotImplementedError, match="it takes 16 positions or more"):
            call(*given)
        return
    arrays, valid, out_gradient, taps_gradient = make_case(name)
    (y, left), pull = jax.vjp(jax.jit(call), *given)
    expected, expected_left = reference.causal_conv(*arrays, valid=valid)
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerances.CONVOLUTION)
    np.testing.assert_array_equal(left, expected_left)
    found = pull((jnp.asarray(out_gradient), jnp.asarray(taps_gradient)))
    wanted = list(reference.gradients(*arrays, valid=valid, out_gradient=out_gradient, taps_gradient=taps_gradient))
    if not CASES[name][5]:
        wanted[1:3] = wanted[1].sum(axis=1), wanted[2].sum(axis=0)
    for gradient, want, tolerance in zip(found, wanted, ("x", "sum", "sum", "x"), strict=True):
        large = max(1.0, np.abs(want).max(initial=0)) if tolerance == "sum" else 1.0
        atol = tolerances.CONVOLUTION_SUM * large if tolerance == "sum" and large > 3 else tolerances.CONVOLUTION
        np.testing.assert_allclose(gradient, want, rtol=0, atol=atol)


@pytest.mark.parametrize("implementation", EVERY)
def test_without_heads_bias_and_taps(implementation):
    """[B, T, C] is one head, no bias is zeros, and so are no taps."""
    (x, filters, _, _), *_ = make_case("no taps")
    x, filters = jnp.asarray(x[:, 0]), jnp.asarray(np.concatenate([filters[:, 0]] * 3))
    y, left = causal_conv(x, filters, None, None, implementation=implementation)
    zeros = np.zeros((2, 1, 2, 8))
    wide = (np.asarray(x)[:, None], np.asarray(filters)[:, None], np.zeros((1, 8)), zeros)
    expected, expected_left = reference.causal_conv(*wide, valid=np.ones((2, 17), bool))
    np.testing.assert_allclose(y, expected[:, 0], rtol=0, atol=tolerances.CONVOLUTION)
    np.testing.assert_array_equal(left, expected_left[:, 0])


@pytest.mark.parametrize("implementation", EVERY)
def test_bfloat16(implementation):
    """Sums are in float32: one rounding, at the end."""
    name = "RCMHA: 3 filters shared by heads"
    call, given = ours(name, implementation, jnp.bfloat16)
    (y, left), pull = jax.vjp(call, *given)
    arrays, valid, out_gradient, _ = make_case(name)
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float64) for a in arrays]
    expected, _ = reference.causal_conv(*rounded, valid=valid)
    near = functools.partial(np.testing.assert_allclose, rtol=tolerances.CONVOLUTION_BF16, atol=tolerances.CONVOLUTION)
    assert y.dtype == left.dtype == jnp.bfloat16
    near(np.asarray(y, np.float64), expected)
    gradient = jnp.asarray(out_gradient, jnp.bfloat16)
    found = pull((gradient, jnp.zeros_like(left)))
    assert all(g.dtype == jnp.bfloat16 for g in found)
    wanted = reference.gradients(
        *rounded, valid=valid, out_gradient=np.asarray(gradient, np.float64), taps_gradient=np.zeros(left.shape)
    )
    near(np.asarray(found[0], np.float64), wanted[0])
    near(np.asarray(found[1], np.float64), wanted[1].sum(axis=1))


@pytest.mark.parametrize("name", ["shorter than the filters", "left-padded", "right-padded", "per head, pads anywhere"])
def test_step_by_step(name):
    """One token after another is the whole, in results and taps, at every position; a row that stands still keeps its taps."""
    call, (x, filters, bias, taps) = ours(name, "xla")
    whole, left = call(x, filters, bias, taps)
    valid = jnp.asarray(make_case(name)[1])
    one = jax.jit(step)
    for t in range(x.shape[2]):
        y, taps = one(x[:, :, t], filters, bias, taps, valid=valid[:, t])
        np.testing.assert_allclose(y, whole[:, :, t], rtol=0, atol=tolerances.CONVOLUTION)
    np.testing.assert_array_equal(taps, left)


@pytest.mark.parametrize("implementation", EVERY)
def test_in_pieces(implementation):
    """Taps carry on: a sequence in segments is the sequence in whole, gradients through the taps too."""
    call, (x, filters, bias, taps) = ours("RCMHA: 3 filters shared by heads", implementation)

    def whole(x, taps):
        return call(x, filters, bias, taps)

    def pieces(x, taps):
        first, taps = call(x[:, :, :18], filters, bias, taps)
        second, taps = call(x[:, :, 18:], filters, bias, taps)
        return jnp.concatenate([first, second], axis=2), taps

    loss = lambda run: lambda x, taps: sum((jnp.sin(y)).sum() for y in run(x, taps))
    for one, two in zip(whole(x, taps), pieces(x, taps), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerances.CONVOLUTION)
    for one, two in zip(*(jax.grad(loss(run), (0, 1))(x, taps) for run in (whole, pieces)), strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=tolerances.CONVOLUTION)


def test_batch_mates_and_pads_do_not_matter():
    """Bit for bit: other rows, and what lies in pads."""
    call, (x, filters, bias, taps) = ours("per head, pads anywhere", "xla")
    valid = make_case("per head, pads anywhere")[1]
    y, _ = call(x, filters, bias, taps)
    other = jnp.where(jnp.asarray(valid)[:, None, :, None], x, 1e30).at[0].set(7.0)
    np.testing.assert_array_equal(call(other, filters, bias, taps)[0][1:], y[1:])


def test_nothing_sees_ahead():
    call, (x, filters, bias, taps) = ours("RCMHA: 3 filters shared by heads", "interpret")
    gradient = jax.grad(lambda x: call(x, filters, bias, taps)[0][:, :, 20].sum())(x)
    seen = np.abs(np.asarray(gradient)).sum(axis=(0, 1, 3)) > 0
    assert np.flatnonzero(seen).tolist() == [18, 19, 20]


WRONG = {  # what a mistaken kernel would give; each must be far outside the tolerances
    "filters in reverse": lambda call, x, f, b, t: call(x, f[::-1], b, t)[0],
    "one position late": lambda call, x, f, b, t: jnp.roll(call(x, f, b, t)[0], 1, axis=2),
    "bias dropped": lambda call, x, f, b, t: call(x, f, None, t)[0],
    "taps dropped": lambda call, x, f, b, t: call(x, f, b, None)[0],
    "taps in reverse": lambda call, x, f, b, t: call(x, f, b, t[:, :, ::-1])[0],
    "pads as zeros in between": lambda call, x, f, b, t: causal_conv(jnp.nan_to_num(x), f, b, t)[0],
}


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_visible(mistake):
    name = "per head, pads anywhere"
    call, given = ours(name, "xla")
    arrays, valid, *_ = make_case(name)
    expected, _ = reference.causal_conv(*arrays, valid=valid)
    seen = np.broadcast_to(valid[:, None, :, None], expected.shape)
    wrong = np.asarray(WRONG[mistake](call, *given))
    assert np.abs(wrong - expected)[seen].max() > tolerances.VISIBLE
    assert np.abs(np.asarray(call(*given)[0]) - expected)[seen].max() < tolerances.VISIBLE / 500


def test_shapes_that_do_not_fit():
    x, taps = jnp.zeros((2, 3, 20, 4)), jnp.zeros((2, 3, 1, 4))
    for arguments, message in (
        ((x, jnp.zeros((3, 5)), None, None), r"got x \(2, 3, 20, 4\) and filters \(3, 5\)"),
        ((x[0, 0], jnp.zeros((3, 4)), None, None), "causal_conv takes x"),
        ((x, jnp.zeros((3, 4)), jnp.zeros((3,)), None), r"bias must be \(4,\)"),
        ((x, jnp.zeros((3, 4)), None, taps), r"taps must be the last 2 inputs, \(2, 3, 2, 4\), got \(2, 3, 1, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            causal_conv(*arguments)
    with pytest.raises(ValueError, match=r"valid must be \[B, T\] = \(2, 20\), got \(20,\)"):
        causal_conv(x, jnp.zeros((3, 4)), None, None, valid=jnp.ones((20,), bool))
    with pytest.raises(
        NotImplementedError, match="it reads 16 positions beside a block, fewer than filters of 19 need"
    ):
        causal_conv(x, jnp.zeros((19, 4)), None, None, implementation="interpret")
    assert list(IMPLEMENTATIONS) == list(BACKWARD)


def by_segment(x, filters, bias, taps, segments):
    """Each segment on its own; the first goes on where the taps end."""
    out, edges = np.zeros(x.shape), [0, *(np.flatnonzero(np.diff(segments)) + 1), len(segments)]
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        before = taps if start == 0 else np.zeros_like(taps)
        part = x[:, :, start:stop]
        valid = np.ones((x.shape[0], stop - start), bool)
        out[:, :, start:stop], _ = reference.causal_conv(part, filters, bias, before, valid=valid)
    return out


def test_segments_are_texts_on_their_own():
    """Also one that is shorter than the filters; and gradients do not cross from one to the next."""
    (x, filters, bias, taps), *_ = make_case("right-padded")
    x, length = np.nan_to_num(x), x.shape[2]
    segments = np.repeat([3, 1, 4, 2], [7, 1, 2, length - 10])
    given = [jnp.asarray(a) for a in (x, filters, bias, taps)]
    call = lambda x, segments: causal_conv(x, *given[1:], segments=segments)[0]
    rows = jnp.broadcast_to(jnp.asarray(segments, jnp.int32)[None], (x.shape[0], length))
    expected = by_segment(x, filters, bias, taps, segments)
    np.testing.assert_allclose(call(given[0], rows), expected, rtol=0, atol=tolerances.CONVOLUTION)
    assert np.abs(np.asarray(call(given[0], None)) - expected).max() > tolerances.VISIBLE
    gradient = jax.grad(lambda x: call(x, rows)[:, :, 8].sum())(given[0])
    assert np.flatnonzero(np.abs(np.asarray(gradient)).sum(axis=(0, 1, 3))).tolist() == [8]
    everyone = rows.at[:, 7].set(-1)  # meets all, and is met by all
    gradient = jax.grad(lambda x: call(x, everyone)[:, :, 7:9].sum())(given[0])
    assert np.flatnonzero(np.abs(np.asarray(gradient)).sum(axis=(0, 1, 3))).tolist() == [4, 5, 6, 7, 8]


def test_segments_pass_over_pads():
    (x, filters, bias, taps), *_ = make_case("right-padded")
    x, length = np.nan_to_num(x), x.shape[2]
    segments = np.repeat([0, 1], [length // 2, length - length // 2])
    valid = np.random.default_rng(0).random(length) < 0.6
    rows = lambda a, kind: jnp.broadcast_to(jnp.asarray(a, kind)[None], (x.shape[0], length))
    found, left = causal_conv(
        *map(jnp.asarray, (np.where(valid[:, None], x, np.nan), filters, bias, taps)),
        valid=rows(valid, bool), segments=rows(segments, jnp.int32),
    )  # fmt: skip
    expected = by_segment(x[:, :, valid], filters, bias, taps, segments[valid])
    np.testing.assert_allclose(np.asarray(found)[:, :, valid], expected, rtol=0, atol=tolerances.CONVOLUTION)
    np.testing.assert_array_equal(left, x[:, :, valid][:, :, -taps.shape[2] :])
    with pytest.raises(NotImplementedError, match="'interpret' cannot take segments"):
        causal_conv(
            *map(jnp.asarray, (x, filters, bias, taps)), segments=rows(segments, jnp.int32), implementation="interpret"
        )
    with pytest.raises(ValueError, match=r"segments must be \[B, T\]"):
        causal_conv(*map(jnp.asarray, (x, filters, bias, taps)), segments=jnp.zeros((length,), jnp.int32))


@pytest.mark.parametrize("name", ["shorter than the filters", "left-padded", "right-padded", "per head, pads anywhere"])
def test_taps_carried_are_those_that_the_convolution_leaves(name):
    (x, filters, bias, taps), valid, *_ = make_case(name)
    flat = lambda a: np.moveaxis(a, 1, 2).reshape(a.shape[0], a.shape[2], -1)
    _, left = reference.causal_conv(x, filters, bias, taps, valid=valid)
    np.testing.assert_array_equal(carry(*map(jnp.asarray, (flat(taps), flat(x), valid))), flat(left))
    none = jnp.zeros(valid.shape, bool)
    np.testing.assert_array_equal(carry(*map(jnp.asarray, (flat(taps), flat(x))), none), flat(taps))
