"""What a run would take: shapes, parameters, memory and FLOPs of the compiled step; nothing is run or written."""

import re

import jax
import jax.numpy as jnp

from train.loop import compiled
from train.prepare import Prepared
from train.sharding import batch_sharding, unsharded


def describe(prepared: Prepared) -> str:
    """A table of parameters and figures of the program, compiled for the mesh (chips that are not here included)."""
    shapes, mesh, recipe = prepared.shapes, prepared.mesh, prepared.recipe
    device = mesh.devices.flat[0]
    lines = [f"mesh: {' x '.join(f'{name} {size}' for name, size in mesh.shape.items())} of {device.device_kind}", ""]
    lines += [f"{'parameter':42}{'shape':>20}{'layers':>8}{'parameters':>14}"]
    for mark, flat in (("", shapes.trained), (" (frozen)", shapes.frozen)):
        for (path, shape), count in _by_kind(flat).items():
            size = count * int(jnp.prod(jnp.array(shape)))
            lines.append(f"{path + mark:42}{'x'.join(map(str, shape)):>20}{count:>8}{size:>14,}")
    trained, frozen = (sum(x.size for x in flat.values()) for flat in (shapes.trained, shapes.frozen))
    lines.append(f"trained {trained:,}, frozen {frozen:,}; {recipe.batch * recipe.sequence:,} tokens a step")
    whole = unsharded(shapes.trained | shapes.frozen, mesh)
    if whole:
        lines.append(f"not cut, because the mesh does not divide them: {', '.join(whole)}")
    program = compile_step(prepared)
    memory = program.memory_analysis()
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    lines.append(
        f"memory of a device: {_size(kept)} of parameters, optimizer and batch, {_size(memory.temp_size_in_bytes)} while a"
        f" step runs, {_size(memory.generated_code_size_in_bytes)} of code"
    )
    cost = program.cost_analysis() or {}
    if "flops" in cost:
        lines.append(f"the compiled step: {cost['flops'] / 1e9:,.1f} GFLOP on each device, loops counted once")
    return "\n".join(lines)


def compile_step(prepared: Prepared):
    """The compiled step, from shapes alone."""
    recipe, place = prepared.recipe, batch_sharding(prepared.mesh)
    shape = lambda dtype: jax.ShapeDtypeStruct((recipe.batch, recipe.sequence), dtype, sharding=place)
    batch = {name: shape(jnp.int32) for name in ("tokens", "targets", "segments", "positions")}
    return compiled(prepared)[0].lower(prepared.shapes, batch | {"weights": shape(jnp.float32)}).compile()


def _by_kind(flat):
    """(path with the layer's number left open, shape) -> how many."""
    found = {}
    for path, x in flat.items():
        key = re.sub(r"^layers_\d+", "layers_*", path), x.shape
        found[key] = found.get(key, 0) + 1
    return found


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
