"""Grouped-query attention with rotary positions (GQA, arXiv 2305.13245), the attention of all published models here."""

import flax.linen as nn
import jax.numpy as jnp

from jaxkv.config import DecoderConfig
from jaxkv.layers import Linear, RMSNorm
from jaxkv.rope import rotate
from jaxkv.types import Array


class GroupedQueryAttention(nn.Module):
    """Projections of one layer: fused q/k/v, optional q/k norms, output."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        self.qkv = Linear((c.num_heads + 2 * c.num_kv_heads) * c.head_dim, use_bias=c.qkv_bias)
        self.out = Linear(c.hidden_size, use_bias=c.output_bias, name="output")
        if c.qk_norm:
            self.query_norm = RMSNorm(c.norm_eps, c.norm_offset)
            self.key_norm = RMSNorm(c.norm_eps, c.norm_offset)

    def project(self, x: Array, positions: Array, key_angles, query_angles) -> tuple[tuple[Array, ...], Array, Array]:
        """Queries once per entry of `query_angles`, keys rotated by `key_angles`, values.

        Args: x [B, T, D]; positions [B, T] int32, from 0, whose angles are (cos, sin), [B, T, R/2] each.
        Returns: queries, a tuple of [B, T, N, H]; keys and values [B, T, K, H].
        """
        queries, keys, values = self.normed(*self.split(x))
        return tuple(rotate(queries, *a) for a in query_angles), rotate(keys, *key_angles), values

    def split(self, x: Array) -> tuple[Array, Array, Array]:
        """The bare projections of x [B, T, D]: queries [B, T, N, H], keys and values [B, T, K, H]."""
        c = self.config
        heads = self.qkv(x).reshape(*x.shape[:2], -1, c.head_dim)
        return tuple(jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=2))

    def normed(self, queries: Array, keys: Array, values: Array) -> tuple[Array, Array, Array]:
        """The same after the norms of queries and keys, where a model has those."""
        if self.config.qk_norm:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        return queries, keys, values

    def output(self, heads: Array) -> Array:
        """[B, T, N, H] -> [B, T, D]."""
        return self.out(heads.reshape(*heads.shape[:2], -1))
