"""Run in a process of its own with four devices: one model whole, and over a mesh of 2 x 2; prints the largest differences.

Per case, of hidden states after a prompt, of logits after each of four decode steps, and the state's positions that differ.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv import decoder
from jaxkv.cache import decode, empty_state, extend
from jaxkv.cache.budgets import plan
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.sharding import DATA, TENSOR, arrange_params, param_specs, shard_config, state_specs

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROPE = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
CONFIG = DecoderConfig(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=8, num_kv_heads=4, head_dim=8,
    layers=(LayerConfig(window=None, rope=ROPE), LayerConfig(window=12, rope=ROPE)), max_positions=128, norm_eps=1e-6,
    norm_offset=0.0, activation="silu", query_scale=8**-0.5, embedding_scale=1.0, tie_embeddings=False,
)  # fmt: skip
GEMMA = dataclasses.replace(
    CONFIG, tie_embeddings=True, embedding_scale=32**0.5, norm_offset=1.0, qk_norm=True, sandwich_norms=True,
    attention_softcap=20.0, logit_softcap=10.0, qkv_bias=True,
)  # fmt: skip
BATCH, LENGTH, STEPS = 2, 24, 4


def run(params, tokens, following, state, *, config):
    """Hidden [B, T, D], logits [B, STEPS, V], state."""
    hidden, state = extend(params, tokens, state, config=config)
    out = []
    for step in range(STEPS):
        last, state = decode(params, following[:, step], state, config=config, valid=jnp.ones(len(tokens), bool))
        out.append(decoder.logits(params, last, config=config))
    return hidden, jnp.stack(out, axis=1), state


def compare(config, cache, budget, break_it):
    params = jax.jit(functools.partial(decoder.init_params, config))(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype), params)
    planned = plan(config, cache, budget, lengths=[LENGTH + STEPS] * BATCH, dtype="float32")
    new = lambda: empty_state(config, planned.spec, lengths=[LENGTH + STEPS] * BATCH, **planned.sizes())
    tokens, following = (jnp.asarray(rng.integers(0, 64, (BATCH, n)), jnp.int32) for n in (LENGTH, STEPS))
    whole = run(params, tokens, following, new(), config=config)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), (DATA, TENSOR))
    state = new()
    states, rows = state_specs(state), PartitionSpec(DATA)
    specs = (param_specs(params), rows, rows, states)
    arranged = params if break_it == "arrangement" else arrange_params(params, config, 2)
    local = shard_config(config, 2)
    if break_it == "sum":
        local = dataclasses.replace(local, tensor_axis=None)
    own = functools.partial(run, config=local)
    logits = PartitionSpec(DATA, None, TENSOR if break_it == "sum" else None)
    f = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=(rows, logits, states), check_vma=False)
    given = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), (arranged, tokens, following, state), specs
    )
    cut = jax.jit(f)(*given)
    differ = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max())
    moved = jax.tree.map(
        lambda a, b: int((np.asarray(a) != np.asarray(b)).sum()),
        [tier.positions for layer in whole[2].layers for tier in layer.tiers],
        [tier.positions for layer in cut[2].layers for tier in layer.tiers],
    )
    return {"hidden": differ(whole[0], cut[0]), "logits": differ(whole[1], cut[1]), "moved": sum(moved)}


if __name__ == "__main__":
    cases = {
        "llama full": (CONFIG, "full", None, ""),
        "llama h2o": (CONFIG, "h2o", 16, ""),
        "gemma mikv": (GEMMA, "mikv", "30%", ""),
        "wrong order": (CONFIG, "full", None, "arrangement"),
        "no sums": (CONFIG, "full", None, "sum"),
    }
    json.dump({name: compare(*case) for name, case in cases.items()}, sys.stdout)
