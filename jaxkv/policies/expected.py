"""Keep what future queries are expected to look at, judged by what queries have been like.

Source: Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution (arXiv
2510.00636), section 3. Queries before RoPE are taken for draws of a Gaussian, per query head; one of the next `n_future`
positions has R q with R the mean rotation of those positions. What it gives to a key, and what that is worth:

    z = E exp(scale q' R' k) in logs = scale m' u + scale^2 / 2 u' C u,   u = R' k     m, C: mean and covariance of queries
    score = (mean over query heads of softmax(z over the keys) + epsilon) * |v|

The first `sinks` tokens are outliers: always kept, and in neither the statistics nor the softmax.
Departs: a token is scored once, when it enters, in bfloat16, 2 bytes a slot, and not again as the future moves on. C takes
H x H numbers a head, as many as H / 2 tokens of a cache, so it is not kept: the first extend of a row is judged as in the
paper, by its own queries; tokens that come later, at decode or in another extend, by the mean of all queries so far alone,
one per kv head, with R taken where they entered. Their share is of the sum that this mean has given to all keys so far,
each at its time. `scale` is the model's own, where the paper has 1 / sqrt(H); a softcap on logits is not modelled.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from jaxkv.policies.base import Policy
from jaxkv.quantization.base import from_bits, to_bits
from jaxkv.rope import angles, mean_angles, rotate

LEAST = -1e30  # the logarithm of nothing: finite, and lost beside any logit


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpectedAttention(Policy):
    """Expected attention of the next `n_future` positions times the norm of the value. epsilon: added to the attention.

    row: of queries and keys behind the sinks, "queries" [B, P, H], the sum before RoPE; "heard" [B], how many tokens;
    "total" [B, P], the log of the sum of exp(logit) that the mean query gave.
    """

    name: ClassVar[str] = "expected-attention"
    summary: ClassVar[str] = "what the next 512 queries are expected to attend to"
    source: ClassVar[str] = "Expected Attention, arXiv 2510.00636"
    needs_queries: ClassVar[bool] = True

    sinks: int = 4
    n_future: int = 512
    epsilon: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.n_future < 1:
            raise ValueError(f"n_future must be at least 1, got {self.n_future}")
        if not self.epsilon >= 0:
            raise ValueError(f"epsilon must not be negative, got {self.epsilon}")

    @property
    def watcher(self):
        return dataclasses.replace(self, recent=1)  # sinks change what is gathered

    def enter_row(self, shape, layer):
        return {
            "queries": jnp.zeros(shape, jnp.float32),
            "heard": jnp.zeros(shape[:1], jnp.int32),
            "total": jnp.full(shape[:2], LEAST, jnp.float32),
        }

    def advance(self, row, new):
        heard = self._heard(new)
        queries = row["queries"] + jnp.einsum("bnpgh,bn->bph", plain_queries(new), heard) * (1.0 / new.queries.shape[2])
        row = {**row, "queries": queries, "heard": row["heard"] + heard.sum(axis=1).astype(jnp.int32)}
        return {**row, "total": jnp.logaddexp(row["total"], log_sum(self._logits(new, row)))}

    def enter(self, new, row):
        share = jnp.exp(jnp.minimum(self._logits(new, row) - row["total"][..., None], 0.0))
        if new.keys.shape[2] > 1:  # of one token alone the two are equal
            first = row["heard"] == self._heard(new).sum(axis=1).astype(jnp.int32)
            share = jnp.where(first[:, None, None], self._share_at_first(new), share)
        share = jnp.where(self._heard(new)[:, None] > 0, share, 0.0)
        worth = jnp.sqrt(jnp.square(new.values.astype(jnp.float32)).sum(axis=-1))
        return {"expected": to_bits((share + self.epsilon) * worth)}

    def score(self, slots, row, positions):
        return from_bits(slots["expected"])

    def _heard(self, new):
        """1.0 for tokens that are in the statistics, [B, n]."""
        return (new.valid & (new.positions >= self.sinks)).astype(jnp.float32)

    def _turned_keys(self, new):
        """u = R' k, [B, P, n, H] float32: a query before RoPE meets it as the mean future one meets k."""
        start = jnp.where(new.valid, new.positions, 0).max(axis=1) + 1 - new.offset
        cos, sin = mean_angles(new.rotary, start, self.n_future)
        return turned(new.keys.astype(jnp.float32), cos, -sin)

    def _logits(self, new, row):
        """What the mean of all queries so far gives to the keys, [B, P, n]; LEAST to those of no account."""
        mean = row["queries"] / jnp.maximum(row["heard"], 1).astype(jnp.float32)[:, None, None]
        z = jnp.einsum("bpnh,bph->bpn", self._turned_keys(new), mean) * new.scale
        return jnp.where(self._heard(new)[:, None] > 0, z, LEAST)

    def _share_at_first(self, new):
        """The paper's expected attention among the new keys by the new queries alone, mean over query heads, [B, P, n]."""
        heard, keys, queries = self._heard(new), self._turned_keys(new), plain_queries(new)
        count = jnp.maximum(heard.sum(axis=1), 1.0)[:, None, None, None]
        mean = jnp.einsum("bnpgh,bn->bpgh", queries, heard) / count
        off = (queries - mean[:, None]) * heard[:, :, None, None, None]
        covariance = jnp.einsum("bnpgi,bnpgj->bpgij", off, off) / count[..., None]
        spread = (jnp.einsum("bpni,bpgij->bpgnj", keys, covariance) * keys[:, :, None]).sum(axis=-1)
        z = jnp.einsum("bpnh,bpgh->bpgn", keys, mean) * new.scale + spread * (0.5 * new.scale**2)
        z = jnp.where(heard[:, None, None] > 0, z, LEAST)
        return jnp.exp(z - log_sum(z)[..., None]).mean(axis=2)


def plain_queries(new):
    """Queries as they were before RoPE, [B, n, P, G, H] float32; zero where not valid."""
    batch, heads, group, count, size = new.queries.shape
    cos, sin = angles(new.rotary, new.positions - new.offset[:, None])
    undo = jnp.square(new.rotary.scale)[:, None, None]  # rotations scale as well
    flat = jnp.moveaxis(new.queries.astype(jnp.float32), 3, 1).reshape(batch, count, heads * group, size)
    plain = rotate(flat, cos / undo, -sin / undo).reshape(batch, count, heads, group, size)
    return jnp.where(new.valid[:, :, None, None, None], plain, 0.0)


def turned(x, cos, sin):
    """All vectors of a row of x [B, P, n, H] rotated by the same angles [B, 1, R/2]."""
    return rotate(x.reshape(x.shape[0], 1, -1, x.shape[-1]), cos, sin).reshape(x.shape)


def log_sum(z):
    """log sum exp over the last axis."""
    top = z.max(axis=-1)
    return top + jnp.log(jnp.exp(z - top[..., None]).sum(axis=-1))
