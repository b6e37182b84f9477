"""sentencepiece.npz: what llama.cpp makes of texts with a small SentencePiece vocabulary in a GGUF file.

    python sentencepiece_golden.py --text TEXT --out sentencepiece.npz        # 5 seconds

TEXT is any English text (made with Tiny Shakespeare). The vocabulary is trained here, on part of it and on lines with
other scripts, runs of spaces and repeated characters. Made with Python 3.11, llama-cpp-python 0.3.36, gguf 0.19.0,
sentencepiece 0.2.3, numpy 2.4.6.

`vocabulary` and `texts` are JSON as uint8: {"tokens", "scores", "types"} as the GGUF has them, and a list of strings.
For each variant of `VARIANTS`, `ids_NAME` int16 holds the ids of all texts one after another and `lengths_NAME` how
many each has; control tokens in a text are recognised, no BOS is added. The variant "plain", which is like Gemma, has
user-defined tokens of white space after the others (`GEMMA`). `pieces` is JSON: the bytes of each token of that
variant, in hexadecimal.
"""

import argparse
import ctypes
import io
import json
import pathlib
import random
import tempfile

import gguf
import llama_cpp
import numpy as np
import sentencepiece

CONTROL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
USER_DEFINED = ["<tag>"]
GEMMA = ["\n\n", "  ", "    "]
NORMAL, UNKNOWN, CONTROL_TYPE, USER_DEFINED_TYPE, UNUSED, BYTE = range(1, 7)
VARIANTS = {  # name -> (architecture, metadata, further user-defined tokens)
    "prefix": ("llama", {}, []),
    "phi3": ("phi3", {"general.name": "Phi-3"}, []),
    "plain": ("llama", {"tokenizer.ggml.add_space_prefix": False}, GEMMA),
}
OTHER_SCRIPTS = "éüñßøœ你好世界日本語한국어עבריתالعربيةпривет😀👍🏽👩‍👩‍👧∑≈𝔹ﬁ…—“”\u00a0\u200b\u2028\u0301\ufeff▁\t"
COUNT = 260


def vocabulary(text: str) -> dict[str, list]:
    """Tokens, scores and types of a trained vocabulary."""
    lines = text[:200_000].splitlines()
    lines += [
        "naïve café 你好世界 привет",
        "    if x:",
        "        return x",
        "=========",
        "hahahaha",
        "aaaaaaa",
        "-- --",
    ] * 40
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=760, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=1.0,
        control_symbols=CONTROL, user_defined_symbols=USER_DEFINED, allow_whitespace_only_pieces=True,
        split_by_whitespace=False, minloglevel=2,
    )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    found = {"tokens": [], "scores": [], "types": []}
    for index in range(len(pieces)):
        token = pieces.id_to_piece(index)
        kind = UNKNOWN if pieces.is_unknown(index) else CONTROL_TYPE if pieces.is_control(index) else NORMAL
        kind = BYTE if pieces.is_byte(index) else USER_DEFINED_TYPE if token in USER_DEFINED else kind
        found["tokens"].append(token)
        found["scores"].append(-1000.0 if kind == USER_DEFINED_TYPE else pieces.get_score(index))
        found["types"].append(kind)
    return extended(found, ["<unused0>"], UNUSED)


def extended(words: dict[str, list], tokens: list[str], kind: int) -> dict[str, list]:
    further = {"tokens": tokens, "scores": [-1000.0] * len(tokens), "types": [kind] * len(tokens)}
    return {key: values + further[key] for key, values in words.items()}


def random_texts(text: str) -> list[str]:
    draw = random.Random(0)
    found = ["", " ", "  ", "\n", "\n\n", " \n ", "▁", "<0x0A>", "<s", "<s>a</s> b", "e\u0301", "a\r\nb", "<unused0>"]
    found += [char * count for char in " \n=a" for count in (3, 4, 5, 8, 13, 21)]

    def excerpt(longest: int) -> str:
        start = draw.randrange(len(text))
        return text[start : start + draw.randint(0, longest)]

    def spaced() -> str:
        return "".join(draw.choice([" " * draw.randint(1, 9), "\n", excerpt(2), draw.choice("ah=-")]) for _ in range(9))

    def special() -> str:
        specials = [*CONTROL, *USER_DEFINED, *GEMMA, "</s>", "<unk>"]
        return "".join(draw.choice([draw.choice(specials), " ", "\n", excerpt(9)]) for _ in range(6))

    def anything() -> str:
        ranges = ((1, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0x10000, 0x10FFFF))
        return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 6)))

    def scripts() -> str:
        return "".join(draw.choices(OTHER_SCRIPTS + "ahe ", k=draw.randint(1, 12)))

    while len(found) < COUNT:
        found.append(draw.choice([lambda: excerpt(80), spaced, special, anything, scripts])())
    return found


def write_vocabulary(path: str, architecture: str, words: dict[str, list], metadata: dict) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words["tokens"])
    writer.add_token_scores(words["scores"])
    writer.add_token_types(words["types"])
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_bool(key, value)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_head_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def piece_of(model: llama_cpp.Llama, index: int) -> str:
    buffer = ctypes.create_string_buffer(64)
    size = llama_cpp.llama_token_to_piece(model._model.vocab, index, buffer, 64, 0, True)
    return buffer.raw[:size].hex()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    words, texts = vocabulary(text), random_texts(text)
    packed = {name: np.frombuffer(json.dumps(value).encode(), np.uint8) for name, value in
              (("vocabulary", words), ("texts", texts))}  # fmt: skip
    for name, (architecture, metadata, tokens) in VARIANTS.items():
        all_words = extended(words, tokens, USER_DEFINED_TYPE)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/vocabulary.gguf"
            write_vocabulary(path, architecture, all_words, metadata)
            model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
            ids = [model.tokenize(one.encode(), add_bos=False, special=True) for one in texts]
            packed[f"ids_{name}"] = np.array([index for row in ids for index in row], np.int16)
            packed[f"lengths_{name}"] = np.array([len(row) for row in ids], np.int16)
            pieces = [piece_of(model, index) for index in range(len(all_words["tokens"]))]
            packed["pieces"] = np.frombuffer(json.dumps(pieces).encode(), np.uint8)
    np.savez_compressed(arguments.out, **packed)


if __name__ == "__main__":
    main()
