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
from jaxkv.config import DecoderConfig, SsaConfig

MODEL_TYPE, ARCHITECTURE = "jaxkv", "JaxkvForCausalLM"
_NESTED = {"ssa": SsaConfig}
# Field of `DecoderConfig` that only variants set -> its value in every family
_PLAIN = {"attention": "gqa", "ssa": None}
_WHERE = "config.json section 'jaxkv'"


def plain(config: DecoderConfig) -> DecoderConfig:
    """The family's model that the variant departs from."""
    return dataclasses.replace(config, **_PLAIN)


def join(family: Mapping[str, Any], config: DecoderConfig) -> dict[str, Any]:
    """The fields of config.json: `family`, those of `plain(config)`, and the section."""
    section = {"model_type": family["model_type"]}
    for name, usual in _PLAIN.items():
        value = getattr(config, name)
        if value != usual:
            section[name] = dataclasses.asdict(value) if name in _NESTED else value
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
    _only(section, {"model_type", *_PLAIN}, _WHERE)
    fields = {key: value for key, value in config.items() if key not in ("jaxkv", "architectures")}
    return {**fields, "model_type": section["model_type"]}, section


def apply(family: DecoderConfig, section: Mapping[str, Any]) -> DecoderConfig:
    """The family's model with what the section changes.

    Raises:
      CheckpointError: a value that is not supported, or fields that are missing or not known.
    """
    attention = section.get("attention", family.attention)
    if not isinstance(attention, str) or attention not in ATTENTION:
        raise CheckpointError(f"{_WHERE}: attention {attention!r:.80} is not known; known: {', '.join(ATTENTION)}")
    changes = {}
    for name, value in section.items():
        if name in _NESTED and value is not None:
            where, known = f"{_WHERE}, {name}", {field.name for field in dataclasses.fields(_NESTED[name])}
            if not isinstance(value, dict):
                raise CheckpointError(f"{where} must be an object {{...}}, got {value!r:.80}")
            _only(value, known, where)
            if known - value.keys():
                raise CheckpointError(f"{where} lacks {', '.join(sorted(known - value.keys()))}")
        if name != "model_type":
            changes[name] = value
    try:
        nested = {
            name: _NESTED[name](**value) for name, value in changes.items() if name in _NESTED and value is not None
        }
        return dataclasses.replace(family, **changes | nested)
    except ValueError as error:
        raise CheckpointError(f"{_WHERE}: {error}") from error


def _only(given: Mapping[str, Any], known: set[str], where: str) -> None:
    foreign = sorted(given.keys() - known)
    if foreign:
        raise CheckpointError(f"{where}: field {foreign[0]!r} is not known; known: {', '.join(sorted(known))}")
