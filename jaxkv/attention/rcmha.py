"""Relative convolutional attention: logits that also go by distance, and projections that have met their predecessors.

    logits(i, j) = scale * ((q_i + u) . k_j + q_i . R[i - j] + S[i - j])         q, k, v: convolved over time, head by head

The convolution is causal and depthwise. What it has yet to meet of earlier tokens are a row's taps, bare projections, which
the state carries from read to read; keys and values are stored convolved, so policies and schemes see ordinary ones. The
relative term goes by the positions that slots hold, so it stays right when tokens between have been evicted.

Source: RCMHA, arXiv 2308.03429, and its released code; the relative term is Transformer-XL's, arXiv 1901.02860, section 3.3,
the convolution Primer's, arXiv 2109.08668. Departs: distances below 0, which a causal model never sees, have no rows in the
table; queries are convolved over what was read before, as keys and values are, where the released code begins every read
anew (`query_context="segment"`), so that results do not depend on how the tokens arrive. After `jaxkv.cache.drop` of the end
of a row, the next tokens meet the taps of a row's beginning, zeros. While training, keys and values of a segment memory are
convolved over what stood before it, where the released code puts zeros (`jaxkv.causal`).
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.attention.gqa import GroupedQueryAttention
from jaxkv.config import DecoderConfig, RcmhaConfig
from jaxkv.types import Array, Place, Projected, Relative
from pallas_kernels.causal_conv import carry, causal_conv, step
from pallas_kernels.flash_attention import DEAD

ROLES = ("queries", "keys", "values")


class Convolution(nn.Module):
    """Owns filters [Kw, H] or [Kw, heads, H] and bias of one role; they start as a convolution of torch does."""

    rcmha: RcmhaConfig
    heads: int

    @nn.compact
    def __call__(self, x: Array, taps: Array | None, place: Place) -> Array:
        """x [B, T, heads, H] convolved over time, behind taps [B, Kw - 1, heads, H]."""
        width, size = self.rcmha.width, x.shape[-1]
        shape = (size,) if self.rcmha.convolution == "shared" else (self.heads, size)
        start = functools.partial(_uniform, bound=width**-0.5)
        filters = self.param("filters", start, (width, *shape), x.dtype)
        bias = self.param("bias", start, shape, x.dtype)
        by_head = lambda y: None if y is None else jnp.swapaxes(y, 1, 2)
        if x.shape[1] == 1 and place.passages is None:  # a decode step; what follows itself alone knows no segments
            valid = None if place.valid is None else place.valid[:, 0]
            return step(x[:, 0], filters, bias, by_head(taps), valid=valid)[0][:, None]
        valid = place.valid if place.passages is None else place.lasting
        y, left = causal_conv(by_head(x), filters, bias, by_head(taps), valid=valid, segments=place.segments)
        if place.passages is not None:
            y = y + _passages(by_head(x), filters, bias, left, place.passages)
        return by_head(y)


def _passages(x: Array, filters: Array, bias: Array, left: Array, numbers: Array) -> Array:
    """x [B, heads, T, H] of passages convolved, zeros elsewhere: each begins behind the lasting tokens, whose taps are left."""
    again, width = numbers > 0, left.shape[2]
    of_passage = jnp.cumsum(numbers == 1, axis=1, dtype=jnp.int32)
    y, _ = causal_conv(x, filters, bias, None, valid=again, segments=of_passage)
    behind, _ = causal_conv(jnp.zeros_like(left), filters, None, left)  # what the taps add to the first tokens of each
    first = again & (numbers <= width)
    index = jnp.where(first, numbers - 1, 0)[:, None, :, None]
    return y + jnp.where(first[:, None, :, None], jnp.take_along_axis(behind, index, axis=2), 0)


def _uniform(key, shape, dtype, *, bound):
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class Distances(nn.Module):
    """Owns the relative term: query_bias u [N, H], and table [N, distances, H + 1] of R and S; or, of "sinusoidal",
    query_bias u and distance_bias v [N, H] and kernel [D, N * H], which the sinusoids of distances go through."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, queries: Array) -> tuple[Array, Relative]:
        """What meets keys, and what meets distances; queries [B, T, N, H]."""
        c, (heads, size) = self.config, queries.shape[2:]
        zeros, far = nn.initializers.zeros_init(), c.rcmha.distances
        bias = self.param("query_bias", zeros, (heads, size), queries.dtype)
        if c.rcmha.relative == "learned":
            table = self.param("table", zeros, (heads, far, size + 1), queries.dtype)
            relative = Relative(jnp.concatenate([queries, jnp.ones_like(queries[..., :1])], axis=-1), table)
        else:
            other = self.param("distance_bias", zeros, (heads, size), queries.dtype)
            kernel = self.param("kernel", nn.initializers.lecun_normal(), (c.hidden_size, heads * size), queries.dtype)
            turned = jnp.einsum("btnh,dnh->btnd", queries + other[None, None], kernel.reshape(-1, heads, size))
            relative = Relative(turned, jnp.asarray(sinusoids(far, c.hidden_size), queries.dtype)[None])
        return queries + bias[None, None], relative


