"""What decode programs for TPU take and move, as compiled without one; the shapes of Llama 3 8B, in bfloat16.

    python benchmarks/decode_programs.py [--topology v5e:4x4] [--context 8192] [--batch 64] [--out FILE]

Of one device and one step. "beyond": memory at the peak beyond weights and state. "counted": bytes accessed, as the compiler
counts its own instructions and kernels say of themselves; what it fetches to fast memory ahead of its use it counts twice
and more, so this compares programs, and is no traffic. Compiled and counted, not run. Needs libtpu.
"""

import argparse
import pathlib

from common import record

from infer.plan import check, make_plan
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig

CACHES = (("full", None), ("h2o", "20%"), ("rotated-4", "20%"), ("mikv", "20%"), ("auto", "25%"))
LLAMA = DecoderConfig(
    model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_heads=32, num_kv_heads=8,
    layers=(LayerConfig(window=None, rope=RopeConfig(kind="default", theta=5e5, rotary_dim=128)),) * 32, head_dim=128,
    max_positions=8192, norm_eps=1e-5, norm_offset=0.0, activation="silu", query_scale=128**-0.5, embedding_scale=1.0,
    tie_embeddings=False,
)  # fmt: skip


def main():
    """Compiles and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path)
    given = parser.parse_args()
    rows = []
    for cache, budget in CACHES:
        case = check(
            LLAMA, topology=given.topology, context=given.context, batch=given.batch, cache=cache, budget=budget,
            dtype="bfloat16",
        )  # fmt: skip
        found = make_plan(case)
        held = found.weights + found.state
        rows.append({
            "cache": cache,
            "budget": budget or "100%",
            "weights MB": round(found.weights / 1e6),
            "state MB": round(found.state / 1e6),
            "beyond MB": round(found.decode / 1e6),
            "peak over weights and state": round((held + found.decode) / held, 3),
            "counted MB": round(found.counted / 1e6),
            "kernels": found.kernels,
        })  # fmt: skip
        print(rows[-1], flush=True)
    record(
        given.out,
        title=f"Decode programs of Llama 3 8B for {given.topology}, {given.batch} rows of {given.context} tokens: compiled and"
        " counted, not run",
        command=f"python benchmarks/decode_programs.py --topology {given.topology} --context {given.context} --batch"
        f" {given.batch}",
        rows=rows,
    )


if __name__ == "__main__":
    main()
