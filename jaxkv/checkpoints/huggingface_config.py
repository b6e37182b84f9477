"""config.json of Hugging Face <-> `DecoderConfig`.

A field that changes the result and is not supported is refused by name, and so is a field nobody knows; absent fields
take transformers' defaults.
Source: transformers 5.2, `models/*/configuration_*.py`, and the spellings of transformers 4 that Hub files still have.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints import huggingface_rope, variants
from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.fields import check_fields
from jaxkv.checkpoints.generation_config import Generation
from jaxkv.config import DecoderConfig, LayerConfig

_LLAMA = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_MISTRAL = {
    "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "sliding_window": 4096,
}  # fmt: skip
_QWEN2 = {
    "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 32_768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
_QWEN3 = {**_QWEN2, "head_dim": 128, "attention_bias": False}
_GEMMA2 = {
    "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "attention_bias": False,
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip
_GEMMA3 = {
    **_GEMMA2, "vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6,
    "final_logit_softcapping": None, "attn_logit_softcapping": None,
}  # fmt: skip
_PHI3 = {
    "vocab_size": 32_064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "sliding_window": None,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", _MISTRAL),
    "qwen2": ("Qwen2ForCausalLM", _QWEN2),
    "qwen3": ("Qwen3ForCausalLM", _QWEN3),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA2),
    "gemma3_text": ("Gemma3ForCausalLM", _GEMMA3),
    "phi3": ("Phi3ForCausalLM", _PHI3),
}
_NULLABLE = ("sliding_window", "final_logit_softcapping", "attn_logit_softcapping")  # null differs from absent
_FIELDS = {  # field -> kind of value
    "vocab_size": "size", "hidden_size": "size", "intermediate_size": "size", "num_hidden_layers": "size",
    "num_attention_heads": "size", "num_key_value_heads": "size", "head_dim": "size", "sliding_window": "count",
    "max_position_embeddings": "size", "max_window_layers": "count",
    "sliding_window_pattern": "size", "_sliding_window_pattern": "size", "rms_norm_eps": "positive",
    "query_pre_attn_scalar": "positive", "final_logit_softcapping": "positive", "attn_logit_softcapping": "positive",
    "tie_word_embeddings": "flag", "attention_bias": "flag", "mlp_bias": "flag", "use_sliding_window": "flag",
    "hidden_act": "name", "hidden_activation": "name", "model_type": "name", "layer_types": "names",
    "architectures": "names", "text_config": "object",
}  # fmt: skip
_WHERE = "config.json field"
_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip
_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

# Known fields that do not change the logits of a forward pass.
_HARMLESS = frozenset(
    "model_type architectures transformers_version _name_or_path name_or_path _commit_hash torch_dtype dtype use_cache"
    " initializer_range pretraining_tp attention_dropout hidden_dropout resid_pdrop embd_pdrop bos_token_id"
    " eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id output_attentions"
    " output_hidden_states return_dict return_dict_in_generate auto_map id2label label2id num_labels problem_type"
    " chunk_size_feed_forward attn_implementation _attn_implementation _attn_implementation_autoset"
    " _attn_implementation_internal cache_implementation gradient_checkpointing is_llama_config transformers.js_config"
    " unsloth_fixed unsloth_version tokenizer_class task_specific_params finetuning_task max_length min_length"
    " do_sample temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size num_beams"
    " num_beam_groups num_return_sequences diversity_penalty early_stopping bad_words_ids suppress_tokens"
    " begin_suppress_tokens forced_bos_token_id forced_eos_token_id encoder_no_repeat_ngram_size output_scores"
    " remove_invalid_values exponential_decay_length_penalty torchscript tf_legacy_loss use_bfloat16 prefix"
    " max_window_layers _sliding_window_pattern is_decoder ignore_keys_at_rope_validation".split()
)
# Fields that must be off. Many writers store the off value.
_OFF = frozenset(
    "quantization_config compression_config is_encoder_decoder add_cross_attention tie_encoder_decoder"
    " cross_attention_hidden_size pruned_heads rope_interleaved use_bidirectional_attention attention_bias"
    " mlp_bias qkv_bias num_experts num_local_experts num_experts_per_tok n_routed_experts use_sliding_window"
    " use_qk_norm qk_layernorm lm_head_bias use_mrope num_kv_shared_layers".split()
)
_ONLY = {"interpolate_factor": 1, "full_attn_mod": 1}  # of Phi-4 mini: any other value changes the result
_OUTER_GEMMA3 = frozenset(
    "text_config vision_config mm_tokens_per_image boi_token_index eoi_token_index image_token_index"
    " boi_token_id eoi_token_id image_token_id tie_word_embeddings".split()
)


def parse_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Translates the contents of config.json, one of `variants` included.

    Raises:
      CheckpointError: an architecture, RoPE type, activation or field that is not supported, by name.
    """
    if config.get("model_type") == variants.MODEL_TYPE:
        family, section = variants.take_apart(config)
        return variants.apply(parse_config(family), section)
    check_fields(config, _FIELDS, _WHERE)
    text = _text_part(config)
    check_fields(text, _FIELDS | huggingface_rope.TOP_LEVEL_FIELDS, _WHERE)
    model_type = text["model_type"]
    values = _values(text)
    heads = values["num_attention_heads"]
    kv_heads = values["num_key_value_heads"] or heads
    if values["head_dim"] is None and values["hidden_size"] % heads:
        raise CheckpointError(
            f"{_WHERE} 'hidden_size' = {values['hidden_size']} must be a multiple of num_attention_heads = {heads}, or "
            "head_dim must be given"
        )
    if heads % kv_heads:
        raise CheckpointError(
            f"{_WHERE} 'num_attention_heads' = {heads} must be a multiple of num_key_value_heads = {kv_heads}"
        )
    head_dim = values["head_dim"] or values["hidden_size"] // heads
    longest = values["max_position_embeddings"]
    if model_type == "phi3":  # its default overrides the RoPE field of that name
        text = {**text, "original_max_position_embeddings": values["original_max_position_embeddings"]}
    ropes = huggingface_rope.parse_ropes(text, head_dim=head_dim, longest=longest)
    layer_types = _layer_types(text, values)
    window = values.get("sliding_window")
    gemma = model_type in ("gemma2", "gemma3_text")
    activation = values["hidden_activation" if gemma else "hidden_act"]
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"activation {activation!r} is not supported; accepted: {', '.join(_ACTIVATIONS)}")
    if model_type == "gemma3_text" and values["attn_logit_softcapping"] is not None:
        raise CheckpointError("attn_logit_softcapping is not supported for gemma3_text; it must be null")
    bias = values.get("attention_bias", False)
    try:
        return DecoderConfig(
            model_type=model_type,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            layers=tuple(
                LayerConfig(window=window if kind == "sliding_attention" else None, rope=ropes[kind])
                for kind in layer_types
            ),
            max_positions=longest,
            norm_eps=float(values["rms_norm_eps"]),
            norm_offset=1.0 if gemma else 0.0,
            activation=_ACTIVATIONS[activation],
            query_scale=float(values["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
            embedding_scale=math.sqrt(values["hidden_size"]) if gemma else 1.0,
            tie_embeddings=values["tie_word_embeddings"],
            qkv_bias=True if model_type == "qwen2" else bias,
            output_bias=bias,
            mlp_bias=values.get("mlp_bias", False),
            qk_norm=model_type in ("qwen3", "gemma3_text"),
            sandwich_norms=gemma,
            attention_softcap=values.get("attn_logit_softcapping"),
            logit_softcap=values.get("final_logit_softcapping"),
        )
    except ValueError as error:
        raise error if isinstance(error, CheckpointError) else CheckpointError(f"config.json: {error}") from error


def _text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checks type and architecture, and takes the text part out of a multimodal Gemma 3."""
    model_type = config.get("model_type")
    accepted = ", ".join((*FAMILIES, "gemma3 (its text part)"))
    if model_type == "gemma3":
        if config.get("text_config") is None:
            raise CheckpointError("model_type 'gemma3' needs text_config, the part that is read; config.json has none")
        outer = {key: value for key, value in config.items() if key not in _OUTER_GEMMA3}
        _refuse_unknown(outer, {}, "gemma3")
        _check_architecture(config, ("Gemma3ForConditionalGeneration",))
        tied = config.get("tie_word_embeddings", True)
        text = {"tie_word_embeddings": tied, **config["text_config"], "model_type": "gemma3_text"}
        return {key: value for key, value in text.items() if key != "architectures"}
    if model_type not in FAMILIES:
        raise CheckpointError(f"model_type {model_type!r} is not supported; accepted: {accepted}")
    _check_architecture(config, (FAMILIES[model_type][0],))
    return dict(config)


def _check_architecture(config: Mapping[str, Any], accepted: tuple[str, ...]) -> None:
    given = config.get("architectures") or []
    if given and not set(given) & set(accepted):
        raise CheckpointError(
            f"architecture {given[0]!r} is not supported for model_type {config['model_type']!r}; "
            f"accepted: {', '.join(accepted)}"
        )


def _refuse_unknown(config: Mapping[str, Any], defaults: Mapping[str, Any], model_type: str) -> None:
    known = set(defaults) | _HARMLESS | set(huggingface_rope.TOP_LEVEL_FIELDS)
    for key, value in config.items():
        if value is None or key in known or _ONLY.get(key) == value:
            continue
        if key not in _OFF:
            raise CheckpointError(
                f"config.json field {key!r} (= {value!r:.80}) is not known for model_type {model_type!r}, so it may "
                f"change the result; accepted are null, and the fields {', '.join(defaults) or 'of text_config'}"
            )
        if value:
            raise CheckpointError(
                f"config.json field {key!r} = {value!r:.80} is not supported for model_type {model_type!r}; "
                "accepted: absent, null, false or empty"
            )


def _values(text: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the family, transformers' defaults where absent."""
    model_type = text["model_type"]
    defaults = FAMILIES[model_type][1]
    known = {key: value for key, value in text.items() if not (key == "layer_types" or _harmless_extra(key, text))}
    _refuse_unknown(known, defaults, model_type)
    return {
        key: text[key] if key in text and (text[key] is not None or key in _NULLABLE) else default
        for key, default in defaults.items()
    }


def _harmless_extra(key: str, text: Mapping[str, Any]) -> bool:
    """Fields that transformers does not read for this family, with a value that agrees with what it does."""
    model_type, value = text["model_type"], text[key]
    if key == "hidden_act" and model_type in ("gemma2", "gemma3_text"):  # a leftover: hidden_activation is what counts
        return _ACTIVATIONS.get(value, "").startswith("gelu")
    if key == "sliding_window_size" and model_type == "gemma2":  # the published files have both, equal
        return value == text.get("sliding_window", 4096)
    if key == "attention_bias" and model_type == "qwen2":  # q, k, v have biases whatever it says, o has none
        return value is True
    return key == "head_dim"


def _layer_types(text: Mapping[str, Any], values: dict[str, Any]) -> tuple[str, ...]:
    """The attention of each layer; also sets values["sliding_window"] to None where the file switches it off."""
    model_type, count = text["model_type"], values["num_hidden_layers"]
    window = values.get("sliding_window")
    given = text.get("layer_types")
    if model_type in ("qwen2", "qwen3"):
        window = values["sliding_window"] = window if values["use_sliding_window"] else None
        default = [window is not None and i >= values["max_window_layers"] for i in range(count)]
    elif model_type == "gemma2":
        default = [i % 2 == 0 for i in range(count)]
    elif model_type == "gemma3_text":
        pattern = text.get("_sliding_window_pattern") or values["sliding_window_pattern"]
        default = [(i + 1) % pattern != 0 for i in range(count)]
    else:
        default = [window is not None] * count
    types = tuple("sliding_attention" if sliding else "full_attention" for sliding in default)
    if given is not None:
        unknown = [kind for kind in given if kind not in huggingface_rope.LAYER_TYPES]
        if unknown:
            accepted = ", ".join(huggingface_rope.LAYER_TYPES)
            raise CheckpointError(f"layer type {unknown[0]!r} is not supported; accepted: {accepted}")
        if len(given) != count:
            raise CheckpointError(f"layer_types has {len(given)} entries; num_hidden_layers is {count}")
        if model_type in ("llama", "mistral", "phi3") and tuple(given) != types:
            raise CheckpointError(f"layer_types is not read for {model_type}; all layers are {types[0]!r} here")
        types = tuple(given)
    if "sliding_attention" in types and window is None:
        raise CheckpointError("layer_types has 'sliding_attention', but sliding_window is null or switched off")
    return types


def config_to_json(config: DecoderConfig, *, dtype: str, generation: Generation | None = None) -> dict[str, Any]:
    """The config.json of `config`, for old and new transformers (both spellings of RoPE and dtype).

    A model that no class of transformers computes is written as one of `variants`, which transformers refuses.
    Raises:
      CheckpointError: transformers' class of this model_type cannot express the configuration.
    """
    if variants.plain(config) != config:
        return variants.join(config_to_json(variants.plain(config), dtype=dtype, generation=generation), config)
    if config.model_type not in FAMILIES:
        raise CheckpointError(f"model_type {config.model_type!r} cannot be written; accepted: {', '.join(FAMILIES)}")
    architecture, defaults = FAMILIES[config.model_type]
    values = _common_json(config) | _window_json(config) | _rope_json(config)
    allowed = set(defaults) | set(huggingface_rope.TOP_LEVEL_FIELDS)
    fields = {"architectures": [architecture], "model_type": config.model_type, "dtype": dtype, "torch_dtype": dtype}
    fields |= {key: value for key, value in values.items() if key in allowed}
    if generation is not None:
        ids = list(generation.eos_ids)
        fields |= {"bos_token_id": generation.bos_id, "pad_token_id": generation.pad_id}
        fields["eos_token_id"] = ids[0] if len(ids) == 1 else ids or None
    back = parse_config(fields)
    for field in dataclasses.fields(DecoderConfig):
        if field.name in ("kernels", "tensor_axis"):  # how a program runs, not what the model is
            continue
        asked, got = getattr(config, field.name), getattr(back, field.name)
        close = isinstance(asked, float) and isinstance(got, float) and math.isclose(asked, got, rel_tol=1e-12)
        if asked != got and not close:
            raise CheckpointError(
                f"config.json of model_type {config.model_type!r} cannot express {field.name} = {asked!r:.200}; "
                f"transformers would read {got!r:.200}"
            )
    return fields


def _common_json(config: DecoderConfig) -> dict[str, Any]:
    activation = _ACTIVATION_NAMES[config.activation]
    scalar = config.query_scale**-2
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "hidden_activation": activation,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-12) else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
    }


