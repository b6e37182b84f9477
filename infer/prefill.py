"""From rows of token ids to a state that has read them."""

import jax
import jax.numpy as jnp
import numpy as np

from infer.replay import with_replay
from jaxkv import decoder
from jaxkv.cache import empty_state, extend
from jaxkv.cache.budgets import Plan, format_bytes, slot_grid
from jaxkv.types import State


def pad_rows(rows: list[list[int]]) -> tuple[jax.Array, jax.Array]:
    """Rows of ids, padded on the right to one length from the grid: tokens and valid, [B, T]."""
    length = slot_grid(max(1, max(map(len, rows))))
    tokens, valid = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
        valid[index, : len(row)] = True
    return jnp.asarray(tokens), jnp.asarray(valid)


@jax.jit
def last_hidden(hidden, valid):
    """Hidden state [B, D] of each row's last valid token."""
    last = jnp.maximum(valid.sum(axis=1, dtype=jnp.int32) - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def new_state(config, plan: Plan, lengths: list[int], *, copies: int = 1, row: int | None = None) -> State:
    """An empty state for the plan's rows, or for its row number `row` alone.

    Args: copies: of the state that the caller will hold at once.
    Raises: MemoryError, before anything is allocated, if it cannot fit.
    """
    needed, free = plan.bytes_per_row * len(lengths) * copies, free_bytes()
    if free is not None and needed > free:
        raise MemoryError(
            f"the cache needs {format_bytes(needed)} for {len(lengths) * copies} sequences, {format_bytes(free)} are"
            " free; choose a smaller budget, fewer sequences or fewer new tokens"
        )
    sizes = plan.sizes(row, len(lengths))
    return empty_state(config, plan.spec, lengths=np.asarray(lengths, np.int32), **sizes)


def read(params, rows: list[list[int]], state: State, *, config, repeat: list[int] | None = None, progress=None):
    """Extends `state` by these rows.

    repeat: ids that ask for a repetition; given, a policy that learns from one gets it (`infer.replay`). A short text,
      such as a question, is not worth a second reading.
    Returns: the hidden state [B, D] of each row's last token, and the state.
    """
    tokens, valid = pad_rows(rows)
    more = {}
    if repeat is not None and any(layer.policy.needs_replay for layer in state.layers):
        start = int(state.next_position.max())
        more = with_replay(
            rows, start=start, window=config.max_positions, table=config.most_positions, repeat=repeat, grid=slot_grid
        )
        more = {name: jnp.asarray(x) for name, x in more.items()}
        tokens, valid = more.pop("tokens"), more.pop("valid")
    hidden, state = extend(params, tokens, state, config=config, valid=valid, progress=progress, **more)
    own = valid & (more["replay"] == 0) if more else valid
    return last_hidden(hidden, own), state


def free_bytes() -> int | None:
    """Free memory of the default device, or None where it cannot be told."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def next_logits(params, hidden, *, config):
    """Logits [B, V] float32 of hidden [B, D]."""
    return _logits({"head": params["head"]}, hidden, config=config)


def _head(params, hidden, *, config):
    return decoder.logits(params, hidden, config=config)


_logits = jax.jit(_head, static_argnames=("config",))
