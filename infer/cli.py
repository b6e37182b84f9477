"""The `jaxkv` command: generate, chat, evaluate, info."""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import sys


class Refused(Exception):
    """Bad input: one line for the user, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns: the exit code; 2 for bad input, 130 after Ctrl-C before anything came out."""
    arguments = _parser().parse_args(argv)
    from jaxkv.checkpoints import CheckpointError

    try:
        return arguments.run(arguments)
    except (Refused, CheckpointError, ValueError, MemoryError, OSError) as error:
        print(f"jaxkv: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\njaxkv: interrupted", file=sys.stderr)
        return 130


def _parser():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="jaxkv", description=__doc__, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"jaxkv {importlib.metadata.version('jaxkv')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name, run, text):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        sub.set_defaults(run=run)
        group = sub.add_argument_group("model")
        group.add_argument("--model", default="smollm2", help="name, directory, .gguf file or Hugging Face id")
        group.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and cache")
        group.add_argument("--revision", help="of a Hugging Face id")
        group.add_argument("--token", help="for a Hugging Face id")
        group.add_argument("--offline", action="store_true", help="use only what the hub's cache folder holds")
        sub.add_argument("--compilation-cache", default=_cache_folder(), help="folder of compiled programs; '' = none")
        sub.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
        return sub

    sub = command("generate", _generate, "complete a prompt, or a file of prompts")
    sub.add_argument("prompt", nargs="?", help="the prompt; '-' or nothing = standard input")
    sub.add_argument("--file", help="read the prompt from this file")
    sub.add_argument(
        "--jsonl", help='file of lines {"prompt": ...}, one result line each; a bad line spoils only itself'
    )
    sub.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    sub.add_argument("--json", action="store_true", help="print a JSON object instead of text")
    sub.add_argument("--samples", type=int, default=1, help="completions per prompt")
    sub.add_argument("--logprobs", action="store_true", help="with --json: log probabilities of the chosen tokens")
    sub.add_argument("--output", help="write to this file instead of standard output")
    _generation_options(sub)
    sub = command("chat", _chat, "talk to the model over one budgeted cache")
    sub.add_argument("--document", help="a text file to read before the first question")
    sub.add_argument("--max-tokens", type=int, help="planned length of the conversation; default: the model's window")
    _generation_options(sub)
    sub = command("evaluate", _evaluate, "compare caches with the full cache on the same text")
    sub.add_argument("--text", required=True, help="a UTF-8 text file, also the filler of the tasks")
    sub.add_argument("--caches", default="full,scissorhands,h2o,recency,random", help="policies, with commas")
    sub.add_argument("--budgets", default="100%,50%,25%,12.5%", help="budgets, with commas")
    sub.add_argument("--tasks", default="passkey,magic", help="generated tasks, with commas; '' = none")
    sub.add_argument("--context", type=int, default=1900, help="tokens read before the comparison")
    sub.add_argument("--next", type=int, default=128, help="teacher-forced tokens compared after the context")
    sub.add_argument("--excerpts", type=int, default=4, help="excerpts of the text")
    sub.add_argument("--samples", type=int, default=20, help="questions per task")
    sub.add_argument("--samples-file", help="ask these samples instead of generated ones")
    sub.add_argument("--protocol", default="compress then ask", choices=("compress then ask", "ask with context"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--json", help="write the rows to this file")
    sub.add_argument("--plot", help="write the picture of quality against bytes to this PNG file")
    sub = command("info", _info, "what a model is and what its cache costs")
    sub.add_argument("--json", action="store_true")
    return parser


def _generation_options(sub):
    from jaxkv.policies import POLICIES

    sub.add_argument("--cache", default="full", help=f"policy: {', '.join(POLICIES)}")
    sub.add_argument("--budget", help="tokens per kv head and layer (512), bytes (64MiB) or a share (20%%)")
    sub.add_argument("--max-new-tokens", type=int, default=128)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    sub.add_argument("--top-k", type=int, default=0, help="0 = off")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--min-p", type=float, default=0.0)
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stop", action="append", help="text that ends the completion; may be given several times")
    sub.add_argument("--streaming", action="store_true", help="allow positions past the model's window")


def _cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or str(pathlib.Path.home() / ".cache")
    return str(pathlib.Path(base) / "jaxkv" / "compiled")


def _load(arguments):
    import infer

    if arguments.compilation_cache:
        import jax

        jax.config.update("jax_compilation_cache_dir", arguments.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    bar = _Bar(arguments, "loading", "B")
    lm = infer.load(
        arguments.model, dtype=arguments.dtype, revision=arguments.revision, token=arguments.token,
        offline=arguments.offline, progress=lambda done, total, name: bar(done, total),
    )  # fmt: skip
    bar.close()
    return lm


class _Bar:
    """A progress bar on standard error, if that is a terminal."""

    def __init__(self, arguments, text, unit):
        self._on, self._text, self._unit, self._bar = not arguments.quiet and sys.stderr.isatty(), text, unit, None

    def __call__(self, done, total):
        if not self._on:
            return
        if self._bar is None:
            import tqdm

            self._bar = tqdm.tqdm(total=total, desc=self._text, unit=self._unit, unit_scale=True, leave=False)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self.close()

    def close(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _sampling(arguments):
    from infer.sampling import Sampling

    return Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p, min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty, seed=arguments.seed,
    )  # fmt: skip


def _options(arguments) -> dict:
    return dict(
        max_new_tokens=arguments.max_new_tokens, cache=arguments.cache, budget=arguments.budget,
        sampling=_sampling(arguments), stop=arguments.stop, streaming=arguments.streaming,
    )  # fmt: skip


def _check_early(arguments):
    """What can be refused before a model is loaded."""
    from jaxkv.cache.budgets import parse_budget
    from jaxkv.policies import make_policy

    make_policy(arguments.cache)
    parse_budget(arguments.budget)
    _sampling(arguments)
    if arguments.max_new_tokens < 1:
        raise Refused(f"--max-new-tokens must be at least 1, got {arguments.max_new_tokens}")


def _read_text(path) -> str:
    data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise Refused(f"{name} is not UTF-8: byte {error.start} cannot be read; convert it to UTF-8") from error


def _writable(path):
    parent = pathlib.Path(path).absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK) or pathlib.Path(path).is_dir():
        raise Refused(f"cannot write {path}: {parent} must be an existing, writable folder and the target a file")


def _generate(arguments) -> int:
    _check_early(arguments)
    if sum(x is not None for x in (arguments.prompt, arguments.file, arguments.jsonl)) > 1:
        raise Refused("give one of: a prompt, --file, --jsonl")
    if arguments.output:
        _writable(arguments.output)
    if arguments.jsonl:
        return _batch(arguments)
    if arguments.prompt is not None and arguments.prompt != "-":
        try:
            prompt = arguments.prompt.encode("utf-8").decode("utf-8")
        except UnicodeEncodeError as error:
            raise Refused("the prompt is not UTF-8; convert it to UTF-8") from error
    else:
        prompt = _read_text(arguments.file or "-")
    if not prompt:
        raise Refused("the prompt is empty; give at least one character")
    lm = _load(arguments)
    if arguments.chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = lm.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    bar = _Bar(arguments, "reading", "layer")
    plan = lm.plan(arguments.cache, arguments.budget, lengths=[len(lm.encode(prompt)) + arguments.max_new_tokens])
    _note(arguments, plan.describe())
    if arguments.json or arguments.samples > 1 or arguments.output:
        out = lm.generate(
            prompt, samples=arguments.samples, logprobs=arguments.logprobs, progress=bar, **_options(arguments)
        )
        rows = [dataclasses.asdict(c) for c in out]
        text = json.dumps(rows[0] if len(rows) == 1 else rows, ensure_ascii=False) if arguments.json else None
        _write(arguments.output, (text or "\n\n".join(c.text for c in out)) + "\n")
        return 0
    try:
        for piece in lm.stream(prompt, progress=bar, **_options(arguments)):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        _note(arguments, "interrupted")
    print()
    return 0


def _write(path, text):
    if not path:
        sys.stdout.write(text)
        return
    temporary = pathlib.Path(str(path) + ".partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _batch(arguments) -> int:
    """JSONL in, JSONL out: a bad line gives an error line, and the rest goes on."""
    lines = _read_text(arguments.jsonl).splitlines()
    lm = _load(arguments)
    results, bad = [], 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), (str, list)):
                raise ValueError('a line must be an object with "prompt": a string or a list of token ids')
            if not record["prompt"]:
                raise ValueError("the prompt is empty")
            out = lm.generate([record["prompt"]], samples=arguments.samples, logprobs=arguments.logprobs,
                              **_options(arguments))  # fmt: skip
            result = {**record, "completions": [dataclasses.asdict(c) for c in out]}
        except ValueError as error:
            result, bad = {"line": number, "error": str(error)}, bad + 1
        results.append(json.dumps(result, ensure_ascii=False))
        if not arguments.output:
            print(results[-1], flush=True)
    if arguments.output:
        _write(arguments.output, "".join(line + "\n" for line in results))
    if bad:
        print(f"jaxkv: {bad} of {len(results)} lines were refused", file=sys.stderr)
    return 2 if bad and bad == len(results) else 0


def _chat(arguments) -> int:
    _check_early(arguments)
    document = _read_text(arguments.document) if arguments.document else None
    lm = _load(arguments)
    session = lm.session(cache=arguments.cache, budget=arguments.budget, max_tokens=arguments.max_tokens)
    _note(arguments, session.plan.describe())
    if document:
        session.extend(document, progress=_Bar(arguments, "reading", "layer"))
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not question.strip():
            continue
        try:
            for piece in session.stream(
                question, max_new_tokens=arguments.max_new_tokens, sampling=_sampling(arguments)
            ):
                if isinstance(piece, str):
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print("\n(interrupted; the conversation ends here)")
            return 0
        print()


def _evaluate(arguments) -> int:
    from infer.evaluate import report
    from infer.evaluate.run import evaluate

    split = lambda text: [part.strip() for part in text.split(",") if part.strip()]
    for path in (arguments.json, arguments.plot):
        if path:
            _writable(path)
    text = _read_text(arguments.text)
    lm = _load(arguments)
    bar = _Bar(arguments, "evaluating", "step")
    rows = evaluate(
        lm, text=text, caches=split(arguments.caches), budgets=split(arguments.budgets), tasks=split(arguments.tasks),
        context=arguments.context, next_tokens=arguments.next, excerpts=arguments.excerpts, samples=arguments.samples,
        samples_file=arguments.samples_file, seed=arguments.seed, protocol=arguments.protocol,
        progress=lambda done, total, what: bar(done, total),
    )  # fmt: skip
    print(report.table(rows))
    if arguments.json:
        report.write_json(rows, arguments.json)
    if arguments.plot:
        report.write_picture(rows, arguments.plot)
        _note(arguments, f"picture: {arguments.plot}")
    return 0


def _info(arguments) -> int:
    import jax

    from jaxkv.cache.budgets import format_bytes, plan
    from jaxkv.checkpoints import read_config
    from jaxkv.decoder import init_params
    from jaxkv.policies import POLICIES
    from pallas_kernels import decode_attention, extend_attention

    config = read_config(arguments.model, revision=arguments.revision, token=arguments.token, offline=arguments.offline)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    parameters = sum(x.size for x in jax.tree.leaves(shapes))
    costs = {
        name: plan(config, policy(), None, lengths=[1000], dtype=arguments.dtype).bytes_per_row
        for name, policy in POLICIES.items()
    }
    facts = {
        "model": arguments.model,
        "model_type": config.model_type,
        "parameters": parameters,
        "layers": config.num_layers,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "vocabulary": config.vocab_size,
        "window": config.max_positions,
        "cache_bytes_per_1000_tokens": costs,
        "device": f"{jax.devices()[0].platform}: {jax.devices()[0].device_kind}",
        "versions": {name: importlib.metadata.version(name) for name in ("jaxkv", "jax", "jaxlib", "flax", "numpy")},
        "implementations": {
            op: next(iter(module.IMPLEMENTATIONS))
            for op, module in (("decode_attention", decode_attention), ("extend_attention", extend_attention))
        },
    }
    if arguments.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        if name == "cache_bytes_per_1000_tokens":
            print("cache bytes per 1,000 tokens, all counted:")
            for policy, size in value.items():
                print(f"  {policy:24} {size:12,}  ({format_bytes(size)})")
        elif isinstance(value, dict):
            print(f"{name:12} " + ", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            print(f"{name:12} {value:,}" if isinstance(value, int) else f"{name:12} {value}")
    return 0


def _note(arguments, text):
    if not arguments.quiet:
        print(text, file=sys.stderr)
