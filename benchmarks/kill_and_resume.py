"""Kills a training run with SIGKILL at random moments, goes on each time, and compares with a run that was left alone.

python benchmarks/kill_and_resume.py --kills 20 --text FILE

A moment is drawn from a little before the first step to so much later that the run is about done with the last kill.
Losses of every step and the parameters at the end must be the same bits. Exit code 1 if they are not. Other
options are fields of the recipe, such as --memory 16.
"""

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
from safetensors.numpy import load_file

from train.report import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = """--model.hidden_size 32 --model.intermediate_size 48 --model.num_layers 2 --batch 4 --sequence 32 --logging.every 1
--checkpoints.every 5 --evaluation.every 20 --evaluation.batches 2 --evaluation.tokens 0 --logging.curves false
--schedule.warmup 5""".split()


def start(out: pathlib.Path, options) -> subprocess.Popen:
    words = [
        "-m",
        "train",
        "shakespeare",
        "--data.train",
        options.text,
        "--steps",
        str(options.steps),
        "--out",
        str(out),
    ]
    words += [*FIELDS, *options.fields, "--compilation-cache", str(out.parent / "compiled")]
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, *words], env=place, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate()
    if process.returncode:
        sys.exit(f"a run failed: {said}")


def wait_for(process: subprocess.Popen, seconds: float) -> None:
    """Until it ends, or so long."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=seconds)


def losses(out: pathlib.Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(str(out)) if "loss" in line}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--text", default="tinyshakespeare")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="write what was seen to this file")
    options, options.fields = parser.parse_known_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, cut = pathlib.Path(folder) / "whole", pathlib.Path(folder) / "cut"
        finish(start(whole, options))
        began, timed = time.perf_counter(), pathlib.Path(folder) / "timed"
        process = start(timed, options)  # its programs are compiled by now
        while process.poll() is None and not losses(timed):
            time.sleep(0.05)
        first = time.perf_counter() - began
        finish(process)
        stepping = time.perf_counter() - began - first
        moments, newest = [], lambda: max(losses(cut), default=0) if cut.exists() else 0
        while len(moments) < options.kills:
            before, process = newest(), start(cut, options)
            if draw.random() < 0.2:  # while it starts
                wait_for(process, draw.uniform(0.5, 1.0) * first)
            else:
                while process.poll() is None and newest() <= before:
                    time.sleep(0.02)
                wait_for(process, draw.uniform(0.0, 1.6) * stepping / options.kills)
            if process.poll() is not None:
                finish(process)
                break
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            moments.append(newest())
            print(f"kill {len(moments)}, steps {before} to {moments[-1]}", flush=True)
        finish(start(cut, options))
        one, two = losses(whole), losses(cut)
        same_losses = one == two and len(one) == options.steps
        first, second = (load_file(out / "model" / "model.safetensors") for out in (whole, cut))
        same_model = first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)
    seen = {"kills": len(moments), "at steps": moments, "steps": options.steps}
    seen |= {"same losses": same_losses, "same model": same_model}
    print(json.dumps(seen))
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(seen, indent=1) + "\n")
    return 0 if same_losses and same_model else 1


if __name__ == "__main__":
    sys.exit(main())
