"""The surface users see: a loaded model that generates, streams, scores and holds sessions under a cache budget."""

import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer import generate as generation
from infer.clock import clock
from infer.prefill import new_state, read
from infer.replay import repeat_prompt
from infer.sampling import Sampling
from infer.stops import build_stops, trim
from jaxkv import decoder
from jaxkv.cache import fingerprint, forward
from jaxkv.cache.budgets import Plan, plan
from jaxkv.checkpoints import Checkpoint, add_adapters, open_checkpoint
from jaxkv.policies import Policy
from jaxkv.presets import Preset, make_preset
from pallas_kernels import decode_attention, extend_attention, slots
from pallas_kernels.decode_attention import slot_multiple


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer. token_ids: without the id that stopped it. logprobs: per token in nats, if asked for.

    stats: cache_bytes (of one sequence, all that is allocated), cache (one line), kernels (what reads and writes it on this
    platform: {"decode_attention": "xla", ...}, see `infer.kernel_table.kernels_of`), prompt_tokens, new_tokens,
    compile_seconds (in the compiler), time_to_first_token, decode_seconds, tokens_per_second (of the whole batch,
    decoding only, without the time in which its program was made).
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    stats: dict[str, Any]


KERNELS = tuple(  # what all operations on the cache have
    name
    for name in decode_attention.IMPLEMENTATIONS
    if name in extend_attention.IMPLEMENTATIONS and name in slots.IMPLEMENTATIONS
)


def load(
    source: str | os.PathLike, *, dtype: str = "float32", revision=None, token=None, offline=False, progress=None,
    adapter: str | os.PathLike | None = None, kernels: str | None = None,
):  # fmt: skip
    """Loads a model: a name ("smollm2"), a directory, a .gguf file or a Hugging Face id.

    Args: dtype of parameters, computation and cache: "float32" or "bfloat16". revision, token, offline: for an id. adapter: a
      folder of LoRA adapters as PEFT or `train` write them, added to the parameters. kernels: what reads and writes the cache,
      "xla", "tpu", "gpu" or "interpret" (the TPU's kernels as ordinary operations, slow); None: as the platform chooses.
      Slots that are written in groups (KIVI) are XLA's everywhere.
    Raises: jaxkv.checkpoints.CheckpointError, ValueError: what was given, and what is accepted.
    """
    check_kernels(kernels)
    checkpoint = open_checkpoint(
        source, dtype=dtype, revision=revision, token=token, offline=offline, progress=progress
    )
    if adapter is not None:
        added = add_adapters(adapter, checkpoint.config, checkpoint.params)
        checkpoint = dataclasses.replace(checkpoint, params=added)
    config = dataclasses.replace(checkpoint.config, kernels=kernels)
    return LanguageModel(dataclasses.replace(checkpoint, config=config), dtype=dtype)


def check_kernels(kernels: str | None) -> None:
    """Raises: ValueError for what not all operations on the cache have, and for kernels of another platform."""
    if kernels is not None and kernels not in KERNELS:
        raise ValueError(
            f"kernels {kernels!r} are not known; accepted: {', '.join(KERNELS)}, or none: as the platform chooses"
        )
    if kernels in ("tpu", "gpu") and jax.default_backend() != kernels:
        raise ValueError(
            f"kernels {kernels!r} need a {kernels.upper()}, and JAX runs on {jax.default_backend()} here; 'interpret' runs"
            " those of a TPU anywhere"
        )


