"""Writes the README's tables from the code (policies) and from benchmarks/results/*.json (figures).

python docs/make_tables.py
"""

import json
import pathlib

from jaxkv.policies import POLICIES

ROOT = pathlib.Path(__file__).parent.parent


def policies() -> str:
    """One line per row of the policy table."""
    lines = ["| `cache=` | keeps | source |", "|---|---|---|"]
    for policy in POLICIES.values():
        lines.append(f"| `{policy.name}` | {policy.summary.removeprefix('keeps ')} | {policy.source} |")
    return "\n".join(lines)


def figures() -> str:
    """One table per results file, with its command, commit, machine and versions."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        result = json.loads(path.read_text())
        columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
        table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        for row in result["rows"]:
            table.append("| " + " | ".join(str(row.get(column, "")) for column in columns) + " |")
        versions = "; ".join(
            f"{name}: " + ", ".join(f"{package} {version}" for package, version in found.items())
            for name, found in result["versions"].items()
        )
        origin = f"`{result['command']}`, commit {result['commit'][:8]}, {result['machine']}. {versions}."
        parts.append(f"**{result['title']}**\n\n" + "\n".join(table) + f"\n\n{origin}")
    return "\n\n".join(parts) or "Nothing is published yet."


def fill(text: str) -> str:
    """The README's text with both tables made anew."""
    for name, make in (("policies", policies), ("figures", figures)):
        mark = f"<!-- {name} -->"
        before, _, after = text.split(mark)
        text = f"{before}{mark}\n{make()}\n{mark}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
