"""Keys or values become codes: one token, a group of tokens, a whole prompt."""

from pallas_kernels.dispatch import Implementation, call, takes_all
from pallas_kernels.quantize import tpu, xla
from pallas_kernels.quantize.how import Codebook, Float8, How, Rounded

__all__ = ["IMPLEMENTATIONS", "Codebook", "Float8", "Rounded", "quantize"]

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.quantize, tpu.why_not, platform="tpu"),
    "interpret": Implementation(tpu.interpreted, tpu.why_not, by_name_only=True),
    "xla": Implementation(xla.quantize, takes_all),
}


def quantize(x, *, how: How, implementation: str | None = None):
    """Codes and factors as a tier stores them, slots-minor. All implementations give the same bits.

    Args:
      x: [B, P, S, H] float of any dtype; NaN counts as 0, infinities as +-1e30. S a multiple of how.granule.
      how: `Rounded`, `Float8` or `Codebook`.
    Returns: codes [B, P, H * bits / 8, S] uint8; factors, a tuple of [B, P, groups, S] uint16 (bfloat16 bits) each, or [B,
      P, H, S / granule] where tokens share them: (scale, zero) or (factor,).
    Raises: ValueError for a shape that `how` does not fit.
    """
    if x.ndim != 4:
        raise ValueError(f"quantize takes [B, P, S, H], got {x.shape}")
    tokens, channels = x.shape[2:]
    whole = {1: 8, 2: 4, 3: 8, 4: 2, 8: 1}[how.bits]
    if channels % whole or tokens % how.granule:
        raise ValueError(
            f"{how.bits} bits take multiples of {whole} channels and of {how.granule} tokens, got {channels} and {tokens}"
        )
    if isinstance(how, Codebook) and (len(how.signs) != channels or len(how.levels) != 2**how.bits):
        raise ValueError(
            f"a codebook of {how.bits} bits for {channels} channels has {2**how.bits} levels and {channels} signs, got "
            f"{len(how.levels)} and {len(how.signs)}"
        )
    return call("quantize", IMPLEMENTATIONS, implementation, x, how=how)