class LanguageModel:
    """A checkpoint in memory, with what is built from it once. Not a pytree; the functions inside are jitted."""

    def __init__(self, checkpoint: Checkpoint, *, dtype: str):
        self.config, self.params, self.tokenizer = checkpoint.config, checkpoint.params, checkpoint.tokenizer
        self.generation, self.dtype = checkpoint.generation, dtype
        self._bytes: list[bytes] | None = None
        self._stops: dict = {}

    def plan(
        self, cache: str | Policy | Preset = "full", budget=None, *, lengths: list[int], layer_weights=None, **options
    ) -> Plan:
        """The cache that `generate` would allocate for rows of these total lengths (prompt plus new tokens).

        Args: layer_weights: uneven budgets, see `jaxkv.cache.budgets.plan`. options: of the policy.
        """
        preset = make_preset(cache, **options)
        return plan(
            self.config, preset, budget, lengths=lengths, dtype=self.dtype, layer_weights=layer_weights,
            multiple=slot_multiple(),
        )  # fmt: skip

    def kernels(self, planned: Plan) -> dict[str, str]:
        """What reads and writes a cache of this plan here; see `infer.kernel_table.kernels_of`."""
        from infer.kernel_table import kernels_of

        return dict(kernels_of(self.config, planned.spec, self.dtype))

    def generate(
        self, prompts, *, max_new_tokens: int = 128, cache="full", budget=None, layer_weights=None, policy_options=None,
        sampling: Sampling | list[Sampling] | None = None, samples: int = 1, stop: list[str] | None = None,
        logprobs: bool = False, streaming: bool = False, progress=None,
    ) -> list[Completion]:  # fmt: skip
        """Completes prompts, greedily unless `sampling` says otherwise, under a cache budget.

        Args:
          prompts: a string or list of token ids, or a list of them; lengths may differ.
          cache: a preset by name (`jaxkv.presets.PRESETS`), a Preset or a Policy. budget: tokens per kv head and layer
            (int), "64MiB" per sequence, "20%" of a full bfloat16 cache; None = everything. layer_weights: see `plan`.
            policy_options: arguments of the policy.
          sampling: for all prompts, or one per prompt; the draws of a row depend on its own seed only.
          samples: completions per prompt, from one prefill; consecutive in the result. Sample i uses seed + i.
          stop: strings that end a completion and are cut off. streaming: allow positions past the model's window.
        Returns: one Completion per prompt and sample.
        Raises: ValueError for bad arguments; MemoryError before allocating what cannot fit.
        """
        rows = self._rows(prompts)
        samplings = list(sampling) if isinstance(sampling, (list, tuple)) else [sampling or Sampling()] * len(rows)
        if len(samplings) != len(rows):
            raise ValueError(f"sampling must be one Sampling, or one per prompt: {len(rows)}, got {len(samplings)}")
        _at_least("samples", samples, 1)
        lengths = [len(row) + _at_least("max_new_tokens", max_new_tokens, 1) for row in rows]
        self._check_window(lengths, streaming)
        planned = self.plan(cache, budget, lengths=lengths, layer_weights=layer_weights, **(policy_options or {}))
        started, compiled = time.perf_counter(), clock().compiling
        state = new_state(self.config, planned, lengths, copies=samples)
        request = self._request(samplings, samples, max_new_tokens, stop)
        hidden, state = read(
            self.params, rows, state, config=self.config, repeat=repeat_prompt(self.tokenizer), progress=progress
        )
        if samples > 1:
            hidden, state = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), (hidden, state))
        repeated = [row for row in rows for _ in range(samples)]
        pieces = generation.run(self.params, hidden, state, request, config=self.config, prompts=repeated)
        out, _, times = generation.collect(pieces, started)
        compile_seconds = clock().compiling - compiled
        return [
            self._completion(made, prompt, planned, times, compile_seconds, stop, logprobs)
            for made, prompt in zip(out, repeated, strict=True)
        ]

    def stream(self, prompt, *, max_new_tokens: int = 128, cache="full", budget=None, layer_weights=None,
               policy_options=None, sampling: Sampling | None = None, stop: list[str] | None = None, streaming: bool = False,
               progress=None, stats: dict | None = None) -> Iterator[str]:  # fmt: skip
        """Yields the completion of one prompt as pieces of text, as they come. Arguments as `generate`.

        stats: a dict that holds, after each piece, what `Completion.stats` says of the tokens so far.
        """
        rows = self._rows([prompt] if isinstance(prompt, str) else [list(prompt)])
        lengths = [len(rows[0]) + _at_least("max_new_tokens", max_new_tokens, 1)]
        self._check_window(lengths, streaming)
        planned = self.plan(cache, budget, lengths=lengths, layer_weights=layer_weights, **(policy_options or {}))
        request = self._request([sampling or Sampling()], 1, max_new_tokens, stop)
        told = self._told(planned, rows[0])
        started, compiled = time.perf_counter(), clock().compiling
        state = new_state(self.config, planned, lengths)
        hidden, state = read(
            self.params, rows, state, config=self.config, repeat=repeat_prompt(self.tokenizer), progress=progress
        )
        pieces = generation.run(self.params, hidden, state, request, config=self.config, prompts=rows)
        stats = {} if stats is None else stats

        def watched():
            first, made, count = None, 0.0, 0
            for piece in pieces:
                now, count = time.perf_counter(), count + len(piece[0][0])
                if first is None:
                    first, made = now, clock().making
                times = generation.times(started, first, now, count - 1, making=clock().making - made)
                stats.update(told | {"new_tokens": count, "compile_seconds": clock().compiling - compiled} | times)
                yield piece

        yield from self.texts(watched(), stop)

    def texts(self, pieces, stop=None) -> Iterator[str]:
        """Turns the token blocks of row 0 into pieces of text; holds back what may be half a character or a stop."""
        ids, shown, longest = [], 0, max(map(len, stop or [""]))
        for tokens, _, loop in pieces:
            ids += tokens[0]
            done = not bool(loop.running[0])
            text = trim(self.decode(self._visible(ids)), stop or [])
            ready = len(text) if done else max(shown, len(text.rstrip("\ufffd")) - longest)
            if ready > shown:
                yield text[shown:ready]
                shown = ready

    def logits(self, ids, *, streaming: bool = False) -> jax.Array:
        """The plain forward pass: token ids [B, T] -> next-token logits [B, T, V] float32.

        streaming: allow positions past the model's window, for which RoPE kinds that depend on length are made.
        """
        tokens = jnp.asarray(np.asarray(ids))
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"ids must be a non-empty [B, T] array, got shape {tokens.shape}")
        self._check_ids(np.asarray(ids).reshape(-1))
        self._check_window([tokens.shape[1]], streaming)
        hidden = forward(self.params, tokens.astype(jnp.int32), config=self.config)
        return decoder.logits(self.params, hidden, config=self.config)

    def session(self, *, cache="full", budget=None, max_tokens: int | None = None, **options):
        """A conversation over one budgeted state; see `infer.session.Session`."""
        from infer.session import Session

        max_tokens = self.config.max_positions if max_tokens is None else max_tokens
        return Session(self, cache=cache, budget=budget, max_tokens=max_tokens, **options)

    def load_session(self, path):
        """The session that `Session.save` wrote, in this or another process, on the same model."""
        from infer.session import Session

        return Session.load(self, path)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the model in files that belong to it."""
        return fingerprint(self.config, self.params)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the beginning-of-sequence id only if the tokenizer itself asks for it."""
        if self.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json; give token ids instead of text")
        return self.tokenizer.encode(text, add_bos=self.tokenizer.add_bos)

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    @property
    def eos_ids(self) -> set[int]:
        """Ids that end a completion, from the model's own configuration."""
        return set(self.generation.eos_ids)

    def _rows(self, prompts) -> list[list[int]]:
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], (int, np.integer))):
            prompts = [prompts]
        rows = [self.encode(p) if isinstance(p, str) else _token_ids(index, p) for index, p in enumerate(prompts)]
        if not rows:
            raise ValueError("no prompts were given; generate takes at least one")
        for index, row in enumerate(rows):
            if not row:
                raise ValueError(f"prompt {index} is empty; a prompt has at least one token")
            self._check_ids(row)
        return rows

    def _check_ids(self, row) -> None:
        bad = [int(i) for i in row if not 0 <= i < self.config.vocab_size]
        if bad:
            raise ValueError(f"token id {bad[0]} is outside the vocabulary, 0 to {self.config.vocab_size - 1}")

    def _check_window(self, lengths, streaming) -> None:
        if max(lengths) > self.config.max_positions and not streaming:
            raise ValueError(
                f"prompt and new tokens take {max(lengths)} positions, the model's window is"
                f" {self.config.max_positions}; shorten them, or ask for streaming past the window"
            )

    def request_stops(self, stop: list[str] | None):
        """The automaton of the model's end ids and these strings, built once for each set of strings."""
        key = tuple(stop or ())
        if key not in self._stops:
            if key and self.tokenizer is None:
                raise ValueError("stop strings need a tokenizer, and this checkpoint has none")
            if key and self._bytes is None:
                self._bytes = self.tokenizer.token_bytes()
            self._stops[key] = build_stops(self._bytes or [], list(key), self.eos_ids, self.config.vocab_size)
        return self._stops[key]

    def _request(self, samplings: list[Sampling], samples: int, max_new_tokens: int, stop):
        per_row = [dataclasses.replace(s, seed=s.seed + i) for s in samplings for i in range(samples)]
        new = [_at_least("max_new_tokens", max_new_tokens, 1)] * len(per_row)
        return generation.Request(samplings=per_row, max_new_tokens=new, stops=self.request_stops(stop))

    def _visible(self, ids):
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids

    def _told(self, planned, prompt) -> dict[str, Any]:
        """What stats say that does not change with the tokens."""
        return {
            "cache_bytes": planned.bytes_per_row,
            "cache": planned.describe(),
            "kernels": self.kernels(planned),
            "prompt_tokens": len(prompt),
        }

    def _completion(self, made, prompt, planned, times, compile_seconds, stop, logprobs) -> Completion:
        ids = self._visible(made.token_ids)
        stats = self._told(planned, prompt) | {
            "new_tokens": len(made.token_ids), "compile_seconds": compile_seconds, **times,
        }  # fmt: skip
        text = trim(self.decode(ids), stop or [])
        return Completion(text, ids, made.logprobs[: len(ids)] if logprobs else None, stats)


def _token_ids(index, prompt) -> list[int]:
    try:
        if any(isinstance(i, bool) or not isinstance(i, (int, np.integer)) for i in prompt):
            raise TypeError
    except TypeError:
        raise ValueError(
            f"prompt {index} is neither a string nor a list of integer token ids: {prompt!r:.60}"
        ) from None
    return [int(i) for i in prompt]


def _at_least(name, value, least):
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value
