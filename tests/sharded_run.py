"""Run in a process of its own with four devices: one model whole, and over a mesh of 2 x 2; prints the largest differences.

Per case, of hidden states after a prompt, of logits after each decode step, and the state's positions that differ.
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
    attention_softcap=20.0, logit_softcap=10.0, qkv_bias=True, layers=CONFIG.layers[1:],
)  # fmt: skip
BATCH, LENGTH, STEPS = 2, 24, 2


def run(params, tokens, following, state, *, config):
    """Hidden [B, T, D], logits [B, STEPS, V], state."""
    hidden, state = extend(params, tokens, state, config=config)
    out = []
    for step in range(STEPS):
        last, state = decode(params, following[:, step], state, config=config, valid=jnp.ones(len(tokens), bool))
        out.append(decoder.logits(params, last, config=config))
    return hidden, jnp.stack(out, axis=1), state


def compare(config, cache, budget, broken=()):
    """Of the model cut rightly, then of each wrong way."""
    params = jax.jit(functools.partial(decoder.init_params, config))(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + np.asarray(rng.normal(0, 0.05, x.shape), x.dtype), params)
    planned = plan(config, cache, budget, lengths=[LENGTH + STEPS] * BATCH, dtype="float32")
    new = lambda: empty_state(config, planned.spec, lengths=[LENGTH + STEPS] * BATCH, **planned.sizes())
    tokens, following = (jnp.asarray(rng.integers(0, 64, (BATCH, n)), jnp.int32) for n in (LENGTH, STEPS))
    whole = jax.jit(functools.partial(run, config=config))(params, tokens, following, new())
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), (DATA, TENSOR))
    states, rows = state_specs(new()), PartitionSpec(DATA)
    specs = (param_specs(params), rows, rows, states)
    arrange = jax.jit(functools.partial(arrange_params, config=config, count=2))
    found = []
    for wrong in ("", *broken):
        local = shard_config(config, 2)
        if wrong == "sums":
            local = dataclasses.replace(local, tensor_axis=None)
        logits = PartitionSpec(DATA, None, TENSOR if wrong == "sums" else None)
        f = jax.shard_map(
            functools.partial(run, config=local), mesh=mesh, in_specs=specs, out_specs=(rows, logits, states),
            check_vma=False,
        )  # fmt: skip
        arranged = params if wrong == "order" else arrange(params)
        place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
        found.append(_differences(whole, jax.jit(f)(*jax.tree.map(place, (arranged, tokens, following, new()), specs))))
    return found


def _differences(whole, cut):
    differ = lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max())
    positions = lambda out: np.concatenate(
        [np.asarray(tier.positions).ravel() for layer in out[2].layers for tier in layer.tiers]
    )
    moved = int((positions(whole) != positions(cut)).sum())
    return {"hidden": differ(whole[0], cut[0]), "logits": differ(whole[1], cut[1]), "moved": moved}


if __name__ == "__main__":
    out = {}
    out["llama h2o"], out["wrong order"], out["no sums"] = compare(CONFIG, "h2o", 16, ("order", "sums"))
    (out["gemma mikv"],) = compare(GEMMA, "mikv", "30%")
    json.dump(out, sys.stdout)
