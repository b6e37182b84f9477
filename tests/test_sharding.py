"""A model cut over a mesh says what it says whole; and where each of its arrays lies."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from jax.sharding import PartitionSpec
from sharded_run import CONFIG, GEMMA

from jaxkv.cache import empty_state
from jaxkv.cache.budgets import plan
from jaxkv.decoder import init_params
from jaxkv.sharding import ShardingError, arrange_params, param_specs, shard_config, state_specs

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def found():
    """What `sharded_run` prints; four devices can be had only by a process that has not begun."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    place = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "sharded_run.py")],
        env=place, capture_output=True, text=True, timeout=1800,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["llama h2o", "gemma mikv"])
def test_cut_or_whole_is_the_same(found, case):
    assert found[case]["hidden"] < tolerances.HIDDEN and found[case]["logits"] < tolerances.LOGITS
    assert found[case]["moved"] == 0  # the same tokens are kept in the same slots


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", ["wrong order", "no sums"])
def test_the_tolerance_sees_a_wrong_cut(found, case):
    assert found[case]["hidden"] > tolerances.VISIBLE and found[case]["logits"] > tolerances.VISIBLE


def test_columns_are_arranged_by_hand():
    """Four query heads, two kv heads, and an MLP of 4, each column a letter or a number."""
    rope = dataclasses.replace(CONFIG.layers[0].rope, rotary_dim=2)
    layers = (dataclasses.replace(CONFIG.layers[0], rope=rope),)
    config = dataclasses.replace(CONFIG, layers=layers, num_heads=4, num_kv_heads=2, head_dim=2, intermediate_size=4)
    qkv = jnp.asarray([list(range(16))], jnp.float32)  # q: 0-7, k: 8-11, v: 12-15
    gate_up = jnp.asarray([[0, 1, 2, 3, 10, 11, 12, 13]], jnp.float32)
    params = {
        "attention": {"qkv": {"kernel": qkv, "bias": qkv[0]}, "output": {"kernel": qkv}},
        "mlp": {"gate_up": {"kernel": gate_up}},
    }
    cut = arrange_params(params, config, 2)
    order = [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    np.testing.assert_array_equal(cut["attention"]["qkv"]["kernel"], [order])
    np.testing.assert_array_equal(cut["attention"]["qkv"]["bias"], order)
    np.testing.assert_array_equal(cut["attention"]["output"]["kernel"], qkv)
    np.testing.assert_array_equal(cut["mlp"]["gate_up"]["kernel"], [[0, 1, 10, 11, 2, 3, 12, 13]])
    assert arrange_params(params, config, 1) is params


def test_where_arrays_lie():
    """Of every matrix the axis that the two sums are over, of a tier rows and heads, of all else nothing."""
    P = PartitionSpec
    params = jax.eval_shape(lambda: init_params(GEMMA, jax.random.key(0)))
    specs = param_specs(params)
    block = specs["layers_0"]
    assert block["attention"]["qkv"] == {"kernel": P(None, "tensor"), "bias": P("tensor")}
    assert block["attention"]["output"]["kernel"] == P("tensor", None) == block["mlp"]["down"]["kernel"]
    assert block["mlp"]["gate_up"]["kernel"] == P(None, "tensor") == specs["head"]["kernel"]
    assert block["attention"]["query_norm"]["scale"] == P() == specs["final_norm"]["scale"]
    untied = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    assert param_specs(untied)["embedder"]["embedding"] == P("tensor", None)
    planned = plan(CONFIG, "mikv", 16, lengths=[64, 64], dtype="float32")
    state = jax.eval_shape(lambda: empty_state(CONFIG, planned.spec, lengths=jnp.array([64, 64]), **planned.sizes()))
    placed = state_specs(state)
    layer = placed.layers[0]
    both = P("data", "tensor")
    assert all(spec == both for spec in jax.tree.leaves(layer.tiers)) and layer.balance == both
    assert placed.next_position == P("data") and all(spec == P("data") for spec in jax.tree.leaves(placed.rotary))
    assert all(spec == P("data") for spec in placed.offsets)


def test_one_shard_is_a_smaller_model():
    local = shard_config(CONFIG, 4)
    assert (local.num_heads, local.num_kv_heads, local.intermediate_size) == (2, 1, 12)
    assert (local.head_dim, local.hidden_size, local.vocab_size, local.tensor_axis) == (8, 32, 64, "tensor")
    assert shard_config(CONFIG, 1) is CONFIG
    assert repr(dataclasses.replace(CONFIG, tensor_axis="tensor")) == repr(CONFIG)  # saved states go by it


@pytest.mark.parametrize(
    "changes, count, message",
    [
        (
            {},
            8,
            "4 kv heads cannot be cut into 8 equal shards, and kv heads are not replicated; this model takes 1, 2, 4",
        ),
        ({}, 3, "4 kv heads cannot be cut into 3"),
        ({"intermediate_size": 50}, 4, "50 channels of the MLP cannot be cut into 4"),
        ({"vocab_size": 66}, 4, "66 tokens of the vocabulary cannot be cut into 4 equal shards"),
        ({"output_bias": True}, 2, "biases after attention"),
        ({"mlp_bias": True}, 2, "biases after attention or in its MLP"),
    ],
)
def test_refused(changes, count, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ShardingError, match=message):
        shard_config(config, count)
    assert shard_config(config, 1) is config
