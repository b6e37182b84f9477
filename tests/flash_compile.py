"""Compiles the TPU kernels of flash attention, without a TPU. Run as a program: some failures end the process.

python tests/flash_compile.py v5e:2x2 v6e:2x2 ...  [--slow]  ->  one line of JSON per program: topology, name, error or null
"""

import json
import os
import sys

from tpu_compile import ENVIRONMENT


def compile_for(topology: str, programs: dict) -> None:
    """programs: {name: (function, arguments)}; prints a line for each."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices[:1]), ("one",))
    whole = NamedSharding(mesh, PartitionSpec())
    for name, (function, arguments) in programs.items():
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), arguments)
        error, kernels = None, 0
        try:
            with use_abstract_mesh(mesh.abstract_mesh):
                compiled = jax.jit(function).trace(*shapes).lower(lowering_platforms=("tpu",)).compile()
            kernels = compiled.as_text().count('custom_call_target="tpu_custom_call"')
        except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as caught:
            error = f"{type(caught).__name__}: {str(caught)[:2000]}"
        print(json.dumps([topology, name, kernels, error]), flush=True)


def programs(cases) -> dict:
    """Gradients, which start with the forward pass, and column sums of each case."""
    import jax
    import jax.numpy as jnp
    from flash_cases import cast, make

    from pallas_kernels.column_sums import column_sums
    from pallas_kernels.flash_attention import flash_attention

    out = {}
    for number, case in cases:
        q, k, v, options = cast(*make(case), jnp.dtype(case.dtype))
        arrays = {name: x for name, x in options.items() if not isinstance(x, int | float | bool | None)}
        window = arrays.pop("window", None)
        fixed = {name: x for name, x in options.items() if name not in arrays} | {"window": window}

        def attend(floats, others, fixed=fixed):
            q, k, v, more = floats
            out, lse = flash_attention(q, k, v, **more, **others, **fixed)
            return out.astype(jnp.float32).sum() + lse.sum()

        def sums(q, k, lse, others, fixed=fixed):
            return column_sums(q, k, lse, **others, **fixed)

        is_float = lambda x: all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(x))
        floats = {name: x for name, x in arrays.items() if is_float(x)}
        integers = {name: x for name, x in arrays.items() if not is_float(x)}
        out[f"{number} gradients"] = jax.grad(attend), ((q, k, v, floats), integers)
        no_values = {name: x for name, x in arrays.items() if name != "value_temperature"}
        out[f"{number} column sums"] = sums, (q, k, q[..., 0].astype("float32"), no_values)
    return out


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    from flash_cases import CASES

    chosen = list(enumerate(CASES))[:: int(sys.argv[1])]
    for topology in sys.argv[2:]:
        compile_for(topology, programs(chosen))
