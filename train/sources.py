"""Documents from where they are: files, names, Hugging Face datasets, and what is generated."""

import json
import pathlib
import random
import sysconfig
import tokenize
import types

from train.config import TrainError

ASIDE = frozenset(
    "test tests idlelib lib2to3 turtledemo ensurepip pydoc_data site-packages dist-packages".split()
)  # folders of the standard library that are not read
FACT, FILLER = 107, 800  # characters that a fact takes at most, and that a short or a long text has around its facts
ALL = 1850  # characters of a text and what is asked about it, as long as one question remains


def read_documents(source: str, *, field: str) -> list[str]:
    """The documents of one source: see `train.config.Data`.

    Raises: TrainError for what cannot be read, with line and field.
    """
    if source.startswith("hf:"):
        found = _huggingface(source, field)
    elif source == "python-library":
        found = _library()
    elif source.split(":")[0] == "retrieval":
        found = _retrieval(source)
    elif source.endswith((".jsonl", ".ndjson")):
        found = _jsonl(source, field)
    else:
        from infer.texts import load_text

        found = [load_text(source)]
    return [text for text in found if text]


def _jsonl(source, field):
    found = []
    try:
        lines = pathlib.Path(source).read_bytes().splitlines()
    except OSError as error:
        raise TrainError(f"{source} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise TrainError(f"{source} line {number} is not JSON in UTF-8: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get(field), str):
            raise TrainError(f"{source} line {number} has no text in field {field!r}; set --data.field")
        found.append(value[field])
    return found


def _huggingface(source, field):
    parts = source.split(":")[1:]
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise TrainError(f"{source!r} is not hf:ID:SPLIT or hf:ID:CONFIG:SPLIT, such as hf:owner/name:train")
    try:
        import datasets
    except ImportError as error:
        raise TrainError(
            f"{source} needs the package datasets, which is not installed: pip install datasets"
        ) from error
    try:
        rows = datasets.load_dataset(parts[0], *parts[1:-1], split=parts[-1])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TrainError(f"{source} cannot be loaded: {error}") from error
    if field not in rows.column_names:
        raise TrainError(f"{source} has no field {field!r}; it has {', '.join(rows.column_names)}; set --data.field")
    return list(rows[field])


def _library() -> list[str]:
    """The modules of the standard library of the Python that runs, without its tests and tools."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    found = []
    for path in files:
        if not ASIDE & set(path.parts):
            with tokenize.open(folder / path) as file:  # in the encoding that the module names
                found.append(file.read())
    return found


def _retrieval(source) -> list[str]:
    """Texts as `infer.evaluate.tasks` has them, over the Python reference, each with questions and their answers.

    A third of them are as long as they come. The others have fewer facts and less around them.
    """
    from infer.evaluate.tasks import INTRO, MAGIC_FACTS, TASKS, draw_facts, hide, split_sentences
    from infer.texts import python_reference

    numbers = source.split(":")[1:]
    if len(numbers) not in (1, 2) or not all(n.isdecimal() for n in numbers) or int(numbers[0]) < 1:
        raise TrainError(f"{source!r} is not retrieval:COUNT or retrieval:COUNT:SEED, such as retrieval:8000")
    count, seed = int(numbers[0]), int((*numbers, "0")[1])
    characters = types.SimpleNamespace(encode=list)  # no tokenizer yet: one may be trained on these texts
    sentences, found = split_sentences(python_reference()), []
    for index in range(count):
        rng = random.Random(f"train {seed} {index}")  # no text of an evaluation
        size = 1.0 if index % 3 == 0 else rng.random() ** 2
        facts = draw_facts(rng, "\n", magic=round(size * MAGIC_FACTS))
        room = len(INTRO) + FACT * (1 + len(facts.magic)) + round(size * rng.random() * FILLER)
        text = hide(facts, rng, sentences, INTRO, characters, room)
        asked = [TASKS["magic"].ask(facts, i) for i in range(len(facts.magic))] + [TASKS["passkey"].ask(facts, 0)]
        rng.shuffle(asked)
        for number, q in enumerate(asked):
            more = q.question + q.prefix + q.answer
            text += more if not number or len(text + more) <= ALL else ""
        found.append(text)
    return found
