"""T new queries against the tiers of a cache and against the new tokens themselves."""

import functools
from typing import Any, NamedTuple

from pallas_kernels.decode_attention.source import Source
from pallas_kernels.dispatch import Implementation, call, takes_all
from pallas_kernels.extend_attention import gpu, tpu, xla
from pallas_kernels.extend_attention.xla import at_distances, distance_logits

__all__ = ["IMPLEMENTATIONS", "TierSource", "at_distances", "distance_logits", "extend_attention"]


class TierSource(NamedTuple):
    """A tier as `extend_attention` reads it: queries [B, P, G, T, H], live [B, P, S]; positions [B, P, S] int32 on the
    queries' scale."""

    source: Source
    positions: Any


IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.extend_attention, tpu.why_not, platform="tpu"),
    "gpu": Implementation(gpu.extend_attention, gpu.why_not, platform="cuda"),
    "interpret": Implementation(
        functools.partial(tpu.extend_attention, kernels="interpret"), tpu.why_not, by_name_only=True
    ),
    "xla": Implementation(xla.extend_attention, takes_all),
}


def extend_attention(
    queries,
    keys,
    values,
    tiers,
    *,
    positions,
    valid,
    segments,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    relative=None,
    row_statistic,
    merge,
    block: int = 128,
    implementation: str | None = None,
):
    """Exact attention in blocks of queries, never [T, T], with the policies' column statistics out of the same pass.

    Query i sees new key j if j is valid, j <= i (when `causal`), their segments agree or one of the two is global, and
    their positions differ by less than `window`; it sees a live slot under the same window.

    Args:
      queries [B, P, G, T, H]; keys, values [B, P, T, H] of the new tokens; rows that are not valid may hold anything.
      tiers: a TierSource each. Dead slots may hold NaN keys and any finite values.
      positions [B, T] int32; valid [B, T] bool; segments [B, T] int32 (-1 = global) or None: all one segment.
      relative: None, or (r [B, P, G, T, C], table [P or 1, G or 1, R, C]): adds scale * r_i.table[d] to the logit of query i
        and a key d positions behind it (before the cap); with `causal` only. R must cover the distances that can be seen.
      row_statistic: None, or (p [B, P, G, t, S] float32, visible [B, P, t, S] bool, live [B, P, t] int32,
        start int32, own bool) -> pytree with leaves [B, P, S, ...]: what query rows start..start+t say of each slot.
        own, static: whether the slots are the new tokens.
      merge: None, or (statistics of two blocks) -> those of both; zeros are neutral.
      block: queries per inner block; it changes memory and speed, not the result.
    Returns: out [B, P, G, T, H]; statistics, one pytree per tier and one for the new tokens (all None without
      `row_statistic`). Rows that see nothing give zeros.
    """
    return call(
        "extend_attention",
        IMPLEMENTATIONS,
        implementation,
        queries,
        keys,
        values,
        tiers,
        positions=positions,
        valid=valid,
        segments=segments,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        relative=relative,
        row_statistic=row_statistic,
        merge=merge,
        block=block,
    )
