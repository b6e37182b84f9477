"""Imports point one way, and importing touches no accelerator."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ORDER = ["pallas_kernels", "jaxkv", "infer", "train"]


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package):
    forbidden = set(ORDER[ORDER.index(package) + 1 :])
    if package == "pallas_kernels":
        forbidden |= {"flax"}
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] not in forbidden, f"{path} imports {name}"


def test_import_touches_no_accelerator():
    code = "import jaxkv, jaxkv.cache, infer; from jax._src import xla_bridge; assert not xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
