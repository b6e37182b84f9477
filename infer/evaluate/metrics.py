"""Measures of what a smaller cache costs. The functions on logits are jax; those on results are numpy in float64."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Z95 = 1.959963984540054  # of the normal distribution, two-sided 95 %


def kl(full_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """KL(full || this) = sum_v p_full (log p_full - log p) in nats, per token: [..., V] twice -> [...] float32."""
    full = jax.nn.log_softmax(full_logits.astype(jnp.float32), axis=-1)
    this = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return jnp.where(full > -jnp.inf, jnp.exp(full) * (full - this), 0.0).sum(axis=-1)


def agree(full_logits: jax.Array, logits: jax.Array) -> jax.Array:
    """Whether both have the same most likely token: [..., V] twice -> [...] bool."""
    return full_logits.argmax(axis=-1) == logits.argmax(axis=-1)


def nll(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log p(target) in nats: [..., V], [...] int32 -> [...] float32."""
    logp = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]


def bits_per_byte(token_nll, byte_count: int) -> float:
    """Sum of the tokens' nll (nats) over the bytes of their text, in bits; comparable between tokenizers.

    Raises: ValueError without bytes.
    """
    if byte_count < 1:
        raise ValueError(f"bits per byte needs at least one byte of text, got {byte_count}")
    return float(np.sum(np.asarray(token_nll, np.float64)) / math.log(2) / byte_count)


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), for independent questions; shares of one context are wider.

    Raises: ValueError unless 0 <= right <= asked and asked >= 1.
    """
    if asked < 1 or not 0 <= right <= asked:
        raise ValueError(f"wilson needs 0 <= right <= asked and asked >= 1, got {right} of {asked}")
    share, spread = right / asked, Z95**2 / asked
    centre = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    low = 0.0 if right == 0 else centre - half  # exact at the ends, where rounding would leave 1e-17
    return low, 1.0 if right == asked else centre + half


def mean_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of independent values and its 95 % interval by Student's t; None for a single value.

    Raises: ValueError for no values.
    """
    values = np.asarray(values, np.float64).ravel()
    if not values.size:
        raise ValueError("the mean of no values was asked for")
    mean = float(values.mean())
    if values.size == 1:
        return mean, None
    half = _student(values.size - 1) * float(values.std(ddof=1)) / math.sqrt(values.size)
    return mean, (mean - half, mean + half)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t: a table up to 10, then an expansion in 1 / freedom (error below 1e-4)."""
    table = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
    if freedom <= len(table):
        return table[freedom - 1]
    z = Z95
    first = (z**3 + z) / 4 / freedom
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96 / freedom**2
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / freedom**3
    return z + first + second + third
