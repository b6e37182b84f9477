"""Hugging Face directories: weights in and out, and every refusal."""

import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxkv.checkpoints import CheckpointError, open_checkpoint, read_config, save

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))


def golden_config(case: str) -> dict:
    return json.loads((GOLDENS / case / "config.json").read_text())


def copy_of(case: str, tmp_path: pathlib.Path, **changes) -> pathlib.Path:
    """A writable copy of a golden directory; changes go into config.json (None: the key is removed)."""
    folder = tmp_path / case
    shutil.copytree(GOLDENS / case, folder)
    fields = {key: value for key, value in (golden_config(case) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def leaves_of(params) -> dict[str, np.ndarray]:
    found = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in found}


def assert_same(one, other):
    one, other = leaves_of(one), leaves_of(other)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.dtype == other[name].dtype, name
        np.testing.assert_array_equal(array, other[name], err_msg=name)


# Weights in


def test_text_part_of_multimodal_gemma3(tmp_path):
    folder = copy_of("gemma3", tmp_path)
    text = golden_config("gemma3")
    outer = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {key: value for key, value in text.items() if key != "architectures"},
        "vision_config": {"hidden_size": 8},
        "mm_tokens_per_image": 256,
        "eos_token_id": [1, 2],
    }
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.replace("model.", "language_model.model.", 1): array for name, array in tensors.items()}
    renamed["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(renamed, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder, dtype="float32")
    assert checkpoint.config == read_config(GOLDENS / "gemma3")
    assert checkpoint.generation.eos_ids == (1, 2)
    assert_same(checkpoint.params, open_checkpoint(GOLDENS / "gemma3", dtype="float32").params)


def test_fused_layout_by_hand():
    """q, k, v side by side as columns, each transposed; gate before up; the tied table only as head."""
    file = load_file(GOLDENS / "smollm2-like" / "model.safetensors")
    params = leaves_of(open_checkpoint(GOLDENS / "smollm2-like", dtype="float32").params)
    layer = "model.layers.1."
    query, key, value = (file[f"{layer}self_attn.{name}_proj.weight"] for name in "qkv")
    expected = np.concatenate([query.T, key.T, value.T], axis=1)
    np.testing.assert_array_equal(params["layers_1/attention/qkv/kernel"], expected)
    expected = np.concatenate([file[f"{layer}mlp.gate_proj.weight"].T, file[f"{layer}mlp.up_proj.weight"].T], axis=1)
    np.testing.assert_array_equal(params["layers_1/mlp/gate_up/kernel"], expected)
    np.testing.assert_array_equal(params["layers_1/mlp/down/kernel"], file[f"{layer}mlp.down_proj.weight"].T)
    np.testing.assert_array_equal(params["layers_1/mlp_norm/scale"], file[f"{layer}post_attention_layernorm.weight"])
    np.testing.assert_array_equal(params["head/kernel"], file["model.embed_tokens.weight"].T)
    assert "embedder/embedding" not in params
    untied = leaves_of(open_checkpoint(GOLDENS / "llama2", dtype="float32").params)
    table = load_file(GOLDENS / "llama2" / "model.safetensors")
    np.testing.assert_array_equal(untied["embedder/embedding"], table["model.embed_tokens.weight"])
    np.testing.assert_array_equal(untied["head/kernel"], table["lm_head.weight"].T)


def test_gemma_norms_by_hand():
    """post_attention_layernorm is the norm after attention here, and not, as elsewhere, the one before the MLP."""
    file = load_file(GOLDENS / "gemma2" / "model.safetensors")
    params = leaves_of(open_checkpoint(GOLDENS / "gemma2", dtype="float32").params)
    for ours, theirs in (
        ("attention_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("mlp_norm", "pre_feedforward_layernorm"),
        ("post_mlp_norm", "post_feedforward_layernorm"),
    ):
        np.testing.assert_array_equal(params[f"layers_0/{ours}/scale"], file[f"model.layers.0.{theirs}.weight"])


@pytest.mark.parametrize("case", ["llama2", "llama-yarn-mscale", "qwen2-window"])  # stored f32, bf16, f16
def test_dtype_in_memory(case):
    whole = leaves_of(open_checkpoint(GOLDENS / case, dtype="float32").params)
    half = leaves_of(open_checkpoint(GOLDENS / case, dtype="bfloat16").params)
    for name, array in whole.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(half[name], array.astype(ml_dtypes.bfloat16))


def test_progress_counts_bytes_to_the_end():
    calls = []
    checkpoint = open_checkpoint(GOLDENS / "llama3", dtype="bfloat16", progress=lambda *call: calls.append(call))
    total = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(checkpoint.params))
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][0] == calls[-1][1] == total
    assert {name for _, _, name in calls} == set(leaves_of(checkpoint.params))


