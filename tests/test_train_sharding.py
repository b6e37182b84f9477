"""Where arrays lie, by hand on a mesh of one device, and the same losses on eight: in a process of its own, which has eight."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tolerances
from cache_harness import PLAIN
from jax.sharding import AbstractMesh, PartitionSpec

from train.config import Compute, TrainError
from train.sharding import LOGICAL, MESH_AXIS, check_batch, check_heads, make_mesh, parameter_spec, unsharded

ROOT = pathlib.Path(__file__).parent.parent
MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))


@pytest.mark.parametrize(
    "path, shape, expected",
    [
        ("layers_0/attention/qkv/kernel", (8, 24), ("fsdp", "tensor")),
        ("layers_11/mlp/down/kernel", (16, 8), ("tensor", "fsdp")),
        ("layers_11/mlp/up/kernel", (8, 16), ("fsdp", "tensor")),
        ("layers_11/mlp/up/bias", (16,), ("tensor",)),
        ("positions/embedding", (64, 8), (None, "fsdp")),
        ("head/kernel", (8, 64), ("fsdp", "tensor")),
        ("head/kernel", (8, 65), ("fsdp", None)),  # 65 tokens are not cut in two
        ("embedder/embedding", (64, 8), ("tensor", "fsdp")),
        ("layers_0/mlp/gate_up/kernel.lora_a", (8, 2), ("fsdp", None)),
        ("final_norm/scale", (8,), ()),
    ],
)
def test_where_parameters_lie(path, shape, expected):
    assert parameter_spec(path, shape, MESH) == PartitionSpec(*expected)


def test_what_is_not_cut_is_told():
    shapes = {
        "head/kernel": jax.ShapeDtypeStruct((8, 65), "float32"),
        "final_norm/scale": jax.ShapeDtypeStruct((8,), "f4"),
    }
    assert unsharded(shapes, MESH) == ["head/kernel"]
    assert unsharded(shapes, AbstractMesh((1, 8, 1), ("data", "fsdp", "tensor"))) == []


def test_the_tables_fit_together():
    assert {name for _, axes in LOGICAL for name in axes} == set(MESH_AXIS)


def test_a_mesh_of_what_is_left():
    with pytest.raises(TrainError, match="data . x fsdp 3 x tensor 1 does not fit 8 devices"):
        make_mesh(Compute(fsdp=3), list(range(8)))
    with pytest.raises(TrainError, match="does not fit 8 devices"):
        make_mesh(Compute(data=2, fsdp=2), list(range(8)))
    with pytest.raises(TrainError, match="batch 12 in 2 parts gives 6 rows, which 4 devices"):
        check_batch(MESH, 12, 2)
    check_batch(MESH, 8, 2)
    check_heads(MESH, PLAIN)
    with pytest.raises(TrainError, match="2 kv heads cannot be cut over tensor 8; --compute.tensor takes 1, 2 for"):
        check_heads(AbstractMesh((1, 1, 8), ("data", "fsdp", "tensor")), PLAIN)


EIGHT = """
import json, pathlib, sys
import jax
from train.config import Recipe, Model, Data, Optimizer, Checkpoints, Evaluation, Logging
from train.fields import override
from train.loop import train
from train.prepare import prepare
recipe = Recipe(
    model=Model(hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=64,
                tie_embeddings=False, **json.loads(sys.argv[3])),
    data=Data(train=("text.txt",), tokenizer="bytes"), optimizer=Optimizer(learning_rate=3e-3), steps=4, batch=8, sequence=16,
    memory=int(sys.argv[2]),
    out="none", checkpoints=Checkpoints(every=2), evaluation=Evaluation(every=0, batches=1), logging=Logging(curves=False),
)
found, layout = {}, {}
for mesh in json.loads(sys.argv[1]):
    words = [f"--compute.{name}={size}" for name, size in zip(("data", "fsdp", "tensor"), mesh)]
    words += ["--compute.accumulation", str(mesh[3])] if len(mesh) > 3 else []
    name = "x".join(map(str, mesh))
    prepared = prepare(override(recipe, [*words, "--out", name]), jax.devices()[: mesh[0] * mesh[1] * mesh[2]])
    found[name] = train(prepared, quiet=True).losses
    leaf = prepared.shapes.optimizer[1].mu["layers_0/attention/qkv/kernel"]
    layout[name] = leaf.sharding.shard_shape(leaf.shape)
moved = prepare(override(recipe, ["--out", "2x2x2", "--compute.fsdp", "8", "--compute.data", "1"]), jax.devices())
import shutil
shutil.rmtree("2x2x2/checkpoints/4")
found["moved"] = train(moved, quiet=True).losses
print(json.dumps([found, layout]))
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("memory, more", [(0, {}), (12, {"attention": "rcmha", "rope": "none"})])
def test_eight_devices_give_the_losses_of_one(tmp_path, memory, more):
    """Every kind of mesh of eight that these two kv heads allow; a checkpoint of one mesh goes on on another."""
    (tmp_path / "text.txt").write_text("".join(map(chr, np.random.default_rng(0).integers(97, 123, 3000))))
    meshes = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2), (2, 1, 1, 4)]
    place = {
        **os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", EIGHT, json.dumps(meshes), str(memory), json.dumps(more)], cwd=tmp_path, env=place,
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found, layout = json.loads(done.stdout.splitlines()[-1])
    expected = found.pop("1x1x1")
    assert len(expected) == 4
    for name, losses in found.items():
        for step, loss in losses.items():
            np.testing.assert_allclose(loss, expected[step], rtol=tolerances.MESH_LOSS, err_msg=f"{name} step {step}")
    assert list(found["moved"]) == ["3", "4"]
    assert layout["1x1x1"] == [32, 64] and layout["2x2x2"] == [16, 32] and layout["1x4x2"] == [8, 32]
