"""What kernels tell the compiler of their cost, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.column_sums import column_sums
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.quantize import quantize
from pallas_kernels.quantize.how import Rounded

LENGTH, SIZE, BLOCK = 256, 64, 128
PAIRS = 2 * 3 * BLOCK * BLOCK  # two query heads, three of four blocks under a causal mask
ARRAY = LENGTH * SIZE * 4  # bytes of a head
normal = lambda *shape: jnp.zeros(shape, jnp.float32)
q, k = normal(1, 1, 2, LENGTH, SIZE), normal(1, 1, LENGTH, SIZE)
relative = normal(1, 1, 2, LENGTH, 16), normal(1, 1, LENGTH, 16)


def attend(q, **more):
    options = {"causal": True, "scale": 1.0, "block": BLOCK, "implementation": "interpret"}
    return flash_attention(q, k, k, **options | more)[0]


def sums(q):
    options = {"causal": True, "scale": 1.0, "block": BLOCK, "implementation": "interpret"}
    return column_sums(q, k, normal(1, 1, 2, LENGTH), **options)


def costs(run, *args):
    """(flops, transcendentals, bytes) of the kernels of a program, in their order."""
    found, todo = [], [jax.make_jaxpr(run)(*args).jaxpr]
    while todo:
        for equation in todo.pop(0).eqns:
            if equation.primitive.name == "pallas_call":
                cost = equation.params["cost_estimate"]
                found.append((cost.flops, cost.transcendentals, cost.bytes_accessed))
            todo += [getattr(x, "jaxpr", x) for x in equation.params.values() if hasattr(x, "eqns")]
    return found


@pytest.mark.parametrize(
    ("run", "pairs", "products", "moved"),
    [  # moved: q, k, v, out and the log-sum-exp; None: not counted here
        (attend, PAIRS, 2 * SIZE, 6 * ARRAY + 2 * LENGTH * 4),
        (lambda q: attend(q, causal=False), 4 * PAIRS // 3, 2 * SIZE, 6 * ARRAY + 2 * LENGTH * 4),
        (lambda q: attend(q, relative=relative), PAIRS, 2 * SIZE + 2 * 16, None),
        (sums, PAIRS, SIZE, 3 * ARRAY + 3 * LENGTH * 4),
    ],
)
def test_attention(run, pairs, products, moved):
    ((flops, exponentials, bytes_),) = costs(run, q)
    assert (flops, exponentials) == (2 * pairs * products, pairs)
    assert moved is None or bytes_ == moved


def test_gradients_of_attention():
    """Of queries: logits again, their gradient, its product with the keys; of keys and values one product more."""
    found = sorted(flops for flops, *_ in costs(jax.grad(lambda q: attend(q).sum()), q))
    assert found == [PAIRS * 2 * products * SIZE for products in (2, 3, 4)]  # the forward pass first


def test_quantize_and_convolution():
    ((flops, _, moved),) = costs(lambda x: quantize(x, how=Rounded(8), implementation="interpret"), k)
    assert flops == 0 and moved == ARRAY + LENGTH * (SIZE + 2 * 2)  # no rotation, no packing; codes, scale and zero
    filters = normal(3, SIZE)
    ((flops, _, moved),) = costs(lambda x: causal_conv(x, filters, None, None, implementation="interpret")[0], k)
    assert flops == 2 * 3 * LENGTH * SIZE and moved >= 2 * ARRAY
