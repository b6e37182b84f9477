"""Decode and prefill speed on smollm2, float32, batch 1, against transformers and llama.cpp, in one run.

    python benchmarks/speed.py [--transformers-python PY] [--llama-python PY] [--out FILE]

Each measurement is a subprocess on 2 threads: rounds alternate between the contenders, and the median of the rounds
counts. Decode: greedy steps after a prompt of this many tokens. "bandwidth": share of the measured read bandwidth that
the bytes of weights and live cache per token amount to.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile

from common import record

HERE = pathlib.Path(__file__).parent
THREADS = {"OMP_NUM_THREADS": "2", "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true"}
CASES = {
    "decode, 128 tokens of context": {"context": 128, "budget": None},
    "decode, 8,000 tokens of context, budget 512": {"context": 8000, "budget": 512},
    "prefill, 2,048 tokens": {"context": 2048, "budget": None},
}


def main():
    """Runs the rounds and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformers-python", help="an interpreter with torch and transformers")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python and gguf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    contenders = {"jaxkv": sys.executable}
    if arguments.transformers_python:
        contenders["transformers"] = arguments.transformers_python
    if arguments.llama_python:
        contenders["llama.cpp"] = arguments.llama_python
    with tempfile.TemporaryDirectory() as folder:
        measure(sys.executable, "export", folder)
        bandwidth = statistics.median(measure(sys.executable, "bandwidth", folder)["GB/s"] for _ in range(3))
        rows = []
        for name, case in CASES.items():
            seen = {contender: [] for contender in contenders}
            for _ in range(arguments.rounds):
                for contender, python in contenders.items():
                    seen[contender].append(measure(python, contender, folder, **case))
            rows.append(row(name, seen, bandwidth))
            print(json.dumps(rows[-1]), flush=True)
        peers = {c: measure(python, f"{c} versions", folder) for c, python in contenders.items() if c != "jaxkv"}
    record(
        arguments.out,
        title="Speed on SmolLM2-135M, float32, batch 1, 2 threads (median of rounds, tokens/s)",
        command=f"python benchmarks/speed.py --transformers-python PY --llama-python PY --rounds {arguments.rounds}",
        machine=f"read bandwidth {bandwidth:.1f} GB/s",
        peers=peers,
        rows=rows,
    )


def row(name, seen, bandwidth):
    """One line of the table: medians, and our ratio to each peer."""
    key = "prefill" if name.startswith("prefill") else "decode"
    medians = {c: statistics.median(m[key] for m in runs) for c, runs in seen.items()}
    out = {"measured": name, **{c: round(v, 1) for c, v in medians.items()}}
    for peer in medians:
        if peer != "jaxkv":
            out[f"over {peer}"] = round(medians["jaxkv"] / medians[peer], 2)
    if key == "decode":
        share = seen["jaxkv"][0]["bytes_per_token"] * medians["jaxkv"] / (bandwidth * 1e9)
        out["share of bandwidth"] = f"{share:.0%}"
    return out


def measure(python, what, folder, **case):
    """Runs one measurement in a subprocess and reads the JSON on its last line."""
    command = [python, str(HERE / "contenders.py"), what, folder, json.dumps(case)]
    environment = {**os.environ, **THREADS, "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
