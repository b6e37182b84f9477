"""A tiny model, its batches and its plan, for the tests of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from cache_harness import MIXED, PLAIN

from jaxkv.decoder import init_params
from train.config import Lora
from train.optimizer import flatten
from train.step import Plan, TrainState

SIZE, ROWS = 24, 4


@functools.cache
def parameters():
    """By path; all norms and tables different from their usual start, so that no term of a gradient is zero."""
    flat = flatten(init_params(PLAIN, jax.random.key(0)))
    draw = lambda i, x: x + 0.1 * jax.random.normal(jax.random.fold_in(jax.random.key(1), i), x.shape)
    return {path: draw(i, x) for i, (path, x) in enumerate(sorted(flat.items()))}


def packed_batch(seed=0, rows=ROWS, size=SIZE, vocab=PLAIN.vocab_size):
    """Rows of two texts and some padding: (batch, edge between the texts, length of both)."""
    rng = np.random.default_rng(seed)
    edge, length = size // 3, size - 3
    at = np.arange(size)
    segments = np.broadcast_to(np.where(at >= length, 0, np.where(at < edge, 1, 2)), (rows, size))
    positions = np.broadcast_to(np.where(at < edge, at, np.where(at < length, at - edge, at - length)), (rows, size))
    weights = np.broadcast_to((at < length - 1) & (at != edge - 1), (rows, size))
    batch = {
        "tokens": rng.integers(0, vocab, (rows, size)).astype(np.int32),
        "targets": rng.integers(0, vocab, (rows, size)).astype(np.int32),
        "segments": segments.astype(np.int32),
        "positions": positions.astype(np.int32),
        "weights": weights.astype(np.float32),
    }
    return {name: jnp.asarray(x) for name, x in batch.items()}, edge, length


def plan(config=MIXED, optimizer=None, **options):
    defaults = dict(dtype="float32", remat="none", loss_tokens=4096, z_loss=0.0, parts=1, lora=Lora())
    return Plan(config=config, optimizer=optimizer or optax.sgd(0.1), **(defaults | options))


def new_state(flat, made, frozen=None, memory=None):
    return TrainState(
        step=jnp.zeros((), jnp.int32), trained=flat, frozen=frozen or {}, optimizer=made.optimizer.init(flat),
        key=jax.random.key_data(jax.random.key(0)), memory=memory,
    )  # fmt: skip
