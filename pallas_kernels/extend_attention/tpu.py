"""Extend attention on TPUs: `by_flash` with their kernels."""

import jax.numpy as jnp

from pallas_kernels.extend_attention import by_flash


def why_not(queries, keys, values, tiers, **options) -> str | None:
    """What the kernels cannot take."""
    sizes = {x.shape[-1] for x in (queries, values)} | {tier.source.queries.shape[-1] for tier in tiers}
    if max(sizes) > 256:
        return f"a block of heads of {max(sizes)} channels leaves no room; at most 256"
    if options.get("relative") is not None:
        return (
            "its relative term counts keys in their order; of a cache, and of rows with pads, it must go by positions"
        )
    if queries.dtype not in (jnp.float32, jnp.bfloat16):
        return f"it computes in float32 and bfloat16, not {queries.dtype}"
    return None


def extend_attention(*args, kernels: str = "tpu", **options):
    """As `xla.extend_attention`. kernels: "tpu", or "interpret"."""
    return by_flash.extend_attention(*args, kernels=lambda dtype: kernels, **options)
