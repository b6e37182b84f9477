"""Flash attention's forward pass on Hopper GPUs: a Mosaic GPU kernel of one block of queries against all keys it sees.

Two warpgroups hold 64 queries each of a block of 128; a third copies the keys and values that both read, two blocks ahead.
The two steps of arithmetic that a block of keys needs are products of bfloat16 matrices with sums in float32; maxima, sums
and the exponential stay in registers. Blocks of keys from the first to the last that may be seen are copied, with their
positions and segments; who is seen is decided in registers.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.dispatch import device_of
from pallas_kernels.flash_attention.operands import DEAD, GLOBAL, NEG, needed, pad, span

ROWS = 64  # queries of a warpgroup
STAGES = 2
KEYS = {
    True: 128,
    False: 64,
}  # at a time: whether only their order says who sees them; what else does wants registers too
LOG2E = float(np.log2(np.e))


def why_not(x, **_) -> str | None:
    """The reason why `forward` cannot take this case, as a sentence. x: the operation's `Operands`."""
    capability = getattr(device_of("gpu"), "compute_capability", "9.0")  # programs may be compiled without a GPU
    if capability != "9.0":
        return f"its products of matrices need a Hopper GPU, of compute capability 9.0; this one has {capability}"
    if jax.__version_info__ < (0, 12) and importlib.util.find_spec("absl") is None:
        return "Mosaic GPU of this JAX needs the package absl-py, which is not installed"
    if {x.q.dtype, x.k.dtype, x.v.dtype} != {jnp.dtype(jnp.bfloat16)}:
        return f"queries, keys and values must be bfloat16, got {x.q.dtype}, {x.k.dtype}, {x.v.dtype}"
    size = x.q.shape[4]
    if size not in (64, 128) or x.v.shape[3] != size:
        return f"keys and values must have 64 or 128 channels, got {size} and {x.v.shape[3]}"
    if x.relative_q is not None:
        return "relative positions are not in this kernel"
    return None


