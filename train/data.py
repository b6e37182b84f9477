"""Text -> tokens -> windows -> batches, the same in every run: batch n is a function of the corpus, the seed and n.

    documents   [a a a a a E][b b E][c c c c ...          E ends a text, where the tokenizer has such a token
    window      tokens     a a E b b E c c                segments say who may see whom, positions restart with each,
                segments   1 1 1 2 2 2 3 3                and nothing learns to predict the start of the next text
                positions  0 1 2 0 1 2 0 1
                weights    1 1 0 1 1 0 1 1

An epoch is all windows in a shuffled order. Each epoch the windows begin somewhere else in the corpus, by less than a
window, so that tokens do not always have the same neighbours before them.

With a memory (`Recipe.memory`) batches are not shuffled: each row reads a stretch of the corpus of its own, window after
window, and all begin anew with an epoch. Segments are then numbers of documents, the same wherever a window ends.

    corpus, 3 rows   0 1 2 3 | 4 5 6 7 | 8 9 10 11            batches   0 4 8    1 5 9    2 6 10    3 7 11    0 4 8 ...
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from jaxkv.checkpoints import Tokenizer, load_tokenizer
from train.config import Data, TrainError
from train.sources import read_documents

END = "<|end|>"
FAR = 2**30  # segments stay below
SPACE = "\u2581"  # characters are decoded as sentencepiece's are, so that stop strings work


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """tokens [n] of all documents one after the other; starts [d] of each, ascending from 0."""

    tokens: np.ndarray
    starts: np.ndarray

    @property
    def fingerprint(self) -> str:
        """Identifies it in a checkpoint."""
        found = hashlib.sha256(np.ascontiguousarray(self.tokens, np.int32).tobytes())
        found.update(np.ascontiguousarray(self.starts, np.int64).tobytes())
        return found.hexdigest()[:16]


def load_texts(data: Data) -> tuple[list[str], list[str]]:
    """Documents to train on and to validate on.

    Raises: TrainError for an empty corpus.
    """
    read = lambda sources: [text for source in sources for text in read_documents(source, field=data.field)]
    training, validation = read(data.train), read(data.validation)
    if not training:
        raise TrainError(f"the training text is empty: {', '.join(data.train)}")
    if data.validation and not validation:
        raise TrainError(f"the validation text is empty: {', '.join(data.validation)}")
    if not data.validation and data.validation_share:
        training, validation = _cut_end(training, data.validation_share)
    return training, validation


def _cut_end(texts, share):
    """The last `share` of all characters, cut between documents if there are several."""
    if len(texts) == 1:
        at = round(len(texts[0]) * (1 - share))
        return [texts[0][:at]], [texts[0][at:]] if at < len(texts[0]) else []
    ends = np.cumsum([len(text) for text in texts])
    count = int(np.searchsorted(ends, ends[-1] * (1 - share), side="right"))
    count = min(max(count, 1), len(texts) - 1)
    return texts[:count], texts[count:]


def make_tokenizer(spec: str, texts: Sequence[str], base: Tokenizer | None = None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names; texts: what "characters" and "bpe" learn from.

    Raises: TrainError for an unknown name.
    """
    if spec == "base":
        if base is None:
            raise TrainError("the base checkpoint has no tokenizer; set --data.tokenizer to a directory that has one")
        return base
    if spec == "bytes":
        return _byte_level(0, ())
    if spec == "characters":
        return _characters(texts)
    if spec.startswith("bpe:"):
        size = spec.removeprefix("bpe:")
        if not size.isdecimal() or int(size) < 257:
            raise TrainError(f"data.tokenizer {spec!r}: the size must be at least 257, all bytes and the end of a text")
        return _byte_level(int(size), texts)
    if pathlib.Path(spec).is_dir():
        found = load_tokenizer(pathlib.Path(spec))
        if found is None:
            raise TrainError(f"{spec} has no tokenizer.json")
        return found
    raise TrainError(
        f"data.tokenizer {spec!r} is not known; accepted: bytes, characters, bpe:SIZE, base, or a directory with"
        " tokenizer.json"
    )


