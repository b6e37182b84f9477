"""Every cache at every budget against the full cache of the same model on the same tokens.

    excerpts   [context | next + 1]     one prefill under Full(observe=...)  ─┬─ compress ─ decode `next` given tokens
                                                                              ├─ compress ─ decode ...
    samples    [context] + questions    one prefill per context              ─┬─ compress ─ copy ─ ask, copy ─ ask, ...
                                                                              └─ ...

What is compiled: per cache and budget one decode loop and three one-layer functions; limits are data, slots are shapes.
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from infer.evaluate import metrics
from infer.evaluate.material import draw_contexts, draw_excerpts, encode_question
from infer.evaluate.tasks import encode_context
from infer.prefill import new_state, read
from infer.replay import repeat_prompt
from jaxkv import decoder
from jaxkv.cache import compress, decode, extend
from jaxkv.cache.budgets import Plan, parse_budget, plan
from jaxkv.cache.state import wants_balance
from jaxkv.policies import Full, Policy, Random
from jaxkv.presets import Preset, make_preset

COMPRESS_THEN_ASK = "compress then ask"  # the cache shrinks before the question is known
ASK_WITH_CONTEXT = "ask with context"  # the question is read before the cache shrinks
PROTOCOLS = (COMPRESS_THEN_ASK, ASK_WITH_CONTEXT)
QUESTION_GRID = 16  # questions are padded to a multiple of this
TOGETHER = 16  # contexts that are in memory at a time

MEANS = ("kl_mean", "kl_p99", "top1", "perplexity", "bits_per_byte")  # over seeds

Progress = Callable[[int, int, str], None]


class Interrupted(KeyboardInterrupt):
    """A KeyboardInterrupt after some rows were measured. rows: those, as `evaluate` returns them, marked `partial`."""

    def __init__(self, rows: list[dict[str, Any]]):
        super().__init__(f"interrupted; {len(rows)} rows were measured, in part or whole")
        self.rows = rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Case:
    """A row to measure. budget None: the full cache."""

    preset: Preset
    budget: str | None

    def drawn(self, seed: int) -> Preset:
        """The cache under this seed: random eviction draws anew under each."""
        return make_preset(self.preset, seed=seed) if isinstance(self.preset.policy, Random) else self.preset

    @property
    def label(self) -> str:
        return f"{self.preset.name} {self.budget or '100%'}"


MAPPINGS = 30_000  # of the 65,530 that Linux gives a process


def spare_mappings() -> bool:
    """Forgets compiled programs if there are very many: each takes mappings of memory, and XLA dies without.

    Returns: whether it did.
    """
    maps = pathlib.Path("/proc/self/maps")
    many = maps.exists() and len(maps.read_bytes().splitlines()) > MAPPINGS
    if many:
        jax.clear_caches()
    return many


class _Steps:
    """Counts the steps of the whole run for the progress callback."""

    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, what: str) -> None:
        self.done += 1
        spare_mappings()
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def evaluate(
    lm: Any,
    *,
    text: str,
    caches: Sequence[str | Policy | Preset],
    budgets: Sequence[str],
    tasks: Sequence[str],
    context: int,
    next_tokens: int,
    scored: int | None = None,
    excerpts: int,
    samples: int | Mapping[str, int] | None,
    samples_file: str | os.PathLike[str] | None = None,
    seeds: Sequence[int] = (0,),
    protocol: str = COMPRESS_THEN_ASK,
    progress: Progress | None = None,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """Measures each cache at each budget; the rows that `infer.evaluate.report` prints, writes and draws.

    Language modelling: after `context` tokens the cache is compressed, then `next_tokens` given tokens go through the
    decode path one by one, evicting as in generation, and each prediction is compared with the full cache's. Questions:
    right iff greedy generation after the question starts with the answer.

    Args:
      lm: has `config`, `params` and `tokenizer` (`encode`, `token_bytes`).
      text: where the excerpts and the filler of the generated tasks come from.
      caches: names of policies, or policies; `full` gives one row, whatever the budgets. budgets: as `jaxkv` spells
        them ("25%", "512", "8MiB"), of context plus what follows.
      tasks: names of `TASKS`; samples: questions per task, or task -> number; None or 0: no questions. samples_file: these
        instead, once.
      context, next_tokens: in tokens. scored: so many of the next tokens, the last ones, count; None = all. excerpts: how
        many under each seed, at least 0 (no language modelling); those of all seeds are in memory together.
      seeds: each draws other excerpts, contexts and facts, and another random eviction.
      protocol: "compress then ask" (the cache shrinks before the question is known), or "ask with context" (it shrinks
        after the question and the answer's prefix but for the prefix's last token; the question continues the prefilled
        context).
      progress: called with (steps done, steps, what was done).
      keep: called with the rows so far, marked `partial`, whenever a case's excerpts or a group of contexts are done.
    Returns: a dict per row, in the order of `caches`, then `budgets`: cache, budget, share (of a full bfloat16 cache), bytes
      (allocated for one row of context plus what follows), tokens (the most that a kv head may hold), kl_mean, kl_interval
      (95 %, over seeds; of a single one over excerpts), kl_by_excerpt, kl_p99, top1, perplexity, bits_per_byte (means over
      seeds), by_seed (metric -> a value for each), spread (metric -> [lowest, highest seed]), seeds, tokens_per_second (all
      rows of the batch), batch, accuracy (task -> share, of all seeds together), accuracy_interval, asked (task -> number),
      answers (task -> whether each was right), protocol, note, partial. What was not measured is None or empty. Excerpts and
      questions are the same ones, in the same order, for every row, so rows can be compared in pairs.
    Raises: ValueError for bad arguments, before anything runs. Interrupted, where something was measured before a
      KeyboardInterrupt: with the rows so far, and of questions those that every row was asked.
    """
    cases = _cases(caches, budgets)
    if protocol not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(map(repr, PROTOCOLS))}")
    for name, value, least in (("context", context, 1), ("next_tokens", next_tokens, 1), ("excerpts", excerpts, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if scored is not None and not 1 <= scored <= next_tokens:
        raise ValueError(f"scored must be from 1 to {next_tokens}, the next tokens, got {scored}")
    if isinstance(samples, int) and samples < 0:
        raise ValueError(f"samples must not be negative, got {samples}")
    seeds = tuple(seeds)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds must be different, at least one, such as [0]; got {list(seeds)}")
    drawn = seeds if samples_file is None else seeds[:1]  # a file has the same questions under every seed
    contexts = [
        (seed, one) for seed in drawn for one in draw_contexts(lm, text, tasks, context, samples, samples_file, seed)
    ]
    of_context, contexts = [seed for seed, _ in contexts], [one for _, one in contexts]
    prompts = [encode_context(lm.tokenizer, one.context) for one in contexts]
    questions = [[encode_question(lm.tokenizer, q) for q in one.questions] for one in contexts]
    asked_lengths = [len(q.ask) + len(q.answer) for group in questions for q in group]
    reserve = max([next_tokens, *asked_lengths])
    longest = max([context, *map(len, prompts)]) + reserve
    if longest > lm.config.max_positions:
        raise ValueError(
            f"{longest} tokens (context {longest - reserve} and {reserve} that follow) exceed the model's"
            f" {lm.config.max_positions} positions; give a smaller context"
        )
    tokens = [draw_excerpts(lm, text, context + next_tokens + 1, excerpts, seed) for seed in seeds if excerpts]
    dtype = str(jax.tree.leaves(lm.params)[0].dtype)
    price = functools.partial(plan, lm.config, dtype=dtype)

    def plans(lengths):
        of = functools.cache(functools.partial(price, lengths=lengths))  # most are the same under every seed
        return {seed: [of(case.drawn(seed), case.budget) for case in cases] for seed in seeds if lengths}

    spans = [context + reserve] * max(excerpts * len(seeds), 0 if contexts else 1)
    lengths = [len(prompt) + reserve for prompt in prompts]
    # All plans are made first: a budget that is impossible must be refused before the minutes of work, not after.
    text_plans, task_plans = plans(spans), plans(lengths)
    first = (text_plans or task_plans)[seeds[0]]
    steps = _Steps(progress, (1 + len(cases)) * (bool(excerpts) + len(contexts)))
    policies = [case.preset.policy for case in cases]
    observe = tuple(dict.fromkeys(policy.watcher for policy in policies if policy.stateful))
    balance = any(wants_balance(layer) for planned in first for layer in planned.spec)
    everything = lambda lengths: price(Full(observe=observe, balance=balance), None, lengths=lengths)

    rows = [_row(case, planned, protocol, seeds) for case, planned in zip(cases, first, strict=True)]
    scores: list[dict[str, list[bool]]] = [{} for _ in cases]

    def told():
        return [row | accuracies(score) for row, score in zip(rows, scores, strict=True)]

    def so_far():
        return [row | {"partial": True} for row in told() if row["accuracy"] or row["batch"]]

    keep = keep or (lambda rows: None)
    try:
        if excerpts:
            bare = price(Full(), None, lengths=spans)
            given = np.concatenate(tokens)
            measured = _language(
                lm, cases, text_plans, bare, given, context, spans, everything(spans), scored or next_tokens, steps
            )
            for row, values in zip(rows, measured, strict=True):
                row.update(values)
                keep(so_far())
        if contexts:
            of_context = [task_plans[seed] for seed in of_context]
            whole = everything(lengths)
            for found in _questions(lm, cases, of_context, prompts, questions, lengths, whole, protocol, steps):
                for score, answers in zip(scores, found, strict=True):
                    for task, right in answers:
                        score.setdefault(task, []).append(right)
                keep(so_far())
    except KeyboardInterrupt:
        if not (found := so_far()):
            raise
        raise Interrupted(found) from None
    return told()


def _cases(caches, budgets) -> list[_Case]:
    if not caches:
        raise ValueError("no caches to evaluate; give at least one, such as 'full'")
    cases = []
    for budget in budgets:
        parse_budget(budget)
    for preset in map(make_preset, caches):
        if isinstance(preset.policy, Full):  # it has one size; a smaller one would not be full
            if not preset.exact:
                raise ValueError(
                    f"cache {preset.name!r} quantizes, and the full policy takes no budget; give it an evicting policy, and a"
                    " budget of all tokens"
                )
            cases.append(_Case(preset=make_preset("full"), budget=None))
        elif not budgets:
            raise ValueError(f"cache {preset.name!r} needs a budget, such as '25%'")
        else:
            cases += [_Case(preset=preset, budget=str(budget)) for budget in budgets]
    if len(set(cases)) != len(cases):
        raise ValueError(f"caches or budgets are repeated: {[case.label for case in cases]}")
    names, watched = {}, {}
    for preset in (case.preset for case in cases):
        policy = preset.policy
        if names.setdefault(preset.name, preset) != preset:
            raise ValueError(f"two different caches are named {preset.name!r}; evaluate them in two runs")
        if watched.setdefault(policy.name, policy.watcher) != policy.watcher:
            raise ValueError(f"two different policies are named {policy.name!r}; evaluate them in two runs")
    return cases


def _row(case: _Case, planned: Plan, protocol: str, seeds: Sequence[int]) -> dict[str, Any]:
    return {
        "cache": case.preset.name,
        "budget": case.budget or "100%",
        "share": float(planned.share),
        "bytes": int(planned.bytes_per_row),
        "tokens": int(planned.tokens.max()),
        "seeds": list(seeds),
        **dict.fromkeys(MEANS),
        "kl_interval": None,
        "kl_by_excerpt": [],
        "by_seed": {},
        "spread": {},
        "tokens_per_second": None,
        "batch": None,
        "accuracy": {},
        "accuracy_interval": {},
        "asked": {},
        "answers": {},
        "protocol": protocol,
        "note": planned.note,
        "partial": False,
    }


def _language(lm, cases, plans, bare, tokens, context, spans, full, scored, steps) -> Iterator[dict[str, Any]]:
    """Teacher-forced decoding of what follows each excerpt's context: what it says of each case, one after the other."""
    prompt, given, targets = tokens[:, :context], tokens[:, context:-1], tokens[:, context + 1 :]
    state = new_state(lm.config, full, spans)
    _, state = read(lm.params, prompt.tolist(), state, config=lm.config, repeat=repeat_prompt(lm.tokenizer))
    jax.block_until_ready(state)
    steps("excerpts read")
    lengths = np.asarray([len(piece) for piece in lm.tokenizer.token_bytes()])[targets.T]
    given, targets = jnp.asarray(given.T), jnp.asarray(targets.T)  # [N, B]
    of_seeds = np.split(np.arange(len(tokens)), len(plans))  # the excerpts of each

    def run(planned: Plan):
        small = compress(state, planned.spec, **planned.sizes())
        loop = _forced.lower(lm.params, given, small, config=lm.config).compile()
        jax.block_until_ready(small)
        begin = time.perf_counter()
        hidden, _, small = loop(lm.params, given, small)
        jax.block_until_ready(small)
        return hidden, given.size / (time.perf_counter() - begin)

    reference = run(bare)
    for index, case in enumerate(cases):
        if isinstance(case.preset.policy, Full):
            hidden, speed = reference
        elif isinstance(case.preset.policy, Random):
            runs = [run(planned[index]) for planned in plans.values()]
            own = [hidden[:, mine] for (hidden, _), mine in zip(runs, of_seeds, strict=True)]
            hidden, speed = jnp.concatenate(own, axis=1), float(np.mean([speed for _, speed in runs]))
        else:
            hidden, speed = run(next(iter(plans.values()))[index])
        kl, same, nll = map(np.asarray, _compare(lm.params, reference[0], hidden, targets, config=lm.config))
        scores = [_of_seed(*(x[-scored:, mine] for x in (kl, same, nll, lengths))) for mine in of_seeds]
        steps(f"{case.label}: excerpts")
        yield _over_seeds(scores, kl[-scored:].mean(axis=0, dtype=np.float64)) | {
            "tokens_per_second": speed,
            "batch": len(tokens),
        }


