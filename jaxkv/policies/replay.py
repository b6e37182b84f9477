"""Keep what a second reading, and the end of the first, look at: the policy of `auto`.

Score of a token: the squared attention, averaged over query heads and summed over queries, of a repetition of the context
(KVzip, arXiv 2505.23416, section 3) and of the context's own last `window` tokens (SnapKV, arXiv 2404.14469).
Departs from KVzip: squares summed instead of the largest value, so that a token that many look at a little does not fall
behind one that a single query looks at; the mean over query heads instead of the largest; and the end of the context is
heard as well, because what follows a text is read in the light of its end, not only of its repetition. Chosen among twelve
such scores on one text; `benchmarks/quality.py` measures the result on others. `replay=False` needs one reading only.
Later queries add theirs. What was there fades, by half in `memory` tokens: instead of fading, newer attention weighs more,
which ranks alike and lets the score be kept in bfloat16, 2 bytes a slot. It overflows after 127 * `memory` tokens. Sums are
rounded up or down by a threshold that moves on with every token: to the nearest, a score would stand still as soon as what
a token adds is less than 1/512 of it.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxkv.policies.base import Policy, expand, mean_vote
from jaxkv.quantization.base import from_bits

GOLDEN = 40503  # 2**16 over the golden ratio: multiples of it, modulo 2**16, lie evenly however many there are


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay(Policy):
    """Squared attention of a replay of the context and of the last `window` queries. replay: whether there is one."""

    name: ClassVar[str] = "replay"
    summary: ClassVar[str] = "what a second reading and the end of the first attend to"
    source: ClassVar[str] = "ours, after KVzip and SnapKV"
    needs_attention: ClassVar[bool] = True

    recent: int = 32
    sinks: int = 4
    window: int = 256
    memory: int = 4096
    replay: bool = True

    def __post_init__(self):
        super().__post_init__()
        for name in ("window", "memory"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def needs_replay(self):
        return self.replay

    def enter_row(self, shape, layer):
        return {"read": jnp.zeros(shape[:1], jnp.int32)}

    def advance(self, row, new):
        return {"read": row["read"] + new.count}

    def enter(self, new, row):
        return {"attention": jnp.zeros(new.keys.shape[:3], jnp.uint16)}

    def row_statistic(self, p, visible, rows, row):
        looks = rows.valid & (rows.remaining < self.window) | rows.replay
        return {"attention": jnp.einsum("bpts,bt->bps", mean_vote(jnp.square(p)), looks.astype(p.dtype))}

    def absorb(self, slots, statistic, row, count):
        steps = expand(row["read"] + count, statistic["attention"])
        weight = jnp.exp2(steps.astype(jnp.float32) * (1.0 / self.memory))
        total = from_bits(slots["attention"]) + weight * statistic["attention"]
        return {"attention": _rounded(total, steps)}

    def score(self, slots, row, positions):
        return from_bits(slots["attention"])


def _rounded(x, steps):
    """bfloat16 bits of x >= 0: up where the part that is cut off and this step's threshold together make a whole one, so right
    on average over many steps; numbers of bfloat16 stay."""
    threshold = (steps.astype(jnp.uint32) * jnp.uint32(GOLDEN)) & 0xFFFF
    return ((jax.lax.bitcast_convert_type(x, jnp.uint32) + threshold) >> 16).astype(jnp.uint16)
