"""What an evaluation reads: excerpts of a text, contexts with questions, all as token ids."""

import dataclasses
import random

import numpy as np

from infer.evaluate.tasks import TASKS, Context, encode_context, load_samples, make_samples


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A question as ids: `ask` ends with the prefix."""

    task: str
    ask: list[int]
    answer: list[int]


def draw_contexts(lm, text, tasks, context, samples, samples_file, seed) -> list[Context]:
    """Generated or given contexts with their questions; the arguments are those of `evaluate`."""
    if samples_file is not None:
        return load_samples(samples_file)
    unknown = [name for name in tasks if name not in TASKS]
    if unknown:
        raise ValueError(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    if not tasks or not samples:
        return []
    return make_samples(tasks, filler=text, tokenizer=lm.tokenizer, context_tokens=context, samples=samples, seed=seed)


def encode_question(tokenizer, question) -> Asked:
    """The three parts are tokenized apart, so that the answer's tokens do not depend on what precedes them."""
    asked, answer = (
        [*tokenizer.encode(question.question), *tokenizer.encode(question.prefix)],
        list(tokenizer.encode(question.answer)),
    )
    if not answer or not asked:
        raise ValueError(
            f"task {question.task!r}: a question and an answer need at least one token each, got {question}"
        )
    return Asked(task=question.task, ask=asked, answer=answer)


def draw_excerpts(lm, text, size, count, seed) -> np.ndarray:
    """[count, size] token ids: evenly spread, each shifted at random inside its part of the text."""
    start = encode_context(lm.tokenizer, "")  # a bos token, if the model wants one
    ids = list(lm.tokenizer.encode(text))
    part, body = len(ids) // count, size - len(start)
    if part < body:
        raise ValueError(
            f"the text has {len(ids)} tokens; {count} excerpts of {body} (context, next tokens and one to predict) need"
            f" {count * body}; give a longer text, fewer excerpts or a smaller context"
        )
    rng = random.Random(f"jaxkv excerpts {seed}")
    starts = [i * part + rng.randint(0, part - body) for i in range(count)]
    return np.asarray([[*start, *ids[at : at + body]] for at in starts], np.int32)