def _window_json(config: DecoderConfig) -> dict[str, Any]:
    sliding = [layer.window is not None for layer in config.layers]
    windows = [layer.window for layer in config.layers if layer.window is not None]
    fields = {
        "sliding_window": windows[0] if windows else None,
        "use_sliding_window": bool(windows),
        "max_window_layers": sliding.index(True) if windows else config.num_layers,
        "layer_types": ["sliding_attention" if one else "full_attention" for one in sliding],
    }
    if config.model_type == "gemma3_text":
        fields["sliding_window_pattern"] = sliding.index(False) + 1 if False in sliding else config.num_layers + 1
    return fields


def _rope_json(config: DecoderConfig) -> dict[str, Any]:
    ropes = {"full_attention": None, "sliding_attention": None}
    for layer in config.layers:
        kind = "full_attention" if layer.window is None else "sliding_attention"
        ropes[kind] = ropes[kind] or layer.rope
    size = {"model_type": config.model_type, "head_dim": config.head_dim, "longest": config.max_positions}
    parameters = {kind: huggingface_rope.rope_to_json(rope, **size) for kind, rope in ropes.items() if rope is not None}
    if config.model_type == "gemma3_text":
        main = parameters.get("full_attention", {"rope_theta": 1e6, "rope_type": "default"})
        local = parameters.get("sliding_attention", {"rope_theta": 1e4})
        fields = {"rope_parameters": parameters, "rope_local_base_freq": local["rope_theta"]}
    else:
        main = next(iter(parameters.values()))
        fields = {"rope_parameters": main}
    scaling = {key: value for key, value in main.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if config.model_type == "phi3":
        fields["partial_rotary_factor"] = main["partial_rotary_factor"]
        original = scaling.pop("original_max_position_embeddings", None)
        if original is not None:
            fields["original_max_position_embeddings"] = original
        scaling["type"] = scaling.pop("rope_type")  # the spelling that the first Phi-3 classes read
    fields["rope_theta"] = main["rope_theta"]
    fields["rope_scaling"] = None if main["rope_type"] == "default" else scaling
    return fields
