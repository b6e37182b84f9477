"""What every subcommand of `jaxkv` does with the console and with files: refusals, interrupts, notes, bars, text in and out."""

import argparse
import contextlib
import io
import json
import os
import pathlib
import signal
import sys
import threading


class Refused(Exception):
    """Bad input: one line for the user, exit code 2."""


def refuse(error: Exception) -> int:
    """Says one line on standard error. Returns: the exit code."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    print("jaxkv: error:", text.replace("\n", " ") or type(error).__name__, file=sys.stderr)
    return 2


def open_streams():
    """Makes standard streams UTF-8 like the files that are read, whatever the locale; a closed one is as if empty."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    for stream, errors in ((sys.stdin, "strict"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and (stream.encoding.lower(), stream.errors) != ("utf-8", errors):
            stream.reconfigure(encoding="utf-8", errors=errors)


@contextlib.contextmanager
def interrupts(signals: list[int]):
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


class Parser(argparse.ArgumentParser):
    """Refuses what it cannot parse, as all bad input is refused."""

    def error(self, message):
        raise Refused(f"{message}; see {self.prog} --help")


def whole(least: int):
    """Parses a number of things, `least` or more."""

    def number(text):
        value = int(text)
        if not least <= value < 10**9:  # tokens are counted in int32
            raise argparse.ArgumentTypeError(f"must be at least {least} and below 10**9, got {value}")
        return value

    number.__name__ = "whole number"  # in argparse's message about other text
    return number


def note(arguments, text):
    """A line on standard error, unless --quiet."""
    if not arguments.quiet:
        print(text, file=sys.stderr)


class Bar:
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


def check_utf8(text: str, name: str) -> str:
    """Refuses lone surrogates: a command line's bytes that are not UTF-8, or \\ud800 in JSON. Returns: the text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"{name} is not UTF-8; convert it to UTF-8") from error
    return text


def read_text(path) -> str:
    """A UTF-8 file, or standard input for "-". Raises: Refused, OSError."""
    data = sys.stdin.buffer.read() if path == "-" else pathlib.Path(path).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        name = "standard input" if path == "-" else path
        raise Refused(f"{name} is not UTF-8: byte {error.start} cannot be read; convert it to UTF-8") from error


def writable(path: str | None) -> pathlib.Path | None:
    """Where a link leads; only regular files are replaced, so that `--output /dev/null` does no harm."""
    if path is None:
        return None
    real = pathlib.Path(os.path.realpath(path))
    if not real.parent.is_dir() or not os.access(real.parent, os.W_OK):
        raise Refused(f"cannot write {path}: {real.parent} must be an existing, writable folder")
    if real.exists() and not (real.is_file() and os.access(real, os.W_OK)):
        raise Refused(f"cannot write {path}: it exists and is not a writable file")
    return real


def write(path: pathlib.Path | None, text: str):
    """Prints, or replaces a file: all of it or nothing."""
    if path is None:
        sys.stdout.write(text)
        return
    from infer.files import replace_file

    replace_file(path, text.encode("utf-8", errors="backslashreplace"))


def to_json(value) -> str:
    """One line; refuses numbers that JSON does not have."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def cache_folder() -> str:
    """Where compiled programs are kept, or "" for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return "" if base.startswith("~") else os.path.join(base, "jaxkv", "compiled")


def keep_compiled(arguments):
    """Lets JAX keep compiled programs in the folder of --compilation-cache, if that can be written."""
    import jax

    folder = arguments.compilation_cache
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        note(arguments, f"--compilation-cache {folder} is not used: {error.strerror}")
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
