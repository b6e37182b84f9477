"""Compiles cases for a Hopper GPU on a machine without one, in a process of its own, down to machine code.

    found = compile_for_hopper(python, ["decode:int4,int4,128,float32,4", ...])
    found["decode:int4,int4,128,float32,4"].spills

`python` is an interpreter that has XLA's compiler for NVIDIA GPUs and ptxas, as `make slow` installs it (see Makefile). What
it compiles for is a description of an H100, not a device.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).parent.parent
H100 = {
    "threads_per_warp": 32, "threads_per_block_limit": 1024, "threads_per_core_limit": 2048,
    "shared_memory_per_block": 48 << 10, "shared_memory_per_block_optin": 227 << 10, "shared_memory_per_core": 228 << 10,
    "registers_per_block_limit": 65536, "registers_per_core_limit": 65536, "core_count": 132, "fpus_per_core": 128,
    "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "memory_bandwidth": 3350 * 10**9, "l2_cache_size": 50 << 20, "clock_rate_ghz": 1.7, "device_memory_size": 80 * 10**9,
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """error: the compiler's words, or None. kernels: names of Mosaic kernels in the program; registers, spills (bytes) of each
    that was compiled. copied: instructions of the program beside kernels with a result of `large` bytes or more. Bytes:
    arguments, and of these those that results take over."""

    error: str | None
    kernels: int = 0
    registers: tuple[int, ...] = ()
    spills: tuple[int, ...] = ()
    copied: tuple[str, ...] = ()
    arguments: int = 0
    alias: int = 0


def compile_for_hopper(python: str, cases: list[str], timeout: float = 900) -> dict[str, Compiled]:
    """cases: "kind:arguments", see `hopper_programs`."""
    with tempfile.TemporaryDirectory() as dump:
        place = os.environ | {
            "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": "--xla_gpu_autotune_level=0",
            "MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_TO": dump,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }  # fmt: skip
        done = subprocess.run(
            [python, "-m", "hopper_compile", *cases], env=place, cwd=dump, capture_output=True, text=True, timeout=timeout
        )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(found) != len(cases):
        raise RuntimeError(f"the compiler of {cases[len(found)]} ended:\n{done.stderr[-4000:]}")
    tuples = lambda x: {name: tuple(value) if isinstance(value, list) else value for name, value in x.items()}
    return {case: Compiled(**tuples(one)) for case, one in zip(cases, found, strict=True)}


def _report(dump: pathlib.Path) -> tuple[list[int], list[int]]:
    """Registers and bytes spilled of what ptxas has compiled since it was last asked."""
    registers, spills = [], []
    for path in sorted(dump.glob("*.ptxas")):
        text = path.read_text()
        registers += map(int, re.findall(r"Used (\d+) registers", text))
        spills += [int(a) + int(b) for a, b in re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)]
        path.unlink()
    return registers, spills


def copies(text: str, large: int) -> list[str]:
    """Operations of a compiled program that make an array of `large` bytes or more: no parameters, views or kernels, and no
    writes into an array, which are in place if it is aliased. Of a fusion that is its result; what it computes on the way is
    in no memory."""
    width = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "u16": 2, "s16": 2, "f32": 4, "s32": 4, "u32": 4}
    fused, inside, found = set(re.findall(r" fusion\(.*calls=(%[\w.-]+)", text)), False, []
    for line in text.splitlines():
        if begins := re.match(r"(?:ENTRY )?(%[\w.-]+) \(.*\{$", line):
            inside = begins[1] in fused
        if inside:
            continue
        match = re.match(r"\s*(?:ROOT )?%\S+ = (\w+)\[([\d,]*)\]\S* ([\w-]+)\(", line)
        if (
            not match
            or match[1] not in width
            or match[3] in ("parameter", "bitcast", "get-tuple-element", "custom-call")
        ):
            continue
        size = width[match[1]]
        for n in filter(None, match[2].split(",")):
            size *= int(n)
        if size >= large and not re.search("dynamic.update.slice", line):
            found.append(line.strip()[:200])
    return found


def main() -> None:
    """One line of JSON per case."""
    import nvidia.cu13

    os.environ["PATH"] = os.pathsep.join([f"{next(iter(nvidia.cu13.__path__))}/bin", os.environ["PATH"]])
    import hopper_programs
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    fields = " ".join(f"{name}: {value}" for name, value in H100.items())
    config = (
        'platform_name: "CUDA" device_description_str: "NVIDIA H100" runtime_version {major: 13} dnn_version_info {major: 9}'
        f" gpu_device_info {{{fields} cuda_compute_capability {{major: 9 minor: 0}}}}"
    )
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=config
    )
    device, dump = SingleDeviceSharding(topology.devices[0]), pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    for case in sys.argv[1:]:
        function, arguments, donate, large = hopper_programs.program(case)
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), arguments)
        try:
            traced = jax.jit(function, donate_argnums=donate).trace(*placed)
            compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"[:2000]}), flush=True)
            continue
        registers, spills = _report(dump)
        text, memory = compiled.as_text(), compiled.memory_analysis()
        found = Compiled(
            error=None,
            kernels=text.count('custom_call_target="mosaic_gpu'),
            registers=tuple(registers),
            spills=tuple(spills),
            copied=tuple(copies(text, large)),
            arguments=memory.argument_size_in_bytes,
            alias=memory.alias_size_in_bytes,
        )
        print(json.dumps(dataclasses.asdict(found)), flush=True)


if __name__ == "__main__":
    main()
