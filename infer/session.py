"""A conversation over one budgeted state: read once, ask many times.

The chat template's pieces go where the model was trained to see them, also when the document comes first:

    extend(document)   <user turn opens> document
    ask(question)                                 question <user turn closes, answer opens>  -> answer
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from infer import generate as generation
from infer.files import replace_file
from infer.prefill import new_state, read
from infer.replay import repeat_prompt
from infer.sampling import Sampling
from infer.stops import trim
from jaxkv.cache import StateFileError, pack_state, unpack_state
from jaxkv.cache.budgets import Plan, tree_bytes
from jaxkv.presets import Part, Preset
from jaxkv.types import LayerSpec, State, TierSpec

SAVED = ("max_tokens", "system", "position", "_pending", "_before", "_seen")  # of a session, beside state and plan


@dataclasses.dataclass(frozen=True)
class Answer:
    """text of the answer; stats: cache_bytes, copy_bytes (of the copy that a question not remembered was asked on), kernels
    (as of `infer.model.Completion`)."""

    text: str
    token_ids: list[int]
    stats: dict


class Session:
    """One row of state that grows by `extend` and `ask`.

    max_tokens: planned length, which "20%" refers to. streaming: allow positions past the model's window.
    """

    def __init__(
        self, lm, *, cache="full", budget=None, max_tokens: int, system: str | None = None, streaming: bool = False,
        **options,
    ):  # fmt: skip
        if lm.tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer.json, and a session takes text")
        window = lm.config.max_positions
        if max_tokens < 1 or (max_tokens > window and not streaming):
            raise ValueError(
                f"max_tokens must be from 1 to {window}, the model's window, got {max_tokens}; ask for streaming to go"
                " past the window"
            )
        self.lm = lm
        self.plan = lm.plan(cache, budget, lengths=[max_tokens], **options)
        self.max_tokens = max_tokens
        self.state = new_state(lm.config, self.plan, [max_tokens])
        self.system, self.pieces = system, lm.tokenizer.chat_pieces(system=system)
        self.position, self._pending, self._before, self._seen = 0, [], self.pieces.before_user, []

    @property
    def cache_bytes(self) -> int:
        """Bytes of the session's state, all counted."""
        return tree_bytes(self.state)

    def extend(self, text: str, progress=None) -> None:
        """Reads a text into the cache, inside a user turn that a later `ask` closes."""
        if not text:
            raise ValueError("the text is empty; extend takes at least one character")
        ids = self._ids(text)
        self._check_room(len(ids), "the text needs")
        _, self.state = self._read(ids, self._take(), progress, repeat_prompt(self.lm.tokenizer))

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

    def stream(self, question: str, *, max_new_tokens: int = 128, sampling: Sampling | None = None,
               stop: list[str] | None = None):  # fmt: skip
        """`ask(remember=True)` as pieces of text while they come; the last item is the Answer.

        Closed early, it remembers what had come.
        """
        yield from self._ask(question, True, max_new_tokens, sampling, stop)

    def save(self, path) -> None:
        """Writes what the session remembers to one safetensors file, whole or not at all.

        The session then goes on as before; `LanguageModel.load_session` goes on from the file, in any process.
        Raises: OSError if it cannot be written.
        """
        if self.state is None:
            raise ValueError("the session was interrupted while its state was changing, and lost it; make a new one")
        extra = {"plan": _plan_to_json(self.plan), **{name: getattr(self, name) for name in SAVED}}
        replace_file(path, pack_state(self.state, model=self.lm.fingerprint, extra=extra))

    @classmethod
    def load(cls, lm, path) -> "Session":
        """A session from `save`.

        Raises: jaxkv.cache.StateFileError for a file that is not this model's, whole and unaltered.
        """
        with open(path, "rb") as file:
            state, extra = unpack_state(file.read(), config=lm.config, model=lm.fingerprint, where=str(path))
        if missing := {"plan", *SAVED} - extra.keys():
            raise StateFileError(f"{path}: is the state of no session of this version; it lacks {sorted(missing)}")
        session = cls.__new__(cls)
        session.lm, session.state, session.plan = lm, state, _plan_from_json(extra["plan"], state)
        for name in SAVED:
            setattr(session, name, extra[name])
        session.pieces = lm.tokenizer.chat_pieces(system=session.system)
        return session

    def _ask(self, question, remember, max_new_tokens, sampling, stop):
        lm = self.lm
        request = lm._request([sampling or Sampling()], 1, max_new_tokens, stop)
        ids = self._ids(question + self.pieces.after_user)
        self._check_room(len(ids) + max_new_tokens, "question and answer need")
        kept = (self.position, self._pending, self._before, self._seen)
        state, copied = self._take(), 0
        if not remember:
            self.state = state
            state, copied = jax.tree.map(jnp.copy, state), tree_bytes(state)
        made, loop = [], None

        def blocks():
            nonlocal loop
            for tokens, _, loop in generation.run(
                lm.params, hidden, state, request, config=lm.config, prompts=[self._seen]
            ):
                made.extend(tokens[0])
                yield tokens, None, loop

        try:
            hidden, state = self._read(ids, state)
            yield from lm.texts(blocks(), stop)
        finally:  # also when it is interrupted or closed early
            if not remember:
                self.position, self._pending, self._before, self._seen = kept
            elif loop is not None and not loop.token.is_deleted():
                self.state = loop.state
                self.position += len(made) - 1  # the last token is not in the state yet
                self._pending, self._before = lm._visible(made)[len(made) - 1 :], self.pieces.after_answer
                self._seen = sorted({*self._seen, *made})
        text = trim(lm.decode(lm._visible(made)), stop or [])
        stats = {"cache_bytes": self.cache_bytes, "copy_bytes": copied, "kernels": lm.kernels(self.plan)}
        yield Answer(text, lm._visible(made), stats)

    def _take(self):
        """The state, which reading donates; until one is put back, the session has none."""
        if self.state is None:
            raise ValueError("the session was interrupted while its state was changing, and lost it; make a new one")
        state, self.state = self.state, None
        return state

    def _ids(self, text):
        """What is to be read for a text inside a user turn; with all that stands around it in one piece, as in training."""
        return self._pending + self.lm.tokenizer.encode(self._before + text, continues=self.position > 0)

    def _check_room(self, tokens, what):
        if self.position + tokens > self.max_tokens:
            raise ValueError(
                f"{what} {tokens} more positions, the session has {self.max_tokens - self.position} of"
                f" {self.max_tokens} left; make it with a larger max_tokens"
            )

    def _read(self, ids, state, progress=None, repeat=None):
        hidden, state = read(self.lm.params, [ids], state, config=self.lm.config, repeat=repeat, progress=progress)
        self.position, self._seen = self.position + len(ids), sorted({*self._seen, *ids})
        self._pending, self._before = [], ""
        return hidden, state


