"""Compiles cases for TPU on a machine without one, in processes of their own: some failures of its compiler end the process.

    found = compile_for_tpu(python, [("decode_programs:with_scores", "00-G3-...", "v5e:2x2"), ...])
    found["decode_programs:with_scores", "00-G3-...", "v5e:2x2"].error

Each function takes its case and returns a `Program`. Cases go through one process, which loads the compiler once; if that
dies, the case at hand failed and another process takes the rest.
"""

import dataclasses
import importlib
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from infer import chips

TOPOLOGIES = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **chips.ENVIRONMENT}
HERE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What to compile: function(*arguments), arguments being trees of shapes; donate: which of them are.

    stored: (tree of arguments) -> those leaves that only kernels may read, as they are: nothing may copy or convert them.
    """

    function: Callable
    arguments: tuple
    donate: tuple[int, ...] = ()
    stored: Callable[[tuple], Any] = lambda arguments: ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """error: the compiler's words, or None. kernels: calls of Pallas kernels. read: instructions other than kernels that read
    what is stored. Bytes of one device: arguments, results, of which alias arguments, and the peak of the whole."""

    error: str | None
    kernels: int = 0
    read: tuple[str, ...] = ()
    arguments: int = 0
    results: int = 0
    alias: int = 0
    peak: int = 0


def compile_for_tpu(python: str, jobs, timeout: float = 1800) -> dict[tuple[str, str, str], Compiled]:
    """python: an interpreter that has libtpu. jobs: ("module:function", case, topology), all strings.
    Returns: what became of each."""
    left, found = [list(job) for job in jobs], {}
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    while left:
        done = subprocess.run(
            [python, __file__], input=json.dumps(left), capture_output=True, text=True, timeout=timeout,
            env=environment,
        )  # fmt: skip
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
        for job, result in zip(left, lines, strict=False):
            found[tuple(job)] = Compiled(**{**result, "read": tuple(result["read"])})
        if len(lines) < len(left):
            last = done.stderr.strip()[-2000:]
            found[tuple(left[len(lines)])] = Compiled(
                error=f"the compiler's process ended with {done.returncode}: {last}"
            )
        left = left[len(lines) + 1 :]
    return found


def stored_reads(text: str, parameters: set[int]) -> tuple[str, ...]:
    """Instructions of the entry computation of compiled HLO that read these parameters, kernels apart.

    XLA may bring an array to fast memory ahead of the kernel that reads it, as it is; that replaces the kernel's own reading.
    """
    entry = text[text.index("\nENTRY ") :]
    stored, read = set(), []
    for line in entry.splitlines():
        instruction = re.match(r"\s*(?:ROOT )?%?([\w.-]+) = (.*)", line)
        if not instruction:
            continue
        name, rest = instruction.groups()
        number = re.search(r" parameter\((\d+)\)", rest)
        if number:
            stored |= {name} if int(number[1]) in parameters else set()
            continue
        called = re.search(r" ([\w-]+)\((.*)", rest)
        if called is None or not stored & set(re.findall(r"%?([\w.-]+)", called[2].split("), ")[0])):
            continue
        if (
            called[1] in ("bitcast", "copy-done", "slice-done")
            or "ConcatBitcast" in rest
            or _prefetches(called[1], rest)
        ):
            stored.add(name)
        elif "tpu_custom_call" not in rest:
            read.append(line.strip()[:300])
    return tuple(read)


def _prefetches(operation: str, started: str) -> bool:
    """Whether an array, or a slice of it, is taken to fast memory, S(1), and nothing else is done to it."""
    of = "".join if operation == "copy-start" else lambda shape: shape[1]  # a slice has other axes, and the same layout
    shapes = [of(shape) for shape in re.findall(r"(\w+\[[\d,]*\])(\{[^}]*\})", started)[:2]]
    if operation == "copy-start":
        return shapes[0] == shapes[1][:-1] + "S(1)}"
    return operation == "slice-start" and shapes[1] == shapes[0][:-1] + "S(1)}"


def _compile(program: Program, topology: str) -> Compiled:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    first = Mesh(devices[:1], ("one",))
    place = lambda x: (
        x
        if x.sharding is not None
        else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(first, PartitionSpec()))
    )
    numbered = jax.tree.unflatten(
        jax.tree.structure(program.arguments), range(jax.tree.structure(program.arguments).num_leaves)
    )
    jitted = jax.jit(program.function, donate_argnums=program.donate, keep_unused=True)
    with use_abstract_mesh(first.abstract_mesh):
        traced = jitted.trace(*jax.tree.map(place, program.arguments))
        compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    return Compiled(
        error=None,
        kernels=text.count('custom_call_target="tpu_custom_call"'),
        read=stored_reads(text, set(jax.tree.leaves(program.stored(numbered)))),
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        alias=memory.alias_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
    )


def main() -> None:
    """One JSON line per job of standard input, in order."""
    import jax

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    for target, case, topology in json.load(sys.stdin):
        module, function = target.split(":")
        try:
            result = _compile(getattr(importlib.import_module(module), function)(case), topology)
        except (RuntimeError, ValueError, TypeError) as error:  # of JAX and the compiler; others end the process
            result = Compiled(error=f"{type(error).__name__}: {error}"[:3000])
        print(json.dumps(dataclasses.asdict(result)), flush=True)


if __name__ == "__main__":
    main()
