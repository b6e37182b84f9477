"""Column sums in XLA, by the blocks of flash attention."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.flash_attention.operands import Operands, Rule
from pallas_kernels.flash_attention.xla import add, blocks_of, logits, rows, shown


def column_sums(x: Operands, lse, *, rule: Rule):
    """[B, K, S] float32: what the queries of each group give each key together."""
    blocks = blocks_of(x, rule)
    more = blocks.x.q.shape[3] - x.q.shape[3]
    lse = jnp.pad(lse, [(0, 0)] * 3 + [(0, more)])
    real = jnp.asarray(np.arange(x.q.shape[3] + more) < x.q.shape[3])
    block_q, block_k = blocks.size

    def of_rows(total, i):
        top, mine = rows(lse, i, block_q, 3), rows(real, i, block_q, 0)

        def step(j, total):
            s, seen = logits(blocks, i, j)
            p = shown(jnp.exp(s - top[..., None]), seen, 0.0)
            return add(total, jnp.where(mine[:, None], p.sum(2), 0.0).sum(2), j * block_k)

        return jax.lax.fori_loop(blocks.first[i], blocks.last[i] + 1, step, total), None

    zeros = jnp.zeros(blocks.x.k.shape[:3], jnp.float32)
    total, _ = jax.lax.scan(of_rows, zeros, jnp.arange(len(blocks.first), dtype=jnp.int32))
    return total[:, :, : x.k.shape[2]]
