"""Cross-entropy of the next token, a block of positions at a time: [B, T, V] logits never exist, forward or backward.

loss = sum_i w_i (lse_i - y_i[target_i]) + z sum_i w_i lse_i^2        y = logits in float32, lse = log sum exp y
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxkv import decoder
from jaxkv.config import DecoderConfig
from jaxkv.types import Array


class Sums(NamedTuple):
    """Over all tokens, by their weights, float32: what is minimized, its cross-entropy part, right guesses, the weights."""

    loss: Array
    cross_entropy: Array
    right: Array
    weight: Array


def token_losses(
    head, hidden: Array, targets: Array, weights: Array, *, config: DecoderConfig, z_loss: float, tokens: int
) -> Sums:
    """Sums over a batch.

    Args:
      head: {"head": ...} parameters. hidden [B, T, D]; targets [B, T] int32; weights [B, T] float32, 0 = not counted.
      z_loss: weight of the squared log-normalizer (PaLM, arXiv 2204.02311, section 5).
      tokens: of the batch, so many have their logits in memory at a time, in whole columns of it.
    """
    batch, length, size = hidden.shape
    width = min(length, max(1, tokens // batch))
    blocks = -(-length // width)
    spare = blocks * width - length
    by_block = lambda x: jnp.moveaxis(
        jnp.pad(x, [(0, 0), (0, spare)] + [(0, 0)] * (x.ndim - 2)).reshape(batch, blocks, width, *x.shape[2:]), 1, 0
    )

    @jax.checkpoint
    def of_block(hidden, targets, weights):
        logits = decoder.logits(head, hidden, config=config)
        lse = jax.nn.logsumexp(logits, axis=-1)
        at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        cross_entropy = jnp.sum(weights * (lse - at_target))
        penalty = z_loss * jnp.sum(weights * lse * lse) if z_loss else 0.0
        right = jnp.sum(jnp.where(at_target >= logits.max(axis=-1), weights, 0.0))
        return Sums(cross_entropy + penalty, cross_entropy, right, jnp.sum(weights))

    if blocks == 1:
        return of_block(hidden, targets, weights)
    add = lambda total, block: (jax.tree.map(jnp.add, total, of_block(*block)), None)
    zero = Sums(*(jnp.zeros((), jnp.float32) for _ in Sums._fields))
    return jax.lax.scan(add, zero, (by_block(hidden), by_block(targets), by_block(weights)))[0]
