"""Text and token ids: the real tokenizer against ids from transformers, and small ones built here."""

import json
import pathlib

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from jaxkv.checkpoints import CheckpointError, load_tokenizer, named
from jaxkv.checkpoints import Tokenizer as Wrapped
from jaxkv.checkpoints.gguf import generation_of
from jaxkv.checkpoints.gguf_file import GgufFile, read_gguf
from jaxkv.checkpoints.gguf_tokenizer import _byte_level_bpe, tokenizer_of
from jaxkv.checkpoints.tokenizer import byte_alphabet

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXTS = ["Hello, world!", " a  b\n\nc", "it's 12345 don't", "naïve 你好 😀", "x<|im_end|>y", ""]


@pytest.fixture(scope="module")
def real(smollm2):
    file = read_gguf(named.find_named("smollm2"))
    return tokenizer_of(file, generation_of(file))


def small(**settings) -> Wrapped:
    """A byte-level tokenizer trained on TEXTS, with two special tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return Wrapped(backend, eos_ids=(1,), bos_id=0, **settings)


def test_ids_of_transformers(real):
    golden = np.load(GOLDENS / "smollm2.npz")
    table = real.token_bytes()
    count = sum(name.startswith("tokenizer_text_") for name in golden.files)
    assert count == 12
    for index in range(count):
        data = golden[f"tokenizer_text_{index}"].tobytes()
        ids = golden[f"tokenizer_ids_{index}"].tolist()
        assert real.encode(data.decode()) == ids
        assert real.decode(ids, skip_special=False).encode() == data
        assert b"".join(table[token] for token in ids) == data
    for index in range(3):
        text = golden[f"prompt_text_{index}"].tobytes().decode()
        assert real.encode(text) == golden[f"prompt_{index}"].tolist()


def test_the_real_tokenizer(real):
    assert (real.vocab_size, real.bos_id, real.eos_ids, real.add_bos) == (49152, 1, (2,), False)
    assert real.special_ids == frozenset(range(17))
    table = real.token_bytes()
    assert len(table) == 49152 and all(table) and table[2] == b"<|im_end|>" and table[216] == b" "
    assert real.decode([1, 33, 2]) == "1" and real.decode([1, 33, 2], skip_special=False) == "<|im_start|>1<|im_end|>"
    pieces = real.chat_pieces()
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert pieces.before_user == f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    assert pieces.after_user == "<|im_end|>\n<|im_start|>assistant\n"
    assert pieces.after_answer == "<|im_end|>\n<|im_start|>user\n"
    assert real.chat_pieces(system="Be brief.").before_user == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )


def test_saved_and_read_again(real, tmp_path):
    real.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.token_bytes() == real.token_bytes()
    for attribute in ("vocab_size", "bos_id", "eos_ids", "add_bos", "special_ids", "chat_template"):
        assert getattr(again, attribute) == getattr(real, attribute)
    for text in TEXTS:
        assert again.encode(text) == real.encode(text)


def test_bos_only_if_asked():
    tokenizer = small(add_bos=True)
    plain = tokenizer.encode("Hello")
    assert tokenizer.encode("Hello", add_bos=True) == [0, *plain] and plain[0] != 0
    assert tokenizer.encode("") == [] and tokenizer.encode("", add_bos=True) == [0]
    without = Wrapped(tokenizer.backend)
    with pytest.raises(ValueError, match="no bos token"):
        without.encode("Hello", add_bos=True)
    with pytest.raises(CheckpointError, match="no bos token is named"):
        Wrapped(tokenizer.backend, add_bos=True)
    with pytest.raises(CheckpointError, match="eos id 999 is outside the vocabulary of 300 tokens"):
        Wrapped(tokenizer.backend, eos_ids=[999])


def test_decode_of_odd_ids():
    tokenizer = small()
    with pytest.raises(ValueError, match="-1 is negative; ids are 0 to 299"):
        tokenizer.decode([3, -1])
    assert tokenizer.decode([5000]) == "" and tokenizer.decode([]) == ""
    byte = tokenizer.encode("é")[:1]
    assert tokenizer.decode(byte) in ("é", "\ufffd")


def test_bytes_of_tokens():
    tokenizer = small()
    table = tokenizer.token_bytes()
    for text in TEXTS:
        assert b"".join(table[token] for token in tokenizer.encode(text)) == text.encode()
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())


def test_bytes_of_sentencepiece_like_tokens():
    vocab = {"<unk>": 0, "<0x0A>": 1, "<0xE4>": 2, "\u2581the": 3, "\u2581": 4, "<0xyz>": 6, "cat": 9}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["\u2581\u2581"])
    table = Wrapped(backend).token_bytes()
    assert table[1:5] == [b"\n", b"\xe4", b" the", b" "] and table[6:8] == [b"<0xyz>", b"</s>"]
    assert table[8] == b"  " and backend.decode([9, 8, 9]) == "cat  cat"  # the decoder treats added tokens alike
    assert table[9] == b"cat" and table[5] == b""  # no token has this id
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece.*accepted: ByteLevel"):
        Wrapped(backend).token_bytes()


# SentencePiece in a GGUF


def sentencepiece(tokens, scores, types, *, architecture="llama", **metadata) -> Wrapped:
    """The tokenizer of a GGUF with this vocabulary; metadata without "tokenizer.ggml."."""
    values = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types} | metadata
    values = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    file = GgufFile(pathlib.Path("model.gguf"), {"general.architecture": architecture} | values, {})
    return tokenizer_of(file, generation_of(file))


@pytest.fixture(scope="module")
def golden():
    """What llama.cpp makes of 260 texts; `goldens/sentencepiece_golden.py` wrote it."""
    stored = np.load(GOLDENS / "sentencepiece.npz")
    unpacked = {name: json.loads(stored[name].tobytes()) for name in ("vocabulary", "texts", "pieces")}
    for variant in ("prefix", "phi3", "plain"):
        ends = np.cumsum(stored[f"lengths_{variant}"])[:-1]
        unpacked[variant] = [row.tolist() for row in np.split(stored[f"ids_{variant}"], ends)]
    return unpacked


def golden_tokenizer(golden, variant) -> Wrapped:
    further = ["\n\n", "  ", "    "] if variant == "plain" else []  # as Gemma's files have them
    words = dict(golden["vocabulary"])
    words["tokens"] = words["tokens"] + further
    words["scores"] = words["scores"] + [-1000.0] * len(further)
    words["types"] = words["types"] + [4] * len(further)
    architecture = "phi3" if variant == "phi3" else "llama"
    return sentencepiece(**words, architecture=architecture, add_space_prefix=False if variant == "plain" else None)


@pytest.mark.parametrize("variant", ["prefix", "phi3", "plain"])
def test_sentencepiece_as_llama_cpp_does_it(golden, variant):
    tokenizer = golden_tokenizer(golden, variant)
    assert len(golden["texts"]) == 260
    for text, ids in zip(golden["texts"], golden[variant], strict=True):
        assert tokenizer.encode(text) == ids, text
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos, tokenizer.add_eos) == (1, (2, 6), True, False)


def test_sentencepiece_bytes(golden):
    tokenizer = golden_tokenizer(golden, "plain")
    table, unused = tokenizer.token_bytes(), golden["vocabulary"]["tokens"].index("<unused0>")
    expected = [bytes.fromhex(piece) for piece in golden["pieces"]]
    assert expected[unused] == b"" and table[unused] == b"<unused0>"  # llama.cpp gives unused tokens no bytes
    assert [*table[:unused], *table[unused + 1 :]] == [*expected[:unused], *expected[unused + 1 :]]
    assert {bytes([byte]) for byte in range(256)} <= set(table) and table[-3:] == [b"\n\n", b"  ", b"    "]


@pytest.mark.parametrize("variant", ["prefix", "plain"])
def test_sentencepiece_restores_texts(golden, variant, tmp_path):
    tokenizer = golden_tokenizer(golden, variant)
    table = tokenizer.token_bytes()
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.token_bytes() == table
    cut = {index for index, kind in enumerate(golden["vocabulary"]["types"]) if kind in (2, 3, 4)}
    for text in golden["texts"]:
        ids = tokenizer.encode(text)
        assert again.encode(text) == ids and again.decode(ids) == tokenizer.decode(ids)
        if variant == "plain" or cut.isdisjoint(ids):  # after a cut the prefix is written once more
            restored = text.replace("\u2581", " ")
            assert tokenizer.decode(ids, skip_special=False) == restored
            space = b" " if variant == "prefix" and text else b""
            assert b"".join(table[index] for index in ids) == space + restored.encode()


def small_vocabulary(*pieces: str) -> dict:
    """Unknown, bos, eos, then the pieces; each score is lower than the one before."""
    tokens = ["<unk>", "<s>", "</s>", *pieces]
    return {"tokens": tokens, "scores": [-float(n) for n in range(len(tokens))], "types": [2, 3, 3] + [1] * len(pieces)}


def test_sentencepiece_by_hand():
    """The best score wins wherever its pair is, of equal pairs the left one; unknown characters become one token."""
    tokenizer = sentencepiece(**small_vocabulary("bc", "ab", "dabc", "aa", "a", "b", "c", "d"), add_space_prefix=False)
    for text, pieces in (
        ("abc", ["a", "bc"]),
        ("dabc", ["d", "a", "bc"]),  # "dabc" is a token, but no pair leads there
        ("aaa", ["aa", "a"]),
        ("aab", ["a", "ab"]),
        ("xyb", ["<unk>", "b"]),
    ):
        assert [tokenizer.backend.id_to_token(index) for index in tokenizer.encode(text)] == pieces
    assert tokenizer.special_ids == {0, 1, 2} and tokenizer.encode("<s>a") == [1, 7]


def joined_by_score(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's rule itself: join the pair with the highest score, of equal ones the leftmost, until none is."""
    parts = list(text)
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in scores]
        if not pairs:
            return parts
        place = -max(pairs)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_merges_follow_the_scores():
    """Random vocabularies, in which tokens have many cuts and overlap themselves, with scores in any order."""
    draw = np.random.default_rng(0)
    for _ in range(80):
        pieces = ["a", "b"]
        for _ in range(draw.integers(3, 20)):
            pieces.append(str(draw.choice(pieces)) + str(draw.choice(pieces)))
            pieces += ["a" * draw.integers(2, 9)] * draw.integers(0, 2)
        words = small_vocabulary(*dict.fromkeys(pieces))
        words["scores"][3:] = draw.permutation(len(words["tokens"]) - 3).astype(float).tolist()
        scores = dict(zip(words["tokens"], words["scores"], strict=True))
        tokenizer = sentencepiece(**words, add_space_prefix=False)
        for _ in range(20):
            text = "".join(draw.choice(["a", "b"], p=[0.8, 0.2], size=draw.integers(0, 40)))
            assert tokenizer.backend.encode(text).tokens == joined_by_score(text, scores), (text, scores)


