"""The GPU kernel of `decode_attention`: by the GPU interpreter against the reference, and as machine code for Hopper."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import tolerances
from decode_cases import Case, TierCase, make, shapes
from hopper_compile import compile_for_hopper
from test_decode_kernel import given

from pallas_kernels.decode_attention import decode_attention, gpu, reference
from pallas_kernels.dispatch import call, chosen

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the GPU interpreter of this JAX lacks the kernel's operations"
)


def case(*tiers, group=3, channels=64, batch=1, dtype="float32", owners=False):
    of = lambda words: TierCase(slots=int(words[0]), scheme=words[1], live=words[2])
    return Case(
        group=group, channels=channels, batch=batch, dtype=dtype, owners=owners, bias=False,
        tiers=tuple(of(tier.split()) for tier in tiers),
    )  # fmt: skip


NUMERIC = {  # every scheme that the kernel reads; blocks that are full, cut short, dead; several splits
    "4 bits": case("272 int4 some"),
    "bfloat16 and 3 bits": case("144 bf16 some", "80 int3 some", channels=128),
    "8 bits, bfloat16 queries": case("256 int8 some", dtype="bfloat16", group=1),
    "3 bits, two groups": case("144 int3 some", channels=128, group=8),
    "2 bits, owners": case("128 int2 some", owners=True),
    "codebooks": case("80 rotated4 some", "128 rotated3 full", "64 rotated2 one", channels=128),
    "codebooks, narrow heads": case("80 rotated4 some", "64 rotated2 one"),
    "dead and one": case("128 int4 dead", "640 bf16 one", channels=128, group=4, batch=2),
    "nine heads": case("144 int8 some", group=9),
    "all dead": case("128 int8 dead"),
}
FAST = "4 bits"


def check(one, sources, atol):
    options = {"scale": one.scale, "softcap": one.softcap}
    assert gpu.why_not(sources) is None
    out, probabilities = gpu.decode_attention(given(sources), **options, interpret=True)
    expected, shares = reference.decode_attention(sources, **options)
    assert out.dtype == one.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=atol)
    for p, share in zip(probabilities, shares, strict=True):
        np.testing.assert_allclose(p, share, rtol=0, atol=atol)


def tolerance(one):
    rounded = one.dtype == "bfloat16" or any("rotated" in tier.scheme for tier in one.tiers)
    return tolerances.DECODE_GPU["bfloat16" if rounded else "float32"]


@interpreted
@pytest.mark.parametrize("name", [FAST, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in NUMERIC if n != FAST)])
def test_numbers(name):
    one = NUMERIC[name]
    check(one, make(one), tolerance(one))


@interpreted
@pytest.mark.exhaustive
def test_tolerance_sees_a_wrong_kernel():
    """Keys for values, a mask off by one, a scale and a zero dropped."""
    one = case("144 int8 some")
    sources = make(one)
    stored = sources[0]
    wrong = {
        "keys for values": stored._replace(values=stored.keys),
        "mask": stored._replace(live=np.roll(stored.live, 1, axis=-1)),
        "scale": stored._replace(keys=stored.keys._replace(scale=np.full_like(stored.keys.scale, 0x3C80))),
        "zero": stored._replace(values=stored.values._replace(zero=np.zeros_like(stored.values.zero))),
    }
    expected, _ = reference.decode_attention(sources, scale=one.scale, softcap=one.softcap)
    for name, other in wrong.items():
        out, _ = gpu.decode_attention(
            given((other, *sources[1:])), scale=one.scale, softcap=one.softcap, interpret=True
        )
        off = np.abs(np.nan_to_num(np.asarray(out, np.float64), nan=np.inf) - expected).max()
        assert off > 10 * tolerances.DECODE_GPU["float32"], name


REFUSED = {
    "128 f32 some": "of float32 would lose precision as bfloat16, which the kernel multiplies in",
    "128 fp8_e4m3 some": "are decoded by bitcast_convert_type",
    "128 kivi4 some": "keys whose factors belong to one channel of 32 slots are not read by this kernel",
    "127 int4 some": "so slots must be a multiple of 16, got 127",
    "1 int4 some": "no source has 64 slots or more",
}


@pytest.mark.parametrize("tier", REFUSED)
def test_what_it_cannot_do_it_says(tier):
    assert REFUSED[tier] in gpu.why_not(shapes(case(tier)))


def test_heads_and_biases_that_it_refuses():
    assert "64, 128 or 256 channels, got 96" in gpu.why_not(shapes(case("128 int4 some", channels=96)))
    assert "of 3 bits are taken" in gpu.why_not(shapes(case("128 int3 some")))  # the compiler fails
    assert "at most 32 query heads" in gpu.why_not(shapes(case("128 int4 some", group=33)))
    biased = dataclasses.replace(case("128 int4 some"), bias=True)
    assert "a bias per slot" in gpu.why_not(shapes(biased))


@pytest.mark.parametrize("group, dtype", [(32, "bfloat16"), (16, "bfloat16"), (8, "float32")])
def test_blocks_that_shared_memory_does_not_hold(group, dtype):
    """Of int8, with the logits' place: said before the compiler of the kernel fails, and then XLA runs."""
    large = shapes(case("128 int8 some", channels=256, group=group, dtype=dtype))
    assert f"{group} query heads of 256 channels take " in gpu.why_not(large)
    table = decode_attention.__globals__["IMPLEMENTATIONS"]
    options = {"scale": 1.0, "softcap": None, "scores": True}
    assert chosen("decode_attention", table, None, large, platform="cuda", **options) == "xla"
    lowered(large, "xla")
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lowered(large, gpu.decode_attention)


