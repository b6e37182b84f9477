"""A conversation over one budgeted state: read once, ask many times.

The chat template's pieces go where the model was trained to see them, also when the document comes first:

    extend(document)   <user turn opens> document
    ask(question)                                 question <user turn closes, answer opens>  -> answer
"""

import dataclasses

import jax
import jax.numpy as jnp

from infer import generate as generation
from infer.prefill import new_state, read
from infer.sampling import Sampling
from infer.stops import trim
from jaxkv.cache.budgets import tree_bytes


@dataclasses.dataclass(frozen=True)
class Answer:
    """text of the answer; stats: cache_bytes, copy_bytes (of the copy that a question not remembered was asked on)."""

    text: str
    token_ids: list[int]
    stats: dict


class Session:
    """One row of state that grows by `extend` and `ask`. max_tokens: planned length, which "20%" refers to."""

    def __init__(self, lm, *, cache="full", budget=None, max_tokens: int, system: str | None = None, **options):
        self.lm = lm
        self.plan = lm.plan(cache, budget, lengths=[max_tokens], **options)
        self.max_tokens = max_tokens
        self.state = new_state(lm.config, self.plan, [max_tokens])
        self.pieces = lm.tokenizer.chat_pieces(system=system)
        self.position, self._pending, self._open = 0, [], False

    @property
    def cache_bytes(self) -> int:
        """Bytes of the session's state, all counted."""
        return tree_bytes(self.state)

    def extend(self, text: str, progress=None) -> None:
        """Reads a text into the cache, inside a user turn that a later `ask` closes."""
        if not text:
            raise ValueError("the text is empty; extend takes at least one character")
        _, self.state = self._read(self._ids(text), self.state, progress)
        self._open = True

    def ask(self, question: str, *, remember: bool = False, max_new_tokens: int = 128,
            sampling: Sampling | None = None, stop: list[str] | None = None) -> Answer:  # fmt: skip
        """Asks a question and generates the answer.

        remember: False asks on a copy of the state, so every question meets the same memory; True keeps question and
          answer in it.
        """
        if not question:
            raise ValueError("the question is empty; ask takes at least one character")
        *_, answer = self._ask(question, remember, max_new_tokens, sampling, stop)
        return answer

    def stream(self, question: str, *, max_new_tokens: int = 128, sampling: Sampling | None = None):
        """`ask(remember=True)` as pieces of text while they come; the last item is the Answer."""
        yield from self._ask(question, True, max_new_tokens, sampling, None)

    def _ask(self, question, remember, max_new_tokens, sampling, stop):
        lm = self.lm
        ids = self._ids(question) + lm.tokenizer.encode(self.pieces.after_user)
        kept = (self.position, list(self._pending), self._open)
        state = self.state if remember else jax.tree.map(jnp.copy, self.state)
        copied = 0 if remember else tree_bytes(state)
        if self.position + len(ids) + max_new_tokens > self.max_tokens:
            raise ValueError(
                f"question and answer need {len(ids) + max_new_tokens} more positions, the session has"
                f" {self.max_tokens - self.position} of {self.max_tokens} left; make it with a larger max_tokens"
            )
        hidden, state = self._read(ids, state)
        request = lm._request(1, 1, sampling or Sampling(), max_new_tokens, stop)
        made, loop, shown = [], None, 0
        for tokens, _, loop in generation.run(lm.params, hidden, state, request, config=lm.config, prompts=[ids]):  # noqa: B007 the last one is used
            made += tokens[0]
            text = trim(lm.decode(lm._visible(made)), stop or [])
            ready = text.rstrip("\ufffd")
            yield ready[shown:]
            shown = max(shown, len(ready))
        if remember:
            self.state = loop.state
            self.position += len(made) - 1  # the last token is not in the state yet
            self._pending = lm._visible(made)[len(made) - 1 :] + lm.tokenizer.encode(self.pieces.after_answer)
            self._open = True
        else:
            self.position, self._pending, self._open = kept
        yield Answer(text, lm._visible(made), {"cache_bytes": self.cache_bytes, "copy_bytes": copied})

    def _ids(self, text):
        before = [] if self._open else self.lm.tokenizer.encode(self.pieces.before_user)
        return self._pending + before + self.lm.tokenizer.encode(text)

    def _read(self, ids, state, progress=None):
        if self.position + len(ids) > self.max_tokens:
            raise ValueError(
                f"{len(ids)} tokens do not fit: the session has {self.max_tokens - self.position} of"
                f" {self.max_tokens} positions left; make it with a larger max_tokens"
            )
        hidden, state = read(self.lm.params, [ids], state, config=self.lm.config, progress=progress)
        self.position += len(ids)
        self._pending = []
        return hidden, state
