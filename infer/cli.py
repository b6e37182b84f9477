"""The `jaxkv` command: generate, chat, evaluate, info, plan."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import io
import json
import os
import pathlib
import signal
import sys
import threading

PLUGINS = "jaxkv.commands"  # entry points: functions (subparsers) that add a subcommand


class Refused(Exception):
    """Bad input: one line for the user, exit code 2."""


def main(argv: list[str] | None = None, *, plugins=None) -> int:
    """Runs the command.

    Args: plugins: functions that add subcommands; None = those of the entry point group "jaxkv.commands".

    Returns: the exit code; 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM if nothing came out or prompts of a
    batch were left, 141 if the reader of standard output went away.
    """
    _open_streams()
    signals = []
    try:
        with _interrupts(signals):
            arguments = _parser(plugins).parse_args(argv)
            arguments.signals = signals
            code = arguments.run(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print("\njaxkv: interrupted", file=sys.stderr)
        return 128 + (signals or [signal.SIGINT])[-1]
    except BrokenPipeError:
        return 141  # as if SIGPIPE had ended it
    except (Refused, ValueError, MemoryError, OverflowError, OSError) as error:
        return _refuse(error)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # how XLA says that memory ran out
            raise
        return _refuse(error)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # what cannot be written now would fail again, with a traceback, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _refuse(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    print("jaxkv: error:", text.replace("\n", " ") or type(error).__name__, file=sys.stderr)
    return 2


def _open_streams():
    """Makes standard streams UTF-8 like the files that are read, whatever the locale; a closed one is as if empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding.lower(), stream.errors) != ("utf-8", errors):
            stream.reconfigure(encoding="utf-8", errors=errors)


