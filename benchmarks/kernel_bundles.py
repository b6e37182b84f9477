"""How many instruction words (bundles) the TPU's decode kernel takes for 128 slots of one kv head, as compiled without a TPU.

    python benchmarks/kernel_bundles.py [--schemes bf16,int8,...] [--chips v5e,v6e] [--out FILE]

The slope between two lengths of one block, with the compiler's own listing as the count: what is done once per block does not
count. 4 query heads, head size 128, bfloat16 queries, with scores. Bundles are issue slots, not time. Needs libtpu.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from common import record

SCHEMES = "bf16,int8,int4,rotated4,rotated3,rotated2"
SIZES = (1024, 2048)  # slots of the block
HEADS, GROUP, CHANNELS = 1, 4, 128
LISTING = "*decode_attention*schedule-analysis_final_bundles.txt"


def main():
    """Compiles each in a process of its own, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=SCHEMES)
    parser.add_argument("--chips", default="v5e,v6e")
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        compile_one(given.one[0], int(given.one[1]), given.one[2])
        return
    rows = []
    for scheme in given.schemes.split(","):
        row = {"stored as": scheme}
        for chip in given.chips.split(","):
            first, second = (bundles(scheme, size, chip) for size in SIZES)
            row[chip] = f"{(second - first) / (SIZES[1] - SIZES[0]) * 128:.1f}"
        rows.append(row)
        print(row, flush=True)
    record(
        given.out,
        title="Bundles of the TPU's decode kernel for 128 slots, 4 query heads of 128, with scores: compiled, not run",
        command=f"python benchmarks/kernel_bundles.py --schemes {given.schemes} --chips {given.chips}",
        rows=rows,
    )


def bundles(scheme: str, slots: int, chip: str) -> int:
    """Of the kernel as compiled for a chip, for so many slots."""
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "LIBTPU_INIT_ARGS": dump}
        command = [sys.executable, __file__, "--one", scheme, str(slots), chip]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        listings = list(pathlib.Path(folder).glob(LISTING))
        if done.returncode or len(listings) != 1:
            raise RuntimeError(f"{scheme} {slots} {chip}: {len(listings)} listings; {done.stderr.strip()[-2000:]}")
        found = re.search(r"total scheduled bundles\D*(\d+)", listings[0].read_text())
        return int(found[1])


def compile_one(scheme: str, slots: int, chip: str) -> None:
    """Compiles the kernel for a tier of one scheme."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

    from infer.chips import find_devices
    from jaxkv.cache.state import empty_tier, live_slots, packed_keys, packed_values
    from jaxkv.policies import Recency
    from jaxkv.types import TierSpec
    from pallas_kernels.decode_attention import Source, decode_attention

    def attend(queries, tier):
        source = Source(queries, packed_keys(tier), packed_values(tier), live_slots(tier))
        return decode_attention((source,), scale=CHANNELS**-0.5, softcap=None, scores=True, implementation="tpu")

    spec = TierSpec(slots=slots, scheme=(scheme, scheme), positions="int16")
    tier = jax.eval_shape(lambda: empty_tier(Recency(), spec, jnp.full((1,), slots, jnp.int32), (1, HEADS, CHANNELS)))
    queries = jax.ShapeDtypeStruct((1, HEADS, GROUP, CHANNELS), jnp.bfloat16)
    mesh = Mesh(np.array(find_devices(f"{chip}:{'2x2x1' if chip in ('v4', 'v5p', 'tpu7x') else '2x2'}")[:1]), ("one",))
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    with use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(attend).trace(*jax.tree.map(place, (queries, tier)))
        traced.lower(lowering_platforms=("tpu",)).compile()


if __name__ == "__main__":
    main()
