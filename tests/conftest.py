"""Fixtures shared by the tests."""

import os

import jax
import pytest

pytest.register_assert_rewrite("cache_harness", "command_harness")

import cache_harness  # noqa: E402
from command_harness import alphabet, command, generate, heard, interrupt  # noqa: E402, F401 fixtures

from infer.evaluate.run import spare_mappings  # noqa: E402
from jaxkv.checkpoints import CheckpointError  # noqa: E402
from jaxkv.checkpoints.named import find_named  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """After a module, a worker that has compiled very much forgets its programs; else XLA would run out of mappings."""
    yield
    if spare_mappings():
        cache_harness.TRACES.clear()  # what is made again is traced again


@pytest.fixture(scope="session")
def smollm2():
    """The file of the real model. A machine without its package skips the test; continuous integration fails it."""
    try:
        return find_named("smollm2")
    except CheckpointError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def compilers_python():
    """An interpreter with XLA's compilers for TPU and NVIDIA GPUs, for `tpu_compile` and `hopper_compile`. Without one, the
    test is skipped; continuous integration fails it."""
    path = os.environ.get("JAXKV_COMPILERS_PYTHON")
    if path and os.path.exists(path):
        return path
    reason = (
        f"no interpreter with the compilers of TPU and GPU at JAXKV_COMPILERS_PYTHON={path}: `make slow` installs it"
    )
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
