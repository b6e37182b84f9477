"""The TPU kernels of `quantize`, `causal_conv` and `slots` through the compiler of TPU, on any machine."""

import pytest
from small_op_compile import CONVOLVE, QUANTIZE, SLOTS, TOPOLOGIES, compile_for_tpu

from jaxkv.quantization import SCHEMES

ENCODED = [
    ("quantize", f"{name}.{scheme.name}")
    for name, (shape, _) in QUANTIZE.items()
    for scheme in SCHEMES.values()
    if scheme.how and shape[2] % scheme.granule == 0
]
CONVOLVED = [(program, name) for name in CONVOLVE for program in ("causal_conv", "gradients")]
MOVED = [("slots", name) for name in SLOTS]
EVERY = [(*job, topology) for job in [*ENCODED, *CONVOLVED, *MOVED] for topology in TOPOLOGIES]
TURNS = [(*job, TOPOLOGIES[number % 3]) for number, job in enumerate([*ENCODED[::3], *CONVOLVED, *MOVED])]


def check(python, jobs):
    found = compile_for_tpu(python, jobs)
    assert list(found) == list(jobs)
    for job, result in found.items():
        assert result["error"] is None, f"{job}: {result['error']}"
        assert result["kernels"] == {"quantize": 1, "causal_conv": 1, "gradients": 2, "slots": 2}[job[0]], job


@pytest.mark.slow
def test_some_compile(compilers_python):
    """Every third encoding, every convolution and slot, each for one chip."""
    check(compilers_python, TURNS)


@pytest.mark.exhaustive
def test_all_compile_for_every_chip(compilers_python):
    check(compilers_python, [job for job in EVERY if job not in TURNS])
