"""One slot of each block row: read and written, by XLA and by the kernel in its interpreter, bit for bit as by numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.slots import IMPLEMENTATIONS, read_slot, reference, write_slot

CASES = {  # B, P, slots, (channels, dtype, axis of the slots) of each array, groups
    "codes and factors": (2, 3, 256, ((32, "uint8", 3), (1, "uint16", 3), (64, "uint8", 2), (1, "uint16", 3)), 256),
    "exact": (1, 2, 40, ((8, "float32", 3), (8, "float32", 2)), 40),
    "two bytes": (2, 2, 200, ((64, "uint16", 3), (64, "uint16", 2)), 200),
    "one slot": (1, 1, 1, ((8, "uint8", 3), (8, "uint8", 2)), 1),
    "groups": (2, 2, 64, ((8, "uint8", 3), (8, "uint8", 2)), 16),
}
KERNELS = [name for name in CASES if name != "groups"]


def case(name, seed=0):
    batch, heads, slots, arrays, groups = CASES[name]
    rng = np.random.default_rng(seed)
    made, new = [], []
    for channels, dtype, axis in arrays:
        shape = lambda size, c=channels, a=axis: (batch, heads, c, size) if a == 3 else (batch, heads, size, c)
        for out, size in ((made, slots), (new, slots // groups)):
            raw = rng.integers(0, 256, (*shape(size), jnp.dtype(dtype).itemsize), np.uint8)
            out.append(jax.lax.bitcast_convert_type(raw if raw.shape[-1] > 1 else raw[..., 0], jnp.dtype(dtype)))
    slot = rng.integers(0, groups, (batch, heads))
    slot[0, 0] = groups  # nowhere
    slot[-1, -1] = groups - 1 if slot.size > 1 else slot[-1, -1]
    options = {"axes": tuple(axis for *_, axis in arrays), "groups": groups}
    return tuple(made), tuple(new), jnp.asarray(slot, jnp.int32), options


def assert_same_bits(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize(("name", "implementation"), [(n, "xla") for n in CASES] + [(n, "interpret") for n in KERNELS])
def test_as_by_numpy(name, implementation):
    arrays, new, slot, options = case(name)
    run = lambda f: jax.jit(lambda *given: f(*given, **options, implementation=implementation))
    assert_same_bits(run(read_slot)(arrays, slot), reference.read(arrays, slot, **options))
    written = run(write_slot)(arrays, new, slot)
    assert_same_bits(written, reference.write(arrays, new, slot, **options))
    inside = np.asarray(slot) < options["groups"]
    for x, y in zip(run(read_slot)(written, slot), new, strict=True):  # what was written is read
        assert np.asarray(x)[inside].tobytes() == np.asarray(y)[inside].tobytes()


def test_by_hand():
    """The picture in the docstring."""
    x = jnp.asarray([[97, 98, 99], [100, 101, 102], [103, 104, 105]], jnp.uint8).reshape(1, 3, 1, 3)
    slot, new = jnp.asarray([[0, 2, 3]]), jnp.asarray([120, 121, 122], jnp.uint8).reshape(1, 3, 1, 1)
    for implementation in ("xla", "interpret"):
        options = {"axes": (3,), "groups": 3, "implementation": implementation}
        (found,), (after,) = read_slot((x,), slot, **options), write_slot((x,), (new,), slot, **options)
        assert bytes(np.asarray(found)) == b"afi" and bytes(np.asarray(after)) == b"xbcdeyghi"


def test_a_kernel_is_in_the_program():
    arrays, new, slot, options = case("codes and factors")
    run = lambda *given: write_slot(*given, **options, implementation="interpret")
    assert str(jax.make_jaxpr(run)(arrays, new, slot)).count("pallas_call") == 1  # for all arrays


def test_refusals():
    arrays, new, slot, options = case("groups")
    with pytest.raises(NotImplementedError, match="groups of slots are read and written by XLA"):
        read_slot(arrays, slot, **options, implementation="interpret")
    with pytest.raises(ValueError, match="new must be"):
        write_slot(arrays, tuple(x[..., :1] for x in new), slot, **options)
    with pytest.raises(ValueError, match=r"got \(2, 2, 8, 64\), slots at axis 3, and slot \(2, 1\)"):
        read_slot(arrays, slot[:, :1], **options)
    assert (
        IMPLEMENTATIONS["tpu"]
        .why_not((jnp.zeros((1, 1, 2, 2), jnp.int8),), None, slot, axes=(3,), groups=2)
        .startswith("it moves")
    )
