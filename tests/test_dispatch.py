"""The choice of an implementation: by platform, by name, and never in silence."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.dispatch import Implementation, call, chosen, takes_all


def named(number, **kind):
    return Implementation(lambda x, *, scale, turn: turn(x) * scale + number, takes_all, **kind)


TABLE = {
    "mosaic": named(1000, platform="tpu"),
    "hopper": Implementation(named(2000).run, lambda x, **_: "x is too short" if x.size < 4 else None, platform="cuda"),
    "interpret": named(1000, by_name_only=True),
    "xla": named(0),
}


def run(x, implementation=None):
    return call("op", TABLE, implementation, x, scale=2.0, turn=jnp.negative)


def test_the_platform_compiled_for_decides():
    x = jnp.ones((4,))
    assert run(x).tolist() == jax.jit(run)(x).tolist() == [-2.0] * 4
    for platform, constant in (("cpu", None), ("tpu", "1.000000e+03"), ("cuda", "2.000000e+03")):
        text = jax.jit(run).trace(x).lower(lowering_platforms=(platform,)).as_text()
        for other in ("1.000000e+03", "2.000000e+03"):
            assert (other in text) == (other == constant), platform


def test_what_refuses_a_case_is_not_chosen_for_it():
    text = jax.jit(run).trace(jnp.ones((3,))).lower(lowering_platforms=("cuda",)).as_text()
    assert "2.000000e+03" not in text
    assert chosen("op", TABLE, None, jnp.ones((3,)), platform="cuda") == "xla"
    assert chosen("op", TABLE, None, jnp.ones((4,)), platform="cuda") == "hopper"


def test_gradients_pass_through_the_choice():
    assert jax.grad(lambda x: run(x).sum())(jnp.ones((4,))).tolist() == [-2.0] * 4


def test_a_named_one_runs_or_says_why_not():
    assert run(jnp.ones((2,)), "interpret").tolist() == [998.0] * 2
    assert chosen("op", TABLE, None, jnp.ones((4,)), platform="tpu") == "mosaic"
    with pytest.raises(NotImplementedError, match="op: implementation 'hopper' cannot take this case: x is too short"):
        run(jnp.ones((2,)), "hopper")
    with pytest.raises(ValueError, match="op has no implementation 'triton'; it has: mosaic, hopper, interpret, xla"):
        run(jnp.ones((2,)), "triton")