def test_runs_with_equal_scores_are_joined_from_the_left():
    """As Gemma's older files have them: spaces of every length, all with one score."""
    runs = ["\u2581" * length for length in range(2, 6)]
    words = small_vocabulary(*runs, "\u2581", "a")
    words["scores"][3:7] = [-1000.0] * 4
    tokenizer = sentencepiece(**words, add_space_prefix=False)
    for length in range(1, 23):
        assert tokenizer.encode(" " * length) == [6] * (length // 5) + [[], [7], [3], [4], [5]][length % 5]


def test_added_tokens_of_sentencepiece():
    words = small_vocabulary("\u2581a", "\u2581", "a", "\n", "<|user|>", "<end_of_turn>", "  ")
    words["types"][7:] = [3, 3, 4]
    tokenizer = sentencepiece(**words, architecture="phi3", add_bos_token=False, add_eos_token=True, eos_token_id=8)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.eos_ids) == (False, True, (8,))
    assert tokenizer.special_ids == {0, 1, 2, 7, 8}
    assert tokenizer.encode("<|user|>\n a<s>\na") == [7, 3, 1, 4, 6, 5]  # white space after Phi-3's tokens goes
    assert tokenizer.encode("a  a") == [3, 9, 3] and tokenizer.token_bytes()[9] == b"  "
    other = sentencepiece(**words)
    assert other.encode("<|user|>\n a") == [7, 4, 6, 3] and other.eos_ids == (2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "t5"}, "tokenizer.ggml.model 't5' is not supported; accepted: 'gpt2'.*'llama'"),
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"model": None}, "tokenizer.ggml.model None is not supported"),
        ({"scores": None}, r"tokenizer\.ggml\.scores is missing"),
        ({"scores": [0.0]}, r"tokenizer\.ggml\.scores has 1 entries for 5 tokens"),
        ({"scores": [0.0, 1.0, 2.0, 3.0, float("nan")]}, "'ggml.scores' must be a list of finite numbers"),
        ({"token_type": "x"}, "'ggml.token_type' must be a list of whole numbers"),
        ({"tokens": ["<unk>", "<s>", "</s>", "a", "a"]}, "token 'a' is twice"),
        ({"tokens": ["<unk>", "<s>", "</s>", "a", "ab"]}, "token 'ab' is made of a character that is no token, 'b'"),
        ({"tokens": 5}, "'tokenizer.ggml.tokens' must be a list of strings, got 5"),
        ({"unknown_token_id": 5}, "unknown token id 5 is outside the vocabulary of 5 tokens"),
        ({"add_space_prefix": "no"}, "'ggml.add_space_prefix' must be true or false, got 'no'"),
        ({"bos_token_id": -1}, "'tokenizer.ggml.bos_token_id' must be a whole number from 0 up, got -1"),
        ({"bos_token_id": 7}, "bos id 7 is outside the vocabulary"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused_vocabularies(change, message):
    change = {"types" if key == "token_type" else key: value for key, value in change.items()}
    with pytest.raises(CheckpointError, match=message):
        sentencepiece(**(small_vocabulary("a", "b") | change))


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a 12's", ["a", "Ġ", "1", "2", "'s"]),
        ("gpt-2", "a 12's", ["a", "Ġ12", "'s"]),
        ("llama-bpe", "a 12345'S\n\n b", ["a", "Ġ", "123", "45", "'S", "ĊĊ", "Ġb"]),
        ("qwen2", "a 12\n b", ["a", "Ġ", "1", "2", "Ċ", "Ġb"]),
    ],
)
def test_cuts_before_merging(pre, text, pieces):
    """By hand, from the published regular expressions."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = _byte_level_bpe(tokens, [], [1] * len(tokens), pre)
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces
    assert backend.decode(backend.encode(text).ids) == text
    composed = backend.decode(backend.encode("e\u0301").ids)
    assert composed == ("é" if pre == "qwen2" else "e\u0301")


# Files


def written(folder: pathlib.Path, **settings) -> pathlib.Path:
    small().backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def test_tokenizer_config(tmp_path):
    folder = written(
        tmp_path,
        eos_token={"content": "<|im_end|>", "special": True},
        bos_token="<|im_start|>",
        add_bos_token=True,
        chat_template=[{"name": "tool_use", "template": "t"}, {"name": "default", "template": CHATML}],
    )
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.add_bos) == ((1,), 0, True)
    assert tokenizer.chat_template == CHATML
    (folder / "chat_template.jinja").write_text("own file")
    assert load_tokenizer(folder).chat_template == "own file"
    (folder / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.add_bos) == ((), None, False)


def test_bos_of_the_post_processor(tmp_path):
    """Llama 3 says nothing in tokenizer_config.json; its post-processor adds the token."""
    folder = written(tmp_path, bos_token="<|im_start|>")
    assert not load_tokenizer(folder).add_bos
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    backend.enable_truncation(4)
    backend.enable_padding(length=32)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.add_bos and tokenizer.encode("Hello")[0] != 0
    assert 4 < len(tokenizer.encode("abc " * 6)) < 32  # neither cut nor padded


def test_bad_tokenizer_files(tmp_path):
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model and no tokenizer\.json.*save_pretrained"):
        load_tokenizer(tmp_path)
    for text in ("{", "{}", '{"version": "1.0", "model": {"type": "Nope"}}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
            load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"eos_token '</s>' is not a token"):
        load_tokenizer(written(tmp_path, eos_token="</s>"))
    with pytest.raises(CheckpointError, match=r"chat_template must be a string or.*'default'; it has rag"):
        load_tokenizer(written(tmp_path, chat_template=[{"name": "rag", "template": "t"}]))


# Chat templates


def test_template_language():
    template = (
        "{% for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{{ m.content }}{% generation %}|{% endgeneration %}\n{% endfor %}{{ bos_token }}{{ eos_token }}"
        "{{ {'a': '<é>'} | tojson }}{{ tools is none }}{{ strftime_now('%Y') | length }}{{ thinking }}"
    )
    tokenizer = small(chat_template=template)
    messages = [{"role": "skip", "content": "no"}, {"role": "user", "content": "yes"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=False, thinking="t")
    assert text == 'yes|<|im_start|><|im_end|>{"a": "<é>"}True4t'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template.*plain text"),
        ("{% if %}", "not valid: line 1"),
        ("{{ raise_exception('roles must alternate') }}", r"\[user\]: roles must alternate"),
        ("{{ messages[3].content }}", "refuses messages of roles"),
        ("{{ ''.__class__.__mro__ }}", "refuses messages of roles.*unsafe"),
        ("{{ messages.append(1) }}", "refuses messages of roles.*unsafe"),
    ],
)
def test_bad_templates(template, message):
    with pytest.raises(CheckpointError, match=message):
        small(chat_template=template).apply_chat_template(
            [{"role": "user", "content": "q"}], add_generation_prompt=True
        )


def test_pieces():
    pieces = small(chat_template=CHATML).chat_pieces(system="S")
    assert pieces.before_user == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n"
    mistral = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    pieces = small(chat_template=mistral).chat_pieces()
    assert (pieces.before_user, pieces.after_user) == ("<|im_start|>[INST] ", " [/INST]")
    assert pieces.after_answer == "<|im_end|>[INST] "


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1].content }}", "writes a turn's content 0 times"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "writes a turn's content 2 times"),
        ("{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}", "'1' before a new.*'3' before"),
        (
            "{% for m in messages %}{{ m.content }}|{% if messages | length > 3 %}{{ loop.index }}{% endif %}"
            "{% endfor %}",
            "changes earlier turns",
        ),
    ],
)
def test_templates_without_pieces(template, message):
    with pytest.raises(CheckpointError, match=message):
        small(chat_template=template).chat_pieces()


def metaspace(scheme: str) -> Wrapped:
    """A SentencePiece tokenizer as a tokenizer.json has it: newer ones write the space at the very start only."""
    letters = [chr(n) for n in range(ord("a"), ord("z") + 1)]
    words = ["\u2581", *letters, "[", "]", "/", ".", *(f"<0x{n:02X}>" for n in range(256)), "ab", "\u2581ab", "\u2581a"]
    vocab = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    merges = [("a", "b"), ("\u2581", "ab"), ("\u2581", "a")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])  # fmt: skip
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")])
    return Wrapped(backend, eos_ids=(2,), bos_id=1)


SPACED = {
    "every segment": lambda: metaspace("always"),
    "the start alone": lambda: metaspace("first"),
    "a GGUF": lambda: sentencepiece(
        **small_vocabulary("ab", "\u2581ab", "\u2581", *"abcdefghiä.[]\n"), add_space_prefix=True
    ),
}


@pytest.mark.parametrize("kind", SPACED)
def test_a_text_that_goes_on_begins_with_no_space(kind):
    """The ids before and behind a seam are those of the whole, wherever no token spans it."""
    tokenizer = SPACED[kind]()
    assert tokenizer.encode("ab") != tokenizer.encode("ab", continues=True) != []
    seams = 0
    for text in ("ab", "abcd", "d ab", "<s>[ab] c", " ab</s><s>[ab]ab", "\nab", "a\n\n b", "ää", "c.ab"):
        whole = tokenizer.encode(text)
        for cut in range(len(text) + 1):
            head = tokenizer.encode(text[:cut])
            if cut and whole[: len(head)] == head and "<" not in text[max(0, cut - 3) : cut]:
                assert head + tokenizer.encode(text[cut:], continues=True) == whole, (text, cut)
                seams += 1
    assert seams >= 20 and tokenizer.encode("", continues=True) == []


def test_byte_level_texts_go_on_as_they_begin():
    for text in (*TEXTS, "\n\n a"):
        assert small().encode(text, continues=True) == small().encode(text)


def test_special_tokens_are_not_normalized():
    backend = small().backend
    backend.add_special_tokens([AddedToken("<|x|>", normalized=False)])
    tokenizer = Wrapped(backend)
    assert tokenizer.encode("<|x|>") == [300] and 300 in tokenizer.special_ids and tokenizer.vocab_size == 301
