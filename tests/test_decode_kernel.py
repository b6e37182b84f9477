"""The TPU kernel of `decode_attention`, run as ordinary operations, against the float64 reference; table: `decode_cases`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from decode_cases import CASES, make

from pallas_kernels.decode_attention import decode_attention, reference


def given(sources):
    return tuple(
        jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, source) for source in sources
    )


def check(case, implementation, *, sources=None, scores=True):
    sources = make(case) if sources is None else sources
    options = {"scale": case.scale, "softcap": case.softcap}
    out, probabilities = decode_attention(given(sources), **options, implementation=implementation)
    expected, shares = reference.decode_attention(sources, **options)
    atol = tolerances.DECODE[case.dtype]
    assert out.dtype == case.dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=atol)
    for p, share in zip(probabilities, shares, strict=True):
        np.testing.assert_allclose(p, share, rtol=0, atol=atol)
    return out


@pytest.mark.parametrize("implementation", ["interpret", "xla"])
@pytest.mark.parametrize("name", CASES)
def test_case(name, implementation):
    check(CASES[name], implementation)
