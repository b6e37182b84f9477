"""The tokenizer in a GGUF file's metadata: byte-level BPE (model "gpt2") or SentencePiece BPE (model "llama").

Of byte-level BPE the file has the vocabulary and merges, but only the name of the rule that cuts text before them
(`tokenizer.ggml.pre`); a name is accepted if its rule is known exactly. Of SentencePiece it has scores instead of
merges.
"""

from collections.abc import Set
from typing import Any

from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.fields import check_fields
from jaxkv.checkpoints.generation_config import Generation
from jaxkv.checkpoints.gguf_file import GgufFile
from jaxkv.checkpoints.tokenizer import SPACE, Tokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types; the others are 1 normal, 5 unused and 6 byte
_ADDED = (_UNKNOWN, _CONTROL, _USER_DEFINED)  # found in a text before the rest of it is cut into pieces
_FIELDS = {  # metadata after "tokenizer." -> kind of value
    "ggml.model": "name", "ggml.pre": "name", "chat_template": "name", "ggml.tokens": "names", "ggml.merges": "names",
    "ggml.scores": "numbers", "ggml.token_type": "counts", "ggml.add_bos_token": "flag", "ggml.add_eos_token": "flag",
    "ggml.add_space_prefix": "flag", "ggml.unknown_token_id": "count",
}  # fmt: skip
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
_WORDS += r"|\s+(?!\S)|\s+"
# name -> digits that stay together, whether a word in the vocabulary skips the merges, whether NFC, default of add_bos
_SPLITS = {
    "gpt-2": ("gpt2", False, False, False),
    "smollm": ("one by one", False, False, False),
    "llama-bpe": ("{1,3}", True, False, True),
    "qwen2": ("", False, True, False),
}


