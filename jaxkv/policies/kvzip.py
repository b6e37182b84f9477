"""Keep what a repetition of the context looks at.

Source: KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction (arXiv 2505.23416), section 3. The model is
asked to repeat the context and reads the context again; score of a token: the largest attention that any query of that
second reading, of any query head of its group, gave it.
The second reading is `extend`'s `replay`: it looks, layer by layer, and is not stored. See `infer.replay` for how it is cut.
Departs: the paper ranks the tokens of all heads of the model together; here heads get what `jaxkv.calibration` says of the
model (measured with the scores of `replay`), and equally much where it does not know it, which is far worse. Attention is
normalised over all that a query sees. After the prompt there is no repetition, so the attention of later queries to earlier
tokens counts as well: a token is judged by replays and by the tokens that came in after it was stored. The score is kept in
bfloat16, 2 bytes a slot. Without a replay all prompt tokens are equal, and the oldest leave.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxkv.policies.base import Policy
from jaxkv.quantization.base import from_bits, to_bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVzip(Policy):
    """The largest attention of a replay of the context, and of later queries."""

    name: ClassVar[str] = "kvzip"
    summary: ClassVar[str] = "what a second reading of the context attends to"
    source: ClassVar[str] = "KVzip, arXiv 2505.23416"
    needs_attention: ClassVar[bool] = True
    needs_replay: ClassVar[bool] = True

    recent: int = 32
    sinks: int = 4

    def enter(self, new, row):
        return {"attention": jnp.zeros(new.keys.shape[:3], jnp.uint16)}

    def row_statistic(self, p, visible, rows, row):
        looks = rows.replay if rows.own else rows.replay | rows.valid
        return {"attention": jnp.where(looks[:, None, None, :, None], p, 0.0).max(axis=(2, 3))}

    def merge(self, one, other):
        return jax.tree.map(jnp.maximum, one, other)

    def absorb(self, slots, statistic, row, count):
        return {"attention": to_bits(jnp.maximum(from_bits(slots["attention"]), statistic["attention"]))}

    def score(self, slots, row, positions):
        return from_bits(slots["attention"])
