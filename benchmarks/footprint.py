"""What a run costs beside its speed: start, compilation, memory; smollm2, float32, 2 threads, CPU.

    python benchmarks/footprint.py [--rounds N] [--out FILE]

first token: the whole command `jaxkv generate`, started with an empty folder of compiled programs, then again. compile:
in one process, the first `generate` less the second one (traces, compiles or loads; a prompt of 512 tokens). peak
memory: the process's largest resident size while it reads 4,096 tokens and decodes, warm folder, less that of an idle
JAX process, the weights, the state, and one layer's prompt keys and values.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from common import record

HERE = pathlib.Path(__file__).parent
PROMPT = 4096


def main():
    """Runs the rounds and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    seen = {}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "warm"):
                seen.setdefault(f"first token of the command, {name}", []).append(first_token(folder))
        with tempfile.TemporaryDirectory() as folder:
            for name in ("cold", "from the cache"):
                seen.setdefault(f"compile of prefill and decode, {name}", []).append(
                    child("compile", folder)["seconds"]
                )
            child("memory", folder)
            idle, used = child("idle", folder), child("memory", folder)
            over = used["peak"] - idle["peak"] - used["weights"] - used["state"] - used["layer"]
            seen.setdefault("peak memory", []).append(over)
            print(json.dumps({name: values[-1] for name, values in seen.items()} | used | idle), flush=True)
    targets = {
        "compile of prefill and decode, cold": "10 s",
        "compile of prefill and decode, from the cache": "1 s",
        "first token of the command, cold": "",
        "first token of the command, warm": "6 s",
        "peak memory": "150 MB",
    }
    rows = []
    for name, target in targets.items():
        value = statistics.median(seen[name])
        shown = f"{value / 1e6:.0f} MB" if name == "peak memory" else f"{value:.1f} s"
        label = (
            f"{name} over idle process, weights, state, one layer's keys and values" if name == "peak memory" else name
        )
        rows.append({"measured": label, "seen": shown, "target": target})
    record(
        arguments.out,
        title="Start, compilation and memory on SmolLM2-135M, float32 (median of rounds)",
        command=f"python benchmarks/footprint.py --rounds {arguments.rounds}",
        rows=rows,
    )


def first_token(folder) -> float:
    """Seconds from the start of the command to its first byte on standard output."""
    command = [
        str(pathlib.Path(sys.executable).parent / "jaxkv"),
        "generate",
        "Once upon a time",
        "--max-new-tokens",
        "40",
    ]
    started = time.perf_counter()
    with subprocess.Popen(
        [*command, "--quiet", "--compilation-cache", folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        _, error = process.communicate()
    if process.returncode:
        raise SystemExit(error.decode()[-2000:])
    return seconds


def child(what, folder):
    """Runs one measurement below in a process of its own."""
    command = [sys.executable, __file__, what, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(HERE.parent)))
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def idle(folder):
    """An idle JAX process."""
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jnp.ones(8) + 1)
    return {"peak": peak()}


def warm(folder):
    """Sets the folder of compiled programs as the command does."""
    import jax

    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def compile_seconds(folder):
    """The first `generate` of a process less its second."""
    warm(folder)
    import infer

    lm = infer.load("smollm2")
    times = []
    for _ in range(2):
        started = time.perf_counter()
        lm.generate([list(range(100, 612))], max_new_tokens=2)
        times.append(time.perf_counter() - started)
    return {"seconds": times[0] - times[1]}


def memory(folder):
    """Reads a long prompt and decodes; sizes in bytes."""
    warm(folder)
    import jax

    import infer

    lm = infer.load("smollm2")
    ids = [[(7 * i) % 40000 + 100 for i in range(PROMPT)]]
    out = lm.generate(ids, max_new_tokens=33, cache="scissorhands", budget="12.5%")
    weights = sum(x.nbytes for x in jax.tree.leaves(lm.params))
    layer = PROMPT * lm.config.num_kv_heads * lm.config.head_dim * 2 * 4
    return {"peak": peak(), "weights": weights, "state": out[0].stats["cache_bytes"], "layer": layer}


if __name__ == "__main__":
    table = {"idle": idle, "compile": compile_seconds, "memory": memory}
    if len(sys.argv) == 3 and sys.argv[1] in table:
        print(json.dumps(table[sys.argv[1]](sys.argv[2])))
    else:
        main()
