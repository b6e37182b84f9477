"""Which implementation of an operation runs. The only code that knows platforms.

An operation keeps a table {name: Implementation}. `implementation=None` leaves the choice to the platform that a program
is compiled for: there, the first implementation that takes the case, XLA being always the last. A named one runs or
raises NotImplementedError with its reason.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

PLATFORMS = {"gpu": "cuda"}  # jax.default_backend() -> what XLA compiles for, where the two differ


@dataclasses.dataclass(frozen=True)
class Implementation:
    """run: the function. why_not: (arguments, options) -> None if it takes the case, else the reason as a sentence.

    platform: what it compiles for, "tpu" or "cuda"; None: any. by_name_only: never chosen (interpreters of kernels).
    """

    run: Callable
    why_not: Callable[..., str | None]
    platform: str | None = None
    by_name_only: bool = False


def takes_all(*args, **options) -> None:
    """`why_not` of an implementation without limits."""


def device_of(platform: str):
    """The device that programs are compiled for: the mesh's in use, else this process's if it is of `platform` ("tpu",
    "gpu"); None: not known."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None and jax.default_backend() == platform:
        device = jax.devices()[0]
    return device


def call(op: str, table: dict[str, Implementation], implementation: str | Callable | None, *args, **options):
    """Runs `op`. args, options: trees of arrays, and of anything else that is fixed when the program is traced.

    implementation: a name, None, or a function that is called in place of all: (op, table, *args, **options) -> the result.
    Raises: ValueError for a name that is not in the table; NotImplementedError if the named one cannot take the case.
    """
    if callable(implementation):
        return implementation(op, table, *args, **options)
    if implementation is not None:
        return table[chosen(op, table, implementation, *args, **options)].run(*args, **options)
    default = table[chosen(op, table, None, *args, platform=None, **options)].run
    platforms = dict.fromkeys(one.platform for one in table.values() if one.platform and not one.by_name_only)
    runs = {p: table[chosen(op, table, None, *args, platform=p, **options)].run for p in platforms}
    runs = {platform: run for platform, run in runs.items() if run is not default}
    if not runs:
        return default(*args, **options)
    leaves, tree = jax.tree.flatten((args, options))
    at = [number for number, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]

    def of_arrays(run):
        def with_arrays(*arrays):
            filled = list(leaves)
            for number, array in zip(at, arrays, strict=True):
                filled[number] = array
            args, options = jax.tree.unflatten(tree, filled)
            return run(*args, **options)

        return with_arrays

    return jax.lax.platform_dependent(
        *(leaves[number] for number in at), default=of_arrays(default), **{p: of_arrays(run) for p, run in runs.items()}
    )


def chosen(
    op: str, table: dict[str, Implementation], implementation: str | None, *args, platform: str | None = "here", **options
) -> str:  # fmt: skip
    """The name of what `call` runs on a platform ("tpu", "cuda", None = neither; by default this process's); arguments
    may be shapes only. Raises: as `call`."""
    if implementation is None:
        if platform == "here":
            platform = PLATFORMS.get(jax.default_backend(), jax.default_backend())
        for name, candidate in table.items():
            if candidate.by_name_only or candidate.platform not in (None, platform):
                continue
            if candidate.why_not(*args, **options) is None:
                return name
        raise NotImplementedError(f"no implementation of {op} takes this case")
    if implementation not in table:
        raise ValueError(f"{op} has no implementation {implementation!r}; it has: {', '.join(table)}")
    reason = table[implementation].why_not(*args, **options)
    if reason is not None:
        raise NotImplementedError(f"{op}: implementation {implementation!r} cannot take this case: {reason}")
    return implementation
