"""What `hopper_compile` compiles, by name."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flash_cases import VIEWS

from jaxkv.cache.state import empty_tier, packed_keys, packed_values, tier_keys, tier_values
from jaxkv.policies import make_policy
from jaxkv.quantization import get_scheme
from jaxkv.types import TierSpec
from pallas_kernels.decode_attention import Source, decode_attention
from pallas_kernels.extend_attention import TierSource, extend_attention
from pallas_kernels.flash_attention import flash_attention

BATCH, HEADS, SLOTS = 2, 4, 1024


def program(case: str):
    """Returns: function, arguments as shapes, which are donated, bytes of an array as large as what is stored."""
    kind, _, words = case.partition(":")
    return {"decode": decode, "loop": loop, "flash": flash, "extend": extend}[kind](*words.split(","))


def _tier(scheme, channels):
    spec, limit = TierSpec(slots=SLOTS, scheme=tuple(scheme)), jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    make = functools.partial(empty_tier, make_policy("recency"), spec, shape=(BATCH, HEADS, channels))
    return jax.eval_shape(make, limit)


def _attend(q, tier, new, *, softcap, scores):
    turned = get_scheme(tier.scheme[0]).into_basis(q).astype(q.dtype)
    finish = get_scheme(tier.scheme[1]).out_of_basis
    stored = Source(turned, packed_keys(tier), packed_values(tier), tier.positions >= 0, finish)
    own = Source(q, jnp.swapaxes(new, 2, 3), new, jnp.ones(new.shape[:3], bool))
    return decode_attention((stored, own), scale=0.1, softcap=softcap, scores=scores)


def decode(keys, values, channels, dtype, group, softcap=None):
    """A tier and a new token."""
    channels, dtype, tier = int(channels), jnp.dtype(dtype), _tier((keys, values), int(channels))
    q = jax.ShapeDtypeStruct((BATCH, HEADS, int(group), channels), dtype)
    new = jax.ShapeDtypeStruct((BATCH, HEADS, 1, channels), dtype)
    run = functools.partial(_attend, softcap=softcap and float(softcap), scores=True)
    stored = min(x.codes.size * x.codes.dtype.itemsize for x in (tier.keys, tier.values))
    scores = 4 * BATCH * HEADS * int(group) * SLOTS
    return run, (q, tier, new), (), max(stored, scores + 1)


def loop(keys, values, channels, dtype, group):
    """Steps of decoding that attend to a tier and write a column of codes into it; the tier is donated."""
    _, (q, tier, new), _, stored = decode(keys, values, channels, dtype, group)

    def steps(q, tier, new):
        def one(carry):
            step, q, keys, values, positions = carry
            held = tier_of(keys, values, positions)
            out, _ = _attend(q, held, new, softcap=None, scores=False)
            columns = lambda x: jax.tree.map(lambda y: y.at[..., step].set(jnp.ones((), y.dtype)), x)
            return step + 1, out, columns(keys), columns(values), positions.at[..., step].set(step)

        tier_of = lambda k, v, p: dataclasses.replace(tier, keys=k, values=v, positions=p)
        start = jnp.zeros((), jnp.int32), q, tier.keys, tier.values, tier.positions
        _, q, *parts = jax.lax.while_loop(lambda carry: carry[0] < 16, one, start)
        return q, tier_of(*parts)

    return steps, (q, tier, new), (1,), stored


def flash(channels, view, length=512, keys=512, softcap=None):
    """The forward pass; view: of `flash_cases`, and behind it what else decides: "+segments", "+positions"."""
    view, *more = view.split("+")
    shape = lambda *axes: jax.ShapeDtypeStruct((2, 2, *axes, int(channels)), jnp.bfloat16)
    words = {
        "query": jax.ShapeDtypeStruct((2, int(length)), jnp.int32),
        "key": jax.ShapeDtypeStruct((2, 2, int(keys)), jnp.int32),
    }
    words = {f"{whose}_{what}": x for what in more for whose, x in words.items()}
    options = {"scale": 0.1, "softcap": softcap and float(softcap), "implementation": "gpu"} | VIEWS[view]
    run = lambda q, k, v, words: flash_attention(q, k, v, **options, **words)
    return (
        run,
        (shape(2, int(length)), shape(int(keys)), shape(int(keys)), words),
        (),
        4 * 2 * int(keys) * int(channels) * 2,
    )


def extend(scheme, channels, length=256):
    """New tokens against a tier and themselves, in bfloat16."""
    size, tier = int(channels), _tier((scheme, scheme), int(channels))
    queries = jax.ShapeDtypeStruct((BATCH, HEADS, 2, length, size), jnp.bfloat16)
    new = jax.ShapeDtypeStruct((BATCH, HEADS, length, size), jnp.bfloat16)

    def run(queries, keys, values, tier):
        source = Source(queries, tier_keys(tier), tier_values(tier), tier.positions >= 0)
        return extend_attention(
            queries, keys, values, (TierSource(source, tier.positions.astype(jnp.int32)),),
            positions=jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (BATCH, length)), segments=None, causal=True,
            valid=jnp.ones((BATCH, length), bool), window=None, scale=0.1, softcap=None, row_statistic=None, merge=None,
            implementation="gpu",
        )  # fmt: skip

    return run, (queries, new, new, tier), (), 2**40
