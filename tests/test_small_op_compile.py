"""The TPU kernels of `quantize` and `causal_conv` through the compiler of TPU, on any machine."""

import importlib.util
import os

import pytest
from small_op_compile import CONVOLVE, QUANTIZE, TOPOLOGIES, compile_for_tpu

from jaxkv.quantization import SCHEMES

ENCODED = [
    ("quantize", f"{name}.{scheme.name}")
    for name, (shape, _) in QUANTIZE.items()
    for scheme in SCHEMES.values()
    if scheme.how and shape[2] % scheme.granule == 0
]
CONVOLVED = [(program, name) for name in CONVOLVE for program in ("causal_conv", "gradients")]
EVERY = [(*job, topology) for job in [*ENCODED, *CONVOLVED] for topology in TOPOLOGIES]
TURNS = [(*job, TOPOLOGIES[number % 3]) for number, job in enumerate([*ENCODED[::3], *CONVOLVED])]


def check(jobs):
    if importlib.util.find_spec("libtpu") is None:
        why = "needs libtpu, the compiler of TPU"
        pytest.fail(why) if os.environ.get("CI") else pytest.skip(why)
    found = compile_for_tpu(jobs)
    assert list(found) == list(jobs)
    for job, result in found.items():
        assert result["error"] is None, f"{job}: {result['error']}"
        assert result["kernels"] == {"quantize": 1, "causal_conv": 1, "gradients": 2}[job[0]], job


def test_some_compile():
    """Every third encoding and every convolution, each for one chip."""
    check(TURNS)


@pytest.mark.slow
def test_all_compile_for_every_chip():
    check([job for job in EVERY if job not in TURNS])