def rewrite(folder: pathlib.Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_known_extras_are_skipped(tmp_path):
    folder = copy_of("llama-tied", tmp_path)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    rewrite(folder, change)
    plain = open_checkpoint(GOLDENS / "llama-tied", dtype="float32").params
    assert_same(open_checkpoint(folder, dtype="float32").params, plain)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"] + 1}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings is true, but 'lm_head.weight' differs"):
        open_checkpoint(folder, dtype="float32")


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: tensors.pop(DOWN), [DOWN, "missing"]),
        (lambda tensors: tensors.update({"model.layers.1.mlp.extra": np.ones(2)}), ["mlp.extra", "unexpected"]),
        (lambda tensors: tensors.update({DOWN: np.ones((3, 4), np.float32)}), [DOWN, "[3, 4]", "[32, 48]"]),
        (lambda tensors: tensors.update({DOWN: np.ones((32, 48), np.int8)}), [DOWN, "I8", "F32, F16, BF16"]),
        (lambda tensors: tensors.update({DOWN: np.ones((32, 48), np.float64)}), [DOWN, "F64", "F32, F16, BF16"]),
        (lambda tensors: tensors.pop("lm_head.weight"), ["lm_head.weight", "missing"]),
    ],
)
def test_wrong_tensors(tmp_path, change, named):
    folder = copy_of("llama2", tmp_path)
    rewrite(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder, dtype="float32")
    for word in named:
        assert word in str(caught.value)


def test_damaged_files(tmp_path):
    folder = copy_of("llama2", tmp_path)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 5, 400, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
            open_checkpoint(folder, dtype="float32")
    path.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        open_checkpoint(folder, dtype="float32")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a JSON list"):
        read_config(folder)
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(CheckpointError, match=r"config\.json is not valid JSON"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(folder)


def test_shards(tmp_path):
    folder = copy_of("llama3", tmp_path)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = index["weight_map"][DOWN]
    (folder / name).rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=f"shard '{name}' is missing"):
        open_checkpoint(folder, dtype="float32")
    (folder / "elsewhere").rename(folder / name)
    index["weight_map"]["model.extra"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lacks tensor 'model\.extra'"):
        open_checkpoint(folder, dtype="float32")
    index["weight_map"]["model.extra"] = "../secret.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name in that directory"):
        open_checkpoint(folder, dtype="float32")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(CheckpointError, match="weight_map must map"):
        open_checkpoint(folder, dtype="float32")


def test_pickle_weights_are_refused(tmp_path):
    folder = copy_of("llama2", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*not safe.*safetensors"):
        open_checkpoint(folder, dtype="float32")
    with pytest.raises(CheckpointError, match="not safe"):
        open_checkpoint(folder / "pytorch_model.bin", dtype="float32")
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no weights; model\.safetensors"):
        open_checkpoint(folder, dtype="float32")


@pytest.mark.parametrize("source", ["smollm3", "./nowhere", "/no/such/place", "a/b/c", "models/x.gguf", ""])
def test_unknown_sources_list_what_is_accepted(source):
    with pytest.raises(CheckpointError, match=r"does not exist; accepted: a name \(smollm2\), a directory.*gguf.*id"):
        open_checkpoint(source, dtype="float32")


def test_files_that_are_no_source(tmp_path):
    with pytest.raises(CheckpointError, match="is one file of a model; give its directory"):
        open_checkpoint(GOLDENS / "llama2" / "model.safetensors", dtype="float32")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="not a model file; accepted"):
        open_checkpoint(tmp_path / "notes.txt", dtype="float32")
    with pytest.raises(CheckpointError, match=r"dtype 'int8' is not supported; accepted: float32, bfloat16"):
        open_checkpoint(GOLDENS / "llama2", dtype="int8")


# Weights out


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_save_and_load_bit_for_bit(case, dtype, tmp_path):
    first = open_checkpoint(GOLDENS / case, dtype=dtype)
    save(tmp_path / "copy", first.config, first.params, generation=first.generation)
    second = open_checkpoint(tmp_path / "copy", dtype=dtype)
    assert (second.config, second.generation) == (first.config, first.generation)
    assert_same(first.params, second.params)


# What a forward pass of transformers does not read, or reads only where it has this value.
UNREAD = frozenset(
    "attention_dropout initializer_range transformers_version use_cache pretraining_tp embd_pdrop resid_pdrop"
    " ignore_keys_at_rope_validation".split()
)
DEFAULTS = {
    "use_bidirectional_attention": (None, False), "partial_rotary_factor": (1.0,),
    "original_max_position_embeddings": (4096,),  # of Phi-3
    "_sliding_window_pattern": (3,),  # layer_types says the same, and is what is read
    "beta_fast": (32.0,), "beta_slow": (1.0,), "truncate": (True,),  # of YaRN
}  # fmt: skip
# The same in the style of another transformers; that both styles agree is in test_checkpoint_config.py.
OTHER_STYLE = frozenset(
    "dtype torch_dtype rope_theta rope_scaling rope_parameters rope_local_base_freq layer_types"
    " sliding_window_pattern".split()
)


