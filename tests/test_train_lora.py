"""Adapters: files that PEFT writes, by hand, and a fine-tuning run whose adapters and merged model say the same."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import PLAIN
from safetensors.numpy import load_file, save_file
from train_harness import parameters

import infer
from jaxkv.checkpoints import CheckpointError, add_adapters, save_adapters
from train.config import Data, Evaluation, Logging, Lora, Model, Optimizer, Recipe
from train.loop import train
from train.optimizer import flatten, unflatten
from train.prepare import prepare

FLAT = parameters()
QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"
FIELDS = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}


@pytest.fixture
def folder(tmp_path):
    """Adapters of one layer's queries alone, as PEFT writes them, with alpha / rank = 3."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 32), (32, 2)))
    save_file({QUERY.format("A"): a, QUERY.format("B"): b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(FIELDS))
    return tmp_path, a, b


def test_a_pair_goes_into_its_part_of_the_fused_kernel(folder):
    place, a, b = folder
    found = flatten(add_adapters(place, PLAIN, unflatten(FLAT)))
    path = "layers_1/attention/qkv/kernel"
    np.testing.assert_allclose(
        found[path][:, :32], FLAT[path][:, :32] + 3 * (b @ a).T, rtol=tolerances.ADAPTED, atol=tolerances.ADAPTED
    )
    np.testing.assert_array_equal(found[path][:, 32:], FLAT[path][:, 32:])
    assert all((found[other] == x).all() for other, x in FLAT.items() if other != path)


def test_a_fused_kernels_adapters_are_written_in_parts(tmp_path):
    rng = np.random.default_rng(1)
    path = ("layers_0", "attention", "qkv", "kernel")
    a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((32, 3), (3, 64)))
    save_adapters(tmp_path / "one", PLAIN, {path: (a, b)}, alpha=6.0, base="somewhere")
    found = flatten(add_adapters(tmp_path / "one", PLAIN, unflatten(FLAT)))
    name = "/".join(path)
    np.testing.assert_allclose(found[name], FLAT[name] + 2 * a @ b, rtol=tolerances.ADAPTED, atol=tolerances.ADAPTED)
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"] == [
        "k_proj", "q_proj", "v_proj",
    ]  # fmt: skip
    assert len(load_file(tmp_path / "one" / "adapter_model.safetensors")) == 6
    with pytest.raises(CheckpointError, match="adapters need kernels of the model and one rank"):
        save_adapters(tmp_path / "two", PLAIN, {("final_norm", "scale"): (a, b)}, alpha=6.0, base="somewhere")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"r": None}, "r and lora_alpha must be numbers"),
    ],
)
def test_adapters_that_ask_for_more(folder, change, message):
    (folder[0] / "adapter_config.json").write_text(json.dumps(FIELDS | change))
    with pytest.raises(CheckpointError, match=message):
        add_adapters(folder[0], PLAIN, unflatten(FLAT))


def test_rank_stabilized_adapters(folder):
    place, a, b = folder
    (place / "adapter_config.json").write_text(json.dumps(FIELDS | {"use_rslora": True}))
    path = "layers_1/attention/qkv/kernel"
    found = flatten(add_adapters(place, PLAIN, unflatten(FLAT)))[path][:, :32]
    np.testing.assert_allclose(
        found, FLAT[path][:, :32] + 6 / 2**0.5 * (b @ a).T, rtol=tolerances.ADAPTED, atol=tolerances.ADAPTED
    )


@pytest.mark.parametrize(
    "tensors, message",
    [
        (
            {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": np.zeros((2, 32), "f4")},
            "belongs to no kernel",
        ),
        ({QUERY.format("A"): np.zeros((2, 32), "f4")}, "lora_B.weight' is missing"),
        (
            {QUERY.format("A"): np.zeros((2, 31), "f4"), QUERY.format("B"): np.zeros((32, 2), "f4")},
            "do not fit a kernel",
        ),
    ],
)
def test_adapters_of_another_model(folder, tensors, message):
    save_file(tensors, folder[0] / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        add_adapters(folder[0], PLAIN, unflatten(FLAT))
    (folder[0] / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="cannot be read"):
        add_adapters(folder[0], PLAIN, unflatten(FLAT))


def test_a_checkpoint_is_fine_tuned_by_adapters(alphabet, tmp_path):
    """Two steps; base plus adapters is the merged model, and neither is the base."""
    (tmp_path / "text.txt").write_text("zyxwvutsrqponmlkjihgfedcba " * 40)
    recipe = Recipe(
        model=Model(base=str(alphabet)), data=Data(train=(str(tmp_path / "text.txt"),)), steps=3, batch=4, sequence=16,
        optimizer=Optimizer(learning_rate=1e-2), lora=Lora(rank=2), out=str(tmp_path / "run"),
        evaluation=Evaluation(every=0, batches=1), logging=Logging(curves=False),
    )  # fmt: skip
    prepared = prepare(recipe)
    assert sum(x.size for x in prepared.shapes.trained.values()) < 0.1 * sum(
        x.size for x in prepared.shapes.frozen.values()
    )
    result = train(prepared, quiet=True)
    ids = [[5, 6, 7, 8]]
    base = infer.load(alphabet).logits(ids)
    merged = infer.load(result.model).logits(ids)
    added = infer.load(alphabet, adapter=tmp_path / "run" / "adapter").logits(ids)
    np.testing.assert_allclose(added, merged, rtol=tolerances.ADAPTED_LOGITS, atol=tolerances.ADAPTED_LOGITS)
    assert jnp.abs(merged - base).max() > 1e-2
    stored = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "3").rglob("*") if path.is_file())
    whole = sum(path.stat().st_size for path in alphabet.rglob("*.safetensors"))
    assert stored < whole  # the base is not stored again
