"""Training steps are compiled for several TPU chips, with the kernels of attention in them, without a TPU."""

import json
import os
import pathlib
import subprocess

import pytest
from train_compile import CASES

HERE = pathlib.Path(__file__).parent


@pytest.mark.slow
def test_steps_over_a_mesh_of_chips(compilers_python):
    """The compiler cannot cut kernels over devices by itself."""
    place = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    done = subprocess.run(
        [compilers_python, str(HERE / "train_compile.py"), "v5e:2x2"], env=place, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert [line[0] for line in found] == list(CASES), done.stderr[-2000:]
    for name, kernels, _, error in found:
        assert error is None, f"{name}: {error}"
        assert kernels >= 2, name  # forward and backward
