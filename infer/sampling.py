"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, repetition penalty, with a seed per row."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose tokens. The defaults are greedy.

    temperature: 0 = greedy. top_k: keep the k most likely, 0 = off. top_p: keep the smallest set with at least this
    probability (nucleus, arXiv 1904.09751), 1 = off. min_p: drop tokens below this share of the most likely one. They
    apply in this order, after the repetition penalty (CTRL, arXiv 1909.05858) and the temperature. seed: 64 bits.
    Departs: of tokens equally likely at the edge, top_k keeps all, as in Hugging Face; so does top_p, where Hugging
    Face keeps whichever its sort puts first.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, good, accepted in (
            ("temperature", 0 <= self.temperature <= 1e6, "a number from 0 to 1e6"),
            ("top_k", isinstance(self.top_k, numbers.Integral) and self.top_k >= 0, "an int >= 0 (0 = off)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number > 0"),
            ("seed", isinstance(self.seed, numbers.Integral) and 0 <= self.seed < 2**64, "an int from 0 to 2**64 - 1"),
        ):
            if not good:
                raise ValueError(f"{name} must be {accepted}, got {getattr(self, name)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingArrays:
    """`Sampling` of each row: temperature, top_p, min_p, repetition_penalty [B] float32; top_k [B] int32;
    key [B, 2] uint32, from the row's seed alone."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array
    key: jax.Array


def make_sampling(samplings: list[Sampling]) -> SamplingArrays:
    """One `Sampling` per row, as arrays."""
    column = lambda name, dtype: jnp.asarray(np.array([getattr(s, name) for s in samplings], dtype))
    # What jax.random.key makes of a seed, but with x64 off that drops the upper 32 bits, and costs 3 ms a row.
    keys = np.array([[int(s.seed) >> 32, int(s.seed) & 0xFFFFFFFF] for s in samplings], np.uint32).reshape(-1, 2)
    return SamplingArrays(
        temperature=column("temperature", np.float32),
        top_k=column("top_k", np.int32),
        top_p=column("top_p", np.float32),
        min_p=column("min_p", np.float32),
        repetition_penalty=column("repetition_penalty", np.float32),
        key=jnp.asarray(keys),
    )


def sample(logits, arrays: SamplingArrays, step, seen, *, greedy: bool):
    """The next token of each row.

    Args: logits [B, V] float32; step [B] int32, how many tokens the row has made; seen [B, V] bool or None, for the
      repetition penalty; greedy: static, all rows are greedy and unpenalised, so nothing else is compiled.
    Returns: token [B] int32 (ties: the lowest id), and its log probability [B] under the model's own distribution.
    """
    top = logits.max(axis=-1, keepdims=True)
    norm = top[:, 0] + jnp.log(jnp.exp(logits - top).sum(axis=-1))
    if greedy:
        token = first_argmax(logits)
    else:
        penalised = logits
        if seen is not None:
            penalty = arrays.repetition_penalty[:, None]
            penalised = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
        best = penalised.max(axis=-1, keepdims=True)
        # Distance below the best, [B, V]: 0 and up, so that no temperature overflows the token that must stay.
        cost = (best - penalised) / jnp.where(arrays.temperature > 0, arrays.temperature, 1.0)[:, None]
        noise = jax.vmap(lambda key, n: _gumbel(key, n, logits.shape[1]))(arrays.key, step)
        drawn = first_argmax(jnp.where(_allowed(cost, arrays), noise - cost, -jnp.inf))
        token = jnp.where(arrays.temperature > 0, drawn, first_argmax(penalised))
    return token, jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - norm


def first_argmax(x):
    """argmax of the last axis, the lowest index among equals; a max and a min, which XLA:CPU vectorizes."""
    index = jax.lax.broadcasted_iota(jnp.int32, x.shape, x.ndim - 1)
    return jnp.where(x == x.max(axis=-1, keepdims=True), index, x.shape[-1] - 1).min(axis=-1)


def _gumbel(key, step, size):
    key = jax.random.wrap_key_data(key, impl="threefry2x32")
    return jax.random.gumbel(jax.random.fold_in(key, step), (size,), jnp.float32)


def _allowed(cost, arrays):
    """Tokens that top-k, then top-p, then min-p leave, [B, V] bool; the most likely, at cost 0, always stays."""
    top_k = jnp.where(arrays.top_k > 0, arrays.top_k, cost.shape[1]).astype(jnp.float32)
    keep = _cheapest(cost, jnp.ones_like(cost), top_k)
    share = jnp.where(keep, jnp.exp(-cost), 0.0)
    # Rounding may bring the sum over all but the rarest tokens to 1, so top_p = 1 has to be a case of its own.
    top_p = jnp.where(arrays.top_p < 1, arrays.top_p * share.sum(axis=-1), jnp.inf)
    return keep & _cheapest(cost, share, top_p) & (share >= arrays.min_p[:, None])


def _cheapest(cost, weight, limit):
    """Tokens i for which the weights of all cheaper tokens sum to less than limit [B], [B, V] bool.

    Bits of floats >= 0 order as the floats do, so 31 halvings find the dearest cost exactly. A sort of the
    vocabulary gives the same, and on XLA:CPU took most of the time of a draw.
    """
    bits = jax.lax.bitcast_convert_type(cost, jnp.int32)

    def halve(i, edge):
        higher = edge | jnp.left_shift(jnp.int32(1), 30 - i)
        cheaper = jnp.where(bits < higher[:, None], weight, 0.0).sum(axis=-1)
        return jnp.where(cheaper < limit, higher, edge)

    edge = jax.lax.fori_loop(0, 31, halve, jnp.zeros(cost.shape[:1], jnp.int32))
    return bits <= edge[:, None]