def forward(x, *, rule, interpret: bool = False):
    """As `xla.forward`, for bfloat16 `Operands` without a relative term.

    interpret: by the GPU interpreter, anywhere (JAX 0.12).
    Returns: out [B, K, G, T, H] bfloat16, log-sum-exp [B, K, G, T] float32.
    """
    asked, there, offset = x.q.shape[3], x.k.shape[2], x.offset
    if (
        there % KEYS[True] and not rule.causal and x.key_segments is None
    ):  # else nothing would hide the keys that fill a block
        zeros = lambda *shape: jnp.zeros((x.q.shape[0], *shape), jnp.int32)
        x = x._replace(query_segments=zeros(asked), key_segments=zeros(1, there))
    plain = x.key_segments is None and rule.window == (None, None)
    keys = KEYS[plain]
    x = pad(x, 2 * ROWS, keys)
    batch, heads, _, length, _ = x.q.shape
    of_blocks = lambda end: jnp.broadcast_to(jnp.asarray(end), (batch, heads, length // (2 * ROWS))).reshape(-1)
    ends = [] if plain else list(map(of_blocks, span(needed(x, rule, offset, 2 * ROWS, keys))))
    flat = lambda y: y.reshape(-1, *y.shape[2:])
    words = {"query_positions": x.query_positions, "query_segments": x.query_segments}
    for name, y in (("key_positions", x.key_positions), ("key_segments", x.key_segments)):
        words[name] = None if y is None else flat(jnp.broadcast_to(y, (batch, heads, y.shape[2])))
    words = {name: y for name, y in words.items() if y is not None}
    out, lse = _run(
        *map(flat, (x.q, x.k, x.v)), ends, words, heads=heads, offset=offset, rule=rule, interpret=interpret
    )
    back = lambda y: y.reshape(batch, heads, *y.shape[1:])[:, :, :, :asked]
    return back(out), back(lse)


@functools.partial(jax.jit, static_argnames=("heads", "offset", "rule", "interpret"))
def _run(q, k, v, ends, words, *, heads, offset, rule, interpret):
    """q [R, G, T, H], k, v [R, S, H] in whole blocks; ends: first and last block of keys of each block of queries,
    [R * T / 128], or [], where their order says so.
    words: int32, of queries [B, T], of keys [R, S]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    (rows, group, length, size), warps, keys = q.shape, 2, KEYS[not ends]
    block = ROWS * warps
    turned = lambda ref: ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))
    tile = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    cast, wgmma = plgpu.layout_cast, plgpu.Layout.WGMMA
    over_rows, over_columns = wgmma.reduce(1), wgmma.reduce(0)
    wide = lambda x, n: cast(lax.broadcast_in_dim(x, (ROWS, n), [0]), wgmma)
    high = lambda x: cast(lax.broadcast_in_dim(x, (ROWS, keys), [1]), wgmma)
    of_queries = [name for name in words if name.startswith("query")]
    of_keys = [name for name in words if name.startswith("key")]

    def product(shape, a, b):
        def run(accumulator):
            plgpu.wgmma(accumulator, a, b)
            return accumulator[...]

        return cast(pl.run_scoped(run, plgpu.ACC(shape, jnp.float32)), wgmma)

    def kernel(q_g, k_g, v_g, *refs, q_s, k_s, v_s, p_s, lse_s, arrived, read, ready, **words_s):
        ends_g, refs = refs[: len(ends)], refs[len(ends) :]
        words_g, (out_g, lse_g) = dict(zip(words, refs, strict=False)), refs[len(words) :]
        # blocks of queries are taken from the last to the first: with a causal mask the longest begin first
        row, head = lax.axis_index("row"), lax.axis_index("group")
        number_of_block = length // block - 1 - lax.axis_index("block")
        start, worker = number_of_block * block, lax.axis_index("worker")
        if ends:
            begin, last = (end[row * (length // block) + number_of_block] for end in ends_g)
            count = last + 1 - begin
        else:
            begin, count = 0, k.shape[1] // keys
            if rule.causal:
                count = jnp.clip((start + block + offset + keys - 1) // keys, 0, count)

        def fetch():
            plgpu.set_max_registers(40, action="decrease")

            def one(number, _):
                stage, at = lax.rem(number, STAGES), pl.ds((begin + number) * keys, keys)
                pl.when(number >= STAGES)(lambda: plgpu.barrier_wait(read.at[stage]))
                plgpu.copy_gmem_to_smem(k_g.at[row, at], k_s.at[stage], arrived.at[stage])
                plgpu.copy_gmem_to_smem(v_g.at[row, at], v_s.at[stage], arrived.at[stage])
                for name in of_keys:
                    plgpu.copy_gmem_to_smem(words_g[name].at[row, at], words_s[name].at[stage], arrived.at[stage])

            lax.fori_loop(0, count, one, None)

        def compute():
            plgpu.set_max_registers(232, action="increase")
            at = pl.ds(start + worker * ROWS, ROWS)
            queries, weights = q_s.at[worker], p_s.at[worker]
            plgpu.copy_gmem_to_smem(q_g.at[row, head, at], queries, ready.at[worker])
            for name in of_queries:
                source = words_g[name].at[lax.div(row, heads), at]
                plgpu.copy_gmem_to_smem(source, words_s[name].at[worker], ready.at[worker])
            plgpu.barrier_wait(ready.at[worker])
            ahead = start + worker * ROWS + offset - begin * keys  # how far the first query stands behind the first key
            mine = {name[6:]: cast(words_s[name].at[worker][...], over_rows) for name in of_queries}

            def seen(number, stage):
                """Who is seen of a block of keys, bool [ROWS, keys], or None: all. Indices are compared, not subtracted as in
                `sees`: their differences are the same for all blocks but for one number, and would be kept in registers."""
                index = lambda axis: plgpu.broadcasted_iota(jnp.int32, (ROWS, keys), axis, layout=wgmma)
                theirs = {name[4:]: high(cast(words_s[name].at[stage][...], over_columns)) for name in of_keys}
                ours = {name: wide(x, keys) for name, x in mine.items()}
                at = index(0) + ahead, index(1) + number * keys
                places = (ours["positions"], theirs["positions"]) if "positions" in ours else at
                (behind, before), found = rule.window, [at[0] >= at[1]] if rule.causal else []
                if behind is not None:
                    found.append(places[0] < places[1] + behind)
                if before is not None:
                    found.append(places[1] < places[0] + before)
                if "segments" in ours:
                    a, b = ours["segments"], theirs["segments"]
                    found += [(a == b) | (a == GLOBAL) | (b == GLOBAL), (a > DEAD) & (b > DEAD)]
                return functools.reduce(lambda x, y: x & y, found) if found else None

            def one(number, carry):
                top, total, out = carry
                stage = lax.rem(number, STAGES)
                plgpu.barrier_wait(arrived.at[stage])
                logits = product((ROWS, keys), queries, turned(k_s.at[stage]))
                if rule.softcap is not None:
                    logits = jnp.tanh(logits / rule.softcap) * rule.softcap
                visible = seen(number, stage)
                if visible is not None:
                    logits = jnp.where(visible, logits, NEG)
                highest = jnp.maximum(top, logits.max(axis=1))
                p = jnp.exp2((logits - wide(highest, keys)) * LOG2E)
                if visible is not None:
                    p = jnp.where(visible, p, 0.0)
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
            plgpu.copy_smem_to_gmem(queries, out_g.at[row, head, at])
            plgpu.copy_smem_to_gmem(lse_s.at[worker], lse_g.at[row, head, at])
            plgpu.wait_smem_to_gmem(0)

        lax.cond(worker == warps, fetch, compute)

    shared = lambda *shape: plgpu.SMEM(shape, jnp.bfloat16, transforms=tile)
    options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}
    return plgpu.kernel(
        kernel,
        out_type=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32),
        ],
        scratch_types={
            "q_s": shared(warps, ROWS, size),
            "k_s": shared(STAGES, keys, size),
            "v_s": shared(STAGES, keys, size),
            "p_s": shared(warps, ROWS, keys),
            "lse_s": plgpu.SMEM((warps, ROWS), jnp.float32),
            **{name: plgpu.SMEM((warps, ROWS), jnp.int32) for name in of_queries},
            **{name: plgpu.SMEM((STAGES, keys), jnp.int32) for name in of_keys},
            "arrived": plgpu.Barrier(num_arrivals=2 + len(of_keys), num_barriers=STAGES),
            "read": plgpu.Barrier(num_arrivals=warps, num_barriers=STAGES),
            "ready": plgpu.Barrier(num_arrivals=1 + len(of_queries), num_barriers=warps),
        },
        grid=(length // block, group, rows),
        grid_names=("block", "group", "row"),
        num_threads=warps + 1,
        thread_name="worker",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        **options,
    )(q, k, v, *ends, *words.values())
