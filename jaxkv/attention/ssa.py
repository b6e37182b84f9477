"""Selective Self-Attention: queries and values (keys as an option) times temperatures that their token and position set.

    tau(x, n) = 1 + tanh(f(x)) + g(alpha) log n        n = 1, 2, ... the token's place in its sequence

    out = softmax(mask((tau_q q) (tau_k k)^T scale)) (tau_v v)

A scaled query is a row of logits scaled, a softmax of temperature 1 / tau_q, so that every kernel serves; the temperatures
of keys and values belong to the token that is remembered and are stored with it. So the cache, its policies and schemes
see ordinary queries, keys and values.

Source: Selective Attention: Enhancing Transformer through Principled Context Control, arXiv 2411.12892, and its released
code. Departs: the two terms are added (the text does not say; a product could not start as plain attention); n is the
absolute position also while decoding, after eviction and in padded rows, where the released code counts the rows of the
current tensor; no position term on values unless asked for, with which values would grow with position. Of a token whose
position moves afterwards (`jaxkv.cache.concat`), keys and values keep the temperature of the position it was read at.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkv.attention.gqa import GroupedQueryAttention
from jaxkv.config import DecoderConfig, SsaConfig
from jaxkv.layers import Linear, linear
from jaxkv.types import Array, Place, Projected

ROLES = ("queries", "keys", "values")
GATE = {"sigmoid": jax.nn.sigmoid, "exp-exp": lambda alpha: jnp.exp(-jnp.exp(alpha))}
SCRATCH = {"sigmoid": 0.0, "exp-exp": -0.36651292}  # alpha of a model that is trained from the start: g = 1/2
FINETUNE = {
    "sigmoid": -4.0,
    "exp-exp": 2.0,
}  # of one that starts as another model: g = 0.018 and 0.0006 (released code)


def temperature(token: Array | None, alpha: Array | None, positions: Array, *, gate: str) -> Array:
    """tau = 1 + tanh(token) + g(alpha) log(positions + 1); a term that is None is left out.

    Args: token [B, T, heads or 1]; alpha [heads or 1]; positions [B, T] int32, from 0.
    Returns: [B, T, heads or 1] float32.
    """
    tau = jnp.ones((*positions.shape, 1), jnp.float32)
    if token is not None:
        tau = tau + jnp.tanh(token.astype(jnp.float32))
    if alpha is not None:
        weight = GATE[gate](alpha.astype(jnp.float32))[None, None]
        tau = tau + weight * jnp.log1p(positions.astype(jnp.float32))[..., None]
    return tau


class Temperature(nn.Module):
    """Owns what one of queries, keys and values is scaled by: kernel of the token term, [H, heads] if its features are
    shared, else [D, heads or 1]; hidden/kernel [D, D] of "mlp"; alpha [heads or 1] of the position term.

    Kernels start at zero and alpha at its value for training from scratch; `from_gqa` makes the start for fine-tuning.
    """

    ssa: SsaConfig
    terms: str

    @nn.compact
    def __call__(self, x: Array, projected: Array, positions: Array) -> Array:
        """tau [B, T, heads or 1] float32 of x [B, T, D], the layer's normed input, and projected [B, T, heads, H]."""
        s, (heads, size) = self.ssa, projected.shape[2:]
        token = alpha = None
        zeros = nn.initializers.zeros_init()
        if "token" in self.terms and s.features == "shared":
            kernel = self.param("kernel", zeros, (size, heads), x.dtype)
            features = jax.nn.gelu(projected, approximate=False)
            out = "bth" if s.token_per_head else "bt"
            token = jnp.einsum(f"bthc,ch->{out}", features, kernel, preferred_element_type=jnp.float32)
            token = token.reshape(*token.shape[:2], -1)
        elif "token" in self.terms:
            kernel = self.param("kernel", zeros, (x.shape[-1], heads if s.token_per_head else 1), x.dtype)
            if s.features == "mlp":
                x = jax.nn.gelu(Linear(x.shape[-1], name="hidden")(x), approximate=False)
            token = linear({"kernel": kernel}, x)
        if "position" in self.terms:
            start = nn.initializers.constant(SCRATCH[s.gate])
            alpha = self.param("alpha", start, (heads if s.alpha_per_head else 1,), x.dtype)
        return temperature(token, alpha, positions, gate=s.gate)


class SelectiveAttention(GroupedQueryAttention):
    """`GroupedQueryAttention` and the temperatures of `DecoderConfig.ssa`. With q/k norms, what is normed is scaled."""

    def setup(self):
        super().setup()
        ssa = self.config.ssa
        make = lambda role: Temperature(ssa, getattr(ssa, role)) if getattr(ssa, role) != "none" else None
        self.queries_temperature, self.keys_temperature, self.values_temperature = map(make, ROLES)

    def project(self, x: Array, place: Place) -> Projected:
        """As `GroupedQueryAttention.project`."""
        bare = self.split(x)
        owners = self.queries_temperature, self.keys_temperature, self.values_temperature
        scaled = (
            heads if owner is None else _scaled(heads, owner(x, projected, place.positions))
            for owner, projected, heads in zip(owners, bare, self.normed(*bare), strict=True)
        )
        return self.turned(*scaled, place)


def _scaled(heads: Array, tau: Array) -> Array:
    """heads [B, T, heads, H] times tau [B, T, heads or 1], in float32 on the way."""
    return (heads.astype(jnp.float32) * tau[..., None]).astype(heads.dtype)


def from_gqa(params, config: DecoderConfig, ssa: SsaConfig, key: Array, *, alpha: float | None = None):
    """A plain model as one with temperatures that start at, or near, 1: where fine-tuning begins.

    Args:
      params, config: of a model with attention="gqa"; its arrays are used, not copied.
      key: for the hidden layer of features="mlp"; all else starts at one value.
      alpha: of all position terms; None: `FINETUNE`. At -inf ("sigmoid") or inf ("exp-exp") they are off and the model
        computes what it did, bit for bit; but from there no gradient leads away.
    Returns: params, config.
    Raises: ValueError for a model that is no plain one.
    """
    if config.attention != "gqa":
        raise ValueError(f"temperatures are added to a model with attention 'gqa', got {config.attention!r}")
    config = dataclasses.replace(config, attention="ssa", ssa=ssa)
    start = FINETUNE[ssa.gate] if alpha is None else alpha
    keys = jax.random.split(key, (config.num_layers, len(ROLES)))
    counts = config.num_heads, config.num_kv_heads, config.num_kv_heads
    params = dict(params)
    for index in range(config.num_layers):
        layer = params[f"layers_{index}"]
        dtype = layer["attention"]["qkv"]["kernel"].dtype
        x = jnp.zeros((1, 1, config.hidden_size), dtype)
        added = {}
        for number, (role, heads) in enumerate(zip(ROLES, counts, strict=True)):
            if getattr(ssa, role) == "none":
                continue
            projected = jnp.zeros((1, 1, heads, config.head_dim), dtype)
            owner = Temperature(ssa, getattr(ssa, role))
            mine = owner.init(keys[index, number], x, projected, jnp.zeros((1, 1), jnp.int32))["params"]
            if "alpha" in mine:
                mine = {**mine, "alpha": jnp.full_like(mine["alpha"], start)}
            added[f"{role}_temperature"] = mine
        params[f"layers_{index}"] = {**layer, "attention": {**layer["attention"], **added}}
    return params, config