def _of_seed(kl, same, nll, lengths) -> dict[str, float | None]:
    """`MEANS` of the excerpts of one seed, arrays [N, B]; lengths: of the tokens, in bytes."""
    return {
        "kl_mean": float(kl.mean(dtype=np.float64)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1": float(same.mean()),
        "perplexity": float(np.exp(nll.mean(dtype=np.float64))),
        "bits_per_byte": metrics.bits_per_byte(nll, lengths.sum()) if lengths.any() else None,
    }


def _over_seeds(of_seeds: Sequence[dict[str, float | None]], by_excerpt: np.ndarray) -> dict[str, Any]:
    """Means, spreads and the interval of KL; tokens of one excerpt are not independent, nor are excerpts of one text."""
    by_seed = {name: [one[name] for one in of_seeds] for name in MEANS}
    by_seed = {name: values for name, values in by_seed.items() if None not in values}
    _, interval = metrics.mean_interval(by_seed["kl_mean"] if len(of_seeds) > 1 else by_excerpt)
    return {
        **{name: float(np.mean(values)) for name, values in by_seed.items()},
        "kl_interval": None if interval is None else list(interval),
        "kl_by_excerpt": by_excerpt.tolist(),
        "by_seed": by_seed,
        "spread": {name: [min(values), max(values)] for name, values in by_seed.items()},
    }


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("state",))
def _forced(params, tokens, state, *, config):
    """Decodes the given tokens [N, B]; hidden [N, B, D], the most likely next tokens [N, B], the state.

    The head and the argmax are part of the loop so that its time is that of greedy generation.
    """
    valid = jnp.ones(tokens.shape[1:], bool)

    def step(state, token):
        hidden, state = decode(params, token, state, config=config, valid=valid)
        best = decoder.logits(params, hidden, config=config).argmax(axis=-1).astype(jnp.int32)
        return state, (hidden, best)

    state, (hidden, best) = jax.lax.scan(step, state, tokens)
    return hidden, best, state


