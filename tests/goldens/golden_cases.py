"""The table of tiny golden models: which configuration each has, and what in it must influence the logits."""

import dataclasses

import torch

LENGTH = 90  # tokens of a golden forward
EOS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One golden folder.

    config: arguments of the transformers configuration, beside TINY.
    matters: patches of `config` that must each change the logits (a None inside `rope_parameters` removes the key).
    ignored: patches that must not change them.
    prompt: length of the greedy prompt.
    old: keys of config.old.json, beside those shared with the new style; None = no such file.
    dtype: of the stored weights; the goldens are always the float32 forward of them.
    """

    config: dict
    matters: tuple[dict, ...] = ()
    ignored: tuple[dict, ...] = ()
    prompt: int = 20
    old: dict | None = None
    dtype: torch.dtype = torch.float32
    max_shard_size: str = "1GB"


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
YARN_BETAS = {"beta_fast": 2.0, "beta_slow": 0.25}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0],
    "long_factor": [1.1, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 16.0],
}
HEADS_OF_16 = {"head_dim": 16}


def theta(value: float) -> dict:
    return {"rope_theta": value}


def rope(**changes) -> dict:
    return {"rope_parameters": changes}


def only_default(parameters: dict) -> dict:
    """The patch that turns scaled rope parameters into the unscaled embedding."""
    return rope(**dict.fromkeys(parameters) | {"rope_type": "default"})


def windows(size: int) -> tuple[dict, ...]:
    """A window one shorter, one longer, and none at all must each be noticed."""
    return tuple({"sliding_window": w} for w in (size - 1, size + 1, LENGTH))


def case_llama(rope_parameters: dict, **options) -> Case:
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, **HEADS_OF_16}
    config = {"model_type": "llama", **heads, "rope_parameters": rope_parameters}
    return Case(config=config | options.pop("config", {}), **options)


def case_phi3(**options) -> Case:
    config = {"model_type": "phi3", "num_attention_heads": 2, "rope_parameters": DEFAULT_ROPE}
    return Case(config=config | options.pop("config", {}), **options)


CASES = {
    "llama2": Case(
        config={"model_type": "llama", "num_key_value_heads": 4, "rope_parameters": DEFAULT_ROPE, "rms_norm_eps": 1e-5},
        matters=(rope(rope_theta=500.0), {"rms_norm_eps": 1e-2}),
    ),
    "llama3": case_llama(
        LLAMA3 | theta(500.0),
        config={"num_attention_heads": 4, "num_key_value_heads": 2},
        matters=(only_default(LLAMA3), rope(factor=4.0), rope(low_freq_factor=2.0), rope(high_freq_factor=3.0)),
        old=theta(500.0) | {"rope_scaling": LLAMA3},
        max_shard_size="40KB",
    ),
    "llama-tied": Case(
        config={
            "model_type": "llama",
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": DEFAULT_ROPE,
        },
        matters=(rope(rope_theta=500.0),),
    ),
    "llama-linear": case_llama(
        LINEAR | theta(10000.0),
        matters=(only_default(LINEAR), rope(factor=3.0)),
        old=theta(10000.0) | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama-dynamic-short": case_llama(
        DYNAMIC, ignored=(only_default({"factor": None}), rope(factor=2.0)), dtype=torch.bfloat16
    ),
    "llama-dynamic-long": case_llama(
        DYNAMIC,
        config={"max_position_embeddings": 64},
        matters=(only_default({"factor": None}), rope(factor=2.0), {"max_position_embeddings": 63}),
        prompt=50,
    ),
    "llama-yarn": case_llama(
        YARN | YARN_BETAS | theta(500.0),
        matters=(
            only_default(YARN | YARN_BETAS),
            rope(beta_fast=None),
            rope(beta_slow=None),
            rope(attention_factor=1.0),
            rope(truncate=False),
        ),
        old=theta(500.0) | {"rope_scaling": YARN | YARN_BETAS},
    ),
    "llama-yarn-mscale": case_llama(
        YARN | theta(10000.0) | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False},
        matters=(rope(mscale=None), rope(mscale_all_dim=1.0), rope(truncate=None)),
        ignored=(rope(beta_fast=32.0, beta_slow=1.0),),
        dtype=torch.bfloat16,
    ),
    "llama-yarn-factor": case_llama(
        YARN | YARN_BETAS | theta(500.0) | {"attention_factor": 1.3},
        matters=(rope(attention_factor=None),),
        ignored=(rope(mscale=1.5, mscale_all_dim=0.5),),
        dtype=torch.bfloat16,
    ),
    "mistral": Case(
        config={"model_type": "mistral", "sliding_window": 16, "rope_parameters": DEFAULT_ROPE},
        matters=windows(16),
        dtype=torch.bfloat16,
    ),
    "qwen2": Case(
        config={"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": theta(1e6)},
        matters=(rope(rope_theta=500.0),),
    ),
    "qwen2-window": Case(
        config={
            "model_type": "qwen2",
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "rope_parameters": theta(1e6),
        },
        matters=(*windows(16), {"use_sliding_window": False}, {"max_window_layers": 0}, {"max_window_layers": 2}),
        dtype=torch.float16,
    ),
    "qwen3": Case(
        config={"model_type": "qwen3", **HEADS_OF_16, "rope_parameters": theta(1e6)},
        matters=(rope(rope_theta=500.0),),
    ),
    "gemma2": Case(
        config={
            "model_type": "gemma2",
            **HEADS_OF_16,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "rope_parameters": DEFAULT_ROPE,
        },
        matters=(
            *windows(16),
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"query_pre_attn_scalar": 16},
            {"hidden_activation": "gelu"},
            {"layer_types": ["full_attention", "sliding_attention"]},
        ),
    ),
    "gemma3": Case(
        config={
            "model_type": "gemma3_text",
            **HEADS_OF_16,
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 8,
            "sliding_window": 16,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                "full_attention": LINEAR | theta(1e6),
                "sliding_attention": DEFAULT_ROPE,
            },
        },
        matters=(
            *windows(16),
            {"sliding_window_pattern": 2},
            {"query_pre_attn_scalar": 16},
            {"hidden_activation": "gelu"},
            rope(full_attention={"rope_type": "default", "rope_theta": 1e6}),
            rope(full_attention=LINEAR | theta(1e4)),
            rope(sliding_attention=LINEAR | theta(1e4)),
            rope(sliding_attention=DEFAULT_ROPE | theta(1e6)),
        ),
        old=theta(1e6)
        | {"rope_local_base_freq": 10000.0, "rope_scaling": LINEAR, "sliding_window_pattern": 3, "layer_types": None},
        dtype=torch.bfloat16,
    ),
    "phi3": case_phi3(config={"num_key_value_heads": 2, "sliding_window": 24}, matters=windows(24)),
    "phi3-partial": case_phi3(
        config={"num_key_value_heads": 1, "tie_word_embeddings": True, "partial_rotary_factor": 0.5},
        matters=({"partial_rotary_factor": 1.0}, {"partial_rotary_factor": 0.25}),
    ),
    "phi3-longrope-short": case_phi3(
        config={
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
            "rope_parameters": LONGROPE | theta(10000.0),
        },
        matters=(rope(short_factor=[1.0] * 8), rope(attention_factor=1.0), {"max_position_embeddings": 256}),
        ignored=(rope(long_factor=[1.0] * 8),),
        dtype=torch.bfloat16,
    ),
    "phi3-longrope-long": case_phi3(
        config={
            "num_key_value_heads": 1,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 64,
            "rope_parameters": LONGROPE | theta(10000.0),
        },
        matters=(rope(long_factor=[1.0] * 8), rope(attention_factor=1.0), {"max_position_embeddings": 256}),
        ignored=(rope(short_factor=[1.0] * 8),),
        prompt=50,
        old=theta(10000.0)
        | {
            "partial_rotary_factor": None,
            "rope_scaling": {"type": "longrope"} | {k: LONGROPE[k] for k in ("short_factor", "long_factor")},
        },
    ),
    "smollm2-like": Case(
        config={
            "model_type": "llama",
            "hidden_size": 48,
            "num_attention_heads": 6,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "rope_parameters": theta(100000.0),
        },
        matters=(rope(rope_theta=10000.0),),
    ),
}
