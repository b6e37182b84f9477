"""Programs of `decode_attention` for `tpu_compile`."""

import jax
from decode_cases import CASES, shapes
from tpu_compile import Program

from pallas_kernels.decode_attention import Packed, decode_attention


def lies_plain(shape) -> bool:
    """Whether XLA has no padding to save on TPU by storing [..., rows, slots] with its axes in another order.

    Where it has, it converts the array for the kernel: up to 127 slots or 7 rows of codes past the last whole tile.
    """
    rows, last = shape[2:]
    return last % 128 == 0 and (rows % 8 == 0 or rows in (1, 2, 4)) or (rows % 128 == 0 and last in (64, 80, 96))


def _program(case, scores: bool, implementation=None) -> Program:
    leaves, tree = jax.tree.flatten(shapes(case))
    at = [number for number, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]

    def sources_of(arrays):
        filled = list(leaves)
        for number, array in zip(at, arrays, strict=True):
            filled[number] = array
        return jax.tree.unflatten(tree, filled)

    def stored(arguments):
        """What the tiers are stored as, where that lies in memory as it is written, axis by axis."""
        parts = [
            [p.codes, p.scale, p.zero] if isinstance(p, Packed) else [p]
            for s in sources_of(arguments)[:-1] for p in (s.keys, s.values)
        ]  # fmt: skip
        return [
            number for numbers in parts for number in numbers if number is not None and lies_plain(arrays[number].shape)
        ]

    arrays = [leaves[number] for number in at]

    def function(*arrays):
        return decode_attention(
            sources_of(arrays), scale=case.scale, softcap=case.softcap, scores=scores, implementation=implementation
        )

    return Program(function=function, arguments=tuple(arrays), stored=stored)


def with_scores(name: str) -> Program:
    """A case of the table."""
    return _program(CASES[name], True)


def without_scores(name: str) -> Program:
    """A case of the table, without its probabilities."""
    return _program(CASES[name], False)


def in_xla(name: str) -> Program:
    """What the kernel is there for: here XLA itself reads what is stored."""
    return _program(CASES[name], True, "xla")