def tokenizer_of(file: GgufFile, generation: Generation) -> Tokenizer:
    """Builds the tokenizer from `tokenizer.*` metadata.

    Raises:
      CheckpointError: the model or its pre-tokenizer is not one that is known exactly, or metadata is missing or wrong.
    """
    get = {
        key.removeprefix("tokenizer."): value for key, value in file.metadata.items() if key.startswith("tokenizer.")
    }
    check_fields(get, _FIELDS, f"{file.path}: metadata of the tokenizer,")
    model, pre = get.get("ggml.model"), get.get("ggml.pre")
    if model not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model {model!r} is not supported; accepted: 'gpt2' (byte-level BPE), 'llama' "
            "(SentencePiece BPE). Load the model's Hugging Face directory, which has a tokenizer.json."
        )
    if model == "gpt2" and pre not in _SPLITS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported; accepted: {', '.join(_SPLITS)}"
        )
    for key in ("ggml.tokens", "ggml.merges" if model == "gpt2" else "ggml.scores", "ggml.token_type"):
        if key not in get:
            raise CheckpointError(f"{file.path}: metadata tokenizer.{key} is missing")
        if key != "ggml.merges" and len(get[key]) != len(get["ggml.tokens"]):
            raise CheckpointError(
                f"{file.path}: tokenizer.{key} has {len(get[key])} entries for {len(get['ggml.tokens'])} tokens"
            )
    try:
        if model == "gpt2":
            backend = _byte_level_bpe(get["ggml.tokens"], get["ggml.merges"], get["ggml.token_type"], pre)
        else:
            backend = _sentencepiece_bpe(
                get["ggml.tokens"],
                get["ggml.scores"],
                get["ggml.token_type"],
                unknown=get.get("ggml.unknown_token_id", 0),
                space_prefix=get.get("ggml.add_space_prefix", True),
                strip_after=file.metadata.get("general.architecture") == "phi3",
            )
    except CheckpointError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    add_bos = get.get("ggml.add_bos_token", _SPLITS[pre][3] if model == "gpt2" else True)
    return Tokenizer(
        backend,
        eos_ids=generation.eos_ids,
        bos_id=generation.bos_id,
        add_bos=add_bos and generation.bos_id is not None,
        add_eos=get.get("ggml.add_eos_token", False),
        chat_template=get.get("chat_template"),
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], types: list[int], pre: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    digits, ignore_merges, nfc, _ = _SPLITS[pre]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    wrong = [pair for pair in pairs if len(pair) != 2 or not {*pair, "".join(pair)} <= vocab.keys()]
    if wrong:
        raise CheckpointError(
            f"merge {' '.join(wrong[0])!r} in tokenizer.ggml.merges does not join two tokens to a third; download the "
            "file again"
        )
    backend = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
    if nfc:
        backend.normalizer = normalizers.NFC()
    if digits == "gpt2":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        first = (
            pre_tokenizers.Digits(individual_digits=True)
            if digits == "one by one"
            else pre_tokenizers.Split(Regex(_WORDS % digits), behavior="isolated")
        )
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=digits == "one by one")
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    backend.decoder = decoders.ByteLevel()
    known = [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(known)
    return backend


def _sentencepiece_bpe(
    tokens: list[str], scores: list[float], types: list[int], *, unknown: int, space_prefix: bool, strip_after: bool
) -> Any:
    """SentencePiece's BPE: spaces become "▁", the pair whose piece has the highest score is joined first (of equal
    ones the leftmost), and a character without a piece becomes its bytes.

    Args:
      unknown: id of the unknown token.
      space_prefix: a text begins with a space, at its start and after a control or user-defined token.
      strip_after: Phi-3's control tokens take the white space that follows them.
    Source: llama.cpp, src/llama-vocab.cpp, which is what these files were written for.
    Departs: of overlapping control and user-defined tokens the leftmost is taken, there the longest; and of pairs with
      equal scores the one that gives the longer piece comes first, there the leftmost. Scores differ in trained
      vocabularies, except in runs of spaces and newlines, where both rules agree.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = [token or f"[EMPTY_{index}]" for index, token in enumerate(tokens)]
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for index, token in enumerate(tokens) if vocab[token] != index)
        raise CheckpointError(f"token {twice!r} is twice in tokenizer.ggml.tokens; each must be there once")
    if unknown >= len(tokens):
        raise CheckpointError(f"unknown token id {unknown} is outside the vocabulary of {len(tokens)} tokens")
    added = [(token, kind) for token, kind in zip(tokens, types, strict=True) if kind in _ADDED]
    _check_pieces(vocab.keys(), vocab.keys() - {token for token, _ in added})
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_by_score(tokens, scores),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    replace = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace]) if space_prefix else replace
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if space_prefix else steps)
    known = [
        AddedToken(
            token,
            special=kind != _USER_DEFINED,
            normalized=False,
            rstrip=strip_after and token not in ("<unk>", "<s>", "<|endoftext|>"),
        )
        for token, kind in added
    ]
    backend.add_tokens(known)
    return backend


def _check_pieces(known: Set[str], pieces: Set[str]) -> None:
    """SentencePiece joins characters that are no tokens themselves, if their pair is one. Merges cannot say that."""
    lone = set("".join(pieces)) - known
    parts = known | lone
    for piece in pieces:
        if not lone.isdisjoint(piece) and any(piece[:n] in parts and piece[n:] in parts for n in range(1, len(piece))):
            raise CheckpointError(
                f"token {piece!r} is made of a character that is no token, {min(lone & set(piece))!r}; add that to "
                "tokenizer.ggml.tokens, or load the model's Hugging Face directory"
            )


def _merges_by_score(tokens: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Every cut of a token into two tokens, in the order of joining; see `_sentencepiece_bpe` for equal scores."""
    known = set(tokens)
    ranked = sorted(zip(tokens, scores, strict=True), key=lambda one: (-one[1], -len(one[0])))
    cuts = ((token[:cut], token[cut:]) for token, _ in ranked for cut in range(len(token) - 1, 0, -1))
    return [(left, right) for left, right in cuts if left in known and right in known]
