"""Attention of many queries over many keys, with its gradients, in memory for a block of logits at a time.

    out_i = sum_j p_ij c_j v_j       p = softmax over the keys j that query i sees of  cap(scale * (t_i q_i.k_j + r_i.R[d_ij]))

d_ij = i + (S - T) - j: the queries stand at the end of the keys. One `custom_vjp` lies around the choice of a kernel, so
that every implementation is differentiated by an implementation, which starts from the inputs, out and the log-sum-exp.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.dispatch import Implementation, call, takes_all
from pallas_kernels.flash_attention import gpu, tpu, tpu_backward, xla
from pallas_kernels.flash_attention.operands import DEAD, GLOBAL, NEG, Operands, Rule

__all__ = ["BACKWARD", "DEAD", "GLOBAL", "IMPLEMENTATIONS", "NEG", "fold", "flash_attention"]

IMPLEMENTATIONS = {
    "tpu": Implementation(tpu.forward, tpu.why_not, platform="tpu"),
    "gpu": Implementation(gpu.forward, gpu.why_not, platform="cuda"),
    "interpret": Implementation(functools.partial(tpu.forward, interpret=True), tpu.why_not, by_name_only=True),
    "xla": Implementation(xla.forward, takes_all),
}
BACKWARD = {
    "tpu": Implementation(tpu_backward.backward, tpu.why_not, platform="tpu"),
    "interpret": Implementation(
        functools.partial(tpu_backward.backward, interpret=True), tpu.why_not, by_name_only=True
    ),
    "xla": Implementation(xla.backward, takes_all),
}


def flash_attention(
    q,
    k,
    v,
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
    value_temperature=None,
    relative=None,
    block: int | None = None,
    implementation: str | None = None,
):
    """Exact attention, its logits never in memory in whole; gradients for all that is not an integer.

    Args:
      q [B, K, G, T, H]; k [B, K, S, H]; v [B, K, S, H'], of one dtype: float32 or bfloat16. The G queries of a group share
        a head of keys. Queries must be finite; dead keys and values may hold anything.
      causal: query i sees key j only if j <= i + (S - T).
      window: (behind, ahead): a query at position x sees keys in x - behind < y < x + ahead, None is without limit; a
        number stands for both. softcap: logits become softcap * tanh(logits / softcap).
      query_positions [B, T], key_positions [B, S] or [B, K, S] int32: what `window` goes by; without them, the indices.
      query_segments [B, T], key_segments [B, S] or [B, K, S] int32: only one's own is seen. GLOBAL (-1) sees and is seen
        by all; DEAD (-2) sees nothing and is seen by none, so `where(valid, 0, DEAD)` of keys alone is a validity mask.
        One of the two left out is GLOBAL.
      query_temperature [B, K|1, G|1, T]: multiplies q.k (selective attention), not the relative term.
      value_temperature [B, K|1, S]: multiplies the values.
      relative: (r [B, K, G, T, H''], table [K|1, G|1, R, H'']): adds r_i.table[distance] to q.k before `scale`, as
        Transformer-XL and RCMHA do (their content bias belongs in q, a scalar per distance in one more channel whose r is
        1). Needs `causal`: only distances from 0 are stored; R must cover those that can be seen.
      block: queries and keys per block, for implementations that leave it free; it changes no result.
    Returns: out [B, K, G, T, H'] in v's dtype; log-sum-exp of the logits [B, K, G, T] float32. A query that sees nothing
      gets zeros and NEG. Both have gradients.
    Raises: ValueError for what does not fit together; NotImplementedError as `dispatch.call`.
    Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2; the relative term Transformer-XL (1901.02860), 3.3.
    """
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"nothing to attend: q {q.shape}, k {k.shape}; every axis must have a length")
    x, rule = checked_inputs(
        q, k, v, causal=causal, window=window, softcap=softcap, query_positions=query_positions,
        key_positions=key_positions, query_segments=query_segments, key_segments=key_segments, relative=relative,
        block=block,
    )  # fmt: skip
    return _attend(rule, float(scale), implementation, x, query_temperature, value_temperature)


def checked_inputs(
    q, k, v, *, causal, window, softcap, query_positions, key_positions, query_segments, key_segments, relative,
    block,
):  # fmt: skip
    """Checks shapes; [B, S] becomes [B, 1, S], a missing half of the segments GLOBAL. Returns: Operands, Rule."""
    batch, heads, group, length, size = q.shape
    if k.shape[:2] != (batch, heads) or k.shape[3] != size or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"q [B, K, G, T, H] {q.shape}, k [B, K, S, H] {k.shape}, v [B, K, S, H'] {v.shape} do not fit")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must be of one dtype; they are {q.dtype}, {k.dtype}, {v.dtype}")
    if (query_positions is None) != (key_positions is None):
        raise ValueError("give the positions of both queries and keys, or of neither")
    of_queries, of_keys = ((batch, length),), ((batch, k.shape[2]), (batch, 1, k.shape[2]), k.shape[:3])
    for name, y, shapes in [
        ("query_positions", query_positions, of_queries), ("query_segments", query_segments, of_queries),
        ("key_positions", key_positions, of_keys), ("key_segments", key_segments, of_keys),
    ]:  # fmt: skip
        if y is not None and (y.shape not in shapes or y.dtype != jnp.int32):
            raise ValueError(
                f"{name} must be int32 of shape {' or '.join(map(str, shapes))}; it is {y.dtype} {y.shape}"
            )
    behind, ahead = window if isinstance(window, tuple) else (window, window)
    if behind is None and ahead is None:
        query_positions = key_positions = None  # nothing goes by them
    if query_segments is None and key_segments is not None:
        query_segments = jnp.full((batch, length), GLOBAL, jnp.int32)
    if key_segments is None and query_segments is not None:
        key_segments = jnp.full((batch, k.shape[2]), GLOBAL, jnp.int32)
    by_head = lambda x: x if x is None or x.ndim == 3 else x[:, None]
    r, table = (None, None) if relative is None else relative
    if relative is not None:
        far = k.shape[2] if behind is None or query_positions is not None else min(behind, k.shape[2])
        if not causal:
            raise ValueError("a relative table holds distances from 0 on: it needs causal=True")
        if not q.dtype == r.dtype == table.dtype:
            raise ValueError(f"the relative term must be of q's dtype {q.dtype}; it is {r.dtype}, {table.dtype}")
        if table.shape[2] < far:
            raise ValueError(f"the relative table {table.shape} [K|1, G|1, R, H] must cover {far} distances")
    x = Operands(q, k, v, query_positions, by_head(key_positions), query_segments, by_head(key_segments), r, table)
    return x, Rule(causal=causal, window=(behind, ahead), softcap=softcap, block=block)


def fold(scale: float, x: Operands, query_temperature, value_temperature) -> Operands:
    """Scale and temperatures multiplied into queries and values, and zeros where keys are dead."""
    times = lambda y, factor: (y.astype(jnp.float32) * factor).astype(y.dtype)
    temperature = scale if query_temperature is None else scale * query_temperature.astype(jnp.float32)[..., None]
    k, v = x.k, x.v
    if x.key_segments is not None:
        live = (x.key_segments > DEAD)[..., None]
        k, v = jnp.where(live, k, 0), jnp.where(live, v, 0)
    if value_temperature is not None:
        v = times(v, value_temperature.astype(jnp.float32)[..., None])
    r = None if x.relative_q is None else times(x.relative_q, scale)
    return x._replace(q=times(x.q, temperature), k=k, v=v, relative_q=r)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(rule, scale, implementation, x, query_temperature, value_temperature):
    x = fold(scale, x, query_temperature, value_temperature)
    return call("flash_attention", IMPLEMENTATIONS, implementation, x, rule=rule)


def _forward(rule, scale, implementation, *inputs):
    out, lse = _attend(rule, scale, implementation, *inputs)
    return (out, lse), (inputs, out, lse)


def _backward(rule, scale, implementation, kept, cotangents):
    (x, *temperatures), out, lse = kept
    d_out, d_lse = cotangents
    integers = {
        name: y for name, y in x._asdict().items() if y is not None and not jnp.issubdtype(y.dtype, np.floating)
    }
    of_floats = lambda x, *temperatures: fold(scale, x._replace(**integers), *temperatures)
    floats = x._replace(**dict.fromkeys(integers))
    folded, pull = jax.vjp(lambda *a: of_floats(*a)._replace(**dict.fromkeys(integers)), floats, *temperatures)
    delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1) - d_lse
    folded = folded._replace(**integers)
    d_folded = call("flash_attention backward", BACKWARD, implementation, folded, lse, delta, d_out, rule=rule)
    return pull(d_folded)


_attend.defvjp(_forward, _backward)
