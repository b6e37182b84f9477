"""One slot of each block row: read, or written in place, where the rest of a tier is neither read nor moved.

    slot of the block row      0       2        S (nowhere)
    before                   a b c   d e f      g h i
    new                        x       y          z
    after                    x b c   d e y      g h i
    read                       a       f          i

XLA does both in place on CPU and GPU. Its compiler for TPU lays arrays out anew for them, whole, at every step; the kernels
fetch and store the one tile that a slot lies in.
"""

import jax

from pallas_kernels.dispatch import Implementation, call, takes_all
from pallas_kernels.slots import tpu, xla

__all__ = ["IMPLEMENTATIONS", "read_slot", "write_slot"]

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.run, tpu.why_not, platform="tpu"),
    "interpret": Implementation(tpu.interpreted, tpu.why_not, by_name_only=True),
    "gpu": Implementation(xla.run, takes_all, platform="cuda", by_name_only=True),  # in place there, as it is
    "xla": Implementation(xla.run, takes_all),
}


def read_slot(
    arrays: tuple[jax.Array, ...], slot: jax.Array, *, axes: tuple[int, ...], groups: int, implementation=None
) -> tuple[jax.Array, ...]:
    """What lies at a slot, or a group of adjacent slots.

    Args:
      arrays: [B, P, C, S] or [B, P, S, C] each, of any dtype; C and the number of slots may differ.
      slot: [B, P] int32; past the end: the last.
      axes: of each array, where its slots are: 2 or 3.
      groups: of which slot is one, in every array: S is a multiple of it.
    Returns: as `arrays`, with the slots of one group, S / groups, at that axis.
    Raises: ValueError for arrays that have no such groups.
    """
    _check(arrays, slot, axes, groups)
    return call("slots", IMPLEMENTATIONS, implementation, arrays, None, slot, axes=axes, groups=groups)


def write_slot(
    arrays: tuple[jax.Array, ...],
    new: tuple[jax.Array, ...],
    slot: jax.Array,
    *,
    axes: tuple[int, ...],
    groups: int,
    implementation=None,
) -> tuple[jax.Array, ...]:
    """The arrays with `new` in place of what `read_slot` reads; nowhere where `slot` is past the end.

    Args: as of `read_slot`; new: as it returns, of the same dtypes.
    Raises: ValueError for arrays that have no such groups, and new ones that do not fit them.
    """
    _check(arrays, slot, axes, groups)
    for x, y, axis in zip(arrays, new, axes, strict=True):
        wanted = (*x.shape[:axis], x.shape[axis] // groups, *x.shape[axis + 1 :])
        if (y.shape, y.dtype) != (wanted, x.dtype):
            raise ValueError(f"new must be {wanted} {x.dtype.name}, got {y.shape} {y.dtype.name}")
    return call("slots", IMPLEMENTATIONS, implementation, arrays, new, slot, axes=axes, groups=groups)


def _check(arrays, slot, axes, groups):
    for x, axis in zip(arrays, axes, strict=True):
        if axis not in (2, 3) or x.ndim != 4 or x.shape[:2] != slot.shape or x.shape[axis] % groups:
            raise ValueError(
                f"slots of [B, P, C, S] or [B, P, S, C] in {groups} groups, slot [B, P]; got {x.shape}, slots at axis"
                f" {axis}, and slot {slot.shape}"
            )