def sinusoids(count: int, size: int) -> np.ndarray:
    """[count, size] float32: sines, then cosines, of distances 0, 1, ... (Transformer-XL's order)."""
    half = size // 2
    turns = np.arange(count)[:, None] * 10000.0 ** (-np.arange(half) / half)
    return np.concatenate([np.sin(turns), np.cos(turns)], axis=1).astype(np.float32)


class RelativeConvolutionalAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` with the convolution and the relative term of `DecoderConfig.rcmha`, or one of them."""

    def setup(self):
        super().setup()
        c = self.config
        if c.rcmha.convolution != "none":
            counts = c.num_heads, c.num_kv_heads, c.num_kv_heads
            owners = (Convolution(c.rcmha, heads) for heads in counts)
            self.queries_convolution, self.keys_convolution, self.values_convolution = owners
        if c.rcmha.relative != "none":
            self.distances = Distances(c)

    def project(self, x: Array, place: Place) -> Projected:
        """As `GroupedQueryAttention.project`; the relative term, and the taps if `place` has some."""
        bare, taps = self.split(x), None
        if self.config.rcmha.convolution != "none":
            bare, taps = self.convolved(bare, place)
        queries, keys, values = self.normed(*bare)
        relative = None
        if self.config.rcmha.relative != "none":
            queries, relative = self.distances(queries)
        return self.turned(queries, keys, values, place)._replace(relative=relative, taps=taps)

    def convolved(self, bare, place: Place):
        """The bare projections after the convolution; and the taps that they leave."""
        c = self.config
        owners = self.queries_convolution, self.keys_convolution, self.values_convolution
        counts = c.num_heads, c.num_kv_heads, c.num_kv_heads
        carried = [n for n, role in enumerate(ROLES) if role != "queries" or c.rcmha.query_context == "memory"]
        before: list[Array | None] = [None] * len(ROLES)
        if place.taps is not None:
            edges = np.cumsum([counts[n] * c.head_dim for n in carried])[:-1]
            for n, part in zip(carried, jnp.split(place.taps, edges, axis=-1), strict=True):
                before[n] = part.reshape(*part.shape[:2], counts[n], c.head_dim).astype(bare[n].dtype)
        places = [place] * len(ROLES)
        if place.recalled is not None and c.rcmha.query_context == "segment":
            places[0] = place._replace(segments=jnp.where(place.recalled, DEAD, place.segments))
        out = tuple(owner(y, had, at) for owner, y, had, at in zip(owners, bare, before, places, strict=True))
        if place.taps is None:
            return out, None
        flat = jnp.concatenate([bare[n].reshape(*bare[n].shape[:2], -1) for n in carried], axis=-1)
        return out, carry(place.taps, flat.astype(place.taps.dtype), place.lasting)


def from_gqa(params, config: DecoderConfig, rcmha: RcmhaConfig, key: Array):
    """A plain model as one whose convolutions pass the newest token on and whose tables are zeros: it computes what it did.

    With "sinusoidal" distances it does not: their kernel is random, from key. The plain model's arrays are used, not copied.
    Returns: params, config.
    Raises: ValueError for a model that is no plain one, or a table too short for it.
    """
    if config.attention != "gqa":
        raise ValueError(f"a convolution is added to a model with attention 'gqa', got {config.attention!r}")
    plain, config = config, dataclasses.replace(config, attention="rcmha", rcmha=rcmha)
    params = dict(params)
    angles = jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1))
    place = Place(jnp.zeros((1, 1), jnp.int32), angles, (angles,))
    for index in range(plain.num_layers):
        layer = params[f"layers_{index}"]
        x = jnp.zeros((1, 1, plain.hidden_size), layer["attention"]["qkv"]["kernel"].dtype)
        module = RelativeConvolutionalAttention(config)
        made = module.init(jax.random.fold_in(key, index), x, place, method="project")["params"]
        own = {name: part for name, part in made.items() if name not in layer["attention"]}
        for name, part in own.items():
            if name.endswith("_convolution"):
                newest = jnp.zeros_like(part["filters"]).at[-1].set(1)
                own[name] = {"filters": newest, "bias": jnp.zeros_like(part["bias"])}
        params[f"layers_{index}"] = {**layer, "attention": {**layer["attention"], **own}}
    return params, config
