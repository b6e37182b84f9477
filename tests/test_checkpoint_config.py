"""config.json and generation_config.json: both styles, transformers' defaults, and every refusal by name."""

import dataclasses
import json
import math
import pathlib

import pytest

from jaxkv.checkpoints import CheckpointError, Generation, read_config
from jaxkv.checkpoints.generation_config import parse_generation
from jaxkv.checkpoints.huggingface_config import config_to_json, parse_config
from jaxkv.config import LayerConfig, RopeConfig

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CASES = sorted(path.parent.name for path in GOLDENS.glob("*/config.json"))


def golden_config(case: str) -> dict:
    return json.loads((GOLDENS / case / "config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_old_and_new_style_give_one_configuration(case):
    config = parse_config(golden_config(case))
    old = GOLDENS / case / "config.old.json"
    if old.exists():
        assert parse_config(json.loads(old.read_text())) == config
    written = config_to_json(config, dtype="float32")
    assert parse_config(written) == config
    new_only = {k: v for k, v in written.items() if k not in ("rope_scaling", "rope_theta", "rope_local_base_freq")}
    assert parse_config(new_only) == config
    old_only = {k: v for k, v in written.items() if k not in ("rope_parameters", "layer_types", "dtype")}
    assert parse_config(old_only) == config
    assert parse_config(json.loads(json.dumps(written))) == config


def test_gemma3_by_hand():
    config = read_config(GOLDENS / "gemma3")
    local = RopeConfig(kind="default", theta=1e4, rotary_dim=16)
    whole = RopeConfig(kind="linear", theta=1e6, rotary_dim=16, factor=4.0)
    local, whole = LayerConfig(window=16, rope=local), LayerConfig(window=None, rope=whole)
    assert config.layers == (local, local, whole, local)
    assert config.query_scale == 8**-0.5 and config.embedding_scale == math.sqrt(32)
    assert config.norm_offset == 1.0 and config.sandwich_norms and config.qk_norm and config.tie_embeddings
    assert config.activation == "gelu_tanh" and config.logit_softcap is None


def test_defaults_of_transformers_apply():
    llama = parse_config({"model_type": "llama"})
    assert (llama.hidden_size, llama.num_layers, llama.num_kv_heads, llama.head_dim) == (4096, 32, 32, 128)
    assert llama.layers[0] == LayerConfig(window=None, rope=RopeConfig(kind="default", theta=1e4, rotary_dim=128))
    assert parse_config({"model_type": "mistral"}).layers[0].window == 4096
    assert parse_config({"model_type": "mistral", "sliding_window": None}).layers[0].window is None
    qwen2 = parse_config({"model_type": "qwen2"})
    assert qwen2.qkv_bias and not qwen2.output_bias and qwen2.layers[31].window is None
    gemma2 = parse_config({"model_type": "gemma2"})
    assert [layer.window for layer in gemma2.layers[:3]] == [4096, None, 4096]
    assert (gemma2.attention_softcap, gemma2.logit_softcap) == (50.0, 30.0)
    assert parse_config({"model_type": "gemma2", "final_logit_softcapping": None}).logit_softcap is None
    assert parse_config({"model_type": "qwen3"}).head_dim == 128


PUBLISHED = {  # fields as in files on the Hub, spelled by several generations of tools
    "smollm2": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "is_llama_config": True,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "transformers.js_config": {"a": {}},
        "pretraining_tp": 1, "num_key_value_heads": 3, "num_attention_heads": 9, "hidden_size": 576,
    },
    "qwen2.5-yarn": {
        "model_type": "qwen2", "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 70,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
        "rope_theta": 1000000.0,
    },
    "phi-4-mini": {
        "model_type": "phi3", "attention_bias": False, "full_attn_mod": 1, "interpolate_factor": 1,
        "lm_head_bias": False, "mlp_bias": False, "auto_map": {}, "partial_rotary_factor": 0.75,
        "hidden_size": 3072, "num_attention_heads": 24, "original_max_position_embeddings": 4096,
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2] * 48},
    },
    "gemma-2": {
        "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
        "query_pre_attn_scalar": 224, "sliding_window_size": None,
    },
    "phi-3-su": {
        "model_type": "phi3", "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 8192,
        "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_are_accepted(name):
    config = parse_config(PUBLISHED[name])
    assert parse_config(config_to_json(config, dtype="bfloat16")) == config


def test_published_values():
    yarn = parse_config(PUBLISHED["qwen2.5-yarn"]).layers[0]
    assert (yarn.window, yarn.rope.kind, yarn.rope.factor, yarn.rope.beta_fast) == (None, "yarn", 4.0, 32.0)
    phi = parse_config(PUBLISHED["phi-4-mini"])
    assert phi.layers[0].rope.rotary_dim == 96 and phi.layers[0].rope.factor == 32.0 and phi.head_dim == 128
    assert parse_config(PUBLISHED["phi-3-su"]).layers[0].rope.kind == "longrope"


REFUSED = [  # (base case, changes, what the message must name)
    ("llama2", {"model_type": "gpt_neox"}, ["gpt_neox", "llama, mistral, qwen2"]),
    ("llama2", {"model_type": None}, ["None", "accepted"]),
    ("llama2", {"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequence", "LlamaForCausalLM"]),
    ("llama2", {"architectures": ["Qwen2ForCausalLM"]}, ["Qwen2ForCausalLM", "LlamaForCausalLM"]),
    ("llama2", {"quantization_config": {"bits": 4}}, ["quantization_config", "absent"]),
    ("llama2", {"num_local_experts": 8}, ["num_local_experts"]),
    ("llama2", {"residual_multiplier": 0.2}, ["residual_multiplier", "0.2", "not known"]),
    ("llama2", {"hidden_act": "relu"}, ["relu", "silu, swish, gelu"]),
    ("llama2", {"hidden_size": "32"}, ["hidden_size", "'32'", "whole number"]),
    ("llama2", {"num_key_value_heads": 3}, ["num_kv_heads 3"]),
    ("llama2", {"layer_types": ["sliding_attention", "full_attention"]}, ["layer_types", "llama"]),
    ("qwen2", {"layer_types": ["chunked_attention"] * 2}, ["chunked_attention", "full_attention, sliding_attention"]),
    ("qwen2", {"layer_types": ["full_attention"]}, ["1 entries", "2"]),
    ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ["sliding_window"]),
    ("mistral", {"attention_bias": True}, ["attention_bias", "mistral"]),
    ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ("gemma2", {"hidden_activation": "relu2"}, ["relu2", "accepted"]),
    ("gemma3", {"attn_logit_softcapping": 5.0}, ["attn_logit_softcapping", "null"]),
    ("gemma3", {"rope_parameters": {"rope_type": "default"}}, ["rope_parameters", "full_attention"]),
    ("llama2", {"rope_parameters": {"rope_type": "su"}}, ["'su'", "default, linear, dynamic, yarn, llama3, longrope"]),
    ("qwen2", {"rope_parameters": {"type": "mrope", "mrope_section": [1]}}, ["mrope", "accepted"]),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, ["mrope_section", "accepted"]),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, ["'yarn'", "default, longrope"]),
    ("llama2", {"rope_parameters": {"rope_type": "linear"}}, ["linear", "factor"]),
    ("llama2", {"rope_parameters": {"partial_rotary_factor": 0.5}}, ["partial_rotary_factor", "0.5"]),
    ("llama2", {"rope_parameters": [1]}, ["rope_parameters", "object"]),
    ("llama2", {"rope_theta": 5.0}, ["rope_theta = 5.0", "10000.0", "contradicts"]),
    ("llama-linear", {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["factor", "2.0", "4.0"]),
    ("llama-dynamic-long", {"max_position_embeddings": 0}, ["max_position_embeddings"]),
    ("phi3-longrope-long", {"original_max_position_embeddings": 32}, ["32", "64", "original"]),
]


