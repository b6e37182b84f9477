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

    Args: token_bytes: of every id; may be empty if there are no strings.
    Raises: ValueError for an empty stop string or an id outside the vocabulary.
    """
    for text in stop_strings:
        if not text:
            raise ValueError("a stop string is empty; it needs at least one character")
    for index in stop_ids:
        if not 0 <= index < vocab_size:
            raise ValueError(f"stop id {index} is outside the vocabulary, 0 to {vocab_size - 1}")
    moves = _byte_automaton([text.encode("utf-8") for text in stop_strings])  # [states + 1, 256]
    states = len(moves) - 1
    columns = np.tile(np.arange(states + 1, dtype=np.int32), (vocab_size, 1))  # [V, states + 1]
    if stop_strings:
        lengths = np.zeros(vocab_size, np.int32)
        lengths[: len(token_bytes)] = [len(b) for b in token_bytes[:vocab_size]]
        for place in range(int(lengths.max())):
            longer = np.flatnonzero(lengths > place)
            byte = np.array([token_bytes[i][place] for i in longer], np.int32)
            columns[longer] = moves[columns[longer], byte[:, None]]
    columns[sorted(stop_ids)] = states
    kinds, classes = np.unique(columns, axis=0, return_inverse=True)
    return Stops(classes=jnp.asarray(classes.reshape(-1).astype(np.int32)), table=jnp.asarray(kinds.T.copy()))


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
