"""What a kernel tells the compiler of its cost, which sees nothing of it otherwise."""

from jax.experimental import pallas as pl


def estimate(arrays, *, flops: int, transcendentals: int = 0) -> pl.CostEstimate:
    """arrays: those that are read and written, arrays or shapes; each is counted once, however often its blocks are fetched."""
    moved = sum(x.size * x.dtype.itemsize for x in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=transcendentals, bytes_accessed=moved)
