"""Text <-> token ids, the bytes of every token, and the chat template. Wraps a `tokenizers.Tokenizer`."""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxkv.checkpoints import chat
from jaxkv.checkpoints.errors import CheckpointError, read_json

SPACE = "\u2581"  # how sentencepiece writes a space
SEAMS = ("\n", "\ue000", ".", "0", "a", "@")  # characters that may stay apart from a text that follows them


class Tokenizer:
    """A tokenizer with what its checkpoint says about it.

    Attributes:
      vocab_size: highest token id + 1.
      eos_ids, bos_id: ids that end and begin a text; () and None if there are none.
      special_ids: ids that `decode` can skip.
      add_bos: whether the checkpoint wants `bos_id` before a text; `encode` does so only if told.
      add_eos: whether it wants an eos after a text. `encode` never does so: nothing could be generated after it.
      chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: Any,
        *,
        eos_ids: Iterable[int] = (),
        bos_id: int | None = None,
        add_bos: bool = False,
        add_eos: bool = False,
        chat_template: str | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_ids = tuple(eos_ids)
        self.bos_id = bos_id
        self.add_bos = add_bos
        self.add_eos = add_eos
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._added = {index: token.content for index, token in added.items()}
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        for name, ids in (("eos", self.eos_ids), ("bos", () if bos_id is None else (bos_id,))):
            for index in ids:
                if not 0 <= index < self.vocab_size:
                    raise CheckpointError(f"{name} id {index} is outside the vocabulary of {self.vocab_size} tokens")
        if add_bos and bos_id is None:
            raise CheckpointError("the tokenizer adds a bos token, but no bos token is named")

    def encode(self, text: str, *, add_bos: bool = False, continues: bool = False) -> list[int]:
        """Token ids of `text`. Special tokens written in the text are recognised; none is added but bos, if asked.

        continues: the text goes on where other ids end, so that a tokenizer that puts a space before a text, as
        SentencePiece does, puts none; ids of both together are then those of the whole text, if no token spans the seam.
        Raises:
          ValueError: add_bos without a bos token.
        """
        if add_bos and self.bos_id is None:
            raise ValueError("add_bos=True, but this tokenizer has no bos token")
        ids = self._continued(text) if continues else self._ids(text)
        return [self.bos_id, *ids] if add_bos else ids

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _continued(self, text: str) -> list[int]:
        """Ids of `text` after a character that stays a token of its own. Where none does, the text begins anew."""
        begins = "".join(self.backend.encode("a", add_special_tokens=False).tokens)
        for before in SEAMS if begins.startswith((SPACE, "\u0120")) else ():
            head, both = self._ids(before), self._ids(before + text)
            if both[: len(head)] == head and self.backend.decode(head, skip_special_tokens=False).strip(" ") == before:
                return both[len(head) :]
        return self._ids(text)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 come out as U+FFFD. An id without a token (padding rows of an
        embedding table) has no text. Where the tokenizer puts a space before a text, as SentencePiece does, one leading
        space is taken away, also if the ids come from the middle of a text; `token_bytes` keeps it.

        Raises:
          ValueError: a negative id.
        """
        ids = [int(index) for index in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"token id {min(ids)} is negative; ids are 0 to {self.vocab_size - 1}")
        return self.backend.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self) -> list[bytes]:
        """The bytes that each token adds inside a text, by id; b"" for an id without a token.

        Raises:
          CheckpointError: neither a byte-level nor a sentencepiece-like vocabulary.
        """
        undo = self._undo()
        table = [b""] * self.vocab_size
        for token, index in self.backend.get_vocab(with_added_tokens=True).items():
            table[index] = undo(token, index in self._added)
        return table

    def _undo(self) -> Any:
        """(token, whether it is an added one) -> its bytes."""
        state = self.backend.decoder.__getstate__().decode() if self.backend.decoder is not None else "null"
        if '"ByteLevel"' in state:
            alphabet = byte_alphabet()
            return lambda token, added: token.encode() if added else bytes(alphabet[char] for char in token)
        if '"ByteFallback"' in state or '"Metaspace"' in state or SPACE in state:
            return _undo_sentencepiece
        raise CheckpointError(
            f"the bytes of tokens are not known for the decoder {state:.200}; accepted: ByteLevel, and "
            "sentencepiece's (ByteFallback, Metaspace)"
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool, **variables: Any
    ) -> str:
        """The conversation as one string, by the checkpoint's own template.

        Args:
          messages: [{"role": "system" | "user" | "assistant", "content": text}, ...].
          add_generation_prompt: end with what stands before an answer.
          **variables: passed to the template, such as `enable_thinking`.
        Raises:
          CheckpointError: there is no template, it is not valid, or it refuses these messages.
        """
        return chat.render(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._text_of(self.bos_id),
            eos_token=self._text_of(self.eos_ids[0] if self.eos_ids else None),
            **variables,
        )

    def chat_pieces(self, *, system: str | None = None) -> chat.ChatPieces:
        """The strings around the turns of a conversation; see `ChatPieces`. system: the system message, if any."""
        return chat.pieces(self.apply_chat_template, system=system)

    def _text_of(self, index: int | None) -> str:
        return "" if index is None else self.backend.id_to_token(index)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json and tokenizer_config.json into an existing directory."""
        directory = pathlib.Path(directory)
        self.backend.save(str(directory / "tokenizer.json"))
        fields = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": self.add_bos,
            "add_eos_token": self.add_eos,
            "bos_token": self._text_of(self.bos_id) or None,
            "eos_token": self._text_of(self.eos_ids[0]) if self.eos_ids else None,
            "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
        }
        fields = {key: value for key, value in fields.items() if value is not None}
        text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")


def byte_alphabet() -> dict[str, int]:
    """The printable character of each byte in a byte-level vocabulary (GPT-2's map), inverted: character -> byte."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + n): byte for n, byte in enumerate(moved)}


def _undo_sentencepiece(token: str, added: bool) -> bytes:
    """Added tokens are no exception: the decoder treats them alike."""
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()


def load_tokenizer(directory: pathlib.Path) -> Tokenizer | None:
    """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja; None if the directory has no tokenizer.

    Raises:
      CheckpointError: a file is damaged, or the tokenizer is in another format than tokenizer.json.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        others = [name for name in ("tokenizer.model", "vocab.json", "spiece.model") if (directory / name).exists()]
        if others:
            raise CheckpointError(
                f"{directory} has {others[0]} and no tokenizer.json, which is the accepted format. Write it with "
                "transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
            )
        return None
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_buffer(path.read_bytes())
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
    settings_path = directory / "tokenizer_config.json"
    settings = read_json(settings_path) if settings_path.exists() else {}
    template_path = directory / "chat_template.jinja"
    template = settings.get("chat_template")
    if template_path.exists():
        template = template_path.read_text(encoding="utf-8")
    eos = _special_id(backend, settings, "eos_token", settings_path)
    bos = _special_id(backend, settings, "bos_token", settings_path)
    add_bos = settings.get("add_bos_token")
    if add_bos is None:
        add_bos = bos is not None and backend.encode("", add_special_tokens=True).ids[:1] == [bos]
    return Tokenizer(
        backend,
        eos_ids=() if eos is None else (eos,),
        bos_id=bos,
        add_bos=bool(add_bos) and bos is not None,
        add_eos=bool(settings.get("add_eos_token")),
        chat_template=chat.select_template(template, str(settings_path)),
    )


def _special_id(backend: Any, settings: Mapping[str, Any], key: str, path: pathlib.Path) -> int | None:
    token = settings.get(key)
    text = token.get("content") if isinstance(token, dict) else token
    if text is None:
        return None
    index = backend.token_to_id(text) if isinstance(text, str) else None
    if index is None:
        raise CheckpointError(f"{path}: {key} {text!r} is not a token of tokenizer.json")
    return index