def _byte_level(size, texts) -> Tokenizer:
    """All bytes, then what the texts have often, up to `size` tokens; END is the last of the first 257."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if size:
        backend.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False, min_frequency=2
            ),
        )
    else:
        backend.add_special_tokens([END])
    return Tokenizer(backend, eos_ids=(backend.token_to_id(END),))


def _characters(texts) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    found = sorted(set().union(*texts) - {SPACE})
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(found)}, merges=[]))
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.Fuse()])
    return Tokenizer(backend)


def check_vocabulary(tokenizer: Tokenizer, size: int, *, exact: bool) -> None:
    """Raises: TrainError if the model's vocabulary is not the tokenizer's (`exact`), or too small for it."""
    if tokenizer.vocab_size > size or (exact and tokenizer.vocab_size != size):
        raise TrainError(
            f"the model has a vocabulary of {size}, the tokenizer one of {tokenizer.vocab_size}; leave out"
            " --model.vocab_size, or choose another --data.tokenizer"
        )


def make_corpus(texts: Sequence[str], tokenizer: Tokenizer, *, what: str = "training text") -> Corpus:
    """Tokens of the documents, each opened by the tokenizer's start of a text, if it asks for one, and closed by its end, if
    it has one.

    Raises: TrainError for an empty corpus, and for characters that a character tokenizer does not have.
    """
    end = list(tokenizer.eos_ids[:1])
    letters = set(tokenizer.backend.get_vocab()) if _of_characters(tokenizer) else None
    parts = []
    for text in texts:
        unknown = sorted(set(text) - letters) if letters is not None else []
        if unknown:
            raise TrainError(f"the {what} has characters that the tokenizer lacks: {' '.join(map(repr, unknown[:5]))}")
        parts.append(np.asarray(tokenizer.encode(text, add_bos=tokenizer.add_bos) + end, np.int32))
    lengths = np.array([len(part) for part in parts], np.int64)
    if not lengths.sum():
        raise TrainError(f"the {what} is empty")
    return Corpus(np.concatenate(parts), np.concatenate([[0], np.cumsum(lengths)[:-1]]))


def _of_characters(tokenizer) -> bool:
    return all(len(token) == 1 for token in tokenizer.backend.get_vocab()) and tokenizer.backend.pre_tokenizer is None


class Windows:
    """The windows of a corpus: `windows(index, epoch)` is one, a dict of arrays [sequence].

    tokens, targets int32; segments int32, 0 = padding; positions int32; weights float32, 0 where nothing is predicted.
    rows: that read on, each its own stretch (the windows are then in the order of batches); None: windows are on their own.
    """

    def __init__(
        self, corpus: Corpus, *, sequence: int, whole: bool, seed: int | None, rows: int | None = None,
        what: str = "training text",
    ):  # fmt: skip
        count = len(corpus.tokens)
        if not whole and count < sequence + 1:
            raise TrainError(
                f"the {what} has {count} tokens, fewer than one sequence of {sequence} and its last target; give more text"
                " or lower --sequence"
            )
        self._corpus, self._sequence, self._seed = corpus, sequence, seed
        self._packed = _pack(corpus, sequence) if whole else None
        self._count = len(self._packed) if whole else max(1, (count - (1 if seed is None else sequence)) // sequence)
        self._shifts = min(sequence, count - self._count * sequence)
        self._rows = rows
        if rows is not None and self._count < rows:
            raise TrainError(
                f"the {what} gives {self._count} sequences of {sequence}, fewer than the {rows} rows that read it side by side;"
                " give more text, or lower --batch or --sequence"
            )

    def __len__(self):
        return self._count - (self._count % self._rows if self._rows else 0)

    def __call__(self, index: int, epoch: int) -> dict[str, np.ndarray]:
        size, tokens, starts = self._sequence, self._corpus.tokens, self._corpus.starts
        if self._rows:
            index = index % self._rows * (self._count // self._rows) + index // self._rows
        if self._packed is None:
            shift = 0 if self._seed is None else int(np.random.default_rng((self._seed, epoch)).integers(self._shifts))
            at = shift + index * size + np.arange(size)
        else:
            at = np.concatenate([np.arange(first, last) for first, last in self._packed[index]])
            at = np.pad(at, (0, size - len(at)), constant_values=-1)
        document = np.searchsorted(starts, at, side="right")  # 0 = padding
        same = np.append(starts, len(tokens))[document] > at + 1  # the next token is of this document
        fresh = np.diff(document, prepend=-1) != 0
        first = np.maximum.accumulate(np.where(fresh, np.arange(size), 0))
        live = at >= 0
        segments = np.cumsum(fresh) if self._rows is None else (document + epoch * (len(starts) + 1)) % FAR
        return {
            "tokens": np.where(live, tokens[at], 0).astype(np.int32),
            "targets": np.where(live & same, tokens[np.minimum(at + 1, len(tokens) - 1)], 0).astype(np.int32),
            "segments": np.where(live, segments, 0).astype(np.int32),
            "positions": (np.arange(size) - first).astype(np.int32),
            "weights": (live & same).astype(np.float32),
        }


def _pack(corpus, sequence) -> list[list[tuple[int, int]]]:
    """Documents, cut where they are longer than a window, in order into the first of the open windows with room."""
    ends = np.append(corpus.starts[1:], len(corpus.tokens))
    windows, room = [], []
    opened = 0  # windows before this one are full, or were tried often enough
    for start, end in zip(corpus.starts.tolist(), ends.tolist(), strict=True):
        for first in range(start, end, sequence):
            last = min(first + sequence, end)
            at = next((i for i in range(opened, len(windows)) if room[i] >= last - first), len(windows))
            if at == len(windows):
                windows.append([])
                room.append(sequence)
                opened = max(opened, len(windows) - 32)
            windows[at].append((first, last))
            room[at] -= last - first
    return windows


def make_batches(windows: Windows, *, batch: int, seed: int | None, process: int = 0, processes: int = 1):
    """An endless grain dataset of this process's part of the batches; its iterator's state is the number of the next one.

    seed: of the order; None: in order. The global batch does not depend on the number of processes, only on who has what.
    """
    import grain

    if batch % processes:
        raise TrainError(f"a batch of {batch} sequences cannot be shared by {processes} processes")
    order = grain.MapDataset.range(len(windows))
    if seed is not None:
        order = order.shuffle(seed=seed)
    count = len(windows)
    examples = order.repeat().map_with_index(lambda index, window: windows(int(window), index // count))
    mine = examples.slice(slice(process, None, processes)).batch(batch // processes)
    return mine.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def first_batches(windows: Windows, *, batch: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """The first `count` batches in order, for validation; fewer where there are fewer windows, the last one filled up with
    empty rows."""
    for start in range(0, min(len(windows), batch * count), batch):
        rows = [windows(i, 0) for i in range(start, min(start + batch, len(windows)))]
        rows += [{name: np.zeros_like(x) for name, x in rows[0].items()}] * (batch - len(rows))
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}
