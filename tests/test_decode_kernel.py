"""The TPU kernel of `decode_attention`, run as ordinary operations, against the float64 reference; table: `decode_cases`."""

import dataclasses
import functools
import itertools
import types

import cache_harness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import MIXED, PARAMS, check_oracle, check_promises, make_case, new_state, run_case, small
from decode_cases import AXES, CASES, Case, TierCase, axes_of, make, pairs_of, possible
from jax.experimental.pallas import tpu as pltpu

from jaxkv import quantization
from jaxkv.cache import decode
from jaxkv.quantization import kivi
from pallas_kernels.decode_attention import IMPLEMENTATIONS, Packed, Source, decode_attention, reference, tpu
from pallas_kernels.dispatch import chosen

QUICK = 4  # every fourth case runs in the quick tests


def attend(sources, case, *, implementation="interpret", scores=True, run=decode_attention):
    """`decode_attention` of numpy arrays as one program; the compiler does not optimize what runs once."""
    leaves, tree = jax.tree.flatten(sources)
    at = [number for number, leaf in enumerate(leaves) if isinstance(leaf, np.ndarray)]

    def program(*arrays):
        filled = list(leaves)
        for number, array in zip(at, arrays, strict=True):
            filled[number] = array
        options = {} if implementation is None else {"implementation": implementation}
        sources = jax.tree.unflatten(tree, filled)
        return run(sources, scale=case.scale, softcap=case.softcap, scores=scores, **options)

    arrays = [leaves[number] for number in at]
    quickly = {"xla_backend_optimization_level": 0}
    return jax.jit(program).trace(*arrays).lower().compile(quickly)(*arrays)


def assert_near(found, expected, dtype):
    """Outputs and probabilities."""
    (out, probabilities), (mean, shares) = found, expected
    np.testing.assert_allclose(np.asarray(out, np.float64), mean, rtol=0, atol=tolerances.DECODE[dtype])
    for p, share in zip(probabilities, shares, strict=True):
        np.testing.assert_allclose(p, share, rtol=0, atol=tolerances.DECODE_SHARES[dtype])


def expected_of(sources, case):
    return reference.decode_attention(sources, scale=case.scale, softcap=case.softcap)


def some_slow(names):
    return [name if n % QUICK == 0 else pytest.param(name, marks=pytest.mark.slow) for n, name in enumerate(names)]


@pytest.mark.parametrize("name", some_slow(CASES))
def test_case(name):
    case = CASES[name]
    sources = make(case)
    found = attend(sources, case)
    assert found[0].dtype == case.dtype and all(p.dtype == jnp.float32 for p in found[1])
    assert_near(found, expected_of(sources, case), case.dtype)


@pytest.mark.parametrize("name", [name for n, name in enumerate(CASES) if n in (3, 14, 22)])
def test_case_in_xla(name):
    """Owners and biases, which `test_attention_ops` does not give it."""
    case = CASES[name]
    sources = make(case)
    assert_near(attend(sources, case, implementation="xla"), expected_of(sources, case), case.dtype)


def test_every_pair_occurs():
    """Of values of two axes, in some tier of the table, where both can be."""
    assert len(CASES) <= 40
    wanted = set()
    for values in itertools.product(*AXES.values()):
        axes = dict(zip(AXES, values, strict=True))
        if possible(axes["G"], axes["H"], axes["B"], axes["S"], axes["scheme"]):
            wanted |= pairs_of(axes)
    seen = set().union(*(pairs_of(axes_of(case, tier)) for case in CASES.values() for tier in case.tiers))
    assert wanted <= seen
    for case in CASES.values():
        for tier in case.tiers:
            assert possible(case.group, case.channels, case.batch, tier.slots, tier.scheme)


SCHEMES = AXES["scheme"]


def one_tier(scheme, dtype="float32", slots=128, live="some", **more):
    """A case beside the table: one tier, as it occurs most."""
    tier = TierCase(slots=slots, scheme=scheme, live=live)
    options = {"group": 3, "channels": 64, "batch": 1, "owners": False, "bias": False} | more
    return Case(dtype=dtype, tiers=(tier,), **options)


@pytest.mark.parametrize("scheme, slots", [
    ("int8", 640), ("rotated3", 640), ("f32", 384), ("kivi4", 640), ("kivi2", 4736),
])  # fmt: skip
def test_many_blocks(scheme, slots, monkeypatch):
    """Of 128 slots, some without a live one; of kivi's factors the last columns are no whole block."""
    monkeypatch.setattr(tpu, "BLOCK", 128 * 128)
    case = one_tier(scheme, slots=slots, live="full", bias=True, batch=2)
    sources = make(case)
    live = np.zeros_like(sources[0].live)
    live[0, 0, 130:140] = live[0, 1, :5] = live[0, 1, -200:-90] = True
    live[1, 1, -1] = True
    sources = (sources[0]._replace(live=live), *sources[1:])
    assert_near(attend(sources, case), expected_of(sources, case), case.dtype)


