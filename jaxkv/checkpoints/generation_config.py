"""generation_config.json <-> `Generation`: where a text ends, and the sampling that the checkpoint recommends."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a checkpoint says about generation.

    eos_ids: token ids that end a text. bos_id, pad_id: or None.
    sampling: the checkpoint's recommended settings (temperature, top_p, ...): reported, not applied.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_generation(generation: Mapping[str, Any], config: Mapping[str, Any]) -> Generation:
    """Reads generation_config.json, and config.json for the ids it lacks.

    Args:
      generation: contents of generation_config.json, or {}.
      config: contents of config.json.
    """

    def first(key: str) -> Any:
        places = (generation, config, config.get("text_config") or {})
        return next((place[key] for place in places if place.get(key) is not None), None)

    def ids(key: str) -> tuple[int, ...]:
        value = first(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int) or one < 0:
                raise CheckpointError(f"{key} must be a token id (an integer >= 0) or a list of them, got {value!r}")
        return tuple(dict.fromkeys(values))

    bos, pad = ids("bos_token_id"), ids("pad_token_id")
    settings = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    return Generation(
        eos_ids=ids("eos_token_id"),
        bos_id=bos[0] if bos else None,
        pad_id=pad[0] if pad else None,
        sampling={key: generation[key] for key in settings if generation.get(key) is not None},
    )


def generation_to_json(generation: Generation) -> dict[str, Any]:
    """The contents of generation_config.json."""
    ids = {"bos_token_id": generation.bos_id, "pad_token_id": generation.pad_id}
    ids["eos_token_id"] = list(generation.eos_ids) or None
    return {key: value for key, value in ids.items() if value is not None} | dict(generation.sampling)
