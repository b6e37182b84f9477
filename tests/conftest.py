"""Fixtures shared by the tests."""

import os

import jax
import pytest

from jaxkv.checkpoints import CheckpointError
from jaxkv.checkpoints.named import find_named

pytest.register_assert_rewrite("cache_harness")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2():
    """The file of the real model. A machine without its package skips the test; continuous integration fails it."""
    try:
        return find_named("smollm2")
    except CheckpointError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
