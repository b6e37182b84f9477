"""Generation: one jitted decode loop in blocks, for `generate`, `stream` and sessions alike.

    prefill ─> hidden ─> first token ┐
                                     v
            ┌──── decode(token) ─> hidden ─> sample ─> token ────┐   on device, until the block is full
            └────────────────────────────────────────────────────┘   or every row has stopped
    host: collects the block, shows it, starts the next one

A token enters the state when the one after it is computed, so the last token of an answer is never in it, and nothing
runs past a stop.
"""

import dataclasses
import functools
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from infer.clock import clock
from infer.sampling import Sampling, SamplingArrays, make_sampling, sample
from infer.stops import Stops, step
from jaxkv import decoder
from jaxkv.cache import decode
from jaxkv.types import State

BLOCK = 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Loop:
    """What the decode loop carries.

    token [B] int32: the newest, not yet in `state`. running [B] bool. made [B] int32: tokens so far. stop [B] int32:
    state of the stop automaton. seen [B, V] bool or None: for the repetition penalty. tokens, logprobs [B, BLOCK]: of
    this block; place: int32, how many columns of them are filled.
    """

    state: State
    token: jax.Array
    running: jax.Array
    made: jax.Array
    stop: jax.Array
    seen: jax.Array | None
    tokens: jax.Array
    logprobs: jax.Array
    place: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """How to generate. samplings: one per row. max_new_tokens: [B]. stops: the automaton of stop ids and strings."""

    samplings: list[Sampling]
    max_new_tokens: list[int]
    stops: Stops

    @property
    def greedy(self) -> bool:
        return all(s.temperature == 0 and s.repetition_penalty == 1 for s in self.samplings)

    @property
    def penalised(self) -> bool:
        return any(s.repetition_penalty != 1 for s in self.samplings)


@dataclasses.dataclass
class Generated:
    """What came out for one row: ids (a stop id included), logprobs of the chosen tokens under the model, in nats."""

    token_ids: list[int]
    logprobs: list[float]


def run(params, hidden, state: State, request: Request, *, config, prompts: list[list[int]]) -> Iterator[tuple]:
    """Yields (new token ids per row, logprobs per row, loop) after the first token and after each block.

    Args: hidden [B, D] of the last prompt token; prompts: ids that count as seen for the repetition penalty.
    """
    arrays = make_sampling(request.samplings)
    limit = jnp.asarray(request.max_new_tokens, jnp.int32)
    batch = hidden.shape[0]
    seen = _seen(prompts, config.vocab_size) if request.penalised else None
    loop = Loop(
        state=state,
        token=jnp.zeros((batch,), jnp.int32),
        running=jnp.ones((batch,), bool),
        made=jnp.zeros((batch,), jnp.int32),
        stop=jnp.zeros((batch,), jnp.int32),
        seen=seen,
        tokens=jnp.zeros((batch, BLOCK), jnp.int32),
        logprobs=jnp.zeros((batch, BLOCK), jnp.float32),
        place=jnp.zeros((), jnp.int32),
    )
    head = {"head": params["head"]}
    loop = _first(head, hidden, loop, arrays, request.stops, limit, config=config, greedy=request.greedy)
    before = np.zeros(batch, int)
    while True:
        made, running = np.asarray(loop.made), np.asarray(loop.running)
        tokens, logprobs = np.asarray(loop.tokens), np.asarray(loop.logprobs)
        counts = made - before
        yield (
            [tokens[i, :n].tolist() for i, n in enumerate(counts)],
            [logprobs[i, :n].tolist() for i, n in enumerate(counts)],
            loop,
        )
        if not running.any():
            return
        before = made
        loop = dataclasses.replace(loop, place=jnp.zeros((), jnp.int32))
        loop = _block(
            params, loop, arrays, request.stops, limit, jnp.asarray(BLOCK, jnp.int32), config=config,
            greedy=request.greedy,
        )  # fmt: skip


def collect(pieces: Iterator[tuple], started: float) -> tuple[list[Generated], State, dict]:
    """Runs to the end. Returns: per row what was generated, the final state, and times in seconds."""
    rows, loop, first, made, count = None, None, 0.0, 0.0, 0
    try:
        for tokens, logprobs, loop in pieces:  # noqa: B007 the last one is used
            now = time.perf_counter()
            if rows is None:
                rows, first, made = [Generated([], []) for _ in tokens], now, clock().making
            for row, ids, scores in zip(rows, tokens, logprobs, strict=True):
                row.token_ids += ids
                row.logprobs += scores
                count += len(ids)
    except KeyboardInterrupt:
        if rows is None:
            raise
    making = clock().making - made
    return rows, loop.state, times(started, first, time.perf_counter(), count - len(rows), making=making)


def times(started: float, first: float, last: float, decoded: int, *, making: float) -> dict[str, float | None]:
    """What `Completion.stats` says of time: seconds until the first token, then `decoded` more tokens until `last`.

    making: seconds between the two in which JAX made programs, which the speed does not count.
    """
    running = last - first - making
    return {
        "time_to_first_token": first - started,
        "decode_seconds": last - first,
        "tokens_per_second": decoded / running if decoded and running > 0 else None,
    }


def _seen(prompts, vocab):
    seen = np.zeros((len(prompts), vocab), bool)
    for row, ids in enumerate(prompts):
        seen[row, ids] = True
    return jnp.asarray(seen)


def _take(params, hidden, loop: Loop, arrays: SamplingArrays, stops, limit, *, config, greedy) -> Loop:
    """Samples the next token of the running rows and records it."""
    logits = decoder.logits(params, hidden, config=config)
    token, logprob = sample(logits, arrays, loop.made, loop.seen, greedy=greedy)
    token = jnp.where(loop.running, token, loop.token)
    stop, stopped = step(stops, loop.stop, token)
    rows = jnp.arange(token.shape[0])
    made = loop.made + loop.running.astype(jnp.int32)
    return Loop(
        state=loop.state,
        token=token,
        running=loop.running & ~stopped & (made < limit),
        made=made,
        stop=jnp.where(loop.running, stop, loop.stop),
        seen=None if loop.seen is None else loop.seen.at[rows, token].set(True),
        tokens=loop.tokens.at[:, loop.place].set(token),
        logprobs=loop.logprobs.at[:, loop.place].set(logprob),
        place=loop.place + 1,
    )


@functools.partial(jax.jit, static_argnames=("config", "greedy"))
def _first(params, hidden, loop, arrays, stops, limit, *, config, greedy):
    return _take(params, hidden, loop, arrays, stops, limit, config=config, greedy=greedy)


@functools.partial(jax.jit, static_argnames=("config", "greedy"), donate_argnames=("loop",))
def _block(params, loop: Loop, arrays, stops, limit, steps, *, config, greedy) -> Loop:
    def more(loop):
        return loop.running.any() & (loop.place < steps)

    def advance(loop):
        hidden, state = decode(params, loop.token, loop.state, config=config, valid=loop.running)
        loop = dataclasses.replace(loop, state=state)
        return _take(params, hidden, loop, arrays, stops, limit, config=config, greedy=greedy)

    return jax.lax.while_loop(more, advance, loop)