def test_blocks_that_shared_memory_holds():
    """The largest of these that does."""
    most = shapes(case("128 int8 some", channels=256, group=8, dtype="bfloat16"))
    assert gpu.why_not(most) is None
    lowered(most, gpu.decode_attention)


def lowered(sources, run):
    """For GPUs. run: an implementation's name, or a function in its place."""
    leaves, tree = jax.tree.flatten(sources)
    at = [number for number, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]
    direct = lambda op, table, sources, **options: run(sources, **options)

    def attend(*arrays):
        given = dict(zip(at, arrays, strict=True))
        filled = jax.tree.unflatten(tree, [given.get(number, leaf) for number, leaf in enumerate(leaves)])
        return decode_attention(filled, scale=1.0, softcap=None, implementation=run if isinstance(run, str) else direct)

    jax.jit(attend).trace(*(leaves[number] for number in at)).lower(lowering_platforms=("cuda",))


def test_other_generations_run_xla(monkeypatch):
    sources = shapes(case("128 int4 some"))
    table = decode_attention.__globals__["IMPLEMENTATIONS"]
    options = {"scale": 1.0, "softcap": None, "scores": True}
    assert chosen("decode_attention", table, None, sources, platform="cuda", **options) == "gpu"
    monkeypatch.setattr(gpu, "device_of", lambda platform: types.SimpleNamespace(compute_capability="10.0"))
    assert chosen("decode_attention", table, None, sources, platform="cuda", **options) == "xla"
    with pytest.raises(NotImplementedError, match="need a Hopper GPU, of compute capability 9.0; this one has 10.0"):
        call("decode_attention", table, "gpu", sources, **options)


MACHINE = [
    "decode:bf16,bf16,128,bfloat16,4",
    "decode:bf16,bf16,64,float32,3",
    "decode:bf16,bf16,256,float32,8",
    "decode:int8,int8,128,bfloat16,4",
    "decode:int8,int8,64,float32,3",
    "decode:int4,int4,128,float32,8,30",
    "decode:int4,int4,128,bfloat16,4",
    "decode:int4,bf16,128,float32,16",
    "decode:int3,int3,128,float32,8,30",
    "decode:int2,rotated2,128,float32,4",
    "decode:rotated4,rotated4,128,float32,32,30",
    "decode:rotated4,rotated3,128,bfloat16,1",
    "decode:rotated4,rotated2,64,bfloat16,1",
    "decode:int8,rotated4,256,float32,8",
]


@pytest.mark.exhaustive
def test_machine_code(compilers_python):
    """Down to what an H100 runs, with no register spilled and no copy of a tier in the program."""
    found = compile_for_hopper(compilers_python, MACHINE)
    for name, one in found.items():
        assert one.error is None, (name, one.error)
        assert one.kernels == 1 and one.registers and max(one.registers) <= 255, (name, one)
        assert set(one.spills) == {0}, (name, one.spills)
        assert not one.copied, (name, one.copied)


@pytest.mark.exhaustive
def test_decode_loop_keeps_the_cache_in_place(compilers_python):
    (one,) = compile_for_hopper(compilers_python, ["loop:int4,int4,128,bfloat16,4"]).values()
    assert one.error is None, one.error
    assert one.kernels == 1 and set(one.spills) == {0}
    assert one.alias > 0.97 * one.arguments  # all but queries and the new token
    assert not one.copied