def _plan_to_json(plan: Plan) -> dict:
    """What a plan says that the state it was made for does not."""
    preset = {field.name: getattr(plan.preset, field.name) for field in dataclasses.fields(plan.preset)}
    del preset["policy"], preset["ladder"], preset["calibrated"]  # the state has the policy; a plan has chosen a rung
    preset["parts"] = [dataclasses.asdict(part) for part in plan.preset.parts]
    return {"preset": preset, "share": plan.share, "note": plan.note}


def _plan_from_json(said: dict, state: State) -> Plan:
    """The plan of a session's state, as it was before it was saved."""
    tiers = lambda layer: tuple(
        TierSpec(slots=tier.positions.shape[-1], scheme=tier.scheme, positions=str(tier.positions.dtype))
        for tier in layer.tiers
    )
    parts = tuple(Part(**part) for part in said["preset"]["parts"])
    return Plan(
        preset=Preset(**{**said["preset"], "policy": state.layers[0].policy, "parts": parts}),
        spec=tuple(
            LayerSpec(
                policy=layer.policy, tiers=tiers(layer), rows=None if layer.owner is None else layer.owner.shape[1]
            )
            for layer in state.layers
        ),
        owners=None if state.layers[0].owner is None else tuple(np.asarray(layer.owner) for layer in state.layers),
        limits=np.asarray([[tier.limit[:, 0] for tier in layer.tiers] for layer in state.layers], np.int32),
        bytes_per_row=tree_bytes(state),
        share=said["share"],
        note=said["note"],
    )
