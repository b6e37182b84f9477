"""generation_config.json <-> `Generation`: where a text ends, and what the checkpoint says beyond that."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.fields import check_fields

_IDS = ("eos_token_id", "bos_token_id", "pad_token_id")
_SAMPLING = (  # of no effect on a greedy text, except the last
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty",
)  # fmt: skip
_NEUTRAL = {  # fields that change what is generated -> the value that does not; for any other field that is null or []
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None, "suppress_tokens": None, "begin_suppress_tokens": None,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": None, "min_length": 0,
    "min_new_tokens": 0, "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "length_penalty": 1.0,
    "early_stopping": False, "exponential_decay_length_penalty": None, "guidance_scale": 1.0, "penalty_alpha": 0.0,
    "renormalize_logits": False, "remove_invalid_values": False, "token_healing": False, "stop_strings": None,
    "num_return_sequences": 1,
}  # fmt: skip
# Fields about the run, not the text. The most new tokens are always the caller's.
_NO_EFFECT = frozenset(
    "max_length max_new_tokens max_time use_cache cache_implementation cache_config return_legacy_cache"
    " output_attentions output_hidden_states output_scores output_logits return_dict_in_generate is_assistant"
    " num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold prompt_lookup_num_tokens"
    " max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind compile_config"
    " disable_compile low_memory prefill_chunk_size transformers_version _commit_hash _from_model_config"
    " decoder_start_token_id generation_kwargs".split()
)


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a checkpoint says about generation.

    eos_ids: token ids that end a text. bos_id, pad_id: or None.
    sampling: the checkpoint's suggestions (do_sample, temperature, top_p, ...), for information: generation is greedy
      unless the caller asks for something else.
    ignored: settings that would change a greedy text and are not followed, each "name=value" with the value as JSON
      (suppress_tokens, no_repeat_ngram_size, num_beams, ...); those with a value of no effect are left out.
    """

    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    pad_id: int | None = None
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def parse_generation(generation: Mapping[str, Any], config: Mapping[str, Any]) -> Generation:
    """Reads generation_config.json, and config.json for the ids it lacks; without the first, also for the settings
    that transformers once wrote there.

    Args:
      generation: contents of generation_config.json, or {}.
      config: contents of config.json.
    """
    check_fields(config, {"text_config": "object"}, "config.json field")
    text = config.get("text_config") or {}

    def ids(key: str) -> tuple[int, ...]:
        value = next((place[key] for place in (generation, config, text) if place.get(key) is not None), None)
        values = value if isinstance(value, list) else [] if value is None else [value]
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int) or one < 0:
                raise CheckpointError(f"{key} must be a token id (an integer >= 0) or a list of them, got {value!r}")
        return tuple(dict.fromkeys(values))

    eos, bos, pad = map(ids, _IDS)
    given = generation or {key: value for key, value in (text | config).items() if key in (*_SAMPLING, *_NEUTRAL)}
    given = {key: value for key, value in given.items() if value is not None and key not in (*_IDS, *_NO_EFFECT)}
    return Generation(
        eos_ids=eos,
        bos_id=bos[0] if bos else None,
        pad_id=pad[0] if pad else None,
        sampling={key: given[key] for key in _SAMPLING if key in given},
        ignored=tuple(
            f"{key}={json.dumps(value, ensure_ascii=False)}"
            for key, value in given.items()
            if (key not in _SAMPLING or key in _NEUTRAL) and value not in (_NEUTRAL.get(key), [], {})
        ),
    )


def generation_to_json(generation: Generation) -> dict[str, Any]:
    """The contents of generation_config.json."""
    ids = {"bos_token_id": generation.bos_id, "pad_token_id": generation.pad_id}
    ids["eos_token_id"] = list(generation.eos_ids) or None
    ignored = (setting.partition("=") for setting in generation.ignored)
    settings = {key: json.loads(value) for key, _, value in ignored} | dict(generation.sampling)
    return {key: value for key, value in ids.items() if value is not None} | settings
