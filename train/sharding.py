"""Where every array of a run lies on a mesh of devices: a table of path patterns, logical axes, and axes of the mesh.

    mesh      data x fsdp x tensor
    batch     rows over data and fsdp together
    kernels   [in, out]: the model's width over fsdp, heads, MLP and vocabulary over tensor
    Adam      its two moments as their parameters

The compiler puts the sums and gathers in (GSPMD, arXiv 2105.04663); parameters sharded over `fsdp` are gathered where they
are used (ZeRO-3, arXiv 1910.02054).
"""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxkv.causal import Spread
from jaxkv.config import DecoderConfig
from train.config import Compute, TrainError
from train.optimizer import matches

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what the rows of a batch are cut over

MESH_AXIS = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor", "rank": None, "positions": None}
LOGICAL = (  # the first pattern that a path matches; a path that matches none is whole on every device
    ("*/qkv/kernel", ("embed", "heads")),
    ("*/qkv/bias", ("heads",)),
    ("*/attention/output/kernel", ("heads", "embed")),
    ("*/gate_up/kernel", ("embed", "mlp")),
    ("*/gate_up/bias", ("mlp",)),
    ("*/up/kernel", ("embed", "mlp")),
    ("*/up/bias", ("mlp",)),
    ("*/down/kernel", ("mlp", "embed")),
    ("embedder/embedding", ("vocab", "embed")),
    ("positions/embedding", ("positions", "embed")),
    ("head/kernel", ("embed", "vocab")),
    ("*.lora_a", ("embed", "rank")),
    ("*.lora_b", ("rank", "embed")),
)


def make_mesh(compute: Compute, devices) -> Mesh:
    """The mesh of a recipe over these devices.

    Raises: TrainError if they cannot be laid out so.
    """
    sizes = {name: getattr(compute, name) for name in AXES}
    given = math.prod(size for size in sizes.values() if size)
    count = len(devices)
    if count % given or (given != count and 0 not in sizes.values()):
        raise TrainError(
            f"a mesh of {' x '.join(f'{name} {size or chr(63)}' for name, size in sizes.items())} does not fit {count}"
            f" device{'s' if count > 1 else ''}; set --compute.data, --compute.fsdp and --compute.tensor (one may be 0:"
            " what is left)"
        )
    sizes = {name: size or count // given for name, size in sizes.items()}
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES)


def make_spread(mesh: Mesh) -> Spread | None:
    """How attention is mapped over a mesh; None for one device."""
    return Spread(mesh=mesh, rows=ROWS, heads=MESH_AXIS["heads"]) if mesh.size > 1 else None


def check_batch(mesh: Mesh, batch: int, parts: int) -> None:
    """Raises: TrainError if the rows of a part cannot be shared out evenly."""
    over = math.prod(mesh.shape[axis] for axis in ROWS)
    if (batch // parts) % over:
        raise TrainError(
            f"batch {batch} in {parts} part{'s' if parts > 1 else ''} gives {batch // parts} rows, which {over} devices along"
            f" data and fsdp cannot share; make --batch a multiple of {over * parts}"
        )


def check_heads(mesh: Mesh, config: DecoderConfig) -> None:
    """Raises: TrainError if a shard over `tensor` would hold parts of kv heads.

    This is not about speed: XLA (JAX 0.12.0.1, CPU) was seen to compile wrong gradients of the fused q|k|v kernel where 2 kv
    heads were cut over 8 devices.
    """
    tensor, heads = mesh.shape["tensor"], config.num_kv_heads
    if heads % tensor:
        accepted = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise TrainError(
            f"{heads} kv heads cannot be cut over tensor {tensor}; --compute.tensor takes {', '.join(accepted)} for this model"
        )


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a parameter lies. An axis that the mesh does not divide is left whole (`unsharded` lists those)."""
    logical = next((axes for pattern, axes in LOGICAL if matches(path, [pattern])), ())
    axes = [MESH_AXIS[name] for name in logical]
    return PartitionSpec(
        *(axis if axis and not size % mesh.shape[axis] else None for axis, size in zip(axes, shape, strict=False))
    )


def unsharded(shapes, mesh: Mesh) -> list[str]:
    """Parameters by path of which an axis is whole because the mesh does not divide it."""
    found = []
    for path, x in shapes.items():
        logical = next((axes for pattern, axes in LOGICAL if matches(path, [pattern])), ())
        wanted = sum(1 for name in logical if MESH_AXIS[name] and mesh.shape[MESH_AXIS[name]] > 1)
        got = sum(1 for axis in parameter_spec(path, x.shape, mesh) if axis and mesh.shape[axis] > 1)
        if got < wanted:
            found.append(path)
    return found


def state_shardings(state, mesh: Mesh):
    """A NamedSharding for every array of a `TrainState` (arrays or shapes), by the path of the parameter that it is, or
    that it belongs to; a memory lies where its rows do, other numbers are everywhere."""

    def one(path, leaf):
        if path[0] == jax.tree_util.GetAttrKey("memory"):
            return batch_sharding(mesh)
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        spec = parameter_spec(names[-1], leaf.shape, mesh) if names else PartitionSpec()
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of every array [B, ...] of a batch."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh):
    """A global batch from this process's rows of it."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}
