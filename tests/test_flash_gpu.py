"""The GPU kernel of flash attention: by the GPU interpreter against float64, and as machine code for Hopper."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from hopper_compile import compile_for_hopper

from pallas_kernels.flash_attention import gpu


def expected(q, k, v, *, causal, scale, softcap, late=0):
    """out and log-sum-exp in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = scale * np.einsum("bkgth,bksh->bkgts", q, k)
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    if causal:
        queries, keys = np.arange(q.shape[3]) + k.shape[2] - q.shape[3] + late, np.arange(k.shape[2])
        logits = np.where(keys <= queries[:, None], logits, -np.inf)
    top = logits.max(axis=-1, keepdims=True)
    p = np.exp(logits - top)
    total = p.sum(axis=-1, keepdims=True)
    return np.einsum("bkgts,bksh->bkgth", p / total, v), (top + np.log(total))[..., 0]


CASES = {  # G, T, S, H, causal, softcap
    "causal": (2, 128, 384, 64, True, None),
    "causal, square": (1, 256, 256, 128, True, 2.0),
    "full": (1, 128, 256, 64, False, None),
}


@pytest.mark.exhaustive
@pytest.mark.skipif(
    jax.__version_info__ < (0, 12), reason="the GPU interpreter of this JAX lacks the kernel's operations"
)
@pytest.mark.parametrize("name", CASES)
def test_numbers(name):
    group, length, slots, size, causal, softcap = CASES[name]
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal((1, 1, *shape, size)), jnp.bfloat16)
    q, k, v = normal(group, length), normal(slots), normal(slots)
    options = {"causal": causal, "scale": 0.2, "softcap": softcap}
    out, lse = gpu.forward(q, k, v, **options, interpret=True)
    wanted, sums = expected(q, k, v, **options)
    np.testing.assert_allclose(np.asarray(out, np.float64), wanted, rtol=0, atol=tolerances.FLASH_GPU)
    np.testing.assert_allclose(lse, sums, rtol=0, atol=tolerances.FLASH_GPU_LSE)
    for wrong in (expected(q, k, k, **options), expected(q, k, v, **options | {"scale": 0.15})):
        assert np.abs(wrong[0] - wanted).max() > 10 * tolerances.FLASH_GPU
    if causal and length == slots:  # the first queries see few keys: one more shows
        late, _ = expected(q, k, v, **options, late=1)
        assert np.abs(late - wanted).max() > 10 * tolerances.FLASH_GPU


def refusal(dtype="bfloat16", length=128, slots=128, size=64, window=(None, None), **more):
    shape = lambda *axes: jax.ShapeDtypeStruct((1, 1, *axes), jnp.dtype(dtype))
    given = {"q": shape(1, length, size), "k": shape(slots, size), "v": shape(slots, size)}
    given |= {"query_segments": None, "relative_q": None} | more
    return gpu.why_not(types.SimpleNamespace(**given), rule=types.SimpleNamespace(window=window))


def test_what_it_cannot_do_it_says():
    assert refusal() is None
    assert "must be bfloat16, got float32" in refusal(dtype="float32")
    assert "64 or 128 channels, got 96" in refusal(size=96)
    assert "multiples of 128, got 100 and 128" in refusal(length=100)
    assert "windows, segments" in refusal(window=(4, None))
    assert "windows, segments" in refusal(query_segments=object())


@pytest.mark.exhaustive
def test_machine_code(compilers_python):
    found = compile_for_hopper(compilers_python, ["flash:128,causal", "flash:64,full", "flash:128,full,30"])
    for name, one in found.items():
        assert one.error is None and one.kernels == 1 and set(one.spills) == {0}, (name, one)