@pytest.mark.parametrize(("case", "changes", "named"), REFUSED, ids=lambda value: str(value)[:40])
def test_unsupported_configurations_are_refused_by_name(case, changes, named):
    fields = {key: value for key, value in (golden_config(case) | changes).items() if value is not None}
    with pytest.raises(CheckpointError) as caught:
        parse_config(fields)
    for word in named:
        assert word in str(caught.value)


def test_what_transformers_cannot_express_is_not_written():
    config = parse_config(golden_config("llama2"))
    windowed = dataclasses.replace(config, layers=(dataclasses.replace(config.layers[0], window=8),) * 2)
    for changed, named in (
        (windowed, "layers"),
        (dataclasses.replace(config, query_scale=0.5), "query_scale"),
        (dataclasses.replace(config, logit_softcap=5.0), "logit_softcap"),
        (dataclasses.replace(config, qkv_bias=True), "qkv_bias"),
        (dataclasses.replace(config, model_type="pocket"), "pocket"),
        (dataclasses.replace(config, attention="ssa"), "attention"),
    ):
        with pytest.raises(CheckpointError, match=named):
            config_to_json(changed, dtype="float32")


def test_generation():
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.43.0"}
    found = parse_generation({"eos_token_id": [5, 6, 5], "bos_token_id": 1, **sampling}, {"eos_token_id": 2})
    assert found == Generation((5, 6), 1, None, {"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    assert parse_generation({}, {"eos_token_id": 2, "pad_token_id": 0}) == Generation((2,), None, 0)
    assert parse_generation({}, {"text_config": {"eos_token_id": 3}}).eos_ids == (3,)
    for wrong in ("2", -1, [True], 2.5):
        with pytest.raises(CheckpointError, match="eos_token_id"):
            parse_generation({"eos_token_id": wrong}, {})
