"""A tiny model that says the alphabet, the command run on it in this process, and signals on demand: fixtures."""

import functools
import io
import itertools
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import infer
from infer.cli import main
from jaxkv.checkpoints import Generation, save
from jaxkv.checkpoints import Tokenizer as Wrapped
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.decoder import init_params

LETTERS = "abcdefghijklmnopqrstuvwxyzé "  # é is two tokens
TEMPLATE = (
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ROPE = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
CONFIG = DecoderConfig(
    model_type="llama", vocab_size=258, hidden_size=64, intermediate_size=32, num_heads=4, num_kv_heads=2, head_dim=8,
    layers=(LayerConfig(window=None, rope=ROPE),) * 2, max_positions=2048, norm_eps=1e-6, norm_offset=0.0,
    activation="silu", query_scale=8**-0.5, embedding_scale=1.0, tie_embeddings=False,
)  # fmt: skip


def after(prompt: str, tokens: int) -> str:
    """What the model says: the alphabet, from the letter after the prompt's last, `tokens` bytes of it."""
    start = LETTERS.index(prompt[-1]) + 1
    said = "".join(itertools.islice(itertools.cycle(LETTERS), start, start + tokens))
    return said.encode()[:tokens].decode(errors="replace")


@pytest.fixture(scope="session")
def alphabet(tmp_path_factory):
    """A checkpoint with one token for each byte: the head's row of a letter is the embedding of the one before it."""
    special = ["<|start|>", "<|end|>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    tokenizer = Wrapped(backend, eos_ids=(1,), bos_id=0, chat_template=TEMPLATE)
    table = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (258, 64))
    head, cycle = np.zeros((64, 258), np.float32), tokenizer.encode(LETTERS)
    head[:, np.roll(cycle, -1)] = table[cycle].T
    params = dict(init_params(CONFIG, jax.random.key(0)))
    params |= {"embedder": {"embedding": jnp.asarray(table)}, "head": {"kernel": jnp.asarray(head)}}
    folder = tmp_path_factory.mktemp("models") / "alphabet"
    save(folder, CONFIG, params, tokenizer=tokenizer, generation=Generation(eos_ids=(1,)))
    return folder


@pytest.fixture
def command(alphabet, capsys, monkeypatch):
    """Runs the command; gives the exit code, standard output and standard error."""

    def run(name, *arguments, stdin=b"", terminal=False):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        code = main([name, "--model", str(alphabet), "--compilation-cache", "", *arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def generate(command):
    """`generate` of eight tokens, which a later --max-new-tokens changes."""
    return functools.partial(command, "generate", "--max-new-tokens", "8", "--quiet")


def assert_refused(result, message):
    code, out, err = result
    assert (code, out) == (2, "") and message in err, result
    assert len(err.splitlines()) == 1 and err.startswith("jaxkv: error: ")


BLOCK = "infer.generate._block"  # the second of them: 1 + 32 tokens are there


@pytest.fixture
def interrupt(monkeypatch):
    """interrupt(name, call, n): the function `name` gets a signal when it is called for the call-th time."""

    def install(name, call, number=signal.SIGINT):
        module, _, attribute = name.rpartition(".")
        real, count = getattr(sys.modules[module], attribute), itertools.count(1)

        def wrapped(*args, **kwargs):
            if next(count) == call:
                assert signal.getsignal(number) is not signal.SIG_DFL  # which would end the tests
                signal.raise_signal(number)
            return real(*args, **kwargs)

        monkeypatch.setattr(name, wrapped)

    return install


@pytest.fixture
def heard(alphabet, monkeypatch):
    """The texts that sessions read, special tokens included."""
    tokenizer, texts = infer.load(alphabet).tokenizer, []
    real = infer.session.read

    def read(params, rows, *args, **kwargs):
        texts.append(tokenizer.decode(rows[0], skip_special=False))
        return real(params, rows, *args, **kwargs)

    monkeypatch.setattr("infer.session.read", read)
    return texts
