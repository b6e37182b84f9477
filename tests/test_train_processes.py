"""Two real processes by jax.distributed take the steps of one, and a run of theirs goes on in one."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
import tolerances

from train.report import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = """--data.train text.txt --model.hidden_size 16 --model.intermediate_size 24 --model.num_layers 1 --model.num_heads 2
--batch 4 --sequence 8 --steps 4 --schedule.warmup 1 --checkpoints.every 2 --evaluation.tokens 4 --evaluation.prompt ab
--evaluation.budget 8 --evaluation.batches 2 --logging.every 1 --logging.curves false --compilation-cache=""".split()


def start(folder, out, *words):
    place = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "train", "shakespeare", *FIELDS, "--out", out, *words]
    return subprocess.Popen(command, cwd=folder, env=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    for process in processes:
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said


@pytest.mark.exhaustive
@pytest.mark.parametrize("memory", ["0", "12"])
def test_two_processes_are_one_run(tmp_path, memory):
    (tmp_path / "text.txt").write_text("".join(np.random.default_rng(0).choice(list("abcd \n"), 600)))
    finish(start(tmp_path, "one", "--memory", memory))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = ("--memory", memory, "--coordinator", f"localhost:{port}", "--processes", "2")
    finish(*(start(tmp_path, "two", *both, "--process", str(i)) for i in range(2)))
    one, two = (read_metrics(str(tmp_path / out)) for out in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "validation_loss"):
        first, second = ([line[name] for line in lines if name in line] for lines in (one, two))
        np.testing.assert_allclose(first, second, rtol=tolerances.PROCESS_LOSS)
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()
