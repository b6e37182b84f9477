"""Both attention operations against their references, and the references against cases worked by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from pallas_kernels.decode_attention import Packed, Source, decode_attention
from pallas_kernels.decode_attention import packed as packed_codes
from pallas_kernels.decode_attention import reference as decode_reference
from pallas_kernels.decode_attention.owners import to_rows
from pallas_kernels.extend_attention import TierSource, extend_attention
from pallas_kernels.extend_attention import reference as extend_reference

ADD = functools.partial(jax.tree.map, jnp.add)


def test_decode_reference_by_hand():
    # logits ln 1, ln 3 and a dead slot: shares 1/4 and 3/4
    q = np.array([[[[1.0, 0.0]]]])
    k = np.array([[[[0.0, 2 * math.log(3), np.nan], [5.0, -7.0, np.nan]]]])  # [B, P, H, S]
    v = np.array([[[[4.0, 0.0], [0.0, 4.0], [1e30, 1e30]]]])
    live = np.array([[[True, True, False]]])
    out, (p,) = decode_reference.decode_attention((Source(q, k, v, live),), scale=0.5, softcap=None)
    np.testing.assert_allclose(p[0, 0, 0], [0.25, 0.75, 0.0], rtol=tolerances.BY_HAND)
    np.testing.assert_allclose(out[0, 0, 0], [1.0, 3.0], rtol=tolerances.BY_HAND)
    # a cap of 1 turns the logit ln 3 into tanh(ln 3) = (9 - 1) / (9 + 1)
    _, (p,) = decode_reference.decode_attention((Source(q, k, v, live),), scale=0.5, softcap=1.0)
    np.testing.assert_allclose(p[0, 0, 0, 1], 1 / (1 + math.exp(-0.8)), rtol=tolerances.BY_HAND)
    out, (p,) = decode_reference.decode_attention((Source(q, k, v, live & False),), scale=0.5, softcap=None)
    assert not out.any() and not p.any()


def test_extend_reference_by_hand():
    """All logits are 0, so every row is the uniform mean of what it sees: the mask, written out."""
    zeros, arange = np.zeros((1, 1, 1, 5, 1)), np.arange(5)
    held = Source(zeros, np.zeros((1, 1, 1, 2)), np.zeros((1, 1, 2, 1)), np.array([[[True, True]]]))
    tier = TierSource(held, np.array([[[7, 8]]]))
    call = lambda **options: extend_reference.extend_attention(
        zeros, zeros[:, :, 0], 10.0 ** arange.reshape(1, 1, 5, 1), (tier,),
        **{"positions": arange[None] + 9, "valid": np.array([[1, 1, 1, 0, 1]]) > 0, "segments": None, "causal": True,
           "window": None, "scale": 1.0, "softcap": None} | options,
    )  # fmt: skip
    out, _, visible = call(window=3)
    assert visible[0][0, 0].astype(int).tolist() == [[1, 1], [0, 1], [0, 0], [0, 0], [0, 0]]
    assert visible[1][0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 1, 0, 1],
    ]  # fmt: skip
    np.testing.assert_allclose(out[0, 0, 0, :, 0], [1 / 3, 11 / 3, 37, 55, 5050], rtol=tolerances.BY_HAND)
    _, _, visible = call(segments=np.array([[0, 1, 1, 0, -1]]), causal=False)
    assert visible[1][0, 0].astype(int).tolist() == [
        [1, 0, 0, 0, 1], [0, 1, 1, 0, 1], [0, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1],
    ]  # fmt: skip


def make_source(rng, batch, rows, group, size, slots, live):
    """One tier as it is attended to; dead slots hold what must not be read."""
    q = rng.standard_normal((batch, rows, group, size)).astype(np.float32)
    k = rng.standard_normal((batch, rows, size, slots)).astype(np.float32)
    v = rng.standard_normal((batch, rows, slots, size)).astype(np.float32)
    live = np.zeros((batch, rows, slots), bool) if live is None else rng.random((batch, rows, slots)) < live
    k = np.where(live[:, :, None], k, np.nan)
    v = np.where(live[..., None], v, np.float32(1e30))
    return Source(q, k, v, live)


DECODE = {  # (B, P, G, H, [(slots, share of live ones)])
    "one": (1, 1, 1, 4, [(1, 1.0)]),
    "group": (2, 2, 3, 8, [(9, 0.7)]),
    "two tiers": (2, 2, 1, 8, [(7, 0.6), (12, 0.4), (1, 1.0)]),
    "an empty tier": (1, 2, 3, 8, [(5, None), (4, 1.0)]),
    "all dead": (2, 1, 2, 4, [(5, None), (1, None)]),
}


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("name", DECODE)
def test_decode(name, softcap):
    batch, rows, group, size, tiers = DECODE[name]
    rng = np.random.default_rng(len(name))
    sources = tuple(make_source(rng, batch, rows, group, size, slots, live) for slots, live in tiers)
    given = tuple(Source(*map(jnp.asarray, source[:4])) for source in sources)
    out, probabilities = decode_attention(given, scale=0.6, softcap=softcap)
    expected, shares = decode_reference.decode_attention(sources, scale=0.6, softcap=softcap)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION)
    for p, share in zip(probabilities, shares, strict=True):
        np.testing.assert_allclose(p, share, rtol=0, atol=tolerances.ATTENTION)
    if name == "all dead":
        assert not np.asarray(out).any()


PACKED = {  # bits: level, how many groups share a scale, whether there is a zero
    "int8": (8, lambda c: c.astype(jnp.float32), 1, True),
    "4 bits, groups": (4, lambda c: c.astype(jnp.float32), 2, True),
    "3 bits, a curve": (3, lambda c: (c.astype(jnp.float32) - 3.5) ** 3, 1, False),
    "2 bits": (2, lambda c: c.astype(jnp.float32) - 1.5, 1, False),
    "bfloat16": (16, lambda c: jax.lax.bitcast_convert_type(c, jnp.bfloat16).astype(jnp.float32), 0, False),
}


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request, monkeypatch):
    """How much is decoded at a time; with 3,000 entries the blocks of these tests overlap, along slots and along rows."""
    if request.param == "many blocks":
        monkeypatch.setattr(packed_codes, "CACHED", 3000)


@pytest.mark.parametrize("slots", [1, 24, 56])
@pytest.mark.parametrize("channels", [16, 64])
@pytest.mark.parametrize("name", PACKED)
def test_packed_keys_and_values(name, channels, slots, blocks):
    """A tier that is read as codes against the same one unpacked by hand, beside a float tier."""
    bits, level, groups, zero = PACKED[name]
    rng = np.random.default_rng(slots)

    def packed():
        """Packed codes, and the numbers they mean [B, P, H, S]."""
        if bits == 16:
            codes = np.asarray(jnp.asarray(rng.standard_normal((2, 2, channels, slots)), jnp.bfloat16)).view(np.uint16)
            return Packed(jnp.asarray(codes), 16, level), np.asarray(level(jnp.asarray(codes)))
        codes = rng.integers(0, 2**bits, (2, 2, channels, slots)).astype(np.uint8)
        field = lambda width, shift: [
            sum(((codes[:, :, h + i] >> shift) & (2**width - 1)) << (width * i) for i in range(8 // width))
            for h in range(0, channels, 8 // width)
        ]
        rows = [*field(2, 0), *field(1, 2)] if bits == 3 else field(bits, 0)
        scale, offset = rng.random((2, 2, 2, groups, slots)).astype(np.float32)
        wide = lambda x: np.repeat(x, channels // groups, axis=2)
        meant = np.asarray(level(jnp.asarray(codes))) * wide(scale) + (wide(offset) if zero else 0)
        factors = jnp.asarray(scale), jnp.asarray(offset) if zero else None
        return Packed(jnp.asarray(np.stack(rows, axis=2).astype(np.uint8)), bits, level, *factors), meant

    live = np.arange(slots)[None, None] < rng.integers(0, slots + 1, (2, 2, 1))
    queries = rng.standard_normal((2, 2, 3, channels)).astype(np.float32)
    (keys, meant_keys), (values, meant_values) = packed(), packed()
    other = make_source(rng, 2, 2, 3, channels, 5, 1.0)
    mine = Source(jnp.asarray(queries), keys, values, jnp.asarray(live))
    out, probabilities = decode_attention((mine, Source(*map(jnp.asarray, other[:4]))), scale=0.1, softcap=None)
    meant = Source(queries, meant_keys, np.swapaxes(meant_values, 2, 3), live)
    expected, shares = decode_reference.decode_attention((meant, other), scale=0.1, softcap=None)
    np.testing.assert_allclose(out, expected, rtol=tolerances.PACKED, atol=tolerances.PACKED)
    for p, share in zip(probabilities, shares, strict=True):
        np.testing.assert_allclose(p, share, rtol=0, atol=tolerances.ATTENTION)


@pytest.mark.parametrize(
    "channels, bits, slots, granule", [(16, 4, 64, 32), (64, 2, 96, 32), (32, 2, 32, 4), (8, 2, 32, 32)]
)
def test_packed_keys_whose_slots_share_factors(channels, bits, slots, granule, blocks):
    """A scale and a zero per channel of so many adjacent slots; dead groups hold large factors."""
    rng, per = np.random.default_rng(slots), 8 // bits
    codes = rng.integers(0, 2**bits, (2, 2, channels, slots)).astype(np.uint8)
    rows = [sum(codes[:, :, h + i] << (bits * i) for i in range(per)) for h in range(0, channels, per)]
    scale, zero = rng.random((2, 2, 2, channels, slots // granule)).astype(np.float32)
    live = rng.random((2, 2, slots)) < 0.6
    live[1, 1, :granule] = False
    scale[1, 1, :, 0] = zero[1, 1, :, 0] = 1e30
    wide = lambda x: np.repeat(x, granule, axis=3)
    keys = Packed(
        jnp.asarray(np.stack(rows, axis=2)), bits, lambda c: c.astype(jnp.float32), jnp.asarray(scale), jnp.asarray(zero),
        granule=granule,
    )  # fmt: skip
    queries = rng.standard_normal((2, 2, 3, channels)).astype(np.float32)
    values = rng.standard_normal((2, 2, slots, channels)).astype(np.float32)
    mine = Source(jnp.asarray(queries), keys, jnp.asarray(values), jnp.asarray(live))
    out, (p,) = decode_attention((mine,), scale=0.1, softcap=None)
    meant = Source(queries, codes * wide(scale) + wide(zero), values, live)
    expected, (share,) = decode_reference.decode_attention((meant,), scale=0.1, softcap=None)
    np.testing.assert_allclose(out, expected, rtol=tolerances.PACKED, atol=tolerances.PACKED)
    np.testing.assert_allclose(p, share, rtol=0, atol=tolerances.ATTENTION)
    if slots == granule:
        return
    late = Source(queries, codes * np.roll(wide(scale), 1, axis=3) + wide(zero), values, live)
    assert (
        np.abs(decode_reference.decode_attention((late,), scale=0.1, softcap=None)[0] - out).max() > tolerances.PACKED
    )


@pytest.mark.parametrize(
    "wrong", ["keys as values", "mask off by one", "scale dropped", "zeros", "no cap", "one query"]
)
def test_decode_tolerance_sees(wrong):
    rng = np.random.default_rng(0)
    sources = tuple(make_source(rng, 2, 2, 3, 8, slots, 1.0) for slots in (6, 7))
    q, k, v, live = sources[1][:4]
    live = live & (np.arange(7) < 5)
    good, _ = decode_reference.decode_attention((sources[0], Source(q, k, v, live)), scale=0.6, softcap=1.5)
    scale, softcap, other = 0.6, 1.5, sources[0]
    if wrong == "keys as values":
        v = np.swapaxes(k, 2, 3)
    elif wrong == "mask off by one":
        live = np.roll(live, 1, axis=-1)
    elif wrong == "scale dropped":
        scale = 1.0
    elif wrong == "no cap":
        softcap = None
    elif wrong == "one query":
        q = other.queries
    bad, _ = decode_reference.decode_attention((other, Source(q, k, v, live)), scale=scale, softcap=softcap)
    bad = 0 * bad if wrong == "zeros" else bad
    assert np.abs(good - bad).max() > tolerances.VISIBLE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extend:
    """Arguments of one case. tiers: (slots, share of live ones). valid: share of new tokens that are."""

    shape: tuple[int, int, int, int, int] = (2, 2, 1, 11, 8)  # B, P, G, T, H
    tiers: tuple = ()
    valid: float | None = 1.0
    segments: bool = False
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    block: int = 128


EXTEND = {
    "one": Extend(shape=(1, 1, 1, 1, 4)),
    "one on a tier": Extend(shape=(2, 1, 3, 1, 4), tiers=((5, 0.6),)),
    "plain": Extend(),
    "group, ragged": Extend(shape=(2, 2, 3, 11, 8), valid=0.6),
    "blocks that do not divide": Extend(shape=(2, 2, 3, 11, 8), valid=0.7, block=4, tiers=((6, 0.5),)),
    "blocks of one": Extend(block=1, shape=(1, 1, 3, 9, 4), softcap=1.0),
    "many blocks": Extend(block=2, shape=(1, 2, 1, 23, 4), valid=0.8, window=5),
    "window and tiers": Extend(window=4, tiers=((6, 0.7), (9, 0.4)), block=4, valid=0.8),
    "wide window": Extend(window=40, tiers=((6, 0.7),), softcap=1.5, block=8),
    "segments": Extend(segments=True, block=3, valid=0.8, tiers=((4, 1.0),)),
    "bidirectional": Extend(causal=False, block=4, valid=0.7, tiers=((4, 0.5),)),
    "bidirectional window segments": Extend(causal=False, block=4, window=3, segments=True, shape=(2, 1, 3, 11, 4)),
    "empty tier": Extend(tiers=((5, None), (3, 1.0)), block=5),
    "all dead": Extend(tiers=((5, None),), valid=None, block=4),
}


def make_extend(case: Extend, seed: int):
    rng = np.random.default_rng(seed)
    batch, rows, group, length, size = case.shape
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    queries, keys, values = normal(batch, rows, group, length, size), normal(batch, rows, length, size), None
    values = normal(batch, rows, length, size)
    valid = np.zeros((batch, length), bool) if case.valid is None else rng.random((batch, length)) < case.valid
    base = 3 * max((slots for slots, _ in case.tiers), default=0)
    positions = base + np.maximum(np.cumsum(valid, axis=1) - 1, 0).astype(np.int32)
    keys = np.where(valid[:, None, :, None], keys, 50.0).astype(np.float32)  # what is not valid must not be read
    values = np.where(valid[:, None, :, None], values, 1e30).astype(np.float32)
    tiers = []
    for slots, share in case.tiers:
        _, k, v, live = make_source(rng, batch, rows, 1, size, slots, share)[:4]
        order = np.argsort(rng.random((batch, rows, base)), axis=-1)[..., :slots].astype(np.int32)
        source = Source(normal(batch, rows, group, length, size), k, v, live)
        tiers.append(TierSource(source, np.where(live, order, -1).astype(np.int32)))
    options = {
        "positions": positions.astype(np.int32),
        "valid": valid,
        "segments": rng.integers(-1, 3, (batch, length)).astype(np.int32) if case.segments else None,
        "causal": case.causal,
        "window": case.window,
        "scale": 0.6,
        "softcap": case.softcap,
    }
    return (queries, keys, values, tuple(tiers)), options


def call_extend(arguments, options, **more):
    as_jax = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x
    queries, keys, values, tiers = arguments
    tiers = tuple(TierSource(Source(*map(jnp.asarray, t.source[:4])), jnp.asarray(t.positions)) for t in tiers)
    options = {name: as_jax(value) for name, value in options.items()}
    return extend_attention(*map(jnp.asarray, (queries, keys, values)), tiers, **options, **more)


@pytest.mark.parametrize("name", EXTEND)
def test_extend(name):
    case = EXTEND[name]
    arguments, options = make_extend(case, len(name))
    length = case.shape[3]
    weights = np.random.default_rng(1).random(length).astype(np.float32)  # so that a row taken for another shows
    padded = jnp.pad(jnp.asarray(weights), (0, length))

    def row_statistic(p, visible, live, start, own):
        p = p.mean(axis=2)
        rows = jnp.where(start + jnp.arange(p.shape[2]) < length, padded[start + jnp.arange(p.shape[2])], 0.0)
        crowd = jnp.where(visible, live[..., None], 0).astype(jnp.float32)
        return {"share": jnp.einsum("bpts,t->bps", p, rows), "crowd": jnp.einsum("bpts,t->bps", crowd, rows)}

    out, statistics = call_extend(arguments, options, block=case.block, row_statistic=row_statistic, merge=ADD)
    expected, shares, visible = extend_reference.extend_attention(*arguments, **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION)
    live = sum(see.sum(axis=-1) for see in visible)
    for statistic, share, see in zip(statistics, shares, visible, strict=True):
        summed = np.einsum("bpgts,t->bps", share, weights) / case.shape[2]
        np.testing.assert_allclose(statistic["share"], summed, rtol=0, atol=tolerances.STATISTIC)
        crowd = np.einsum("bpts,t->bps", see * live[..., None], weights)
        np.testing.assert_allclose(statistic["crowd"], crowd, rtol=tolerances.CROWD, atol=tolerances.STATISTIC)
    if name == "all dead":
        assert not np.asarray(out).any() and not any(np.asarray(s["share"]).any() for s in statistics)


def test_extend_without_statistics():
    arguments, options = make_extend(EXTEND["window and tiers"], 0)
    out, statistics = call_extend(arguments, options, row_statistic=None, merge=None)
    assert statistics == (None, None, None)
    expected, _, _ = extend_reference.extend_attention(*arguments, **options)
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION)


WRONG = {
    "zeros": {},
    "keys as values": {},
    "new keys as values": {},
    "tier queries": {},
    "causal off by one": {},
    "scale dropped": {"scale": 1.0},
    "window one longer": {"window": 6},
    "window one shorter": {"window": 4},
    "no window": {"window": None},
    "not causal": {"causal": False},
    "no segments": {"segments": None},
    "no cap": {"softcap": None},
    "pads seen": {},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_extend_tolerance_sees(wrong):
    case = Extend(shape=(2, 2, 3, 11, 8), tiers=((6, 1.0),), window=5, segments=True, softcap=1.5)
    arguments, options = make_extend(case, 3)
    queries, keys, values, (((q, k, v, live, *_), _),) = arguments
    options["valid"] = np.broadcast_to(np.arange(11) != 4, (2, 11))
    tier_positions = np.broadcast_to(np.arange(12, 18, dtype=np.int32), (2, 2, 6))  # the queries start at 18
    tier = TierSource(Source(q, k, v, live), tier_positions)
    good, _, _ = extend_reference.extend_attention(queries, keys, values, (tier,), **options)
    options |= WRONG[wrong]
    if wrong == "keys as values":
        tier = TierSource(Source(q, k, np.swapaxes(k, 2, 3), live), tier_positions)
    elif wrong == "new keys as values":
        values = keys
    elif wrong == "tier queries":
        tier = TierSource(Source(queries, k, v, live), tier_positions)
    elif wrong == "causal off by one":
        keys, values = np.roll(keys, 1, axis=2), np.roll(values, 1, axis=2)
    elif wrong == "pads seen":
        options["valid"] = np.ones((2, 11), bool)
    bad, _, _ = extend_reference.extend_attention(queries, keys, values, (tier,), **options)
    bad = 0 * bad if wrong == "zeros" else bad
    assert np.abs(good - bad).max() > tolerances.VISIBLE


def test_rows_of_one_head_are_one_long_row():
    """Both operations over block rows with owners give what they give over each head's slots in one row."""
    rng, owner = np.random.default_rng(5), np.asarray([[1, 0, 1], [0, 1, 1]], np.int16)
    queries, k, v, live = (jnp.asarray(x) for x in make_source(rng, 2, 3, 2, 8, 6, 0.7)[:4])
    queries, new = queries[:, :2], make_source(rng, 2, 2, 2, 8, 1, 1.0)
    joined = lambda x, axis, fill: np.stack([
        [np.concatenate([x[b, p] if owner[b, p] == head else np.full_like(x[b, p], fill) for p in range(3)], axis)
         for head in range(2)] for b in range(2)
    ])  # fmt: skip
    own = Source(queries, *map(jnp.asarray, new[1:4]))
    of_rows = Source(to_rows(queries, jnp.asarray(owner)), k, v, live, owner=jnp.asarray(owner))
    whole = Source(queries, joined(k, -1, 0.0), joined(v, -2, 0.0), joined(live, -1, False))
    (out, shares), (expected, wanted) = (
        decode_attention((source, own), scale=0.6, softcap=1.5) for source in (of_rows, whole)
    )
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION)
    np.testing.assert_allclose(shares[1], wanted[1], rtol=0, atol=tolerances.ATTENTION)
    for (b, p), head in np.ndenumerate(owner):
        mine = np.asarray(wanted[0])[b, head, :, 6 * p : 6 * p + 6]
        np.testing.assert_allclose(shares[0][b, p], mine, rtol=0, atol=tolerances.ATTENTION)
    length = 5
    spread = lambda x: jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], length, x.shape[3]))
    keys, values = (jnp.asarray(rng.standard_normal((2, 2, length, 8)), jnp.float32) for _ in range(2))
    options = dict(
        positions=jnp.broadcast_to(jnp.arange(9, 9 + length, dtype=jnp.int32), (2, length)), segments=None, causal=True,
        valid=jnp.ones((2, length), bool), window=None, scale=0.6, softcap=None, merge=lambda a, b: a + b, block=4,
        row_statistic=lambda p, visible, live, start, own: p.sum(axis=(2, 3)) + live.sum(axis=-1).astype(p.dtype)[..., None],
    )  # fmt: skip
    results = [
        extend_attention(
            spread(queries), keys, values,
            (TierSource(s._replace(queries=spread(s.queries)), jnp.zeros(s.live.shape, jnp.int32)),), **options,
        )
        for s in (of_rows, whole)
    ]  # fmt: skip
    (out, (tier, own)), (expected, (wanted, also)) = results
    np.testing.assert_allclose(out, expected, rtol=0, atol=tolerances.ATTENTION)
    np.testing.assert_allclose(own, also, rtol=0, atol=tolerances.STATISTIC)
    for (b, p), head in np.ndenumerate(owner):
        mine = np.asarray(wanted)[b, head, 6 * p : 6 * p + 6]
        np.testing.assert_allclose(tier[b, p], mine, rtol=0, atol=tolerances.STATISTIC)


def test_an_implementation_that_does_not_exist():
    with pytest.raises(ValueError, match="'cuda'; it has: tpu, gpu, interpret, xla"):
        decode_attention((), scale=1.0, softcap=None, implementation="cuda")
