"""config.json of models that no class of transformers computes: a family's fields, and a section of our own.

    {"model_type": "jaxkv", "architectures": ["JaxkvForCausalLM"],
     "jaxkv": {"model_type": "llama", "attention": "ssa", "ssa": {"queries": "token+position", ...}},
     ...}                                           the other fields are those of the family named in the section

The model_type is ours so that transformers refuses such a model, rather than to load the family's and leave the variant out.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.attention import ATTENTION
from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.fields import check_fields
from jaxkv.config import DecoderConfig, RcmhaConfig, SsaConfig

MODEL_TYPE, ARCHITECTURE = "jaxkv", "JaxkvForCausalLM"
# Field of the section -> kind of value; "rope", of all layers, can only be "none". Absent: as the family has it.
_KINDS = {
    "model_type": "name", "attention": "name", "ssa": "object", "rcmha": "object", "activation": "name", "mlp_gate": "flag",
    "learned_positions": "size", "rope": "name",
}  # fmt: skip
_VARIANTS = {"ssa": SsaConfig, "rcmha": RcmhaConfig}  # fields that are sections of their own
_USUAL = {
    "attention": "gqa",
    "ssa": None,
    "rcmha": None,
    "mlp_gate": True,
    "learned_positions": None,
}  # in every family
_OURS = ("relu", "relu_squared")  # activations that none has
_WHERE = "config.json section 'jaxkv'"


def plain(config: DecoderConfig) -> DecoderConfig:
    """The family's model that the variant departs from."""
    activation = "silu" if config.activation in _OURS else config.activation
    return dataclasses.replace(_turned(config, "none", "default"), activation=activation, **_USUAL)


def _turned(config: DecoderConfig, kind: str, into: str) -> DecoderConfig:
    """Rotary positions of one kind as of another."""
    changed = lambda rope: dataclasses.replace(rope, kind=into) if rope.kind == kind else rope
    layers = tuple(dataclasses.replace(layer, rope=changed(layer.rope)) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)


def join(family: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json: `family`, those of `plain(config)`, and the section.

    Raises:
      CheckpointError: an attention that no table has; some layers turn and some do not.
    """
    _check_attention(config.attention)
    section = {"model_type": family["model_type"]}
    for name, usual in _USUAL.items():
        if getattr(config, name) != usual:
            section[name] = getattr(config, name)
    for name in _VARIANTS:
        if getattr(config, name) is not None:
            section[name] = dataclasses.asdict(getattr(config, name))
    if config.activation in _OURS:
        section["activation"] = config.activation
    kinds = {layer.rope.kind for layer in config.layers}
    if "none" in kinds:
        if len(kinds) > 1:
            raise CheckpointError("layers with rotary positions beside layers without cannot be written")
        section["rope"] = "none"
    return {**family, "model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "jaxkv": section}


def take_apart(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The family's fields and the section, checked.

    Raises:
      CheckpointError: no section, or one with fields that this version does not know.
    """
    section, given = config.get("jaxkv"), config.get("architectures") or [ARCHITECTURE]
    if not isinstance(section, dict) or not isinstance(section.get("model_type"), str):
        raise CheckpointError(f"model_type {MODEL_TYPE!r} needs a section 'jaxkv' that names its own model_type")
    if ARCHITECTURE not in given:
        raise CheckpointError(f"architecture {given[0]!r} is not {ARCHITECTURE!r}, as model_type {MODEL_TYPE!r} has it")
    if section["model_type"] == MODEL_TYPE:
        raise CheckpointError(f"{_WHERE}: model_type must be that of a family, got {MODEL_TYPE!r}")
    _only(section, set(_KINDS), _WHERE)
    check_fields(section, _KINDS, f"{_WHERE}: field")
    fields = {key: value for key, value in config.items() if key not in ("jaxkv", "architectures")}
    return {**fields, "model_type": section["model_type"]}, section


def apply(family: DecoderConfig, section: Mapping[str, Any]) -> DecoderConfig:
    """The family's model with what the section changes.

    Raises:
      CheckpointError: a value that is not supported, or fields that are missing or not known.
    """
    changes = {
        name: value for name, value in section.items() if name not in ("model_type", "rope") and value is not None
    }
    attention, rope = changes.get("attention", "gqa"), section.get("rope")
    _check_attention(attention)
    if rope not in (None, "none"):
        raise CheckpointError(f"{_WHERE}: rope {rope!r} is not known; known: none")
    sections = {name: changes[name] for name in _VARIANTS if name in changes}
    for name, given in sections.items():
        known = {field.name for field in dataclasses.fields(_VARIANTS[name])}
        _only(given, known, f"{_WHERE}, {name}")
        if known - given.keys():
            raise CheckpointError(f"{_WHERE}, {name} lacks {', '.join(sorted(known - given.keys()))}")
    try:
        changes |= {name: _VARIANTS[name](**given) for name, given in sections.items()}
        config = dataclasses.replace(family, **changes)
        return config if rope is None else _turned(config, "default", "none")
    except ValueError as error:
        raise CheckpointError(f"{_WHERE}: {error}") from error


def _check_attention(name: str) -> None:
    if name not in ATTENTION:
        raise CheckpointError(f"{_WHERE}: attention {name!r} is not known; known: {', '.join(ATTENTION)}")


def _only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    foreign = sorted(given.keys() - known)
    if foreign:
        raise CheckpointError(f"{where}: field {foreign[0]!r} is not known; known: {', '.join(sorted(known))}")