@contextlib.contextmanager
def _interrupts(signals: list[int]):
    """SIGINT and SIGTERM raise KeyboardInterrupt and are noted in `signals`, as `generate` returns early on it."""

    def interrupt(number, frame):
        signals.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if main_thread else ()
    before = {n: signal.signal(n, interrupt) for n in numbers if signal.getsignal(n) not in (None, signal.SIG_IGN)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Refused(f"{message}; see {self.prog} --help")


def _whole(least: int):
    """Parses a number of things, `least` or more."""

    def number(text):
        value = int(text)
        if not least <= value < 10**9:  # tokens are counted in int32
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 10**9, got {value}")
        return value

    number.__name__ = "whole number"  # in argparse's message about other text
    return number


def _parser(plugins=None):
    from infer import plan_command
    from infer.texts import TEXTS

    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = _Parser(prog="jaxkv", description=__doc__, formatter_class=formatter)
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
    sub.add_argument("--samples", type=_whole(1), default=1, help="completions per prompt")
    sub.add_argument("--logprobs", action="store_true", help="with --json or --jsonl: log probabilities of the tokens")
    sub.add_argument("--output", help="write to this file instead of standard output")
    _adapter_option(sub)
    _generation_options(sub)
    sub = command("chat", _chat, "talk to the model over one budgeted cache")
    sub.add_argument("--document", help="a text file to read before the first question")
    sub.add_argument("--max-tokens", type=_whole(1), help="planned length of it all; default: the model's window")
    _adapter_option(sub)
    _generation_options(sub)
    sub = command("evaluate", _evaluate, "compare caches with the full cache on the same text")
    _adapter_option(sub)
    sub.add_argument("--text", required=True, help=f"a UTF-8 file or one of {', '.join(TEXTS)}; also fills the tasks")
    sub.add_argument("--caches", default="full,scissorhands,h2o,recency,random", help="caches, with commas")
    sub.add_argument("--budgets", default="100%,50%,25%,12.5%", help="budgets, with commas")
    sub.add_argument("--tasks", default="passkey,magic", help="generated tasks, with commas; '' = none")
    sub.add_argument("--context", type=_whole(1), default=1900, help="tokens read before the comparison")
    sub.add_argument("--next", type=_whole(1), default=128, help="teacher-forced tokens compared after the context")
    sub.add_argument("--excerpts", type=_whole(0), default=4, help="excerpts of the text")
    sub.add_argument("--samples", type=_whole(0), default=20, help="questions per task")
    sub.add_argument("--samples-file", help="ask these samples instead of generated ones")
    sub.add_argument("--protocol", default="compress then ask", choices=("compress then ask", "ask with context"))
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--seeds", type=_whole(1), default=1, help="this many seeds, from --seed on")
    sub.add_argument("--scored", type=_whole(1), help="of the next tokens, the last so many count; default: all")
    sub.add_argument("--json", help="write the rows to this file")
    sub.add_argument(
        "--plot", help="write the picture of quality against bytes to this PNG file; default: beside --json; '' = none"
    )
    sub = command("info", _info, "what a model is and what its cache costs")
    sub.add_argument("--json", action="store_true")
    sub.add_argument("--kernels", action="store_true", help="instead: which kernel runs on which platform, and why not")
    plan_command.add_options(command("plan", plan_command.run, "what a model takes on chips that are not here"), _whole)
    if plugins is None:
        plugins = [entry.load() for entry in importlib.metadata.entry_points(group=PLUGINS)]
    for add_command in plugins:
        add_command(commands)
    return parser


def _adapter_option(sub):
    sub.add_argument("--adapter", help="folder of LoRA adapters to add to the model")


def _generation_options(sub):
    from jaxkv.presets import PRESETS

    sub.add_argument("--cache", default="full", help=f"one of: {', '.join(PRESETS)}")
    sub.add_argument("--budget", help="tokens per kv head and layer (512), bytes (64MiB) or a share (20%%)")
    sub.add_argument("--max-new-tokens", type=_whole(1), default=128)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    sub.add_argument("--top-k", type=_whole(0), default=0, help="0 = off")
    sub.add_argument("--top-p", type=float, default=1.0)
    sub.add_argument("--min-p", type=float, default=0.0)
    sub.add_argument("--repetition-penalty", type=float, default=1.0)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stop", action="append", help="text that ends the completion; may be given several times")
    sub.add_argument("--streaming", action="store_true", help="allow positions past the model's window")


def _cache_folder() -> str:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return "" if base.startswith("~") else os.path.join(base, "jaxkv", "compiled")


def _load(arguments, *, text: bool = True):
    """The model. text: refuse one without a tokenizer."""
    import infer

    if arguments.compilation_cache:
        _keep_compiled(arguments)
    with _Bar(arguments, "loading", "B") as bar:
        lm = infer.load(
            arguments.model, dtype=arguments.dtype, revision=arguments.revision, token=arguments.token,
            offline=arguments.offline, progress=bar, adapter=arguments.adapter,
        )  # fmt: skip
    if text and lm.tokenizer is None:
        raise Refused(f"{arguments.model} has no tokenizer.json; without one only --jsonl with token ids works")
    if lm.generation.ignored:
        _note(arguments, f"not applied, though the model suggests it: {', '.join(lm.generation.ignored)}")
    return lm


def _keep_compiled(arguments):
    import jax

    folder = arguments.compilation_cache
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        _note(arguments, f"--compilation-cache {folder} is not used: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


class _Bar:
    """A progress bar on standard error, if that is a terminal."""

    def __init__(self, arguments, text, unit):
        self._on, self._text, self._unit, self._bar = not arguments.quiet and sys.stderr.isatty(), text, unit, None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __call__(self, done, total, what=None):
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
    from jaxkv.presets import make_preset

    make_preset(arguments.cache)
    parse_budget(arguments.budget)
    _sampling(arguments)
    for text in arguments.stop or ():
        if not _check_utf8(text, "--stop"):
            raise Refused("--stop is empty; give at least one character")


def _check_utf8(text: str, name: str) -> str:
    """Refuses lone surrogates: a command line's bytes that are not UTF-8, or \\ud800 in JSON. Returns: the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"{name} is not UTF-8; convert it to UTF-8") from error
    return text


def _read_text(path) -> str:
    data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise Refused(f"{name} is not UTF-8: byte {error.start} cannot be read; convert it to UTF-8") from error


def _writable(path: str | None) -> pathlib.Path | None:
    """Where a link leads; only regular files are replaced, so that `--output /dev/null` does no harm."""
    if path is None:
        return None
    real = pathlib.Path(os.path.realpath(path))
    if not real.parent.is_dir() or not os.access(real.parent, os.W_OK):
        raise Refused(f"cannot write {path}: {real.parent} must be an existing, writable folder")
    if real.exists() and not (real.is_file() and os.access(real, os.W_OK)):
        raise Refused(f"cannot write {path}: it exists and is not a writable file")
    return real


def _generate(arguments) -> int:
    _check_early(arguments)
    if sum(x is not None for x in (arguments.prompt, arguments.file, arguments.jsonl)) > 1:
        raise Refused("give one of: a prompt, --file, --jsonl")
    if arguments.logprobs and not arguments.json and arguments.jsonl is None:
        raise Refused("--logprobs needs --json or --jsonl")
    output = _writable(arguments.output)
    if arguments.jsonl is not None:
        return _batch(arguments, output)
    if arguments.prompt not in (None, "-"):
        prompt = _check_utf8(arguments.prompt, "the prompt")
    elif arguments.prompt is None and arguments.file is not None:
        prompt = _read_text(arguments.file)
    else:
        if sys.stdin.isatty():
            _note(arguments, "type the prompt; Ctrl-D on a line of its own ends it")
        prompt = _read_text("-")
    if not prompt:
        raise Refused("the prompt is empty; give at least one character")
    lm = _load(arguments)
    prompt = _with_template(arguments, lm, prompt)
    plan = lm.plan(arguments.cache, arguments.budget, lengths=[len(lm.encode(prompt)) + arguments.max_new_tokens])
    _note(arguments, plan.describe())
    if arguments.json or arguments.samples > 1 or output:
        with _Bar(arguments, "reading", "layer") as bar:
            out = lm.generate(
                prompt, samples=arguments.samples, logprobs=arguments.logprobs, progress=bar, **_options(arguments)
            )
        rows = [dataclasses.asdict(c) for c in out]
        text = _json(rows[0] if len(rows) == 1 else rows) if arguments.json else "\n\n".join(c.text for c in out)
        _write(output, text + "\n")
    else:
        _stream(arguments, lm, prompt)
    if arguments.signals:
        _note(arguments, "interrupted")
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
        with _Bar(arguments, "reading", "layer") as bar:
            for piece in lm.stream(prompt, progress=bar, stats=stats, **_options(arguments)):
                print(piece, end="", flush=True)
                shown = True
    except KeyboardInterrupt:
        if not shown:
            raise
    print()
    if stats:
        speed = f", {stats['tokens_per_second']:.1f} tokens/s" if stats["tokens_per_second"] else ""
        _note(arguments, f"{stats['new_tokens']} tokens, cache {stats['cache_bytes']:,} bytes{speed}")


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _write(path: pathlib.Path | None, text: str):
    """Prints, or replaces a file: all of it or nothing."""
    if path is None:
        sys.stdout.write(text)
        return
    from infer.files import replace_file

    replace_file(path, text.encode("utf-8", errors="backslashreplace"))


def _batch(arguments, output) -> int:
    """JSONL in, JSONL out: a bad line gives an error line, and the rest goes on."""
    text = _read_text(arguments.jsonl).removeprefix("\ufeff")
    lm = _load(arguments, text=False)
    results, bad = [], 0
    try:
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a string too
            if not line.strip() or arguments.signals:
                continue
            try:
                result = _json(_complete(arguments, lm, line))
            except (Refused, ValueError, MemoryError, RecursionError) as error:
                result, bad = _json({"line": number, "error": str(error)}), bad + 1
            results.append(result)
            if output is None:
                print(result, flush=True)
    except KeyboardInterrupt:
        if not results:
            raise
    if output is not None:
        _write(output, "".join(line + "\n" for line in results))
    if bad:
        print(f"jaxkv: {bad} of {len(results)} lines were refused", file=sys.stderr)
    if arguments.signals:
        _note(arguments, f"interrupted after {len(results)} lines")
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
        _check_utf8(prompt, "the prompt")
    prompt = _with_template(arguments, lm, prompt)
    with _Bar(arguments, "reading", "layer") as bar:
        out = lm.generate(
            [prompt], samples=arguments.samples, logprobs=arguments.logprobs, progress=bar, **_options(arguments)
        )
    return {**record, "completions": [dataclasses.asdict(c) for c in out]}


def _chat(arguments) -> int:
    _check_early(arguments)
    if arguments.document == "-":
        raise Refused("--document takes a file, because standard input holds the questions")
    document = None if arguments.document is None else _read_text(arguments.document)
    if document == "":
        raise Refused(f"{arguments.document} is empty; leave --document out to talk without one")
    lm = _load(arguments)
    session = lm.session(
        cache=arguments.cache, budget=arguments.budget, max_tokens=arguments.max_tokens, streaming=arguments.streaming
    )
    _note(arguments, session.plan.describe())
    if document:
        with _Bar(arguments, "reading", "layer") as bar:
            session.extend(document, progress=bar)
    options = dict(max_new_tokens=arguments.max_new_tokens, sampling=_sampling(arguments), stop=arguments.stop)
    answered, code = False, 0
    try:
        while True:
            question = input("> " if sys.stdin.isatty() else "")
            if not question.strip():
                continue
            try:
                for piece in session.stream(question, **options):
                    if isinstance(piece, str):
                        print(piece, end="", flush=True)
                        answered = True
                print()
            except ValueError as error:  # too long a question leaves the conversation as it was
                code = _refuse(error)
    except EOFError:
        return code
    except UnicodeDecodeError as error:
        raise Refused("standard input is not UTF-8; convert it to UTF-8") from error
    except KeyboardInterrupt:
        if not answered:
            raise
        print("\n(interrupted; the conversation ends here)")
        return code


def _evaluate(arguments) -> int:
    from infer.evaluate import TASKS, Interrupted, evaluate_seeds, load_samples, report
    from infer.texts import load_text
    from jaxkv.cache.budgets import parse_budget
    from jaxkv.presets import make_preset

    if arguments.plot is None and arguments.json:
        if importlib.util.find_spec("matplotlib"):
            arguments.plot = str(pathlib.Path(arguments.json).with_suffix(".png"))
        else:
            _note(arguments, "no picture will be drawn: matplotlib is not installed (pip install jaxkv[demo])")
    rows_file, picture = _writable(arguments.json), _writable(arguments.plot or None)
    if picture and importlib.util.find_spec("matplotlib") is None:
        raise Refused("--plot needs matplotlib, which is not installed: pip install jaxkv[demo]")
    split = lambda text: [part.strip() for part in text.split(",") if part.strip()]
    caches, budgets, tasks = map(split, (arguments.caches, arguments.budgets, arguments.tasks))
    for names, check in ((caches, make_preset), (budgets, parse_budget)):
        for name in names:
            check(name)
    if unknown := [name for name in tasks if name not in TASKS]:
        raise Refused(f"unknown task {unknown[0]!r}; known: {', '.join(TASKS)}")
    if arguments.samples_file is not None:
        load_samples(arguments.samples_file)
    text = _read_text("-") if arguments.text == "-" else load_text(arguments.text, offline=arguments.offline)
    lm = _load(arguments)
    try:
        with _Bar(arguments, "evaluating", "step") as bar:
            rows = evaluate_seeds(
                lm, text=text, caches=caches, budgets=budgets, tasks=tasks, context=arguments.context,
                next_tokens=arguments.next, excerpts=arguments.excerpts, samples=arguments.samples,
                samples_file=arguments.samples_file, seeds=range(arguments.seed, arguments.seed + arguments.seeds),
                scored=arguments.scored, protocol=arguments.protocol, progress=bar,
            )  # fmt: skip
    except Interrupted as stopped:
        rows = stopped.rows
    print(report.table(rows))
    if rows_file:
        report.write_json(rows, rows_file)
    if arguments.signals:
        _note(arguments, f"interrupted; {len(rows)} rows were measured, in part or whole, and no picture was drawn")
        return 128 + arguments.signals[-1]
    if picture:
        report.write_picture(rows, picture)
        _note(arguments, f"picture: {picture}")
    return 0


def _info(arguments) -> int:
    import jax

    from infer.kernel_table import kernel_rows, kernels_here, table
    from jaxkv.cache.budgets import format_bytes, plan
    from jaxkv.checkpoints import read_config
    from jaxkv.decoder import init_params
    from jaxkv.presets import PRESETS

    config = read_config(arguments.model, revision=arguments.revision, token=arguments.token, offline=arguments.offline)
    if arguments.kernels:
        rows = kernel_rows(config, arguments.dtype)
        print(json.dumps({"model": arguments.model, "kernels": rows}) if arguments.json else table(rows))
        return 0
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    parameters = sum(x.size for x in jax.tree.leaves(shapes))
    costs = {name: plan(config, name, None, lengths=[1000], dtype=arguments.dtype).bytes_per_row for name in PRESETS}
    facts = {
        "model": arguments.model,
        "model_type": config.model_type,
        "attention": config.attention,
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
        "implementations": kernels_here(config, arguments.dtype),
    }
    if arguments.json:
        print(json.dumps(facts))
        return 0
    for name, value in facts.items():
        if name == "cache_bytes_per_1000_tokens":
            print("cache bytes per 1,000 tokens, all counted:")
            for cache, size in value.items():
                print(f"  {cache:24} {size:12,}  ({format_bytes(size)})")
        elif isinstance(value, dict):
            print(f"{name:12} " + ", ".join(f"{k} {v}" for k, v in value.items()))
        else:
            print(f"{name:12} {value:,}" if isinstance(value, int) else f"{name:12} {value}")
    return 0


def _note(arguments, text):
    if not arguments.quiet:
        print(text, file=sys.stderr)
