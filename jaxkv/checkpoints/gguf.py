"""A `.gguf` file: configuration, weights and tokenizer out of its metadata and tensors.

What llama.cpp's converter changed is undone here: it permutes the rows of Q and K for the `llama` architecture, so that
neighbouring channels rotate together, and adds 1 to Gemma's norm weights.
Source: llama.cpp, convert_hf_to_gguf.py (writer) and src/llama-model.cpp (what it derives from the metadata).
"""

from typing import Any

import numpy as np

from jaxkv.checkpoints import layout
from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.fields import check_fields
from jaxkv.checkpoints.generation_config import Generation
from jaxkv.checkpoints.gguf_file import GgufFile, check_types, rows_reader
from jaxkv.checkpoints.huggingface_config import parse_config
from jaxkv.config import DecoderConfig

# GGUF architecture -> Hugging Face model_type. Mistral files have the architecture llama.
ARCHITECTURES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text", "phi3": "phi3",
}  # fmt: skip
_KEYS = {  # metadata key without the architecture -> config.json field, kind of value
    "block_count": ("num_hidden_layers", "size"),
    "context_length": ("max_position_embeddings", "size"),
    "embedding_length": ("hidden_size", "size"),
    "feed_forward_length": ("intermediate_size", "size"),
    "attention.head_count": ("num_attention_heads", "size"),
    "attention.head_count_kv": ("num_key_value_heads", "size"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "positive"),
}
_READ = {  # keys that the code below reads beside those -> kind of value
    "attention.key_length": "size", "attention.value_length": "size", "attention.sliding_window": "count",
    "attention.sliding_window_pattern": "period or flags", "attention.causal": "flag", "vocab_size": "count",
    "attn_logit_softcapping": "number", "final_logit_softcapping": "number", "rope.dimension_count": "size",
    "rope.freq_base": "base", "rope.freq_base_swa": "base", "rope.scaling.type": "name",
    "rope.scaling.factor": "number", "rope.scaling.original_context_length": "size",
    "rope.scaling.attn_factor": "positive", "rope.scaling.yarn_beta_fast": "positive",
    "rope.scaling.yarn_beta_slow": "positive", "rope.scaling.finetuned": "flag",
}  # fmt: skip
_KINDS = {key: kind for key, (_, kind) in _KEYS.items()} | _READ
_TURN_ENDS = ("<end_of_turn>", "<|end|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")
_ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config_of(file: GgufFile) -> DecoderConfig:
    """The configuration that the metadata describes.

    Raises:
      CheckpointError: another architecture, a missing key, or one that changes the result and is not supported.
    """
    arch = file.metadata.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {arch!r} is not supported; accepted: {', '.join(ARCHITECTURES)}"
        )
    prefix = arch + "."
    given = {key[len(prefix) :]: value for key, value in file.metadata.items() if key.startswith(prefix)}
    for key, value in given.items():
        if key not in _KINDS and value:
            raise CheckpointError(f"{file.path}: metadata {prefix}{key} = {value!r:.80} is not supported")
    check_fields(file.metadata, {prefix + key: kind for key, kind in _KINDS.items()}, f"{file.path}: metadata")
    missing = [key for key in _KEYS if key not in given and key != "attention.head_count_kv"]
    if missing:
        raise CheckpointError(f"{file.path}: metadata {prefix}{missing[0]} is missing")
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    fields = {field: given[key] for key, (field, _) in _KEYS.items() if key in given}
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    head_dim = given.get("attention.key_length", hidden // heads)
    if given.get("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: keys of {head_dim} and values of another size per head are not supported")
    if given.get("attention.causal", True) is False:
        raise CheckpointError(f"{file.path}: attention.causal = false is not supported; a decoder is causal")
    fields |= {
        "model_type": ARCHITECTURES[arch],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "head_dim": head_dim,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    fields.setdefault("num_key_value_heads", heads)
    fields |= _attention_fields(file, arch, given, fields)
    fields |= _rope_fields(file, arch, given, fields)
    return parse_config(fields)


def _attention_fields(file: GgufFile, arch: str, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    window, layers = given.get("attention.sliding_window"), fields["num_hidden_layers"]
    if arch == "phi3":
        return {"sliding_window": window or None}
    if arch in ("llama", "qwen2", "qwen3"):
        if window:
            raise CheckpointError(f"{file.path}: attention.sliding_window = {window} is not supported for {arch}")
        biases = {"attention_bias": "blk.0.attn_q.bias" in file.tensors}
        if arch == "llama":
            biases["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
        return {} if arch == "qwen2" else biases
    # llama.cpp knows the query scale of Gemma by the number of layers alone
    largest = layers == {"gemma2": 46, "gemma3": 62}[arch]
    wide = fields["hidden_size"] // fields["num_attention_heads"]
    found = {
        "query_pre_attn_scalar": wide if largest else fields["head_dim"],
        "final_logit_softcapping": given.get("final_logit_softcapping") or None,
        "attn_logit_softcapping": given.get("attn_logit_softcapping") or None,
    }
    if window is None and arch == "gemma3":
        raise CheckpointError(f"{file.path}: metadata gemma3.attention.sliding_window is missing")
    if window is not None:
        found["sliding_window"] = window
    pattern = given.get("attention.sliding_window_pattern", 2 if arch == "gemma2" else 6)
    sliding = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(layers)]
    return found | {"layer_types": ["sliding_attention" if one else "full_attention" for one in sliding]}


def _rope_fields(file: GgufFile, arch: str, given: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    head_dim, longest = fields["head_dim"], fields["max_position_embeddings"]
    rotary = given.get("rope.dimension_count", head_dim)
    theta = given.get("rope.freq_base", 1e6 if arch == "gemma3" else 1e4)
    found: dict[str, Any] = {"rope_theta": theta}
    if arch == "gemma3":
        found["rope_local_base_freq"] = given.get("rope.freq_base_swa", 1e4)
    if arch == "phi3":
        found["partial_rotary_factor"] = rotary / head_dim
    elif rotary != head_dim:
        raise CheckpointError(f"{file.path}: rope.dimension_count {rotary} must equal the head size {head_dim}")
    kind = given.get("rope.scaling.type", "none")
    factor = given.get("rope.scaling.factor", 1.0)
    original = given.get("rope.scaling.original_context_length", longest)
    attention = given.get("rope.scaling.attn_factor")
    if "rope_factors_long.weight" in file.tensors:
        long, short = (_vector(file, f"rope_factors_{name}.weight") for name in ("long", "short"))
        scaling = {"type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
        scaling |= {} if attention is None else {"attention_factor": attention}
        return found | {"rope_scaling": scaling, "original_max_position_embeddings": original}
    if attention not in (None, 1.0):
        raise CheckpointError(f"{file.path}: rope.scaling.attn_factor = {attention} is not supported without longrope")
    if "rope_freqs.weight" in file.tensors:
        return found | {"rope_scaling": _llama3(file, theta, head_dim)}
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return found
    if kind == "linear":
        return found | {"rope_scaling": {"rope_type": "linear", "factor": factor}}
    if kind != "yarn":
        raise CheckpointError(f"{file.path}: rope.scaling.type {kind!r} is not supported; accepted: none, linear, yarn")
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if f"rope.scaling.yarn_{name}" in given:
            scaling[name] = given[f"rope.scaling.yarn_{name}"]
    return found | {"rope_scaling": scaling}


def _vector(file: GgufFile, name: str) -> np.ndarray:
    if name not in file.tensors:
        raise CheckpointError(f"{file.path}: tensor {name!r} is missing")
    with file.path.open("rb") as data:
        return rows_reader(file, data)(name, 0, file.tensors[name].shape[0])


def _llama3(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's RoPE settings. The file has only the divisor of each frequency that they led to: recognise them."""
    given = _vector(file, "rope_freqs.weight")
    factor = float(given.max())
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high, length = _LLAMA3.values()
    smooth = np.clip((length / wavelength - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if given.shape != expected.shape or not np.allclose(given, expected, rtol=1e-4):
        raise CheckpointError(f"{file.path}: rope_freqs.weight is not Llama 3's scaling with {_LLAMA3}")
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}


def _names(arch: str, config: DecoderConfig) -> dict[str, str]:
    block = "blk.{i}."
    names = {
        "embedding": "token_embd",
        "head": "output",
        "final_norm": "output_norm",
        "attention_norm": block + "attn_norm",
        "mlp_norm": block + "ffn_norm",
        "query": block + "attn_q",
        "key": block + "attn_k",
        "value": block + "attn_v",
        "output": block + "attn_output",
        "query_norm": block + "attn_q_norm",
        "key_norm": block + "attn_k_norm",
        "gate": block + "ffn_gate",
        "up": block + "ffn_up",
        "down": block + "ffn_down",
    }
    if arch == "phi3":
        names |= {"qkv": block + "attn_qkv", "gate_up": block + "ffn_up"}
    if config.sandwich_norms:
        names |= {"post_attention_norm": block + "post_attention_norm", "post_mlp_norm": block + "post_ffw_norm"}
    return names


def load(
    file: GgufFile, config: DecoderConfig, *, dtype: str, progress: layout.Progress | None = None
) -> dict[str, Any]:
    """Dequantizes the weights, a block of rows at a time, onto the default device.

    Args:
      file: from `read_gguf`. config: from `config_of`.
      dtype: "float32" or "bfloat16".
      progress: called with (bytes done, bytes in all, parameter name).
    Returns:
      The `params` collection.
    """
    layout.check_dtype(dtype)
    arch = file.metadata["general.architecture"]
    wanted = layout.leaves(config, _names(arch, config))
    shapes = {name: tensor.shape for name, tensor in file.tensors.items()}
    layout.check_tensors(wanted, shapes, extras=_ROPE_TENSORS, where=str(file.path))
    check_types(file)
    with file.path.open("rb", buffering=0) as data:
        read = rows_reader(file, data)
        if arch == "llama":
            read = _unpermuted(read, config)
        if config.norm_offset:
            read = _without_offset(read, np.float32(config.norm_offset))
        return layout.assemble(wanted, read, dtype=dtype, progress=progress)


def _without_offset(read: layout.ReadRows, offset: np.float32) -> layout.ReadRows:
    def shifted(name: str, first: int, end: int) -> np.ndarray:
        rows = read(name, first, end)
        return rows - offset if name.endswith("norm.weight") else rows

    return shifted


def _unpermuted(read: layout.ReadRows, config: DecoderConfig) -> layout.ReadRows:
    """The file has channel pairs (c, c + H/2) of a head as neighbours; the tree has c in the first half."""
    size = config.head_dim

    def unpermuted(name: str, first: int, end: int) -> np.ndarray:
        if not (".attn_q." in name or ".attn_k." in name):
            return read(name, first, end)
        wanted = np.arange(first, end)
        head, channel = wanted // size * size, wanted % size
        source = head + channel % (size // 2) * 2 + channel // (size // 2)
        low = int(source.min())
        return read(name, low, int(source.max()) + 1)[source - low]

    return unpermuted


def generation_of(file: GgufFile) -> Generation:
    """Ids that end a text (eos, end of turn, end of message), bos and padding.

    As in llama.cpp, some tokens end a turn whatever the metadata says, and SentencePiece has a default bos and eos.
    """
    names = ("eos", "eot", "eom", "bos", "padding")
    keys = {name: f"tokenizer.ggml.{name}_token_id" for name in names}
    kinds = dict.fromkeys(keys.values(), "count") | {"tokenizer.ggml.tokens": "names"}
    check_fields(file.metadata, kinds, f"{file.path}: metadata")
    ids = {name: file.metadata.get(key) for name, key in keys.items()}
    if file.metadata.get("tokenizer.ggml.model") == "llama":
        ids |= {name: index for name, index in (("bos", 1), ("eos", 2)) if ids[name] is None}
    tokens = file.metadata.get("tokenizer.ggml.tokens") or []
    ends = [ids[name] for name in ("eos", "eot", "eom")]
    ends += [index for index, token in enumerate(tokens) if token in _TURN_ENDS]
    return Generation(
        eos_ids=tuple(dict.fromkeys(index for index in ends if index is not None)),
        bos_id=ids["bos"],
        pad_id=ids["padding"],
    )
