"""What every implementation of flash attention gets, who sees whom, and which blocks hold anything that is seen."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# The log-sum-exp of a row that sees nothing; finite, so that no difference of two makes NaN
NEG = float(np.float32(-1e30))
GLOBAL, DEAD = -1, -2  # segments: sees and is seen by all; sees nothing and is seen by none


class Operands(NamedTuple):
    """q [B, K, G, T, H] with scale and temperature in it; k [B, K, S, H]; v [B, K, S, H'] with its temperature in it, dead
    keys and values 0. The rest may be None: query_positions, query_segments [B, T] int32; key_positions, key_segments
    [B, K|1, S] int32; relative_q [B, K, G, T, H''] with scale in it; relative_table [K|1, G|1, R, H'']."""

    q: Any
    k: Any
    v: Any
    query_positions: Any = None
    key_positions: Any = None
    query_segments: Any = None
    key_segments: Any = None
    relative_q: Any = None
    relative_table: Any = None

    @property
    def offset(self) -> int:
        """Query i stands where key i + offset does: the queries are the last of the keys."""
        return self.k.shape[2] - self.q.shape[3]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """What is fixed in the program. window: (behind, ahead), a query at x sees keys in x - behind < y < x + ahead, None
    is without limit. block: queries and keys per block, None: the implementation's own."""

    causal: bool
    window: tuple[int | None, int | None]
    softcap: float | None
    block: int | None


def sees(rule: Rule, distance, apart, mine, theirs):
    """Who is seen, bool of the shape that the arguments broadcast to, or None if all is.

    distance, apart: query less key, by index and by position. mine, theirs: segments, or None.
    """
    seen, (behind, ahead) = [], rule.window
    if rule.causal:
        seen.append(distance >= 0)
    if behind is not None:
        seen.append(apart < behind)
    if ahead is not None:
        seen.append(apart > -ahead)
    if theirs is not None:
        seen.append((mine == theirs) | (mine == GLOBAL) | (theirs == GLOBAL))
        seen.append((mine > DEAD) & (theirs > DEAD))
    if not seen:
        return None
    both = seen[0]
    for one in seen[1:]:
        both = both & one
    return both


def capped(logits, softcap: float | None):
    """softcap * tanh(logits / softcap), or the logits."""
    return logits if softcap is None else jnp.tanh(logits * (1 / softcap)) * softcap


def uncap(gradient, logits, softcap: float | None):
    """The gradient of logits before the cap, from that of the capped ones and these."""
    return gradient if softcap is None else gradient * (1 - jnp.square(logits * (1 / softcap)))


def pad(x: Operands, block_q: int, block_k: int) -> Operands:
    """Whole blocks. Added keys are zeros and have to be hidden by their index; added queries see whatever they see."""
    more_q, more_k = -x.q.shape[3] % block_q, -x.k.shape[2] % block_k

    def along(y, axis, more, **kind):
        if y is None or not more:
            return y
        return jnp.pad(y, [(0, more if number == axis else 0) for number in range(y.ndim)], **kind)

    return Operands(
        q=along(x.q, 3, more_q),
        k=along(x.k, 2, more_k),
        v=along(x.v, 2, more_k),
        query_positions=along(x.query_positions, 1, more_q, mode="edge"),
        key_positions=along(x.key_positions, 2, more_k, mode="edge"),
        query_segments=along(x.query_segments, 1, more_q, constant_values=DEAD),
        key_segments=along(x.key_segments, 2, more_k, constant_values=DEAD),
        relative_q=along(x.relative_q, 3, more_q),
        relative_table=x.relative_table,
    )


def reversed_table(table, queries: int, keys: int, offset: int):
    """[..., R, H] by distance -> [..., queries + keys, H] by queries + offset - 1 - distance; 0 where none is stored.

    Block (i, j) of logits needs rows queries - (i + 1) * block_q + j * block_k and on, block_q + block_k of them:
    column c of its row r has row block_q - 1 - r + c of those.
    """
    last = queries + offset - 1
    sides = (last - table.shape[2] + 1, queries + keys - 1 - last, 0)
    none = (0, 0, 0)
    return jax.lax.pad(jnp.flip(table, 2), jnp.zeros((), table.dtype), [none, none, sides, none])


def needed(x: Operands, rule: Rule, offset: int, block_q: int, block_k: int):
    """[B|1, K|1, queries' blocks, keys' blocks] bool: which blocks of padded operands may hold a key that is seen.

    numpy, known when the program is traced, unless positions or segments say more.
    """
    rows, columns = x.q.shape[3] // block_q, x.k.shape[2] // block_k
    nearest = block_q * np.arange(rows)[:, None] + offset - block_k * np.arange(columns) - (block_k - 1)
    farthest = nearest + block_q + block_k - 2
    seen, (behind, ahead) = np.ones((1, 1, rows, columns), bool), rule.window
    if rule.causal:
        seen &= farthest >= 0
    if x.query_positions is None:
        seen &= (behind is None or nearest < behind) & (ahead is None or farthest > -ahead)
    blocks = lambda y, size: y.reshape(*y.shape[:-1], -1, size)
    far = jnp.asarray(2**30, jnp.int32)
    if x.key_segments is not None:
        mine, theirs = blocks(x.query_segments[:, None], block_q)[..., :, None, :], blocks(x.key_segments, block_k)
        theirs = theirs[..., None, :, :]
        least = lambda y: jnp.where(y >= 0, y, far).min(-1)
        most = lambda y: jnp.where(y >= 0, y, -far).max(-1)
        shared = (least(mine) <= most(theirs)) & (least(theirs) <= most(mine))
        shared |= (mine == GLOBAL).any(-1) | (theirs == GLOBAL).any(-1)
        seen = seen & shared & (mine > DEAD).any(-1) & (theirs > DEAD).any(-1)
    if x.query_positions is not None:
        mine, theirs = blocks(x.query_positions[:, None], block_q)[..., :, None, :], blocks(x.key_positions, block_k)
        low = high = theirs
        if x.key_segments is not None:
            live = blocks(x.key_segments, block_k) > DEAD
            low, high = jnp.where(live, theirs, far), jnp.where(live, theirs, -far)
        low, high = low.min(-1)[..., None, :], high.max(-1)[..., None, :]
        if behind is not None:
            seen = seen & (mine.min(-1) - high < behind)
        if ahead is not None:
            seen = seen & (mine.max(-1) - low > -ahead)
    return seen


def span(seen):
    """[..., n] bool -> first and last true, [...] int32 both; 0 and -1 where none is."""
    xp = np if isinstance(seen, np.ndarray) else jnp
    some = seen.any(-1)
    first = xp.argmax(seen, axis=-1)
    last = seen.shape[-1] - 1 - xp.argmax(xp.flip(seen, -1), axis=-1)
    return xp.where(some, first, 0).astype(np.int32), xp.where(some, last, -1).astype(np.int32)
