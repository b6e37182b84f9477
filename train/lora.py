"""Low-rank adapters: kernel + alpha / rank * A B, A [in, rank] random, B [rank, out] zero (LoRA, arXiv 2106.09685).

Adapters are added to the kernel where it is used, so that every linear layer is still `jaxkv.layers.linear` on one kernel;
under rematerialisation one block's sums exist at a time. Departs: no dropout.
"""

import jax
import jax.numpy as jnp

from train.config import Lora, TrainError
from train.optimizer import Flat, check_patterns, matches

A, B = ".lora_a", ".lora_b"


def make_adapters(lora: Lora, flat, key: jax.Array) -> Flat:
    """A and B, float32, for every kernel of the flat dict (arrays or shapes) that a target matches.

    Raises: TrainError if a target matches none, or something that is not a matrix.
    """
    check_patterns("lora.targets", lora.targets, flat)
    found = {}
    for number, path in enumerate(sorted(path for path in flat if matches(path, lora.targets))):
        if flat[path].ndim != 2:
            raise TrainError(f"lora.targets match {path} of shape {flat[path].shape}; adapters are for matrices")
        rows, columns = flat[path].shape
        start = jax.random.normal(jax.random.fold_in(key, number), (rows, lora.rank), jnp.float32)
        found[path + A] = start / rows**0.5
        found[path + B] = jnp.zeros((lora.rank, columns), jnp.float32)
    return found


def adapted(flat: Flat, lora: Lora) -> Flat:
    """The parameters with the adapters among them added to their kernels."""
    pairs = {path.removesuffix(A): x for path, x in flat.items() if path.endswith(A)}
    found = {path: x for path, x in flat.items() if not path.endswith((A, B))}
    for path, a in pairs.items():
        delta = jnp.einsum("ir,ro->io", a, flat[path + B].astype(a.dtype)) * (lora.alpha / lora.rank)
        found[path] = found[path] + delta.astype(found[path].dtype)
    return found