def stored_tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in load_file(path).items()}


@pytest.mark.parametrize("case", CASES)
def test_saved_directory_is_the_one_that_transformers_wrote(case, tmp_path):
    """Tensor for tensor and field for field, so transformers computes the same logits, those of the golden."""
    original = stored_tensors(GOLDENS / case)
    stored = str(original["model.norm.weight"].dtype)
    kept = stored if stored in ("float32", "bfloat16") else "float32"  # from float16, and exact
    model = open_checkpoint(GOLDENS / case, dtype=kept)
    save(tmp_path / "copy", model.config, model.params, generation=model.generation)
    saved = stored_tensors(tmp_path / "copy")
    assert saved.keys() == original.keys()
    for name, array in original.items():
        assert saved[name].dtype == kept and saved[name].shape == array.shape, name
        np.testing.assert_array_equal(saved[name], array.astype(kept), err_msg=name)
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    fields = golden_config(case)
    size = {"head_dim": fields["hidden_size"] // fields["num_attention_heads"]}  # where the file does not say
    assert_same_fields(size | fields | {"dtype": kept}, written)
    old = GOLDENS / case / "config.old.json"
    if old.exists():  # for transformers 4
        assert_same_fields(size | json.loads(old.read_text()) | {"torch_dtype": kept}, written)


def assert_same_fields(original: dict, written: dict) -> None:
    for key, value in original.items():
        if key in UNREAD:
            continue
        if key == "max_window_layers" and not original["use_sliding_window"]:
            continue
        if key not in written:
            assert value in DEFAULTS.get(key, ()), key
        elif isinstance(value, dict):
            assert_same_fields(as_new_names(value), as_new_names(written[key]))
        else:
            assert written[key] == value, key
    for key in written.keys() - original.keys() - OTHER_STYLE:
        assert written[key] in DEFAULTS.get(key, ()), key


def as_new_names(rope: dict) -> dict:
    return {"rope_type" if key == "type" else key: value for key, value in rope.items()}


def test_saved_generation_settings(tmp_path):
    folder = copy_of("llama2", tmp_path)
    settings = {"eos_token_id": [2, 5], "temperature": 0.6, "suppress_tokens": [7], "stop_strings": ["a=b"]}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    model = open_checkpoint(folder, dtype="float32")
    assert model.generation.ignored == ("suppress_tokens=[7]", 'stop_strings=["a=b"]')
    save(tmp_path / "copy", model.config, model.params, generation=model.generation)
    assert open_checkpoint(tmp_path / "copy", dtype="float32").generation == model.generation
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert {key: written[key] for key in settings} == settings


def test_save_in_shards(tmp_path):
    first = open_checkpoint(GOLDENS / "qwen3", dtype="float32")
    save(tmp_path / "copy", first.config, first.params, max_shard_bytes=20_000)
    shards = sorted((tmp_path / "copy").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 24_000 for path in shards)
    assert_same(first.params, open_checkpoint(tmp_path / "copy", dtype="float32").params)


def test_save_replaces_whole_checkpoints_only(tmp_path):
    first = open_checkpoint(GOLDENS / "qwen3", dtype="float32")
    target = tmp_path / "copy"
    save(target, first.config, first.params, max_shard_bytes=20_000)
    with pytest.raises(CheckpointError, match="not empty.*overwrite=True"):
        save(target, first.config, first.params)
    save(target, first.config, first.params, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    (target / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match=r"thesis\.tex.*not overwritten"):
        save(target, first.config, first.params, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_nothing_is_left_half_written(tmp_path):
    first = open_checkpoint(GOLDENS / "llama2", dtype="float32")
    broken = {key: value for key, value in first.params.items() if key != "final_norm"}
    with pytest.raises(CheckpointError, match="final_norm/scale' is missing"):
        save(tmp_path / "copy", first.config, broken)
    with pytest.raises(CheckpointError, match="'extra/scale' is unexpected"):
        save(tmp_path / "copy", first.config, {**first.params, "extra": {"scale": first.params["head"]["kernel"]}})
    wrong = {**first.params, "final_norm": {"scale": first.params["final_norm"]["scale"][:5]}}
    with pytest.raises(CheckpointError, match=r"has shape \[5\].*\[32\]"):
        save(tmp_path / "copy", first.config, wrong)
    with pytest.raises(CheckpointError, match=r"float16; accepted: one of float32, bfloat16"):
        save(tmp_path / "copy", first.config, jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), first.params))
    assert list(tmp_path.iterdir()) == []


def test_unwritable_targets_are_named(tmp_path):
    first = open_checkpoint(GOLDENS / "llama2", dtype="float32")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is a file; a directory"):
        save(tmp_path / "file", first.config, first.params)
    with pytest.raises(CheckpointError, match=r"file/copy cannot be written"):
        save(tmp_path / "file" / "copy", first.config, first.params)
