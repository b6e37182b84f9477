"""The `jaxkv` command: generate, chat, evaluate, info, plan, train."""

import argparse
import importlib.metadata
import os
import signal
import sys

from infer.console import Parser, Refused, cache_folder, interrupts, open_streams, refuse

PLUGINS = "jaxkv.commands"  # entry points: functions (subparsers) that add a subcommand


def main(argv: list[str] | None = None, *, plugins=None) -> int:
    """Runs the command.

    Args: plugins: functions that add subcommands; None = those of the entry point group "jaxkv.commands".

    Returns: the exit code; 2 for bad input, 130 after Ctrl-C and 143 after SIGTERM if nothing came out or prompts of a
    batch were left, 141 if the reader of standard output went away.
    """
    open_streams()
    signals = []
    try:
        with interrupts(signals):
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
        return refuse(error)
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # how XLA says that memory ran out
            raise
        return refuse(error)
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # what cannot be written now would fail again, with a traceback, when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(plugins=None):
    from infer.commands import chat, evaluate, generate, info, plan

    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = Parser(prog="jaxkv", description=__doc__, formatter_class=formatter)
    parser.add_argument("--version", action="version", version=f"jaxkv {importlib.metadata.version('jaxkv')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module, text in (
        ("generate", generate, "complete a prompt, or a file of prompts"),
        ("chat", chat, "talk to the model over one budgeted cache"),
        ("evaluate", evaluate, "compare caches with the full cache on the same text"),
        ("info", info, "what a model is and what its cache costs"),
        ("plan", plan, "what a model takes on chips that are not here"),
    ):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter)
        sub.set_defaults(run=module.run)
        group = sub.add_argument_group("model")
        group.add_argument("--model", default="smollm2", help="name, directory, .gguf file or Hugging Face id")
        group.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights and cache")
        group.add_argument("--revision", help="of a Hugging Face id")
        group.add_argument("--token", help="for a Hugging Face id")
        group.add_argument("--offline", action="store_true", help="use only what the hub's cache folder holds")
        sub.add_argument("--compilation-cache", default=cache_folder(), help="folder of compiled programs; '' = none")
        sub.add_argument("--quiet", action="store_true", help="no progress bars, no notes")
        module.add_options(sub)
    if plugins is None:
        plugins = [entry.load() for entry in importlib.metadata.entry_points(group=PLUGINS)]
    for add_command in plugins:
        add_command(commands)
    return parser
