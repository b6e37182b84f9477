"""Which kernel runs: every operation of `pallas_kernels`, every storage scheme, every platform, and why not another.

Nothing runs: each operation is called on shapes, and in place of an implementation stands a function that asks the table of
the operation what it would choose.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp

from jaxkv.cache.state import (
    empty_tier,
    granule_of,
    live_slots,
    packed_keys,
    packed_values,
    positions_of,
    tier_keys,
    tier_values,
)
from jaxkv.policies import make_policy
from jaxkv.quantization import SCHEMES, get_scheme
from jaxkv.types import TierSpec
from pallas_kernels.causal_conv import causal_conv
from pallas_kernels.column_sums import column_sums
from pallas_kernels.decode_attention import Source, decode_attention, slot_multiple
from pallas_kernels.dispatch import PLATFORMS as COMPILED
from pallas_kernels.dispatch import chosen
from pallas_kernels.extend_attention import TierSource, extend_attention
from pallas_kernels.flash_attention import flash_attention
from pallas_kernels.quantize import quantize
from pallas_kernels.slots import read_slot

PLATFORMS = ("cpu", "tpu", "gpu")
SLOTS, TOKENS = 1024, 512  # of the cases
CAST = "cast"  # storage that is a cast has no operation of its own


def kernel_rows(config, dtype: str) -> list[dict]:
    """One row per operation, scheme (None: it has none) and platform.

    Returns: {"operation", "scheme", "platform", "implementation", "why_not"} each; implementation: what would run; why_not:
    the reasons of the platform's own kernels that would not, by name.
    """
    rows = []
    for operation, case in CASES.items():
        for name in SCHEMES if operation not in WITHOUT_SCHEME else (None,):
            try:
                scheme = None if name is None else get_scheme(name)
                if scheme:
                    scheme.check(config.head_dim)
                seen = _ask(functools.partial(case, config, jnp.dtype(dtype), scheme), operation in DIFFERENTIATED)
            except ValueError as error:  # vectors that this scheme does not store
                seen = {operation: {p: ("", {"": str(error)}) for p in PLATFORMS}}
            seen = seen or {operation: {p: (CAST, {}) for p in PLATFORMS}}
            rows += [
                {"operation": op, "scheme": name, "platform": platform, "implementation": found, "why_not": reasons}
                for op, by_platform in seen.items()
                for platform, (found, reasons) in by_platform.items()
            ]
    return rows


def kernels_here(config, dtype: str) -> dict[str, str]:
    """What reads this model's full cache on this process's platform: {operation: implementation}."""
    scheme, asked = get_scheme({"float32": "f32", "bfloat16": "bf16"}[dtype]), {}
    for operation in ("decode_attention", "extend_attention"):
        asked |= _ask(functools.partial(CASES[operation], config, jnp.dtype(dtype), scheme))
    return {operation: by_platform[jax.default_backend()][0] for operation, by_platform in asked.items()}


@functools.lru_cache(maxsize=256)
def kernels_of(config, spec, dtype: str) -> dict[str, str]:
    """What reads and writes a cache on this process's platform: {operation: implementation, or several, by commas}.

    spec: LayerSpec per layer of config. Of layers that differ in numbers of slots alone, the first is asked; nothing runs.
    """
    found, kinds, here = {}, {}, jax.default_backend()
    for layer in spec:
        kinds.setdefault(tuple((tier.scheme, tier.slots % slot_multiple()) for tier in layer.tiers), layer.tiers)
    for tiers in kinds.values():
        alone = [(one,) for one in tiers]
        for operation, asked in (("decode_attention", [tiers]), ("extend_attention", [tiers]), ("slots", alone)):
            for stored in asked:
                grouped = operation == "slots" and get_scheme(stored[0].scheme[0]).granule > 1  # XLA's everywhere
                name = "xla" if grouped else config.kernels
                if name is None and here == "cpu":
                    name = "xla"  # no kernel is for it, and asking takes a tenth of a second
                if name is None:
                    seen = _ask(functools.partial(CASES[operation], config, jnp.dtype(dtype), stored))
                    name = seen[operation][here][0]
                found.setdefault(operation, set()).add(name)
    return {operation: ", ".join(sorted(names)) for operation, names in found.items()}


def table(rows: list[dict]) -> str:
    """The rows as text: what runs, then the reasons, each once."""
    cells = {(row["operation"], row["scheme"] or "-"): {} for row in rows}
    reasons = {}
    for row in rows:
        key = row["operation"], row["scheme"] or "-"
        cells[key][row["platform"]] = row["implementation"] or "none"
        for name, reason in row["why_not"].items():
            reasons.setdefault((row["platform"], row["operation"], name, reason), []).append(key[1])
    lines = [("operation", "scheme", *PLATFORMS), *((*key, *map(found.get, PLATFORMS)) for key, found in cells.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    if reasons:
        text += ["", "why not:"]
    for (platform, operation, name, reason), schemes in reasons.items():
        where = "" if schemes == ["-"] else f" ({', '.join(schemes)})"
        text.append(f"  {platform} {operation}{where}: {name + ': ' if name else ''}{reason}")
    return "\n".join(text)


class _Asked(Exception):
    """The question is answered; what would follow is not of interest."""


def _ask(case, differentiated: bool = False) -> dict[str, dict[str, tuple[str, dict[str, str]]]]:
    """{operation: {platform: (what would run, {kernel of the platform: why it would not})}} of what `case` calls: the
    first operation, or all that follow from differentiating it."""
    seen = {}

    def ask(operation, implementations, *args, **options):
        seen[operation] = {}
        for platform in PLATFORMS:
            compiled = None if platform == "cpu" else COMPILED.get(platform, platform)
            own = {
                name: one for name, one in implementations.items()
                if one.platform == compiled and compiled and not one.by_name_only
            }  # fmt: skip
            reasons = {name: one.why_not(*args, **options) for name, one in own.items()}
            reasons = {name: reason for name, reason in reasons.items() if reason is not None}
            if compiled and not own:
                reasons[""] = "no kernel of its own"
            found = chosen(operation, implementations, None, *args, platform=compiled, **options)
            seen[operation][platform] = found, reasons
        if not differentiated:
            raise _Asked
        default = chosen(operation, implementations, None, *args, platform=None, **options)
        return implementations[default].run(*args, **options)

    with contextlib.suppress(_Asked):
        jax.eval_shape(lambda: case(ask))
    return seen


def _normal(dtype, *shape):
    return jnp.zeros(shape, dtype)


def _tiers(config, stored):
    """stored: a tuple of TierSpec, or a scheme: then one tier of it, for values of the nearest where it is for keys only."""
    if not isinstance(stored, tuple):
        values = f"int{stored.bits}" if stored.keys_only else stored.name
        stored = (TierSpec(slots=SLOTS, scheme=(stored.name, values)),)
    shape = (1, config.num_kv_heads, config.head_dim)
    return [empty_tier(make_policy("full"), spec, jnp.full((1,), spec.slots, jnp.int32), shape) for spec in stored]


def _relative(config) -> bool:
    """Whether distances add to the logits."""
    return config.rcmha is not None and config.rcmha.relative != "none"


def _decode(config, dtype, scheme, ask):
    heads, size = config.num_kv_heads, config.head_dim
    queries = _normal(dtype, 1, heads, config.num_heads // heads, size)
    own = _normal(dtype, 1, heads, size, 1)
    bias = lambda x: {"bias": _normal(jnp.float32, *queries.shape[:3], x.shape[2])} if _relative(config) else {}
    of = lambda *x, live: Source(queries, *x, live, **bias(live))
    sources = (
        *(of(packed_keys(t), packed_values(t), live=live_slots(t)) for t in _tiers(config, scheme)),
        of(own, jnp.swapaxes(own, 2, 3), live=jnp.ones((1, heads, 1), bool)),
    )
    decode_attention(sources, scale=config.query_scale, softcap=config.attention_softcap, implementation=ask)


def _extend(config, dtype, scheme, ask):
    heads, size = config.num_kv_heads, config.head_dim
    queries, keys = (
        _normal(dtype, 1, heads, config.num_heads // heads, TOKENS, size),
        _normal(dtype, 1, heads, TOKENS, size),
    )
    tiers = tuple(
        TierSource(Source(queries, tier_keys(t), tier_values(t), live_slots(t)), positions_of(t))
        for t in _tiers(config, scheme)
    )
    extend_attention(
        queries, keys, keys, tiers, positions=jnp.zeros((1, TOKENS), jnp.int32),
        valid=jnp.ones((1, TOKENS), bool), segments=None, causal=True, window=None, scale=config.query_scale,
        softcap=config.attention_softcap, row_statistic=None, merge=None, implementation=ask,
        **({"relative": (queries, keys)} if _relative(config) else {}),
    )  # fmt: skip


def _quantize(config, dtype, scheme, ask):
    if scheme.how is not None:
        x = _normal(dtype, 1, config.num_kv_heads, TOKENS, config.head_dim)
        quantize(x, how=scheme.how(config.head_dim), implementation=ask)


def _causal_conv(config, dtype, scheme, ask):
    x, filters = _normal(dtype, 1, config.num_heads, TOKENS, config.head_dim), _normal(dtype, 3, config.head_dim)
    jax.grad(lambda x: causal_conv(x, filters, None, None, implementation=ask)[0].sum().astype(jnp.float32))(x)


def _flash(config, dtype, scheme, ask):
    heads, size = config.num_kv_heads, config.head_dim
    q, k = _normal(dtype, 1, heads, config.num_heads // heads, TOKENS, size), _normal(dtype, 1, heads, TOKENS, size)
    attend = lambda q: flash_attention(
        q, k, k, causal=True, scale=config.query_scale, softcap=config.attention_softcap, implementation=ask
    )
    jax.grad(lambda q: attend(q)[0].astype(jnp.float32).sum())(q)


def _column_sums(config, dtype, scheme, ask):
    heads, size = config.num_kv_heads, config.head_dim
    q, k = _normal(dtype, 1, heads, config.num_heads // heads, TOKENS, size), _normal(dtype, 1, heads, TOKENS, size)
    column_sums(
        q, k, jnp.zeros(q.shape[:-1]), causal=True, scale=config.query_scale, softcap=config.attention_softcap,
        implementation=ask,
    )  # fmt: skip


def _slots(config, dtype, scheme, ask):
    (tier,) = _tiers(config, scheme)
    arrays = (tier.keys.codes, *tier.keys.factors)
    slot = jnp.zeros(tier.limit.shape, jnp.int32)
    read_slot(
        arrays, slot, axes=(3,) * len(arrays), groups=tier.positions.shape[-1] // granule_of(tier), implementation=ask
    )


CASES = {  # operation: a call of it on shapes of a model
    "decode_attention": _decode,
    "extend_attention": _extend,
    "quantize": _quantize,
    "flash_attention": _flash,
    "column_sums": _column_sums,
    "causal_conv": _causal_conv,
    "slots": _slots,
}
DIFFERENTIATED = ("flash_attention", "causal_conv")  # their backward pass is asked too
WITHOUT_SCHEME = (*DIFFERENTIATED, "column_sums")  # these know no scheme
