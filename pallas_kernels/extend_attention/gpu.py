"""Extend attention on Hopper GPUs: `by_flash` with their kernel for what is bfloat16, which the new tokens must be.

Tiers that decode to float32 are attended to by XLA's flash attention and merged with the rest: their keys would lose
precision in the kernel's products of bfloat16.
"""

import jax.numpy as jnp

from pallas_kernels.extend_attention import by_flash
from pallas_kernels.flash_attention import Operands, gpu


def why_not(queries, keys, values, tiers, *, relative=None, **_) -> str | None:
    """What the kernel cannot take."""
    return gpu.why_not(Operands(queries, keys, values, relative_q=relative))


def kernels(dtype) -> str:
    """Which flash attention takes keys and values of `dtype`."""
    return "gpu" if dtype == jnp.bfloat16 else "xla"


def extend_attention(*args, **options):
    """As `xla.extend_attention`."""
    return by_flash.extend_attention(*args, kernels=kernels, **options)
