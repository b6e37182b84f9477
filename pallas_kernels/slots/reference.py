"""What the operations do, slot by slot, in numpy."""

import numpy as np


def read(arrays, slot, *, axes, groups):
    """As `read_slot`."""
    out = []
    for x, axis in zip(arrays, axes, strict=True):
        size, x = x.shape[axis] // groups, np.asarray(x)
        found = np.zeros((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
        for b, p in np.ndindex(*slot.shape):
            first = min(int(slot[b, p]), groups - 1) * size
            found[b, p] = x[b, p].take(range(first, first + size), axis=axis - 2)
        out.append(found)
    return tuple(out)


def write(arrays, new, slot, *, axes, groups):
    """As `write_slot`."""
    out = []
    for x, y, axis in zip(arrays, new, axes, strict=True):
        size, x = x.shape[axis] // groups, np.array(x)
        for b, p in np.ndindex(*slot.shape):
            if slot[b, p] < groups:
                first = int(slot[b, p]) * size
                x[b, p][(slice(None),) * (axis - 2) + (slice(first, first + size),)] = y[b, p]
        out.append(x)
    return tuple(out)
