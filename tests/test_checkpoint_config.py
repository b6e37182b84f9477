"""config.json and generation_config.json: both styles, transformers' defaults, and every refusal by name."""

import dataclasses
import json
import math
import pathlib

import pytest

from jaxkv.checkpoints import CheckpointError, Generation, read_config
from jaxkv.checkpoints.generation_config import generation_to_json, parse_generation
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


def test_the_choice_of_kernels_is_not_the_models():
    config = parse_config(golden_config(CASES[0]))
    written = config_to_json(dataclasses.replace(config, kernels="interpret"), dtype="float32")
    assert config.kernels is None and written == config_to_json(config, dtype="float32")
    with pytest.raises(CheckpointError, match="'kernels'"):
        parse_config(written | {"kernels": "interpret"})


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
    ("llama2", {"num_key_value_heads": 3}, ["num_attention_heads", "4", "num_key_value_heads = 3"]),
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


WRONG_VALUES = [  # (base case, field, or field inside rope_parameters; wrong values; what is accepted)
    ("llama2", "head_dim", ["64", 0, -8, 8.0, True, [8], 2**31], "a whole number from 1 up"),
    ("llama2", "hidden_size", ["32", 0, -32, math.nan, math.inf], "a whole number from 1 up"),
    ("llama2", "num_hidden_layers", [-2, 2.5, {}], "a whole number from 1 up"),
    ("llama2", "num_key_value_heads", [0, -4, "4"], "a whole number from 1 up"),
    ("llama2", "max_position_embeddings", [0, "long"], "a whole number from 1 up"),
    ("llama2", "rms_norm_eps", [-1, 0, math.nan, math.inf, "1e-6", True, 10**400], "a finite number above 0"),
    ("llama2", "tie_word_embeddings", ["false", 0, 1, []], "true or false"),
    ("llama2", "attention_bias", ["yes", 1], "true or false"),
    ("llama2", "architectures", [5, "LlamaForCausalLM", [5]], "a list of strings"),
    ("llama2", "model_type", [["llama"], 5], "a string"),
    ("llama2", "hidden_act", [["silu"], 1], "a string"),
    ("llama2", "rope_theta", ["1e4", 0, 1, -1e4, math.nan], "a finite number above 1"),
    ("llama2", "rope_scaling", [[1], "linear", 4.0], "an object"),
    ("qwen2", "layer_types", [5, "full_attention", [None, 1]], "a list of strings"),
    ("qwen2", "sliding_window", [-1, "4", 2.5], "a whole number from 0 up"),
    ("qwen2", "use_sliding_window", ["true"], "true or false"),
    ("qwen2", "max_window_layers", [-1, "all"], "a whole number from 0 up"),
    ("gemma2", "query_pre_attn_scalar", [0, -1, "16"], "a finite number above 0"),
    ("gemma2", "attn_logit_softcapping", [0.0, -5.0, "50", math.nan], "a finite number above 0"),
    ("gemma3", "sliding_window_pattern", [0, [1]], "a whole number from 1 up"),
    ("gemma3", "rope_local_base_freq", [0, "1e4"], "a finite number above 1"),
    ("gemma3", "rope_parameters.full_attention", [5, "default"], "an object"),
    ("phi3", "partial_rotary_factor", [0, -0.5, 1.5, "half"], "a number above 0 and at most 1"),
    ("phi3", "original_max_position_embeddings", [0, "4k"], "a whole number from 1 up"),
    ("llama-linear", "rope_parameters.factor", [[1], "x", 0.0, -4.0, math.nan, True], "a finite number above 0"),
    ("llama-linear", "rope_parameters.rope_type", [5, ["linear"]], "a string"),
    ("llama-yarn", "rope_parameters.beta_fast", [0, "32"], "a finite number above 0"),
    ("llama-yarn", "rope_parameters.truncate", ["no", 1], "true or false"),
    ("llama-yarn-mscale", "rope_parameters.mscale", ["1", [1], math.inf], "a finite number"),
    ("llama3", "rope_parameters.low_freq_factor", [0, "1"], "a finite number above 0"),
    ("phi3-longrope-long", "rope_parameters.short_factor", [5, "x", [1, "2"], [0.0] * 8], "a list of finite numbers"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "field", "value", "accepted"),
    [(case, field, value, accepted) for case, field, values, accepted in WRONG_VALUES for value in values],
    ids=lambda value: str(value)[:30],
)
def test_values_of_a_wrong_kind_are_refused(case, field, value, accepted):
    """The message has the field, the value and what is accepted."""
    fields = golden_config(case)
    outer, _, inner = field.partition(".")
    fields[outer] = fields[outer] | {inner: value} if inner else value
    with pytest.raises(CheckpointError) as caught:
        parse_config(fields)
    for word in (repr(inner or outer), accepted, repr(value)[:80]):
        assert word in str(caught.value)


