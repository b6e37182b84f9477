"""Rotary position embedding: frequencies of every supported kind, and the rotation.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); LongRoPE (arXiv 2402.13753); dynamic NTK and Llama 3
scaling as the published checkpoints define them. Departs: frequencies that depend on the length of a row are fixed when
its state is made, from its whole planned length, and never change under cached keys.
"""

import math

import jax.numpy as jnp

from jaxkv.config import RopeConfig
from jaxkv.types import Array, Rotary


def make_rotary(rope: RopeConfig, length: Array) -> Rotary:
    """Frequencies for rows of a planned total `length` [B] int32 (prompt plus new tokens)."""
    half = rope.rotary_dim // 2
    exponent = jnp.arange(half, dtype=jnp.float32) / half
    base = (rope.theta**exponent)[None]  # [1, R/2]; a frequency is 1 / base
    scale = 1.0
    if rope.kind == "none":
        frequencies = jnp.zeros_like(base)
    elif rope.kind == "default":
        frequencies = 1.0 / base
    elif rope.kind == "linear":
        frequencies = 1.0 / (base * rope.factor)
    elif rope.kind == "dynamic":
        frequencies = _dynamic(rope, exponent, length)
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, 1.0 / base)
    elif rope.kind == "yarn":
        frequencies, scale = _yarn(rope, base)
    else:
        frequencies, scale = _longrope(rope, base, length)
    batch = length.shape[0]
    return Rotary(
        frequencies=jnp.broadcast_to(frequencies, (batch, half)).astype(jnp.float32),
        scale=jnp.full((batch,), scale, jnp.float32),
    )


def _dynamic(rope, exponent, length):
    longest = jnp.maximum(length, rope.original_max_positions).astype(jnp.float32)[:, None]
    growth = rope.factor * longest / rope.original_max_positions - (rope.factor - 1.0)
    theta = rope.theta * growth ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return 1.0 / theta ** exponent[None]


def _llama3(rope, frequencies):
    wavelength = 2 * math.pi / frequencies
    smooth = rope.original_max_positions / wavelength - rope.low_freq_factor
    smooth = jnp.clip(smooth / (rope.high_freq_factor - rope.low_freq_factor), 0.0, 1.0)
    return (1.0 - smooth) * frequencies / rope.factor + smooth * frequencies


def _yarn(rope, base):
    def channel(rotations):  # which channel turns this often over the original length
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    width = (high - low) or 0.001
    ramp = jnp.clip((jnp.arange(rope.rotary_dim // 2, dtype=jnp.float32) - low) / width, 0.0, 1.0)[None]
    frequencies = ramp / (base * rope.factor) + (1.0 - ramp) / base

    def magnitude(weight):
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return frequencies, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return frequencies, magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return frequencies, magnitude(1.0)


def _longrope(rope, base, length):
    is_long = (length > rope.original_max_positions)[:, None]
    stretch = jnp.where(
        is_long, jnp.asarray(rope.long_factor, jnp.float32), jnp.asarray(rope.short_factor, jnp.float32)
    )
    scale = rope.attention_factor
    if scale is None:
        scale = 1.0
        if rope.factor > 1:
            scale = math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
    return 1.0 / (stretch * base), scale


def angles(rotary: Rotary, positions: Array) -> tuple[Array, Array]:
    """cos and sin [B, T, R/2] float32 at `positions` [B, T]."""
    angle = positions.astype(jnp.float32)[..., None] * rotary.frequencies[:, None, :]
    scale = rotary.scale[:, None, None]
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def mean_angles(rotary: Rotary, start: Array, count: int) -> tuple[Array, Array]:
    """cos and sin [B, 1, R/2] float32, each averaged over the positions start .. start + count - 1; start [B] int32.

    With them `rotate` is the mean of n = `count` rotations: from start s and at a frequency f below 2 pi,

        mean over j of exp(i f (s + j)) = exp(i f (s + (n - 1) / 2)) sin(n f / 2) / (n sin(f / 2))
    """
    half = 0.5 * rotary.frequencies
    still = jnp.abs(jnp.sin(half)) < 1e-30  # a channel that does not turn
    shrink = jnp.where(still, 1.0, jnp.sin(count * half) / (count * jnp.where(still, 1.0, jnp.sin(half))))
    angle = (start.astype(jnp.float32) + 0.5 * (count - 1))[:, None] * rotary.frequencies
    size = shrink * rotary.scale[:, None]
    return (jnp.cos(angle) * size)[:, None], (jnp.sin(angle) * size)[:, None]


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the first R channels of `x` [B, T, heads, H] by angles [B, T, R/2]; channel c pairs with c + R/2."""
    half = cos.shape[-1]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    first, second = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    turned = [first * cos - second * sin, second * cos + first * sin]
    turned = [part.astype(x.dtype) for part in turned]
    return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)
