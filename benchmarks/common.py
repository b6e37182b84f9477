"""What every results file says beside its rows."""

import json
import os
import pathlib
import platform
import subprocess
from importlib import metadata

HERE = pathlib.Path(__file__).parent
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers", "llama_cpp_python")


def versions() -> dict[str, str]:
    """Versions of this interpreter and of what it has of the contenders."""
    have = {d.metadata["Name"].replace("-", "_").lower() for d in metadata.distributions()}
    return {"python": platform.python_version()} | {n: metadata.version(n) for n in PACKAGES if n in have}


def record(out: pathlib.Path | None, *, title, command, rows, machine="", peers=None) -> None:
    """Prints the rows and, if `out` is given, writes them with command, commit, machine and versions."""
    git = lambda *words: subprocess.run(["git", *words], capture_output=True, text=True, cwd=HERE).stdout.strip()
    changed = (
        " with uncommitted changes" if git("status", "--porcelain", "--", "..", ":!results", ":!../README.md") else ""
    )
    result = {
        "title": title,
        "command": command,
        "commit": git("rev-parse", "HEAD") + changed,
        "machine": f"{os.cpu_count()} shared {platform.machine()} cores" + (f", {machine}" if machine else ""),
        "versions": {"jaxkv": versions()} | (peers or {}),
        "rows": rows,
    }
    print(json.dumps(rows, indent=1))
    if out:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


def questions(contexts: int) -> dict[str, int]:
    """Task -> how many: all that the facts of so many contexts allow, 8 each."""
    return {"passkey": contexts, "magic": 7 * contexts}
