"""Writes the README's tables from the code (caches) and from benchmarks/results/*.json (figures).

python docs/make_tables.py
"""

import json
import pathlib

import jax
import jax.numpy as jnp

from jaxkv.cache.budgets import tree_bytes
from jaxkv.cache.state import empty_tier
from jaxkv.presets import COMPUTE, PRESETS
from jaxkv.types import TierSpec

ROOT = pathlib.Path(__file__).parent.parent


def policies() -> str:
    """One line per row of the table of presets."""
    lines = ["| `cache=` | keeps | source | stores keys/values as | bytes a slot |", "|---|---|---|---|---|"]
    for preset in PRESETS.values():
        summary, source = preset.summary.removeprefix("keeps "), preset.source or preset.policy.source
        rungs = [(f"from {least:.0%}: ", parts) for least, parts in preset.ladder]
        rungs.append(("below: " if rungs else "", preset.parts))
        rungs += [
            (f"measured models from {least:.0%}: ", parts)
            for least, parts in preset.calibrated
            if least and (least, parts) not in preset.ladder
        ]
        stored = "; ".join(mark + ", ".join(map(_part, parts)) for mark, parts in rungs)
        prices = dict.fromkeys(_slot_bytes(preset, part) for _, parts in rungs for part in parts)
        lines.append(f"| `{preset.name}` | {summary} | {source} | {stored} | {', '.join(map(str, prices))} |")
    return "\n".join(lines)


def _part(part) -> str:
    size = f"{part.slots} " if part.slots else "" if part.share == 1 else f"{part.share:.0%} "
    return size + "/".join(dict.fromkeys((part.keys, part.values)))


def _slot_bytes(preset, part) -> int:
    """Of one kv head and token, head size 64, float32 computation: codes, factors, position, what the policy keeps."""
    scheme = tuple("f32" if name == COMPUTE else name for name in (part.keys, part.values))
    limit = jnp.ones((1,), jnp.int32)
    size = lambda slots: tree_bytes(
        jax.eval_shape(
            lambda: empty_tier(
                preset.policy, TierSpec(slots=slots, scheme=scheme, positions="int16"), limit, (1, 1, 64)
            )
        )
    )
    granule = part.granule
    return (size(2 * granule) - size(granule)) // granule


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
