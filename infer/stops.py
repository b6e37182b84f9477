"""Stop ids and stop strings as one automaton over tokens, built on the host and stepped inside the decode loop.

A stop string may begin and end inside tokens and span many. The automaton is Aho-Corasick over bytes; a token moves it
by all of its bytes at once. Tokens that move it alike share a class, so the table is small.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stops:
    """classes [V] int32: class of each token. table [states, classes] int32: next state; the last state = stopped."""

    classes: jax.Array
    table: jax.Array


def build_stops(token_bytes: list[bytes], stop_strings: list[str], stop_ids: set[int], vocab_size: int) -> Stops:
    """The automaton of these strings and ids; state 0 is the start.

    Args: token_bytes: of every id; may be empty if there are no strings. Ids past its end stand for no bytes.
    Raises: ValueError for an empty stop string, an id outside the vocabulary, or strings without token_bytes.
    """
    for text in stop_strings:
        if not text:
            raise ValueError("a stop string is empty; it needs at least one character")
    if stop_strings and not token_bytes:
        raise ValueError("stop strings need the bytes of each token, and token_bytes is empty")
    for index in stop_ids:
        if not 0 <= index < vocab_size:
            raise ValueError(f"stop id {index} is outside the vocabulary, 0 to {vocab_size - 1}")
    moves = _byte_automaton([text.encode("utf-8") for text in stop_strings])  # [states + 1, 256]
    states = len(moves) - 1
    columns = np.tile(np.arange(states + 1, dtype=np.int32), (vocab_size, 1))  # [V, states + 1]
    if stop_strings:
        _read_tokens(columns, moves, token_bytes[:vocab_size])
    columns[sorted(stop_ids)] = states
    # A dict over the bytes of each column: np.unique(axis=0) compares field by field and takes two seconds.
    kinds: dict[bytes, int] = {}
    classes = [kinds.setdefault(column.tobytes(), len(kinds)) for column in columns]
    table = np.frombuffer(b"".join(kinds), np.int32).reshape(len(kinds), states + 1)
    return Stops(classes=jnp.asarray(np.array(classes, np.int32)), table=jnp.asarray(table.T.copy()))


def _read_tokens(columns, moves, token_bytes):
    """Moves columns [V, states + 1], in place, by all bytes of each token; longest tokens first, so each byte is one
    slice."""
    lengths = np.array([len(b) for b in token_bytes])
    order = np.argsort(-lengths, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[order]
    flat = np.frombuffer(b"".join(token_bytes), np.uint8).astype(np.int32)
    rows = moves.reshape(-1) * 256  # states as offsets into the flat table: one addition and one gather for each byte
    moved = columns[order] * 256
    for place in range(int(lengths.max())):
        longer = int((lengths > place).sum())
        moved[:longer] = rows.take(moved[:longer] + flat[starts[:longer] + place][:, None])
    columns[order] = moved // 256


def _byte_automaton(words: list[bytes]) -> np.ndarray:
    """Next state [states + 1, 256] of Aho-Corasick; the last row, reached by completing a word, leads to itself."""
    trie, ends = [{}], [False]
    for word in words:
        node = 0
        for byte in word:
            if byte not in trie[node]:
                trie[node][byte] = len(trie)
                trie.append({})
                ends.append(False)
            node = trie[node][byte]
        ends[node] = True
    moves = np.zeros((len(trie) + 1, 256), np.int32)
    fail, queue = [0] * len(trie), [0]
    for node in queue:  # breadth first: the row of fail[node] is ready before node's
        if node:
            moves[node] = moves[fail[node]]
            ends[node] |= ends[fail[node]]
        for byte, child in trie[node].items():
            fail[child] = int(moves[fail[node], byte]) if node else 0
            moves[node, byte] = child
            queue.append(child)
    stopped = len(trie)
    final = np.array([*ends, True])
    moves[:stopped] = np.where(final[moves[:stopped]], stopped, moves[:stopped])
    moves[stopped] = stopped
    return moves


def step(stops: Stops, state, token):
    """state, token [B] int32 -> next state [B], and whether the row stops with this token [B] bool."""
    state = stops.table[state, stops.classes[token]]
    return state, state == stops.table.shape[0] - 1


def trim(text: str, stop_strings: list[str]) -> str:
    """The text up to the earliest stop string."""
    found = [place for place in map(text.find, stop_strings) if place >= 0]
    return text[: min(found)] if found else text
