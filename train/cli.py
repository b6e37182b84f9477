"""`jaxkv train RECIPE`, which is `python -m train RECIPE`."""

import argparse
import sys

from infer import cli
from infer.console import Parser, Refused, cache_folder, keep_compiled

SUMMARY = "train or fine-tune a model by a recipe"


def add_command(commands) -> None:
    """Adds `train` to the subcommands of `jaxkv` (found by the entry point group "jaxkv.commands")."""
    sub = commands.add_parser("train", help=SUMMARY, description=SUMMARY, add_help=False, prefix_chars="\0")
    sub.add_argument("words", nargs="*")
    sub.set_defaults(run=lambda arguments: run(arguments.words))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="jaxkv train",
        description=f"{SUMMARY}. Every field of the recipe can be set as --field value; `RECIPE --help` lists them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", help="a name, or a Python file with RECIPE = train.config.Recipe(...)")
    parser.add_argument("--help", "-h", action="store_true", help="these lines, and a recipe's fields")
    parser.add_argument(
        "--dry-run", action="store_true", help="shapes, parameters and memory; nothing is run or written"
    )
    parser.add_argument(
        "--compile-for", metavar="TOPOLOGY", help="with --dry-run: TPUs that are not here, such as v5e:2x2"
    )
    parser.add_argument("--compilation-cache", default=cache_folder(), help="folder of compiled programs; '' = none")
    group = parser.add_argument_group("several processes, each with its own part of the devices and of every batch")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0; 'auto' on a cluster that JAX knows")
    group.add_argument("--processes", type=int, help="how many")
    group.add_argument("--process", type=int, help="which one this is, from 0")
    parser.add_argument("--quiet", action="store_true", help="nothing on standard error")
    return parser


def run(words: list[str]) -> int:
    """Runs the subcommand. Returns: the exit code, 130 if the run was stopped and saved."""
    from train.config import find_recipe, recipes
    from train.fields import fields, override

    parser = _parser()
    arguments, rest = parser.parse_known_args(words)
    if arguments.recipe is None:
        parser.print_help()
        print(f"\nrecipes: {', '.join(recipes())}")
        return 0 if arguments.help else 2
    recipe, text = find_recipe(arguments.recipe)
    if arguments.help:
        parser.print_help()
        print(f"\n{arguments.recipe}: {text.strip()}\n\nfields and their values in this recipe:")
        for path, (_, value) in fields(recipe).items():
            print(f"  --{path} {_shown(value)}")
        return 0
    recipe = override(recipe, rest)
    if arguments.compile_for and not arguments.dry_run:
        raise Refused("--compile-for needs --dry-run: it compiles for chips that are not here")
    if arguments.compilation_cache:
        keep_compiled(arguments)
    if arguments.coordinator:
        import jax

        known = (
            () if arguments.coordinator == "auto" else (arguments.coordinator, arguments.processes, arguments.process)
        )
        if None in known:
            raise Refused("--coordinator HOST:PORT needs --processes and --process")
        jax.distributed.initialize(*known)

    from train.prepare import prepare

    if arguments.dry_run:
        from train.describe import describe

        print(describe(prepare(recipe, _devices(arguments.compile_for))))
        return 0
    from train.loop import train

    result = train(prepare(recipe), quiet=arguments.quiet)
    return 0 if result.model else 130


def _shown(value) -> str:
    if isinstance(value, tuple):
        return ",".join(one if isinstance(one, str) else f"{one[0]}={one[1]}" for one in value) or "''"
    return repr(value) if isinstance(value, str) and not value.strip() else str(value)


def _devices(topology: str | None):
    """Descriptions of the chips of a TPU topology; None: those that are here."""
    if topology is None:
        return None
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise Refused(
            f"--compile-for {topology}: {str(error).splitlines()[0]}; it needs the package libtpu and a name such as v5e:2x2"
        ) from error


def main(argv: list[str] | None = None) -> int:
    """`python -m train ...`."""
    return cli.main(["train", *(sys.argv[1:] if argv is None else argv)], plugins=[add_command])
