"""`jaxkv generate`: a prompt, or a file of prompts."""

import dataclasses
import json
import sys

from infer.commands.options import check_early, generation_options, load, options, running_options
from infer.console import Bar, Refused, check_utf8, note, read_text, to_json, whole, writable, write


def add_options(sub):
    """Declares the options."""
    sub.add_argument("prompt", nargs="?", help="the prompt; '-' or nothing = standard input")
    sub.add_argument("--file", help="read the prompt from this file")
    sub.add_argument(
        "--jsonl", help='file of lines {"prompt": ...}, one result line each; a bad line spoils only itself'
    )
    sub.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    sub.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    sub.add_argument("--samples", type=whole(1), default=1, help="completions per prompt")
    sub.add_argument("--logprobs", action="store_true", help="with --json or --jsonl: log probabilities of the tokens")
    sub.add_argument("--output", help="write to this file instead of standard output")
    running_options(sub)
    generation_options(sub)


def run(arguments) -> int:
    """Runs the subcommand. Returns: the exit code."""
    check_early(arguments)
    if sum(x is not None for x in (arguments.prompt, arguments.file, arguments.jsonl)) > 1:
        raise Refused("give one of: a prompt, --file, --jsonl")
    if arguments.logprobs and not arguments.json and arguments.jsonl is None:
        raise Refused("--logprobs needs --json or --jsonl")
    output = writable(arguments.output)
    if arguments.jsonl is not None:
        return _batch(arguments, output)
    if arguments.prompt not in (None, "-"):
        prompt = check_utf8(arguments.prompt, "the prompt")
    elif arguments.prompt is None and arguments.file is not None:
        prompt = read_text(arguments.file)
    else:
        if sys.stdin.isatty():
            note(arguments, "type the prompt; Ctrl-D on a line of its own ends it")
        prompt = read_text("-")
    if not prompt:
        raise Refused("the prompt is empty; give at least one character")
    lm = load(arguments)
    prompt = _with_template(arguments, lm, prompt)
    plan = lm.plan(arguments.cache, arguments.budget, lengths=[len(lm.encode(prompt)) + arguments.max_new_tokens])
    note(arguments, plan.describe())
    if arguments.json or arguments.samples > 1 or output:
        with Bar(arguments, "reading", "layer") as bar:
            out = lm.generate(
                prompt, samples=arguments.samples, logprobs=arguments.logprobs, progress=bar, **options(arguments)
            )
        rows = [dataclasses.asdict(c) for c in out]
        text = to_json(rows[0] if len(rows) == 1 else rows) if arguments.json else "\n\n".join(c.text for c in out)
        write(output, text + "\n")
    else:
        _stream(arguments, lm, prompt)
    if arguments.signals:
        note(arguments, "interrupted")
    return 0


def _with_template(arguments, lm, prompt):
    if not arguments.chat:
        return prompt
    if not isinstance(prompt, str) or lm.tokenizer is None:
        raise Refused("--chat takes a prompt that is text, and a model with a tokenizer")
    return lm.tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)


def _stream(arguments, lm, prompt):
    shown, stats = False, {}
    try:
        with Bar(arguments, "reading", "layer") as bar:
            for piece in lm.stream(prompt, progress=bar, stats=stats, **options(arguments)):
                print(piece, end="", flush=True)
                shown = True
    except KeyboardInterrupt:
        if not shown:
            raise
    print()
    if stats:
        speed = f", {stats['tokens_per_second']:.1f} tokens/s" if stats["tokens_per_second"] else ""
        note(arguments, f"{stats['new_tokens']} tokens, cache {stats['cache_bytes']:,} bytes{speed}")


def _batch(arguments, output) -> int:
    """JSONL in, JSONL out: a bad line gives an error line, and the rest goes on."""
    text = read_text(arguments.jsonl).removeprefix("\ufeff")
    lm = load(arguments, text=False)
    results, bad = [], 0
    try:
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a string too
            if not line.strip() or arguments.signals:
                continue
            try:
                result = to_json(_complete(arguments, lm, line))
            except (Refused, ValueError, MemoryError, RecursionError) as error:
                result, bad = to_json({"line": number, "error": str(error)}), bad + 1
            results.append(result)
            if output is None:
                print(result, flush=True)
    except KeyboardInterrupt:
        if not results:
            raise
    if output is not None:
        write(output, "".join(line + "\n" for line in results))
    if bad:
        print(f"jaxkv: {bad} of {len(results)} lines were refused", file=sys.stderr)
    if arguments.signals:
        note(arguments, f"interrupted after {len(results)} lines")
        return 128 + arguments.signals[-1]
    return 2 if bad and bad == len(results) else 0


def _complete(arguments, lm, line: str) -> dict:
    record = json.loads(line)
    prompt = record.get("prompt") if isinstance(record, dict) else None
    if not isinstance(prompt, (str, list)):
        raise Refused('a line must be an object with "prompt": a string or a list of token ids')
    if not prompt:
        raise Refused("the prompt is empty")
    if isinstance(prompt, str):
        check_utf8(prompt, "the prompt")
    prompt = _with_template(arguments, lm, prompt)
    with Bar(arguments, "reading", "layer") as bar:
        out = lm.generate(
            [prompt], samples=arguments.samples, logprobs=arguments.logprobs, progress=bar, **options(arguments)
        )
    return {**record, "completions": [dataclasses.asdict(c) for c in out]}
