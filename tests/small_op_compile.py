"""Compiles cases of `quantize`, `causal_conv` and `slots` for TPU without one, in a process that the compiler may end.

Run as a script: jobs [[program, case, topology], ...] as JSON on standard input, one JSON line each on standard output.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

from tpu_compile import ENVIRONMENT, TOPOLOGIES  # noqa: F401 the tests' too

QUANTIZE = {  # [B, P, S, H], dtype; each with every scheme that takes it
    "a prompt": ((2, 2, 1024, 128), "bfloat16"),
    "a prompt of part of a block": ((1, 2, 1120, 64), "float32"),
    "a token": ((4, 8, 1, 128), "bfloat16"),
    "a group": ((1, 8, 32, 96), "float32"),
    "wide heads": ((1, 1, 640, 256), "float32"),
    "narrow heads": ((1, 1, 640, 80), "bfloat16"),
}
CONVOLVE = {  # x, filters, dtype
    "heads share filters": ((2, 8, 520, 64), (3, 64), "float32"),
    "filters per head": ((2, 8, 1024, 128), (4, 8, 128), "bfloat16"),
    "without heads": ((2, 100, 640), (3, 640), "float32"),
    "RCMHA": ((4, 8, 34, 16), (3, 16), "float32"),
    "the longest filters": ((1, 2, 32, 128), (17, 128), "bfloat16"),
}
SLOTS = {  # B, P, slots, (channels, dtype, axis of the slots) of each array
    "codes and factors": (8, 8, 2048, ((64, "uint8", 3), (1, "uint16", 3), (64, "uint8", 3), (1, "uint16", 3))),
    "bfloat16 values as rows": (4, 8, 1536, ((128, "uint16", 3), (128, "uint16", 2))),
    "float32, part of a tile": (1, 3, 1120, ((64, "float32", 3), (64, "float32", 2))),
    "3 bits of narrow heads": (2, 2, 640, ((24, "uint8", 3), (2, "uint16", 3), (30, "uint8", 2))),
    "few slots": (2, 8, 32, ((128, "uint16", 3), (128, "uint16", 3))),
}


def compile_for_tpu(python, jobs, timeout=1500) -> dict:
    """{job: {"error": the compiler's words or None, "kernels": Pallas calls in the program}}."""
    here = pathlib.Path(__file__).parent
    done = subprocess.run(
        [python, __file__], input=json.dumps(jobs), capture_output=True, text=True, timeout=timeout,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])},
    )  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    gone = {"error": f"the compiler's process ended with {done.returncode}: {done.stderr[-2000:]}", "kernels": 0}
    return {tuple(job): result for job, result in zip(jobs, [*found, *[gone] * len(jobs)], strict=False)}


def quantize(case):
    """case: "name.scheme"."""
    import jax

    from jaxkv.quantization import get_scheme
    from pallas_kernels.quantize import quantize

    name, scheme = case.split(".")
    shape, dtype = QUANTIZE[name]
    return functools.partial(quantize, how=get_scheme(scheme).how(shape[3])), [jax.ShapeDtypeStruct(shape, dtype)]


def causal_conv(case):
    """Forward, with a mask and taps."""
    import jax

    from pallas_kernels.causal_conv import causal_conv

    shape, filters, dtype = CONVOLVE[case]
    one = lambda *axes: jax.ShapeDtypeStruct(axes, dtype)
    valid = jax.ShapeDtypeStruct((shape[0], shape[-2]), "bool")
    taps = one(*shape[:-2], filters[0] - 1, shape[-1])
    return lambda x, f, b, t, valid: causal_conv(x, f, b, t, valid=valid), [
        one(*shape), one(*filters), one(*filters[1:]), taps, valid
    ]  # fmt: skip


def gradients(case):
    """Forward and backward, of all four arrays."""
    import jax
    import jax.numpy as jnp

    run, arguments = causal_conv(case)
    loss = lambda *given: (run(*given)[0].astype(jnp.float32) ** 2).sum()
    return jax.grad(loss, (0, 1, 2, 3)), arguments


def slots(case):
    """Read, and written."""
    import jax

    from pallas_kernels.slots import read_slot, write_slot

    batch, heads, count, arrays = SLOTS[case]
    lie = lambda c, axis, n: (batch, heads, c, n) if axis == 3 else (batch, heads, n, c)
    of = lambda n: tuple(jax.ShapeDtypeStruct(lie(c, axis, n), dtype) for c, dtype, axis in arrays)
    options = {"axes": tuple(axis for *_, axis in arrays), "groups": count}

    def run(arrays, new, slot):
        return read_slot(arrays, slot, **options), write_slot(arrays, new, slot, **options)

    return run, [of(count), of(1), jax.ShapeDtypeStruct((batch, heads), "int32")]


def main():
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

    for program, case, topology in json.load(sys.stdin):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        mesh = Mesh(np.array(devices[:1]), ("one",))
        function, arguments = globals()[program](case)
        arguments = jax.tree.map(functools.partial(_placed, where=NamedSharding(mesh, PartitionSpec())), arguments)
        try:
            with use_abstract_mesh(mesh.abstract_mesh):
                lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
                lowered.compile()
            result = {"error": None, "kernels": lowered.as_text().count("@tpu_custom_call")}
        except (ValueError, NotImplementedError, RuntimeError) as error:
            result = {"error": f"{type(error).__name__}: {error}", "kernels": 0}
        print(json.dumps(result), flush=True)


def _placed(x, where):
    import jax

    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)


if __name__ == "__main__":
    main()
