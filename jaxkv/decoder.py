"""The whole model on one page: embedder, block, decoder.

Modules own parameters only. The cache comes in as `attend`, a function of what attention has projected, so a block neither
knows nor cares what is remembered of the past:

    x ─ norm ─ project ─ attend ─ output ─(norm)─ + ─ norm ─ gate·up ─ down ─(norm)─ + ─>
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxkv.attention import ATTENTION
from jaxkv.config import DecoderConfig
from jaxkv.layers import Linear, RMSNorm, linear, rms_norm
from jaxkv.sharding import gather_shards, lookup, sum_shards
from jaxkv.types import Array, Place

ACTIVATION = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu_squared": lambda x: jnp.square(jax.nn.relu(x)),  # Primer, arXiv 2109.08668
}


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up fused (GLU variants, arXiv 2002.05202); or down(activation(up(x)))."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        if c.mlp_gate:
            gate, up = jnp.split(Linear(2 * c.intermediate_size, c.mlp_bias, name="gate_up")(x), 2, axis=-1)
            hidden = ACTIVATION[c.activation](gate) * up
        else:
            hidden = ACTIVATION[c.activation](Linear(c.intermediate_size, c.mlp_bias, name="up")(x))
        return sum_shards(Linear(c.hidden_size, c.mlp_bias, name="down")(hidden), c.tensor_axis)


class Block(nn.Module):
    """One layer. `attend(projected) -> (heads, aux)`: attention over what the cache holds and these keys."""

    config: DecoderConfig

    def setup(self):
        c = self.config
        norm = functools.partial(RMSNorm, c.norm_eps, c.norm_offset)
        self.attention_norm, self.mlp_norm = norm(), norm()
        if c.sandwich_norms:
            self.post_attention_norm, self.post_mlp_norm = norm(), norm()
        self.attention = ATTENTION[c.attention](c)
        self.mlp = MLP(c)

    def __call__(self, x: Array, place: Place, attend, recalled: Array | None = None):
        x, aux = self.mix_tokens(x, place, attend, recalled)
        return self.feed_forward(x), aux

    def mix_tokens(self, x: Array, place: Place, attend, recalled: Array | None = None):
        """The first half: attention, and its residual. recalled [B, R, D]: earlier inputs of this layer, projected before x;
        `place` counts them, and `attend` returns heads of x alone."""
        seen = x if recalled is None else jnp.concatenate([recalled, x], axis=1)
        heads, aux = attend(self.attention.project(self.attention_norm(seen), place))
        y = sum_shards(self.attention.output(heads), self.config.tensor_axis)
        return x + (self.post_attention_norm(y) if self.config.sandwich_norms else y), aux

    def feed_forward(self, x: Array) -> Array:
        """The second half, for which tokens are independent: the MLP, and its residual."""
        y = self.mlp(self.mlp_norm(x))
        return x + (self.post_mlp_norm(y) if self.config.sandwich_norms else y)


def embed(params, tokens: Array, *, config: DecoderConfig, positions: Array | None = None) -> Array:
    """Embeddings [B, T, D] of ids [B, T]. A tied table is stored once, as the head's [D, V].

    positions: [B, T] int32, needed by a model with learned ones. Beyond their table the embedding is NaN: `extend` and
    `empty_state` refuse that before it comes to it, and a compiled loop cannot.
    """
    if config.tie_embeddings:
        x = jnp.moveaxis(lookup(params["head"]["kernel"], tokens, along=1, axis=config.tensor_axis), 0, -1)
    else:
        x = lookup(params["embedder"]["embedding"], tokens, along=0, axis=config.tensor_axis)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, x.dtype)
    if config.learned_positions is None:
        return x
    if positions is None:
        raise ValueError("a model with learned positions embeds tokens at their positions; give them")
    return x + jnp.take(params["positions"]["embedding"], positions, axis=0, mode="fill", fill_value=jnp.nan)


def final_norm(params, x: Array, *, config: DecoderConfig) -> Array:
    """The norm between the last block and the head."""
    return rms_norm(params["final_norm"]["scale"], x, eps=config.norm_eps, offset=config.norm_offset)


def logits(params, hidden: Array, *, config: DecoderConfig) -> Array:
    """Next-token logits [..., V] float32 of normed hidden states [..., D]."""
    y = gather_shards(linear(params["head"], hidden), config.tensor_axis).astype(jnp.float32)
    if config.logit_softcap is not None:
        y = jnp.tanh(y / config.logit_softcap) * config.logit_softcap
    return y


def init_params(config: DecoderConfig, key: Array, *, dtype=jnp.float32):
    """Random parameters of the whole decoder; under `jax.eval_shape`, only their shapes.

    Returns: {"embedder" (untied only), "positions" (learned only), "layers_0"..., "final_norm", "head"}; kernels
    are [in, out], q/k/v and gate/up fused along `out`, all of one `dtype`.
    """
    keys = jax.random.split(key, config.num_layers + 2)
    angles = jnp.zeros((1, 1, 1)), jnp.zeros((1, 1, 1))
    place = Place(jnp.zeros((1, 1), jnp.int32), angles, (angles,))
    x = jnp.zeros((1, 1, config.hidden_size), dtype)
    attend = lambda projected: (projected.queries[0], None)
    params = {f"layers_{i}": Block(config).init(keys[i], x, place, attend)["params"] for i in range(config.num_layers)}
    table = jax.nn.initializers.normal(0.02)
    if not config.tie_embeddings:
        params["embedder"] = {"embedding": table(keys[-2], (config.vocab_size, config.hidden_size), dtype)}
    if config.learned_positions is not None:
        shape = (config.learned_positions, config.hidden_size)
        params["positions"] = {"embedding": table(jax.random.fold_in(keys[-2], 1), shape, dtype)}
    params["head"] = {"kernel": table(keys[-1], (config.hidden_size, config.vocab_size), dtype)}
    params["final_norm"] = {"scale": jnp.full((config.hidden_size,), 1.0 - config.norm_offset, dtype)}
    return params
