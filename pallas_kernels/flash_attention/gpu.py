"""Flash attention's forward pass on Hopper GPUs: a Mosaic GPU kernel of one block of queries against all keys it sees.

Two warpgroups hold 64 queries each of a block of 128; a third copies the keys and values that both read, two blocks ahead.
The two steps of arithmetic that a block of keys needs are products of bfloat16 matrices with sums in float32; maxima, sums
and the exponential stay in registers. Blocks of keys behind the last query are not copied.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import device_of
from pallas_kernels.flash_attention.operands import NEG

BLOCK = 128  # keys at a time
ROWS = 64  # queries of a warpgroup
STAGES = 2
LOG2E = float(np.log2(np.e))


def why_not(x, *, rule) -> str | None:
    """The reason why `of_operands` cannot take this case, as a sentence. x, rule: the operation's `Operands` and `Rule`."""
    length, size, slots = *x.q.shape[3:], x.k.shape[2]
    capability = getattr(device_of("gpu"), "compute_capability", "9.0")  # programs may be compiled without a GPU
    if capability != "9.0":
        return f"its products of matrices need a Hopper GPU, of compute capability 9.0; this one has {capability}"
    if jax.__version_info__ < (0, 12) and importlib.util.find_spec("absl") is None:
        return "Mosaic GPU of this JAX needs the package absl-py, which is not installed"
    if {x.q.dtype, x.k.dtype, x.v.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"queries, keys and values must be bfloat16, got {x.q.dtype}, {x.k.dtype}, {x.v.dtype}"
    if size not in (64, 128) or x.v.shape[3] != size:
        return f"keys and values must have 64 or 128 channels, got {size} and {x.v.shape[3]}"
    if length % (2 * ROWS) or slots % BLOCK:
        return f"queries and keys must be multiples of 128, got {length} and {slots}"
    if x.query_segments is not None or x.relative_q is not None or rule.window != (None, None):
        return "windows, segments and relative positions are not in this kernel"
    return None


def of_operands(x, *, rule, interpret: bool = False):
    """An implementation of the operation: `forward` of its `Operands`, whose queries have the scale in them."""
    return forward(x.q, x.k, x.v, causal=rule.causal, scale=1.0, softcap=rule.softcap, interpret=interpret)


def forward(q, k, v, *, causal: bool, scale: float, softcap: float | None = None, interpret: bool = False):
    """q [B, K, G, T, H], k, v [B, K, S, H] bfloat16 -> out [B, K, G, T, H] bfloat16, log-sum-exp [B, K, G, T] float32.

    causal: query i sees key j only if j <= i + (S - T). T must be a multiple of 128, S of 128, H 64 or 128.
    interpret: by the GPU interpreter, anywhere (JAX 0.12).
    """
    return _run(q, k, v, causal=causal, scale=float(scale), softcap=softcap, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("causal", "scale", "softcap", "interpret"))
def _run(q, k, v, *, causal, scale, softcap, interpret):
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, heads, group, length, size = q.shape
    slots, warps = k.shape[2], 2
    offset, block = slots - length, ROWS * warps
    turned = lambda ref: ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))
    tile = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    over_rows = plgpu.Layout.WGMMA.reduce(1)
    cast, wgmma = plgpu.layout_cast, plgpu.Layout.WGMMA
    wide = lambda x, n: cast(lax.broadcast_in_dim(x, (ROWS, n), [0]), wgmma)

    def product(shape, a, b):
        def run(accumulator):
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return cast(pl.run_scoped(run, plgpu.ACC(shape, jnp.float32)), wgmma)

    def kernel(q_g, k_g, v_g, out_g, lse_g, *, q_s, k_s, v_s, p_s, lse_s, arrived, read, ready):
        # blocks of queries are taken from the last to the first: with a causal mask the longest begin first
        row, head = lax.axis_index("row"), lax.axis_index("group")
        start = (length // block - 1 - lax.axis_index("block")) * block
        worker = lax.axis_index("worker")
        count = slots // BLOCK
        if causal:
            count = jnp.clip((start + block + offset + BLOCK - 1) // BLOCK, 0, count)

        def fetch():
            plgpu.set_max_registers(40, action="decrease")

            def one(number, _):
                stage, at = lax.rem(number, STAGES), pl.ds(number * BLOCK, BLOCK)
                pl.when(number >= STAGES)(lambda: plgpu.barrier_wait(read.at[stage]))
                plgpu.copy_gmem_to_smem(k_g.at[row, at], k_s.at[stage], arrived.at[stage])
                plgpu.copy_gmem_to_smem(v_g.at[row, at], v_s.at[stage], arrived.at[stage])

            lax.fori_loop(0, count, one, None)

        def compute():
            plgpu.set_max_registers(232, action="increase")
            first = start + worker * ROWS
            queries, weights = q_s.at[worker], p_s.at[worker]
            plgpu.copy_gmem_to_smem(q_g.at[row, head, pl.ds(first, ROWS)], queries, ready.at[worker])
            plgpu.barrier_wait(ready.at[worker])

            def one(number, carry):
                top, total, out = carry
                stage = lax.rem(number, STAGES)
                plgpu.barrier_wait(arrived.at[stage])
                logits = product((ROWS, BLOCK), queries, turned(k_s.at[stage])) * scale
                if softcap is not None:
                    logits = jnp.tanh(logits / softcap) * softcap
                if causal:
                    at = lambda axis: plgpu.broadcasted_iota(jnp.int32, (ROWS, BLOCK), axis, layout=wgmma)
                    seen = at(0) + (first + offset) >= at(1) + number * BLOCK
                    logits = jnp.where(seen, logits, NEG)
                highest = jnp.maximum(top, logits.max(axis=1))
                p = jnp.exp2((logits - wide(highest, BLOCK)) * LOG2E)
                if causal:
                    p = jnp.where(seen, p, 0.0)
                shrink = jnp.exp2((top - highest) * LOG2E)
                weights[...] = p.astype(jnp.bfloat16)
                plgpu.commit_smem()
                out = out * wide(shrink, size) + product((ROWS, size), weights, v_s.at[stage])
                plgpu.barrier_arrive(read.at[stage])
                return highest, total * shrink + p.sum(axis=1), out

            flat = lambda value: cast(jnp.full((ROWS,), value, jnp.float32), over_rows)
            zeros = cast(jnp.zeros((ROWS, size), jnp.float32), wgmma)
            top, total, out = lax.fori_loop(0, count, one, (flat(NEG), flat(0.0), zeros))
            there = total > 0
            safe = jnp.where(there, total, 1.0)
            # the queries have been read, and their place is free
            queries[...] = (out * wide(1.0 / safe, size)).astype(jnp.bfloat16)
            lse_s.at[worker][...] = jnp.where(there, top + jnp.log(safe), NEG)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(queries, out_g.at[row, head, pl.ds(first, ROWS)])
            plgpu.copy_smem_to_gmem(lse_s.at[worker], lse_g.at[row, head, pl.ds(first, ROWS)])
            plgpu.wait_smem_to_gmem(0)

        lax.cond(worker == warps, fetch, compute)

    rows = batch * heads
    shared = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=tile)
    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}
    out, lse = plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct((rows, group, length, size), q.dtype),
            jax.ShapeDtypeStruct((rows, group, length), jnp.float32),
        ],
        scratch_types={
            "q_s": shared(warps, ROWS, size),
            "k_s": shared(STAGES, BLOCK, size),
            "v_s": shared(STAGES, BLOCK, size),
            "p_s": shared(warps, ROWS, BLOCK),
            "lse_s": plgpu.SMEM((warps, ROWS), jnp.float32),
            "arrived": plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
            "read": plgpu.Barrier(num_arrivals=warps, num_barriers=STAGES),
            "ready": plgpu.Barrier(num_arrivals=1, num_barriers=warps),
        },
        grid=(length // block, group, rows),
        grid_names=("block", "group", "row"),
        num_threads=warps + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )(*(x.reshape(rows, *x.shape[2:]) for x in (q, k, v)))
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])
