"""The main job end to end: a real model reads a long text and answers from a fraction of its cache.

python -m infer.demo [--text FILE] [--budget 25%] [--context 1000] [--picture jaxkv-demo.png]
"""

import argparse
import pathlib
import sys
import time

import infer
from infer import generate as generation
from infer.evaluate import report
from infer.evaluate.run import evaluate
from infer.evaluate.tasks import encode_context, make_samples
from infer.prefill import new_state, read
from infer.sampling import Sampling
from infer.texts import python_reference

CACHES = ["full", "scissorhands", "h2o", "recency", "random"]


def main() -> int:
    """Runs the demo. Returns: the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--text", help="a UTF-8 text file; default: the Python language reference")
    parser.add_argument("--budget", default="25%")
    parser.add_argument("--context", type=int, default=1000, help="tokens of text in front of each question")
    parser.add_argument("--questions", type=int, default=21)
    parser.add_argument("--picture", default="jaxkv-demo.png")
    arguments = parser.parse_args()
    started = time.perf_counter()
    text = pathlib.Path(arguments.text).read_text(encoding="utf-8") if arguments.text else python_reference()
    print(f"Loading {arguments.model} ...", flush=True)
    lm = infer.load(arguments.model)
    print("\n1. The model continues a text (greedy, full cache):\n")
    prompt = "The history of computing begins"
    out = lm.generate(prompt, max_new_tokens=40)[0]
    print(f"   {prompt}{out.text!s}\n   [{out.stats['cache']}]\n", flush=True)
    print("2. One worked example: a fact hidden in a long text, asked for after the cache was cut.\n", flush=True)
    sample = make_samples(
        ["magic"], filler=text, tokenizer=lm.tokenizer, context_tokens=arguments.context, samples=1, seed=7
    )[0]
    _worked_example(lm, sample, arguments.budget)
    print(
        f"3. {arguments.questions} questions, each about a number hidden somewhere in {arguments.context} tokens; the cache is"
        " cut to the budget\n   before the question is known. KL, top-1 and bits per byte: the next tokens of the real text"
        " against the full cache.\n",
        flush=True,
    )
    rows = evaluate(
        lm, text=text, caches=CACHES, budgets=[arguments.budget], tasks=["magic"], context=arguments.context,
        next_tokens=64, excerpts=2, samples=arguments.questions,
        progress=lambda done, total, what: print(f"\r   {done}/{total} {what:50}", end="", file=sys.stderr, flush=True),
    )  # fmt: skip
    print("\r" + " " * 70, file=sys.stderr)
    print(report.table(rows))
    report.write_picture(rows, arguments.picture, title=f"{arguments.model}: quality against cache size")
    print(f"\nPicture: {pathlib.Path(arguments.picture).resolve()}")
    print(f"Done in {time.perf_counter() - started:.0f} s.")
    return 0


def _worked_example(lm, sample, budget):
    question = sample.questions[0]
    context = encode_context(lm.tokenizer, sample.context)
    asked = lm.tokenizer.encode(question.question) + lm.tokenizer.encode(question.prefix)
    fact = next((s for s in sample.context.split(". ") if question.answer.strip() in s), "")
    print(f"   hidden:   ...{fact.strip()[-80:]}...   (of {len(context)} tokens)")
    print(f"   asked:    {(question.question + question.prefix)!r}")
    for cache in CACHES:
        plan = lm.plan(cache, None if cache == "full" else budget, lengths=[len(context) + len(asked) + 8])
        state = new_state(lm.config, plan, [len(context) + len(asked) + 8])
        _, state = read(lm.params, [context], state, config=lm.config)
        hidden, state = read(lm.params, [asked], state, config=lm.config)
        request = generation.Request(
            samplings=[Sampling()],
            max_new_tokens=[len(lm.tokenizer.encode(question.answer))],
            stops=lm.request_stops(None),
        )
        pieces = generation.run(lm.params, hidden, state, request, config=lm.config, prompts=[asked])
        made, _, _ = generation.collect(pieces, time.perf_counter())
        answer = lm.decode(made[0].token_ids)
        verdict = "right" if answer == question.answer else f"WRONG, it is {question.answer.strip()}"
        print(f"   {cache:13} {plan.bytes_per_row / 2**20:6.1f} MiB   {answer!r}   {verdict}", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
