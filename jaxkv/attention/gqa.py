"""Grouped-query attention with rotary positions (GQA, arXiv 2305.13245), the attention of all published models here."""

import flax.linen as nn
import jax.numpy as jnp

from jaxkv.config import DecoderConfig
from jaxkv.layers import Linear, RMSNorm
from jaxkv.rope import rotate
from jaxkv.types import Array, Place, Projected


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

    def project(self, x: Array, place: Place) -> Projected:
        """Queries, keys and values of x [B, T, D], rotated to their positions."""
        return self.turned(*self.normed(*self.split(x)), place)

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

    def turned(self, queries: Array, keys: Array, values: Array, place: Place) -> Projected:
        """The same at their positions: queries once for each tier's frame, and keys."""
        queries = tuple(rotate(queries, *angles) for angles in place.query_angles)
        return Projected(queries, rotate(keys, *place.key_angles), values)

    def output(self, heads: Array) -> Array:
        """[B, T, N, H] -> [B, T, D]."""
        return self.out(heads.reshape(*heads.shape[:2], -1))