@pytest.mark.parametrize("scheme, slots, dtype", [("int4", 384, "bfloat16"), ("kivi2", 4736, "float32")])
def test_nothing_beyond_the_bounds(scheme, slots, dtype, monkeypatch):
    """The interpreter of TPU's memory raises for what ordinary operations would clamp, and uninitialized memory is NaN."""
    monkeypatch.setattr(tpu, "BLOCK", 256 * 128)
    case = one_tier(scheme, dtype, slots, bias=True)
    sources = make(case)
    run = functools.partial(tpu.decode_attention, interpret=pltpu.InterpretParams())
    assert_near(attend(sources, case, implementation=None, run=run), expected_of(sources, case), dtype)


def test_scores_only_if_asked_for():
    case = one_tier("int8")
    sources = make(case)
    (out, none), (also, _) = attend(sources, case, scores=False), attend(sources, case)
    assert none is None
    np.testing.assert_array_equal(out, also)
    assert decode_attention(given(sources), scale=1.0, softcap=None, scores=False)[1] is None


def given(sources):
    return tuple(
        jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, source) for source in sources
    )


WRONG = {
    "keys as values": lambda s: s._replace(values=s.keys if isinstance(s.keys, Packed) else np.swapaxes(s.keys, 2, 3)),
    "values as keys": lambda s: s._replace(keys=_as_keys(s.values)),
    "mask off by one": lambda s: s._replace(live=np.roll(s.live, 1, axis=2)),
    "scale of keys dropped": lambda s: s._replace(keys=_without(s.keys, "scale", 0x3F80)),
    "scale of values dropped": lambda s: s._replace(values=_without(s.values, "scale", 0x3F80)),
    "zero of keys dropped": lambda s: s._replace(keys=_without(s.keys, "zero", 0)),
    "zero of values dropped": lambda s: s._replace(values=_without(s.values, "zero", 0)),
    "bias dropped": lambda s: s._replace(bias=None),
    "factors off by one": lambda s: s._replace(keys=s.keys._replace(scale=np.roll(s.keys.scale, 1, axis=3))),
    "groups exchanged": lambda s: s._replace(values=s.values._replace(scale=s.values.scale[:, :, ::-1])),
}


def _as_keys(values):
    """Values where keys belong."""
    if not isinstance(values, Packed):
        return np.swapaxes(values, 2, 3)
    return values if values.slots_minor else values._replace(codes=np.swapaxes(values.codes, 2, 3), slots_minor=True)


def _without(stored, name, bits):
    """With the same factor everywhere."""
    return stored._replace(**{name: np.full_like(getattr(stored, name), bits)})


def _applies(wrong, source):
    """Whether the mistake can be made there."""
    for part in (source.keys, source.values):
        name = "keys" if part is source.keys else "values"
        if wrong.endswith(f"of {name} dropped"):
            return isinstance(part, Packed) and getattr(part, wrong.split()[0]) is not None
    packed = isinstance(source.keys, Packed) and source.keys.scale is not None
    if wrong == "factors off by one":
        return packed
    if wrong == "groups exchanged":
        return packed and source.values.scale.shape[2] > 1
    shared = isinstance(source.keys, Packed) and source.keys.granule > 1
    return not (wrong == "keys as values" and shared)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_tolerances_see_a_wrong_kernel(scheme, dtype):
    """Each mistake moves outputs or probabilities by at least five tolerances."""
    case = one_tier(scheme, dtype, live="full", bias=True, channels=128)
    whole = make(case)
    source = whole[0]._replace(live=make(dataclasses.replace(case, tiers=one_tier(scheme).tiers))[0].live)
    good = expected_of((source, whole[1]), case)
    wrongs = {name: make_wrong(source) for name, make_wrong in WRONG.items() if _applies(name, source)}
    assert len(wrongs) >= 3 + (scheme not in ("f32", "bf16"))
    for name, wrong in wrongs.items():
        out, shares = expected_of((wrong, whole[1]), case)
        moved = np.abs(out - good[0]).max() / tolerances.DECODE[dtype]
        moved = max(moved, np.abs(shares[0] - good[1][0]).max() / tolerances.DECODE_SHARES[dtype])
        assert moved > 5, name


def test_what_the_kernel_refuses():
    shape = lambda *axes, dtype="float32": jax.ShapeDtypeStruct((1, 1, *axes), dtype)
    source = lambda slots, dtype="float32": Source(
        shape(4, 128), shape(128, slots, dtype=dtype), shape(slots, 128, dtype=dtype), shape(slots, dtype="bool")
    )
    named = lambda *sources, by="interpret": chosen("decode_attention", IMPLEMENTATIONS, by, sources)
    for slots in (1, 40, 127, 2047, 2048, 2176, 131072):
        assert named(source(slots)) == "interpret"
        assert chosen("decode_attention", IMPLEMENTATIONS, None, (source(slots),), platform="tpu") == "tpu"
    assert chosen("decode_attention", IMPLEMENTATIONS, None, (source(2049),), platform="tpu") == "xla"
    with pytest.raises(NotImplementedError, match="source 1: 2049 slots of 128 channels.*make them a multiple of 128"):
        named(source(128), source(2049))
    with pytest.raises(NotImplementedError, match="keys are float16; the kernel takes"):
        named(source(128, "float16"))
    wide = Packed(shape(64, 128, dtype="uint8"), 4, lambda x: x, scale=shape(1, 128))
    with pytest.raises(NotImplementedError, match="factors of values are float32; the kernel reads bfloat16 bits"):
        named(source(128)._replace(values=wide))
    with pytest.raises(NotImplementedError, match="keys have codes of 1 bits"):
        named(source(128)._replace(keys=wide._replace(bits=1)))
    assert chosen("decode_attention", IMPLEMENTATIONS, None, (source(128),), platform="cuda") == "xla"


