"""How much attention each key gets from all queries together: what policies score a prompt by.

    out_j = sum over the queries i of a group of  exp(logit_ij - lse_i)

The log-sum-exp comes from `flash_attention`; for the last w queries of a prompt give those alone, with theirs.
"""

import functools

from pallas_kernels.column_sums import tpu, xla
from pallas_kernels.dispatch import Implementation, call, takes_all
from pallas_kernels.flash_attention import checked_inputs, fold

__all__ = ["IMPLEMENTATIONS", "column_sums"]

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.column_sums, tpu.why_not, platform="tpu"),
    "interpret": Implementation(functools.partial(tpu.column_sums, interpret=True), tpu.why_not, by_name_only=True),
    "xla": Implementation(xla.column_sums, takes_all),
}


def column_sums(
    q,
    k,
    lse,
    *,
    scale: float,
    causal: bool,
    window: int | tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    query_positions=None,
    key_positions=None,
    query_segments=None,
    key_segments=None,
    query_temperature=None,
    relative=None,
    block: int | None = None,
    implementation: str | None = None,
):
    """The column sums of the probabilities of `flash_attention`, without the probabilities.

    Args: as those of `flash_attention`; lse [B, K, G, T] float32 is what it returned for these queries. Queries of segment
      DEAD add nothing: so each row of a ragged batch has its own last w.
    Returns: [B, K, S] float32, summed over the group; no gradient.
    """
    x, rule = checked_inputs(
        q, k, k, causal=causal, window=window, softcap=softcap, query_positions=query_positions,
        key_positions=key_positions, query_segments=query_segments, key_segments=key_segments, relative=relative,
        block=block,
    )  # fmt: skip
    x = fold(float(scale), x, query_temperature, None)
    return call("column_sums", IMPLEMENTATIONS, implementation, x, lse, rule=rule)
