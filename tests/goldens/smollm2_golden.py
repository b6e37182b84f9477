"""smollm2.npz: logits, greedy tokens and token ids of the real SmolLM2-135M-Instruct, dequantized from its GGUF.

The tokenizer is built here from the tokens and merges of the file: the one that transformers makes from a GGUF of this
model gives other ids. Attention, weights and logits are float32.
"""

import pathlib
from collections.abc import Iterator

import gguf
import numpy as np
import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NEW_TOKENS = 48
LONG_PROMPT = 1500
MIN_MARGIN = 0.05
SPECIAL = 3  # GGUF token type "control"
EOS = (0, 2)  # <|endoftext|>, <|im_end|>: a run that would have stopped is not kept

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PLAIN_PROMPTS = (
    "1 2 3 4 5 6 7 8 9 10 11 12",
    "The days of the week are Monday, Tuesday,",
    "The alphabet: a, b, c, d, e, f,",
    "def fibonacci(n):\n",
    "Once upon a time",
    "The capital of France is",
)
CHAT_PROMPTS = tuple(
    CHAT.format(question)
    for question in (
        "Write a Python function that returns the factorial of n.",
        "Count from 1 to 30.",
        "Repeat after me: the quick brown fox jumps over the lazy dog, and then it sleeps in the warm sun.",
        "What is gravity?",
        "List the months of the year.",
    )
)
TOKENIZER_TEXTS = (
    "",
    "Hello, world!",
    " leading space",
    "   three leading spaces, two trailing  ",
    "\n\n1",
    "In 2024, 1234567 people paid $3.14 (or 10%).",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "text<|endoftext|>text <|im_end|> <|not_special|>",
    "naïve café, Ångström, Straße, Привет, 你好\uff0c世界, שלום",
    "emoji 😀👩\u200d👩\u200d👧\u200d👦🇫🇷 and e\u0301 combining, \u200bzero width",
    "def f(x):\n\tif x >= 10:\n\t\treturn x**2  # squared\n    else: pass\r\n",
    "don't I'LL we've    \n \n  12 a1b22c³½",
)


def field(reader: gguf.GGUFReader, key: str):
    return reader.fields[key].contents()


def build_tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
    """Byte-level BPE with one token per digit and the control tokens of the file as special tokens."""
    names = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {name: index for index, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    split = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = split.Sequence(
        [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [name for name, kind in zip(names, kinds, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens(special)
    if tokenizer.get_vocab_size() != len(names):
        raise RuntimeError("the special tokens are not all in the vocabulary")
    return tokenizer


def unpermute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row order of GGUF's Q and K: from channel pairs (c, c + 1) to pairs (c, c + H/2)."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def build_model(reader: gguf.GGUFReader) -> LlamaForCausalLM:
    """The float32 model of the dequantized weights, with eager attention."""
    heads, kv_heads = field(reader, "llama.attention.head_count"), field(reader, "llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field(reader, "llama.vocab_size"),
        hidden_size=field(reader, "llama.embedding_length"),
        intermediate_size=field(reader, "llama.feed_forward_length"),
        num_hidden_layers=field(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field(reader, "llama.context_length"),
        rms_norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    parts = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if tensor.name in names:
            weights[names[tensor.name]] = torch.from_numpy(value)
            continue
        _, block, part, _ = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            value = unpermute(value, heads if part == "attn_q" else kv_heads)
        weights[f"model.layers.{block}.{parts[part]}.weight"] = torch.from_numpy(np.ascontiguousarray(value))
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing not in ([], ["lm_head.weight"]) or unexpected:
        raise RuntimeError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model


@torch.no_grad()
def greedy(model, ids: list[int]) -> tuple[np.ndarray, np.ndarray, float] | None:
    """Last logits of the prompt, greedy tokens and their least margin; None as soon as a step is unclear or a stop."""
    output = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
    last = output.logits[0, -1].numpy()
    chosen, margins = [], []
    while True:
        top = output.logits[0, -1].topk(2)
        chosen.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        if margins[-1] <= MIN_MARGIN or chosen[-1] in EOS:
            return None
        if len(chosen) == NEW_TOKENS:
            return last, np.array(chosen, np.int32), min(margins)
        output = model(torch.tensor([chosen[-1:]]), past_key_values=output.past_key_values, use_cache=True)


def excerpts(tokenizer: tokenizers.Tokenizer, novel: str) -> Iterator[str]:
    """Pieces of the novel of exactly LONG_PROMPT tokens, each from the start of a paragraph."""
    starts = [index + 2 for index in range(len(novel)) if novel.startswith("\n\n", index)]
    for start in starts[100::37]:
        encoding = tokenizer.encode(novel[start : start + 12 * LONG_PROMPT])
        if len(encoding.ids) <= LONG_PROMPT:
            continue
        text = novel[start : start + encoding.offsets[LONG_PROMPT - 1][1]]
        if len(tokenizer.encode(text).ids) == LONG_PROMPT:
            yield text


def utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


def write_smollm2(model_file: pathlib.Path, novel_file: pathlib.Path, out: pathlib.Path) -> None:
    """Takes the first clear prompt of each kind (plain, chat, long) and writes `out`."""
    reader = gguf.GGUFReader(model_file)
    tokenizer, model = build_tokenizer(reader), build_model(reader)
    novel = novel_file.read_text(encoding="utf-8")
    arrays = {}
    for index, texts in enumerate((PLAIN_PROMPTS, CHAT_PROMPTS, excerpts(tokenizer, novel))):
        for text in texts:
            ids = tokenizer.encode(text).ids
            result = greedy(model, ids)
            if result is not None:
                break
        else:
            raise RuntimeError(f"no prompt of kind {index} has a greedy run with margins above {MIN_MARGIN}")
        logits, chosen, margin = result
        arrays |= {
            f"prompt_text_{index}": utf8(text),
            f"prompt_{index}": np.array(ids, np.int32),
            f"logits_{index}": logits,
            f"greedy_{index}": chosen,
            f"margin_{index}": np.float32(margin),
        }
        print(f"prompt {index}: {len(ids)} tokens, margin {margin:.4f}, {text[-40:]!r} -> {tokenizer.decode(chosen)!r}")
    for index, text in enumerate(TOKENIZER_TEXTS):
        ids = tokenizer.encode(text).ids
        if tokenizer.decode(ids, skip_special_tokens=False) != text:
            raise RuntimeError(f"{text!r} is not decoded back")
        arrays |= {f"tokenizer_text_{index}": utf8(text), f"tokenizer_ids_{index}": np.array(ids, np.int32)}
    np.savez_compressed(out, **arrays)
