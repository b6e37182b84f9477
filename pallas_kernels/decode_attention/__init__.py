"""One query per head against several sources of keys and values: the tiers of a cache, and the token itself.

out = sum over sources s of  p_s V_s,     p = softmax over the live slots of all sources of  scale * q_s K_s
"""

import functools

import jax

from pallas_kernels.decode_attention import gpu, tpu, xla
from pallas_kernels.decode_attention.packed import Packed
from pallas_kernels.decode_attention.source import Source
from pallas_kernels.dispatch import Implementation, call, takes_all

__all__ = ["IMPLEMENTATIONS", "Packed", "Source", "decode_attention", "slot_multiple"]

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.decode_attention, tpu.why_not, platform="tpu"),
    "gpu": Implementation(gpu.decode_attention, gpu.why_not, platform="cuda"),
    "interpret": Implementation(
        functools.partial(tpu.decode_attention, interpret=True), tpu.why_not, by_name_only=True
    ),
    "xla": Implementation(xla.decode_attention, takes_all),
}

MULTIPLES = {"tpu": 128, "gpu": 16}


def slot_multiple(platform: str | None = None) -> int:
    """How many slots, and multiples of it, kernels read where they lie. platform: of `jax.default_backend`; None: it.

    For other numbers XLA's compiler for TPU lays a tier out anew at every step, and the GPU's kernel refuses it.
    """
    return MULTIPLES.get(platform or jax.default_backend(), 1)


def decode_attention(
    sources: tuple[Source, ...],
    *,
    scale: float,
    softcap: float | None,
    scores: bool = True,
    implementation: str | None = None,
):
    """Exact attention of one query per head over the union of `sources`.

    Args:
      sources: queries [B, P, G, H], keys [B, P, H, S], values [B, P, S, H], live [B, P, S] bool each. Queries differ by
        source when a tier's positions are shifted or its keys are stored in another basis. Dead slots may hold NaN keys
        and any finite values.
      scale: multiplies the logits. softcap: logits become softcap * tanh(logits / softcap), or None.
      scores: whether probabilities are wanted.
      implementation: "xla", "tpu", "interpret" (the TPU kernel as ordinary operations, slow); None: see `dispatch`.
    Returns: out [B, K, G, H] in the queries' dtype; probabilities, one [B, P, G, S] float32 per source, or None. A row
      without a live slot gives zeros.
    Raises: NotImplementedError if the named implementation cannot take these sources.
    """
    return call(
        "decode_attention", IMPLEMENTATIONS, implementation, sources, scale=scale, softcap=softcap, scores=scores
    )
