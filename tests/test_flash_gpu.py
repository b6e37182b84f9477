"""The GPU kernel of flash attention: by the GPU interpreter against float64, and as machine code for Hopper."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from flash_cases import Case, cast, make
from hopper_compile import compile_for_hopper

from pallas_kernels.flash_attention import checked_inputs, fold, gpu, reference
from pallas_kernels.flash_attention.operands import Operands

bf16 = functools.partial(Case, dtype="bfloat16", query_temperature=None, value_temperature=None, relative=None)
plain = functools.partial(bf16, segments=None, batch=1)
CASES = {
    "causal": plain(group=2, size=64, length=128, more=256, view="causal", softcap=None),
    "causal, square, capped": plain(group=1, size=128, length=256, more=0, view="causal", softcap=2.0),
    "all, no whole blocks": plain(group=1, size=64, length=100, more=65, view="all", softcap=None),
    "window": plain(group=1, size=128, length=200, more=0, view="window", softcap=None),
    "segments": bf16(
        group=1, size=64, length=128, more=37, batch=1, view="causal", segments="ids", softcap=None
    ),
    "positions": bf16(
        group=1, size=64, length=40, more=30, batch=5, view="behind and ahead", segments="dead", softcap=None
    ),
}  # fmt: skip
ONE_MORE = {  # key that a query sees, than in the views of `flash_cases`
    "causal": {"causal": False, "window": (None, 2)}, "window": {"window": 51}, "behind and ahead": {"window": (91, 30)},
}  # fmt: skip


@pytest.mark.exhaustive
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the GPU interpreter of this JAX lacks the kernel's operations"
)
@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    case = CASES[name]
    q, k, v, options = make(case)
    q, k, v, options = cast(q, k, v, options | {"scale": 0.125}, jnp.bfloat16)  # what is folded into q rounds nothing
    names = ("window", "query_positions", "key_positions", "query_segments", "key_segments")
    x, rule = checked_inputs(
        *map(jnp.asarray, (q, k, v)), causal=options["causal"], softcap=case.softcap, relative=None, block=None,
        **{name: options.get(name) if name == "window" else as_array(options.get(name)) for name in names},
    )  # fmt: skip
    x = fold(options["scale"], x, None, None)
    assert gpu.why_not(x) is None
    out, lse = gpu.forward(x, rule=rule, interpret=True)
    wanted, sums, _ = reference.flash_attention(q, k, v, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=0, atol=tolerances.FLASH_GPU)
    np.testing.assert_allclose(lse, sums, rtol=0, atol=tolerances.FLASH_GPU_LSE)
    wrong = [(k, {}), (v, {"scale": 0.1})]
    if case.view in ONE_MORE and not (case.view == "causal" and case.more):  # where it shows: some queries see few keys
        wrong.append((v, ONE_MORE[case.view]))
    for values, changes in wrong:
        other, _, _ = reference.flash_attention(q, k, values, **options | changes)
        assert np.nanmax(np.abs(other - wanted)) > 10 * tolerances.FLASH_GPU


def as_array(x):
    return None if x is None else jnp.asarray(x)


def test_what_it_cannot_do_it_says():
    shape = lambda *axes, dtype="bfloat16": jax.ShapeDtypeStruct((1, 1, *axes), jnp.dtype(dtype))
    of = lambda size=64, **kind: Operands(shape(1, 100, size, **kind), shape(37, size, **kind), shape(37, size, **kind))
    assert gpu.why_not(of()) is None
    assert "must be bfloat16, got float32" in gpu.why_not(of(dtype="float32"))
    assert "64 or 128 channels, got 96" in gpu.why_not(of(96))
    assert "relative positions" in gpu.why_not(of()._replace(relative_q=shape(1, 100, 64)))


MACHINE = [
    "flash:128,causal", "flash:64,all", "flash:128,all,512,512,30", "flash:128,window", "flash:64,all+segments,1,500",
    "flash:128,behind and ahead+segments+positions", "flash:128,causal+segments,512,512,30",
]  # fmt: skip


@pytest.mark.exhaustive
def test_machine_code(compilers_python):
    found = compile_for_hopper(compilers_python, MACHINE)
    for name, one in found.items():
        assert one.error is None and one.kernels == 1 and set(one.spills) == {0}, (name, one)
