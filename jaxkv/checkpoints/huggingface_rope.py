"""RoPE settings of a Hugging Face config.json, in the old spelling and in that of transformers 5.

Old: `rope_theta`, `rope_scaling` (with `type` or `rope_type`), `rope_local_base_freq`. New: `rope_parameters`, one
dict, or for Gemma 3 one dict for each layer type. A file may hold both; then they must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.fields import check_fields
from jaxkv.config import ROPE_KINDS, RopeConfig

LAYER_TYPES = ("full_attention", "sliding_attention")
TOP_LEVEL_FIELDS = {  # of config.json: field -> kind of value
    "rope_theta": "base", "rope_scaling": "object", "rope_parameters": "object", "rope_local_base_freq": "base",
    "partial_rotary_factor": "share", "original_max_position_embeddings": "size",
}  # fmt: skip
_INNER_FIELDS = {  # of rope_scaling and rope_parameters
    "rope_type": "name", "type": "name", "rope_theta": "base", "factor": "positive", "attention_factor": "positive",
    "beta_fast": "positive", "beta_slow": "positive", "mscale": "number", "mscale_all_dim": "number",
    "truncate": "flag", "low_freq_factor": "positive", "high_freq_factor": "positive", "short_factor": "positives",
    "long_factor": "positives", "partial_rotary_factor": "share", "original_max_position_embeddings": "size",
}  # fmt: skip

_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", *_YARN),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
# Written into files by conversion tools and read by nobody, or read here under another heading.
_IGNORED = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "finetuned")


def _agreed(what: str, given: Mapping[str, Any], default: Any) -> Any:
    """The one value among `given` (place -> value or None); refuses a file that contradicts itself."""
    found = {place: value for place, value in given.items() if value is not None}
    values = list(found.values())
    if any(value != values[0] for value in values):
        places = ", ".join(f"{place} = {value}" for place, value in found.items())
        raise CheckpointError(f"config.json contradicts itself on {what}: {places}. Remove all but one.")
    return values[0] if values else default


def _kind(parameters: Mapping[str, Any], model_type: str) -> str:
    kind = parameters.get("rope_type")
    kind = "default" if kind is None else kind
    if model_type == "phi3" and kind == "su":  # the name of longrope in the first Phi-3 files
        kind = "longrope"
    accepted = ("default", "longrope") if model_type == "phi3" else ROPE_KINDS
    if kind not in accepted:
        raise CheckpointError(f"RoPE type {kind!r} is not supported for {model_type}; accepted: {', '.join(accepted)}")
    unknown = [key for key in parameters if key not in (*_FIELDS[kind], *_IGNORED) and parameters[key] is not None]
    if unknown:
        raise CheckpointError(
            f"RoPE type {kind!r}: field {unknown[0]!r} is not supported; accepted: {', '.join(_FIELDS[kind]) or 'none'}"
        )
    return kind


def _original_length(kind: str, parameters: Mapping[str, Any], config: Mapping[str, Any], longest: int) -> int | None:
    """transformers: a top-level value overrides; dynamic always scales from max_position_embeddings."""
    inner = parameters.get("original_max_position_embeddings")
    top = config.get("original_max_position_embeddings")
    if kind in ("default", "linear"):
        return None
    if kind == "dynamic":
        places = {"max_position_embeddings": longest, "original_max_position_embeddings": inner}
        return _agreed("the length that dynamic RoPE scales from", places, longest)
    places = {"original_max_position_embeddings": top, "its RoPE field of that name": inner}
    return _agreed("the original length", places, longest)


def _rope(
    parameters: Mapping[str, Any], config: Mapping[str, Any], theta: float, head_dim: int, longest: int
) -> RopeConfig:
    kind = _kind(parameters, config["model_type"])
    original = _original_length(kind, parameters, config, longest)
    share = parameters.get("partial_rotary_factor")
    share = 1.0 if share is None else share
    if share != 1.0 and config["model_type"] != "phi3":
        raise CheckpointError(f"partial_rotary_factor {share} is supported for phi3 only; here it must be 1.0")
    values = {name: parameters.get(name) for name in _FIELDS[kind]}
    if values.get("factor") is None and kind in ("yarn", "longrope"):
        values["factor"] = longest / original
    if kind == "yarn":
        values["beta_fast"] = values["beta_fast"] or 32.0
        values["beta_slow"] = values["beta_slow"] or 1.0
        values["truncate"] = True if values["truncate"] is None else values["truncate"]
    for name, value in values.items():
        if name in ("short_factor", "long_factor") and value is not None:
            values[name] = tuple(float(number) for number in value)
        elif name != "truncate" and value is not None:
            values[name] = float(value)
    if kind == "llama3" and None not in values.values() and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise CheckpointError(
            f"RoPE field 'high_freq_factor' = {values['high_freq_factor']} must exceed low_freq_factor = "
            f"{values['low_freq_factor']}"
        )
    try:
        return RopeConfig(
            kind=kind,
            theta=float(theta),
            rotary_dim=int(head_dim * share),
            original_max_positions=original,
            **values,
        )
    except ValueError as error:
        raise CheckpointError(f"config.json: {error}") from error


def _merged(scaling: Mapping[str, Any] | None, parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    scaling, parameters = dict(scaling or {}), dict(parameters or {})
    for one in (scaling, parameters):
        check_fields(one, _INNER_FIELDS, "config.json RoPE field")
        if one.get("rope_type") is None and one.get("type") is not None:
            one["rope_type"] = one["type"]
        one.pop("type", None)
    for key in scaling.keys() & parameters.keys():
        _agreed(f"RoPE field {key}", {"rope_scaling": scaling[key], "rope_parameters": parameters[key]}, None)
    return {**parameters, **scaling}


def parse_ropes(config: Mapping[str, Any], *, head_dim: int, longest: int) -> dict[str, RopeConfig]:
    """RoPE of each layer type.

    Args:
      config: config.json (or its text part) with `model_type`; values of the kinds in `TOP_LEVEL_FIELDS`.
      head_dim: channels of a head.
      longest: max_position_embeddings.
    Returns:
      {"full_attention": ..., "sliding_attention": ...}.
    Raises:
      CheckpointError: a type or field is not supported, or old and new spelling contradict each other.
    """
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    nested = isinstance(parameters, dict) and any(isinstance(value, dict) for value in parameters.values())
    if config["model_type"] != "gemma3_text":
        if nested or config.get("rope_local_base_freq") is not None:
            given = "rope_parameters by layer type" if nested else "rope_local_base_freq"
            raise CheckpointError(f"{given}: supported for gemma3_text only, got model_type {config['model_type']!r}")
        merged = _merged(scaling, parameters)
        share = {"top level": config.get("partial_rotary_factor"), "RoPE": merged.get("partial_rotary_factor")}
        merged["partial_rotary_factor"] = _agreed("partial_rotary_factor", share, None)
        places = {"rope_theta": config.get("rope_theta"), "its RoPE rope_theta": merged.get("rope_theta")}
        rope = _rope(merged, config, _agreed("rope_theta", places, 10_000.0), head_dim, longest)
        return dict.fromkeys(LAYER_TYPES, rope)
    if parameters and not (nested and set(parameters) <= set(LAYER_TYPES)):
        raise CheckpointError(f"gemma3 rope_parameters must have the keys {LAYER_TYPES}, got {sorted(parameters)}")
    check_fields(parameters or {}, dict.fromkeys(LAYER_TYPES, "object"), "config.json rope_parameters of")
    ropes = {}
    for layer_type, key, default in (
        ("full_attention", "rope_theta", 1_000_000.0),
        ("sliding_attention", "rope_local_base_freq", 10_000.0),
    ):
        merged = _merged(scaling if layer_type == "full_attention" else None, (parameters or {}).get(layer_type))
        theta = _agreed(key, {key: config.get(key), layer_type: merged.get("rope_theta")}, default)
        if merged.get("truncate") is False:  # transformers does not see it there
            raise CheckpointError("RoPE field 'truncate' = false is not supported by layer type; accepted: true")
        ropes[layer_type] = _rope(merged, config, theta, head_dim, longest)
    return ropes


def rope_to_json(rope: RopeConfig, *, model_type: str, head_dim: int, longest: int) -> dict[str, Any]:
    """The RoPE fields as transformers 5 names them; `rope_theta` and `rope_type` first."""
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    for name in _FIELDS[rope.kind]:
        value = getattr(rope, name)
        if value is not None:
            fields[name] = list(value) if isinstance(value, tuple) else value
    if rope.kind == "longrope" and math.isclose(rope.factor, longest / rope.original_max_positions):
        fields.pop("factor")  # derived from the lengths, and old Phi-3 readers allow three keys only
    if rope.kind in ("yarn", "llama3", "longrope"):
        fields["original_max_position_embeddings"] = rope.original_max_positions
    if model_type == "phi3":
        fields["partial_rotary_factor"] = rope.rotary_dim / head_dim
    return fields
