"""Questions about facts hidden deep in a long text, generated from any filler text, or read from a file.

    chat header · intro · sentence · sentence · FACT · sentence · ... · FACT · sentence       the context
    question · prefix                                                                         asked later
    answer                                                                                    right iff greedy says it

The formats are those that a 135M-parameter model answers with its full cache in 9 of 10 cases, so that what a smaller
cache loses is visible. Each context hides eight facts, one pass key and seven magic numbers, at random depths, and no
two values start with the same digit: a guess is right at most once in nine times on the first token alone.
"""

import dataclasses
import json
import os
import pathlib
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

INTRO = "Some special facts are hidden within the following text. Memorize them. I will ask you about them later.\n\n"
NOUNS = (
    "anchor", "basket", "candle", "dragon", "engine", "feather", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "magnet", "needle", "orange", "pepper", "quilt", "rocket", "saddle", "temple", "umbrella", "violin",
    "window", "zebra",
)  # fmt: skip
MAGIC_FACTS = 7  # of a context, beside its one pass key
LONG = 60  # words; a longer sentence is cut, so that text without full stops works too
_END = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\b[A-Z]\.)(?<=[.!?])[\"”’)_]*\s+")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """Asked about a context. question, prefix and answer are tokenized apart; the answer follows the prefix."""

    task: str
    question: str
    prefix: str
    answer: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """A text to remember and what is asked about it; tokenized without a special token of its own."""

    id: str
    context: str
    questions: tuple[Question, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What one context hides. magic: (noun, value), in random order. after_user: the chat's string before an answer."""

    pass_key: str
    magic: tuple[tuple[str, str], ...]
    after_user: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A row of the table. per_context: how many questions a context has; ask(facts, i): the i-th of them."""

    summary: str
    per_context: int
    ask: Callable[[Facts, int], Question]


def _pass_key_fact(value: str) -> str:
    return f"The pass key is {value}. Remember it. {value} is the pass key."


def _magic_fact(noun: str, value: str) -> str:
    text = f"special magic number for {noun} is {value}."
    return f"The {text} Remember it: the {text}"


def _ask_pass_key(facts: Facts, index: int) -> Question:
    del index  # a context has one
    question = f"\n\nWhat is the pass key?{facts.after_user}"
    return Question(task="passkey", question=question, prefix="The pass key is", answer=f" {facts.pass_key}")


def _ask_magic(facts: Facts, index: int) -> Question:
    """One shot: the first line shows the format with another fact of the same context."""
    noun, value = facts.magic[index]
    other, known = facts.magic[(index + 1) % len(facts.magic)]
    return Question(
        task="magic",
        question=f"\n\nThe special magic number for {other} is {known}.",
        prefix=f"\n\nThe special magic number for {noun} is",
        answer=f" {value}",
    )


TASKS: dict[str, Task] = {
    "passkey": Task(summary="a five-digit pass key, asked in the chat's form", per_context=1, ask=_ask_pass_key),
    "magic": Task(summary="four-digit magic numbers of seven nouns, one shot", per_context=MAGIC_FACTS, ask=_ask_magic),
}


def split_sentences(text: str) -> list[str]:
    """Sentences of any text, white space collapsed, none longer than 60 words."""
    sentences = []
    for sentence in _END.sub(lambda m: m[0].rstrip() + "\n", " ".join(text.split())).split("\n"):
        words = sentence.split()
        sentences += [" ".join(words[i : i + LONG]) for i in range(0, len(words), LONG)]
    return sentences


def encode_context(tokenizer: Any, text: str) -> list[int]:
    """Token ids of the start of a row: with a bos token where the tokenizer's model wants one and the text has none."""
    ids = list(tokenizer.encode(text))
    bos = tokenizer.bos_id if getattr(tokenizer, "add_bos", False) else None
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def make_samples(
    tasks: Sequence[str],
    *,
    filler: str,
    tokenizer: Any,
    context_tokens: int,
    samples: int | Mapping[str, int],
    seed: int,
) -> list[Context]:
    """Contexts of nearly, never more than, `context_tokens` tokens, with `samples` questions of each task in all.

    As few contexts as the task with the fewest questions per context needs; the questions are spread evenly over them.
    The same arguments give the same samples.

    Args:
      tasks: names from `TASKS`. filler: any text. samples: questions per task, at least 1, or task -> number.
      tokenizer: `encode(text) -> list[int]`; its chat template, if it has one, gives the strings around the turns.
    Raises: ValueError for an unknown task, no samples, a context too short for the facts, or too little filler.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown or len(set(tasks)) != len(tasks):
        raise ValueError(f"unknown or repeated task in {list(tasks)}; known: {', '.join(TASKS)}")
    wanted = dict(samples) if isinstance(samples, Mapping) else dict.fromkeys(tasks, samples)
    if set(wanted) != set(tasks):
        raise ValueError(f"samples are given for {list(wanted)}, the tasks are {list(tasks)}")
    if tasks and min(wanted.values()) < 1:
        raise ValueError(f"samples must be at least 1, got {min(wanted.values())}")
    if not tasks:
        return []
    sentences = split_sentences(filler)
    before_user, after_user = _chat_strings(tokenizer)
    count = max(-(-wanted[name] // TASKS[name].per_context) for name in tasks)
    contexts = []
    for index in range(count):
        rng = random.Random(f"jaxkv {seed} {index}")  # a string seeds the same everywhere
        facts = draw_facts(rng, after_user)
        text = hide(facts, rng, sentences, before_user + INTRO, tokenizer, context_tokens)
        questions = []
        for name in tasks:
            here = wanted[name] * (index + 1) // count - wanted[name] * index // count
            questions += [TASKS[name].ask(facts, i) for i in range(here)]
        contexts.append(Context(id=f"seed{seed}-{index}", context=text, questions=tuple(questions)))
    return contexts


def _chat_strings(tokenizer: Any) -> tuple[str, str]:
    """What stands before the user's text and before the answer; nearly nothing for a model without a chat template."""
    if getattr(tokenizer, "chat_template", None) is None:
        return "", "\n"
    pieces = tokenizer.chat_pieces()
    return pieces.before_user, pieces.after_user


def draw_facts(rng: random.Random, after_user: str, *, magic: int = MAGIC_FACTS) -> Facts:
    """A pass key and so many magic numbers."""
    first = rng.sample("123456789", magic + 1)
    digits = lambda n: "".join(rng.choice("0123456789") for _ in range(n))
    values = [first[0] + digits(4), *(digit + digits(3) for digit in first[1:])]
    nouns = rng.sample(NOUNS, magic)
    return Facts(pass_key=values[0], magic=tuple(zip(nouns, values[1:], strict=True)), after_user=after_user)


def hide(facts: Facts, rng: random.Random, sentences: list[str], head: str, tokenizer: Any, limit: int) -> str:
    """The longest run of sentences from a random start that fits into so many tokens, with the facts between them.

    Raises: ValueError for a limit too low for the facts alone, or too little text.
    """
    hidden = [_pass_key_fact(facts.pass_key), *(_magic_fact(*fact) for fact in facts.magic)]
    rng.shuffle(hidden)
    depths = sorted(rng.random() for _ in hidden)
    count = lambda text: len(encode_context(tokenizer, text))

    def build(start: int, length: int) -> str:
        parts, done = [], 0
        for fact, depth in zip(hidden, depths, strict=True):
            place = round(depth * length)
            parts += [*sentences[start + done : start + place], fact]
            done = place
        return head + " ".join([*parts, *sentences[start + done : start + length]])

    least = count(build(0, 0))
    if least > limit:
        raise ValueError(f"a context of {limit} tokens is too short: the facts alone take {least}; give more than that")
    # A start is possible if enough text follows it. Estimated on the last sentences, then checked on the real text.
    last = len(sentences)
    tail = 0
    while last > 0 and tail <= limit - least:
        last -= 1
        tail += count(" " + sentences[last])
    if tail <= limit - least:
        raise ValueError(
            f"the filler text is too short: it has {tail} tokens in {len(sentences)} sentences, and a context of"
            f" {limit} tokens needs more than {limit - least}; give a longer text or a smaller context"
        )
    start = rng.randint(0, last)
    low, high = 0, len(sentences) - start  # fits, and an upper bound found by doubling
    step = 16
    while low + step < high and count(build(start, low + step)) <= limit:
        low, step = low + step, step * 2
    high = min(high, low + step)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(build(start, middle)) <= limit else (low, middle - 1)
    return build(start, low)


def load_samples(path: str | os.PathLike[str]) -> list[Context]:
    """Reads samples from a JSON file.

        {"contexts": [{"id", "context", "questions": [{"task", "question", "prefix", "answer"}, ...]}, ...]}

    Raises: ValueError that names what is wrong and what is accepted; OSError if the file cannot be read.
    """
    accepted = (
        'accepted: {"contexts": [{"id": text, "context": text, "questions": [{"task": text, "question": text,'
        ' "prefix": text, "answer": text}, ...]}, ...]}'
    )
    try:
        data = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}; {accepted}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: line {error.lineno}: {error.msg}; {accepted}") from error

    def refuse(where: str, given: Any, wanted: str):
        shown = f"keys {sorted(given)}" if isinstance(given, dict) else f"{type(given).__name__} {given!r:.60}"
        raise ValueError(f"{path}: {where} must be {wanted}, got {shown}; {accepted}")

    def listed(given: Any, key: str, where: str) -> list:
        if not isinstance(given, dict) or key not in given:
            refuse(where, given, f"an object with {key!r}")
        if not isinstance(given[key], list) or not given[key]:
            refuse(f"{where}.{key}", given[key], "a list that is not empty")
        return given[key]

    def text(given: Any, key: str, where: str, empty: bool = False) -> str:
        if not isinstance(given, dict) or key not in given:
            refuse(where, given, f"an object with {key!r}")
        if not isinstance(given[key], str) or not (given[key] or empty):
            refuse(f"{where}.{key}", given[key], "text" if empty else "text that is not empty")
        return given[key]

    contexts = []
    for c, one in enumerate(listed(data, "contexts", "the file")):
        here = f"contexts[{c}]"
        questions = []
        for q, asked in enumerate(listed(one, "questions", here)):
            there = f"{here}.questions[{q}]"
            fields = {key: text(asked, key, there, key == "prefix") for key in ("task", "question", "prefix", "answer")}
            questions.append(Question(**fields))
        contexts.append(
            Context(id=text(one, "id", here), context=text(one, "context", here), questions=tuple(questions))
        )
    return contexts
