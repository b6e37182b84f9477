"""What a query attends to: the tiers of a cache, and new tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Source(NamedTuple):
    """Queries, keys [B, P, H, S], values [B, P, S, H], and which slots are seen: `live` [B, P, S] for one query, [B, P, t,
    S] for t of them. finish: turns the weighted sum of these values [..., H] out of the basis that they are stored in.
    owner [B, P]: the head of each block row, see `owners`; None: row p is head p. The last source has a row per head.

    bias [B, P, G, S], or [B, P, G, t, S] for t queries, float32: added to scale * q·k before the cap; dead slots may hold NaN.

    Keys and values of `decode_attention` may be `Packed`.
    """

    queries: Any
    keys: Any
    values: Any
    live: Any
    finish: Callable[[Any], Any] = lambda x: x
    owner: Any = None
    bias: Any = None
