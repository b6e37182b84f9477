"""The tokenizer in a GGUF file's metadata.

The file has the vocabulary and merges, but only the name of the rule that cuts text before them
(`tokenizer.ggml.pre`); a name is accepted if its rule is known exactly.
"""

from typing import Any

from jaxkv.checkpoints.errors import CheckpointError
from jaxkv.checkpoints.generation_config import Generation
from jaxkv.checkpoints.gguf_file import GgufFile
from jaxkv.checkpoints.tokenizer import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4  # token types
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
      CheckpointError: the model or its pre-tokenizer is not one that is known exactly, or metadata is missing.
    """
    get = {
        key.removeprefix("tokenizer."): value for key, value in file.metadata.items() if key.startswith("tokenizer.")
    }
    model, pre = get.get("ggml.model"), get.get("ggml.pre")
    if model != "gpt2":
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.model {model!r} is not supported; accepted: 'gpt2' (byte-level BPE). Load "
            "the model's Hugging Face directory, which has a tokenizer.json."
        )
    if pre not in _SPLITS:
        raise CheckpointError(
            f"{file.path}: tokenizer.ggml.pre {pre!r} is not supported; accepted: {', '.join(_SPLITS)}"
        )
    for key in ("ggml.tokens", "ggml.merges", "ggml.token_type"):
        if not isinstance(get.get(key), list):
            raise CheckpointError(f"{file.path}: metadata tokenizer.{key} is missing")
    backend = _byte_level_bpe(get["ggml.tokens"], get["ggml.merges"], get["ggml.token_type"], pre)
    add_bos = get.get("ggml.add_bos_token", _SPLITS[pre][3])
    return Tokenizer(
        backend,
        eos_ids=generation.eos_ids,
        bos_id=generation.bos_id,
        add_bos=bool(add_bos) and generation.bos_id is not None,
        chat_template=get.get("chat_template"),
    )


def _byte_level_bpe(tokens: list[str], merges: list[str], types: list[int], pre: str) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    digits, ignore_merges, nfc, _ = _SPLITS[pre]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
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