def test_sizes_that_do_not_fit_each_other_are_refused():
    fields = {"model_type": "llama", "hidden_size": 33, "num_attention_heads": 4}
    with pytest.raises(CheckpointError, match="'hidden_size' = 33 must be a multiple of num_attention_heads = 4, or"):
        parse_config(fields)
    assert parse_config(fields | {"head_dim": 8}).head_dim == 8
    with pytest.raises(
        CheckpointError, match="'num_attention_heads' = 4 must be a multiple of num_key_value_heads = 3"
    ):
        parse_config(fields | {"head_dim": 8, "num_key_value_heads": 3})
    parameters = golden_config("llama3")["rope_parameters"] | {"high_freq_factor": 1.0, "low_freq_factor": 1.0}
    with pytest.raises(CheckpointError, match="'high_freq_factor' = 1.0 must exceed low_freq_factor = 1.0"):
        parse_config(golden_config("llama3") | {"rope_parameters": parameters})
    outer = {"model_type": "gemma3", "tie_word_embeddings": "false", "text_config": golden_config("gemma3")}
    for changed in (outer, outer | {"tie_word_embeddings": True, "text_config": 5}):
        with pytest.raises(CheckpointError, match=r"'(tie_word_embeddings|text_config)' must be (true or|an object)"):
            parse_config(changed)


def test_what_transformers_cannot_express_is_not_written():
    config = parse_config(golden_config("llama2"))
    windowed = dataclasses.replace(config, layers=(dataclasses.replace(config.layers[0], window=8),) * 2)
    for changed, named in (
        (windowed, "layers"),
        (dataclasses.replace(config, query_scale=0.5), "query_scale"),
        (dataclasses.replace(config, logit_softcap=5.0), "logit_softcap"),
        (dataclasses.replace(config, qkv_bias=True), "qkv_bias"),
        (dataclasses.replace(config, model_type="pocket"), "pocket"),
        (dataclasses.replace(config, attention="another"), "attention 'another' is not known"),
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
    with pytest.raises(CheckpointError, match="'text_config' must be an object"):
        parse_generation({}, {"text_config": 5})


CONSTRAINTS = {
    "suppress_tokens": [1, 2], "begin_suppress_tokens": [220], "no_repeat_ngram_size": 3, "forced_bos_token_id": 5,
    "forced_eos_token_id": [6], "bad_words_ids": [[7, 8]], "min_length": 4, "min_new_tokens": 1, "num_beams": 4,
    "repetition_penalty": 1.1, "stop_strings": ["é="], "something_of_next_year": True,
}  # fmt: skip
NEUTRAL = {
    "suppress_tokens": [], "begin_suppress_tokens": None, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1,
    "repetition_penalty": 1.0, "early_stopping": False, "sequence_bias": {}, "renormalize_logits": False,
    "max_length": 4096, "use_cache": True, "_from_model_config": True, "transformers_version": "5.2.0",
}  # fmt: skip


def test_constraints_on_the_text_are_named():
    """Nothing that would change a greedy text is dropped in silence, a field unknown today included."""
    found = parse_generation(CONSTRAINTS | {"temperature": 0.6, "do_sample": True}, {})
    assert sorted(name.partition("=")[0] for name in found.ignored) == sorted(CONSTRAINTS)
    assert "suppress_tokens=[1, 2]" in found.ignored and 'stop_strings=["é="]' in found.ignored
    assert found.sampling == {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1}
    assert parse_generation(generation_to_json(found), {}) == found
    assert parse_generation(NEUTRAL, {}).ignored == ()
    for name, value in CONSTRAINTS.items():
        assert len(parse_generation(NEUTRAL | {name: value}, {}).ignored) == 1


def test_settings_in_an_old_config_json():
    old = {"hidden_size": 32, "no_repeat_ngram_size": 3, "num_beams": 1, "top_k": 50, "eos_token_id": 2}
    expected = Generation((2,), sampling={"top_k": 50}, ignored=("no_repeat_ngram_size=3",))
    assert parse_generation({}, old) == expected
    assert parse_generation({"eos_token_id": 2}, old) == Generation((2,))


def test_gemma2_may_say_its_window_twice():
    """As the published files do; but not with another value."""
    config = {"model_type": "gemma2", "sliding_window": 512, "num_hidden_layers": 2}
    parse_config(config | {"sliding_window_size": 512})
    with pytest.raises(CheckpointError, match="'sliding_window_size' .= 256. is not known"):
        parse_config(config | {"sliding_window_size": 256})
