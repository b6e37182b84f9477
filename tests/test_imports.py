"""Imports point one way, and importing touches no accelerator."""

import ast
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ORDER = ["pallas_kernels", "jaxkv", "infer", "train"]


def imported(path):
    """Absolute names of what a file imports, modules and what is taken from them alike; its own package as it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package):
    forbidden = set(ORDER[ORDER.index(package) + 1 :])
    for path in (ROOT / package).rglob("*.py"):
        for name in imported(path):
            assert name.split(".")[0] not in forbidden, f"{path} imports {name}"
            assert not name.startswith("jax._src"), f"{path} imports {name}"


def test_kernels_need_jax_and_numpy_only():
    """So that `pallas_kernels` can be taken out and used without the rest."""
    paths = list((ROOT / "pallas_kernels").rglob("*.py"))
    assert len(paths) > 5
    for path in paths:
        for name in imported(path):
            allowed = {"pallas_kernels", "jax", "numpy"} | sys.stdlib_module_names
            assert name.split(".")[0] in allowed, f"{path} imports {name}"


HEAVY = """
    torch transformers matplotlib tensorflow pandas kvpress llama_cpp gguf huggingface_hub tokenizers safetensors jinja2
    orbax optax tqdm hypothesis
""".split()
IMPORT = """
import importlib, pkgutil, sys
{modules}
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was initialized"
assert not xla_bridge._backends
loaded = sorted({{name.split(".")[0] for name in sys.modules}} & set({heavy}))
assert not loaded, f"imported {{loaded}}"
"""
EVERY_MODULE = """
for package in ("pallas_kernels", "jaxkv", "infer"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    "modules", ["import jaxkv", "import infer", EVERY_MODULE], ids=["jaxkv", "infer", "all modules"]
)
def test_import_touches_no_accelerator(modules, tmp_path):
    """Nor does it load what only some uses need; those stand ready as empty packages, so that loading one would show."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").touch()
    code = IMPORT.format(modules=modules, heavy=HEAVY)
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=place,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