@pytest.mark.parametrize(
    "chip, bits, runs", [("TPU v4", 2, "xla"), ("TPU v4", 3, "tpu"), ("TPU v4", 4, "tpu"), ("TPU v5 lite", 2, "tpu")]
)
def test_chips_without_vectors_of_two_bits(chip, bits, runs, monkeypatch):
    case = Case(
        group=4, channels=128, batch=1, dtype="bfloat16", owners=False, bias=False,
        tiers=(TierCase(slots=128, scheme=f"rotated{bits}", live="full"),),
    )  # fmt: skip
    monkeypatch.setattr(tpu, "device_of", lambda platform: types.SimpleNamespace(device_kind=chip))
    sources = make(case)
    assert chosen("decode_attention", IMPLEMENTATIONS, None, sources, platform="tpu") == runs
    reason = "source 0: keys have codes of 2 bits, and the compiler for TPU v4 has no vectors of those."
    assert tpu.why_not(sources) == (reason if runs == "xla" else None)


# The cache

KERNEL = dataclasses.replace(MIXED, kernels="interpret")
TIERS = {
    "exact over rotated": ("f32", "rotated4", "rotated2"),
    "three down": ("bf16", ("int4", "rotated3"), ("fp8_e5m2", "int2")),
    "groups over groups": ("f32", ("balanced-kivi4-by-4", "fp8_e4m3"), ("kivi2-by-4", "rotated3")),
}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("full", "scissorhands", "random", "tova")]


@pytest.mark.parametrize("name", ["h2o", *OTHERS])
def test_the_contract_of_the_cache(name):
    """Single tokens are read by the kernel; what is kept and what comes out is what the reference keeps and says."""
    case = make_case(0)
    results = run_case(small(name), case, KERNEL)
    check_promises(small(name), case, results, KERNEL)
    for row in range(cache_harness.B):
        same, margin = check_oracle(small(name), case, results, KERNEL, row)
        assert same, f"row {row}, margin {margin}"


@pytest.mark.slow
@pytest.mark.parametrize("tiers", ["three down", *list(TIERS)[::2]])
def test_a_chain_of_tiers(tiers, groups_of_four):
    """By the kernel and by XLA: the same tokens in the same slots, and the same hidden states."""
    limits = ((8, 4, 16, 1), (12, 4, 8, 4), (8, 16, 0, 4))
    case, options = make_case(1, limits=limits), {"slots": (20, 16, 16), "scheme": TIERS[tiers]}
    one, other = (run_case(small("recency"), case, config, **options) for config in (KERNEL, MIXED))
    for mine, theirs in zip(jax.tree.leaves(one[3]), jax.tree.leaves(other[3]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(one[2], other[2], rtol=0, atol=tolerances.HIDDEN_TIED)


@pytest.fixture
def groups_of_four(monkeypatch):
    for bits in (4, 2):
        scheme = dataclasses.replace(kivi.scheme(bits, 4), name=f"kivi{bits}-by-4")
        monkeypatch.setitem(quantization.SCHEMES, scheme.name, scheme)


@pytest.mark.parametrize("name", ["h2o", "recency"])
def test_the_kernel_is_in_the_program(name):
    """By name, and where the platform chooses only for TPU; logits leave it for a policy that wants probabilities."""
    policy = small(name)
    state = jax.eval_shape(lambda: new_state(policy, make_case(0).limits))
    token = jax.ShapeDtypeStruct((cache_harness.B,), jnp.int32)
    valid = jax.ShapeDtypeStruct((cache_harness.B,), bool)

    def traced(kernels):
        config = dataclasses.replace(MIXED, kernels=kernels)
        step = lambda params, token, state, valid: decode(params, token, state, config=config, valid=valid)
        return str(jax.make_jaxpr(step)(PARAMS, token, state, valid))

    text = traced("interpret")
    assert text.count("pallas_call[") == text.count("interpret=True") > 0 and "platform_index" not in text
    assert (f"f32[{cache_harness.B},2,2,{cache_harness.SLOTS}] = pallas_call" in " ".join(text.split())) == (
        name == "h2o"
    )
    text = traced(None)
    assert text.count("pallas_call[") == text.count("interpret=False") > 0 and "platform_index" in text
    assert "pallas_call[" not in traced("xla")
    assert policy.needs_attention == (name == "h2o")