@functools.partial(jax.jit, static_argnames=("config",))
def _compare(params, full, hidden, targets, *, config):
    """KL(full || this), equal most likely token, and nll of `targets` [N, B]; hidden states are [N, B, D]."""

    def step(one):
        ours = decoder.logits(params, one[1], config=config)
        theirs = decoder.logits(params, one[0], config=config)
        return metrics.kl(theirs, ours), metrics.agree(theirs, ours), metrics.nll(ours, one[2])

    return jax.lax.map(step, (full, hidden, targets))


def _questions(lm, cases, plans, prompts, questions, lengths, full, protocol, steps) -> Iterator[list]:
    """For each group of contexts, per case: (task, whether it was answered right) of its questions. plans: of each context, a
    plan per case.

    Each case answers all of a group, so that its programs are made once for them. Whatever interrupts it, all cases have the
    same questions.
    """
    everything = [q for group in questions for q in group]
    width = -(-max(len(q.ask) for q in everything) // QUESTION_GRID) * QUESTION_GRID

    def read_one(index):
        state = new_state(lm.config, full, [lengths[index]], row=index)
        _, state = read(lm.params, [prompts[index]], state, config=lm.config, repeat=repeat_prompt(lm.tokenizer))
        jax.block_until_ready(state)
        steps(f"context {index + 1} of {len(prompts)} read")
        return state

    def rights(state, planned, index):
        shrink = lambda state: compress(state, planned.spec, **planned.sizes(index))
        if protocol == COMPRESS_THEN_ASK:
            small = shrink(state)
            return [_answers(lm, q.ask, q.answer, width, _copy(small)) for q in questions[index]]
        found = []
        for q in questions[index]:
            seen = _copy(state)
            if q.ask[:-1]:
                _, seen = _extend_padded(lm, q.ask[:-1], width, seen)
            found.append(_answers(lm, q.ask[-1:], q.answer, 1, shrink(seen)))
        return found

    for begin in range(0, len(prompts), TOGETHER):
        group = range(begin, min(begin + TOGETHER, len(prompts)))
        states, found = [read_one(index) for index in group], []
        for k, case in enumerate(cases):
            found.append([])
            for index, state in zip(group, states, strict=True):
                tasks = [q.task for q in questions[index]]
                found[-1] += zip(tasks, rights(state, plans[index][k], index), strict=True)
                steps(f"{case.label}: context {index + 1} of {len(prompts)}")
        yield found


def _copy(state):
    """`extend` donates its state."""
    return jax.tree.map(jnp.copy, state)


def _extend_padded(lm, ids, width, state):
    tokens = np.zeros((1, width), np.int32)
    tokens[0, : len(ids)] = ids
    valid = jnp.asarray(np.arange(width)[None] < len(ids))
    return extend(lm.params, jnp.asarray(tokens), state, config=lm.config, valid=valid)


def _answers(lm, ask, answer, width, state) -> bool:
    """Whether greedy generation after `ask` starts with the answer. Consumes the state.

    The answer's tokens go in one by one, as in generation: what reading the question evicts, they do not see.
    """
    hidden, state = _extend_padded(lm, ask, width, state)
    for index, token in enumerate(answer):
        last = jnp.asarray(len(ask) - 1 if index == 0 else 0, jnp.int32)
        if int(_most_likely(lm.params, hidden, last, config=lm.config)) != token:
            return False
        if index + 1 < len(answer):
            hidden, state = extend(lm.params, jnp.asarray([[token]], jnp.int32), state, config=lm.config)
    return True


@functools.partial(jax.jit, static_argnames=("config",))
def _most_likely(params, hidden, at, *, config):
    """The most likely next token after position `at` of hidden [1, T, D]."""
    return decoder.logits(params, jnp.take(hidden[0], at, axis=0), config=config).argmax()


def accuracies(answers: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, Any]]:
    """What a row says of its questions; answers: task -> whether each was right."""
    return {
        "accuracy": {task: sum(right) / len(right) for task, right in answers.items()},
        "accuracy_interval": {task: list(metrics.wilson(sum(right), len(right))) for task, right in answers.items()},
        "asked": {task: len(right) for task, right in answers.items()},
        "answers": {task: list(right) for task, right in answers.items()},
    }
