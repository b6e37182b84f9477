"""The argument table of `decode_attention`, shared by the tests of numbers and the tests that compile for TPU.

Every pair of values of these axes occurs in some case and tier, as far as it can (`test_every_pair_occurs`): query heads of
a kv head, channels, rows, dtype, block rows with owners, a bias, and per tier slots, scheme of the keys, what is live.
8,192 slots come only with one small head, and kivi's groups only where they are whole.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.state import empty_tier, packed_keys, packed_values
from jaxkv.policies import make_policy
from jaxkv.quantization import SCHEMES, get_scheme
from jaxkv.types import Tier, TierSpec
from pallas_kernels.decode_attention import Packed, Source

HEADS = 2
OWN, ___, BIAS, ____ = True, False, True, False
TABLE = [  # G, H, B, dtype of queries, owners, bias, tiers: slots, scheme, live slots
    (3, 64, 5, "bfloat16", OWN, ____, "127 f32 dead", "1 rotated3 full", "640 fp8_e5m2 one"),
    (4, 96, 1, "float32", ___, BIAS, "1 fp8_e5m2 some", "127 fp8_e4m3 full", "640 rotated4 dead"),
    (1, 64, 1, "float32", OWN, ____, "127 int8 some", "128 int4 full", "8192 rotated2 one"),
    (7, 256, 5, "bfloat16", ___, BIAS, "1 fp8_e4m3 dead", "640 rotated2 some", "128 kivi2 one"),
    (8, 128, 5, "float32", ___, BIAS, "1 bf16 full", "127 int3 one", "640 int2 dead"),
    (3, 80, 1, "float32", OWN, BIAS, "1 rotated3 one", "640 kivi2 one", "128 kivi4 some"),
    (4, 80, 5, "bfloat16", ___, ____, "127 rotated4 full", "127 int2 some", "640 int8 dead"),
    (1, 64, 1, "bfloat16", ___, BIAS, "8192 bf16 dead", "640 int4 dead", "127 int3 dead"),
    (7, 96, 1, "bfloat16", OWN, ____, "1 int3 one", "127 bf16 dead", "128 kivi4 full"),
    (8, 256, 1, "bfloat16", OWN, ____, "127 rotated2 full", "128 int2 one", "128 fp8_e4m3 some"),
    (7, 128, 5, "float32", OWN, ____, "128 rotated4 some", "127 int4 dead", "128 f32 one"),
    (1, 256, 5, "bfloat16", ___, BIAS, "640 kivi4 dead", "128 f32 some", "127 rotated3 some"),
    (4, 256, 5, "bfloat16", OWN, BIAS, "127 f32 one", "128 int8 full", "640 int3 full"),
    (8, 80, 1, "float32", ___, BIAS, "1 f32 one", "128 fp8_e5m2 dead", "127 int4 one"),
    (3, 128, 1, "bfloat16", OWN, BIAS, "127 fp8_e5m2 one", "1 rotated2 dead", "128 rotated3 dead"),
    (1, 64, 1, "bfloat16", ___, ____, "8192 rotated4 some", "8192 kivi4 one", "8192 kivi2 dead"),
    (8, 96, 1, "bfloat16", OWN, ____, "127 int4 some", "1 int8 one", "640 rotated3 some"),
    (3, 256, 5, "bfloat16", OWN, BIAS, "128 bf16 full", "640 fp8_e5m2 one", "1 rotated4 one"),
    (1, 128, 5, "bfloat16", ___, ____, "128 fp8_e4m3 one", "640 int8 dead", "1 int2 full"),
    (4, 80, 1, "float32", OWN, BIAS, "640 fp8_e4m3 one", "640 bf16 one", "640 kivi2 some"),
    (3, 96, 5, "bfloat16", ___, ____, "640 int2 some", "640 f32 one", "1 int4 one"),
    (1, 64, 1, "bfloat16", OWN, ____, "8192 fp8_e4m3 dead", "128 fp8_e5m2 full", "8192 int3 full"),
    (3, 96, 5, "float32", OWN, BIAS, "640 int8 one", "128 int3 some", "127 f32 full"),
    (7, 80, 5, "bfloat16", ___, BIAS, "128 int2 full", "1 fp8_e5m2 one", "127 rotated2 one"),
    (4, 128, 5, "float32", OWN, BIAS, "640 kivi4 some", "128 rotated2 dead", "127 int4 dead"),
    (8, 64, 1, "bfloat16", OWN, BIAS, "128 int2 dead", "640 kivi2 full", "640 kivi4 full"),
    (7, 256, 1, "float32", OWN, BIAS, "127 int8 one", "127 bf16 dead", "128 int4 some"),
    (7, 64, 1, "float32", ___, ____, "128 rotated3 some", "640 int2 one", "127 bf16 some"),
    (8, 96, 1, "float32", ___, ____, "640 kivi2 one", "127 rotated2 full", "128 rotated4 full"),
    (1, 80, 1, "bfloat16", ___, ____, "128 rotated3 full", "640 int3 one", "127 int3 some"),
    (1, 64, 1, "bfloat16", ___, ____, "127 int2 some", "8192 f32 dead", "8192 rotated3 dead"),
    (1, 64, 1, "bfloat16", ___, ____, "8192 fp8_e5m2 full", "8192 int8 full", "127 int8 dead"),
    (4, 64, 5, "float32", OWN, ____, "1 rotated3 dead", "127 rotated2 dead", "128 int4 full"),
    (8, 128, 1, "bfloat16", ___, BIAS, "127 fp8_e5m2 full", "128 int8 full", "128 kivi2 dead"),
    (1, 96, 5, "bfloat16", OWN, BIAS, "127 bf16 dead", "127 int3 some", "640 int3 full"),
    (3, 64, 1, "bfloat16", ___, ____, "1 fp8_e4m3 full", "128 int2 some", "640 bf16 full"),
    (1, 64, 1, "bfloat16", ___, BIAS, "8192 int2 dead", "128 int8 some", "8192 int4 full"),
    (3, 64, 5, "float32", ___, BIAS, "128 int8 dead", "127 rotated4 dead", "1 f32 dead"),
]
AXES = {
    "G": (1, 3, 4, 7, 8), "H": (64, 80, 96, 128, 256), "B": (1, 5), "dtype": ("float32", "bfloat16"),
    "owners": (False, True), "bias": (False, True), "S": (1, 127, 128, 640, 8192), "scheme": tuple(SCHEMES),
    "live": ("full", "some", "one", "dead"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierCase:
    """slots; scheme of the keys; live: which slots hold a token."""

    slots: int
    scheme: str
    live: str

    @property
    def schemes(self) -> tuple[str, str]:
        """Keys and values; kivi's keys go with plain values of as many bits."""
        return self.scheme, self.scheme.replace("kivi", "int")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of one call. With owners, heads own one row less than there are, and the last row is of none."""

    group: int
    channels: int
    batch: int
    dtype: str
    owners: bool
    bias: bool
    tiers: tuple[TierCase, ...]

    @property
    def scale(self) -> float:
        """Of the logits, which are so of size 2: a few slots stand out, and taking them for others shows."""
        return 2 * self.channels**-0.5

    @property
    def softcap(self) -> float | None:
        return 4.0 if self.group in (3, 8) else None


def _case(group, channels, batch, dtype, owners, bias, *tiers):
    parsed = (tier.split() for tier in tiers)
    tiers = tuple(TierCase(slots=int(slots), scheme=scheme, live=live) for slots, scheme, live in parsed)
    return Case(group=group, channels=channels, batch=batch, dtype=dtype, owners=owners, bias=bias, tiers=tiers)


def _name(number, row):
    return f"{number:02}-G{row[0]}-H{row[1]}-B{row[2]}-" + "-".join(tier.replace(" ", ".") for tier in row[6:])


CASES = {_name(number, row): _case(*row) for number, row in enumerate(TABLE)}


def possible(group, channels, batch, slots, scheme) -> bool:
    """Whether a tier may be in the table."""
    whole = slots % get_scheme(scheme).granule == 0
    return whole and (slots < 8192 or (group, channels, batch) == (1, 64, 1))


def pairs_of(axes: dict) -> set:
    """All pairs of values of one case and tier, as (axis, value) twice."""
    return {frozenset(pair) for pair in itertools.combinations(axes.items(), 2)}


def axes_of(case: Case, tier: TierCase) -> dict:
    """The values that the axes have there."""
    return dict(zip(AXES, (
        case.group, case.channels, case.batch, case.dtype, case.owners, case.bias, tier.slots, tier.scheme, tier.live,
    ), strict=True))  # fmt: skip


def shapes(case: Case) -> tuple[Source, ...]:
    """The sources, the token itself last, as shapes."""
    rows = HEADS + 2 if case.owners else HEADS
    of = lambda *axes, dtype=case.dtype: jax.ShapeDtypeStruct((case.batch, *axes), jnp.dtype(dtype))
    sources = []
    for tier in case.tiers:
        spec = TierSpec(slots=tier.slots, scheme=tier.schemes)
        limit = jax.ShapeDtypeStruct((case.batch,), jnp.int32)
        policy = make_policy("recency")
        stored: Tier = jax.eval_shape(
            lambda limit, spec=spec, policy=policy: empty_tier(policy, spec, limit, (case.batch, rows, case.channels)),
            limit,
        )
        sources.append(
            Source(
                queries=of(rows, case.group, case.channels),
                keys=packed_keys(stored),
                values=packed_values(stored),
                live=of(rows, tier.slots, dtype=bool),
                finish=get_scheme(tier.schemes[1]).out_of_basis,
                owner=of(rows, dtype="int16") if case.owners else None,
                bias=of(rows, case.group, tier.slots, dtype="float32") if case.bias else None,
            )
        )
    new = of(HEADS, case.group, case.channels), of(HEADS, case.channels, 1), of(HEADS, 1, case.channels)
    bias = of(HEADS, case.group, 1, dtype="float32") if case.bias else None
    return (*sources, Source(*new, of(HEADS, 1, dtype=bool), bias=bias))


def make(case: Case, seed: int = 0) -> tuple[Source, ...]:
    """The same with numbers in them, and garbage in dead slots: NaN keys and biases, large values and factors."""
    rng = np.random.default_rng(seed)
    sources = []
    for number, source in enumerate(shapes(case)):
        tier = case.tiers[number] if number < len(case.tiers) else None
        live = _live(rng, source.live.shape, tier.live if tier else "full")
        if tier is None:  # a row whose tiers are dead may see nothing at all
            live[0] = not all(other.live == "dead" for other in case.tiers)
        owner = None
        if source.owner is not None:
            owner = np.tile(np.array([0, 1, 1, -1], np.int16), (case.batch, 1))
            live[owner < 0] = False
        bias = None
        if source.bias is not None:
            bias = np.where(live[:, :, None], rng.standard_normal(source.bias.shape), np.nan).astype(np.float32)
        queries = np.asarray(rng.standard_normal(source.queries.shape), source.queries.dtype)
        keys = _stored(rng, source.keys, live, True)
        values = _stored(rng, source.values, live, False)
        sources.append(source._replace(queries=queries, keys=keys, values=values, live=live, owner=owner, bias=bias))
    return tuple(sources)


def _live(rng, shape, kind):
    """[B, P, S] bool: rows of a batch are ragged, one after another full, thinned out or filled from the front."""
    if kind in ("full", "dead"):
        return np.full(shape, kind == "full")
    if kind == "one":
        return np.arange(shape[2]) == rng.integers(0, shape[2], (*shape[:2], 1))
    live = rng.random(shape) < 0.6
    front = np.arange(shape[2]) < rng.integers(0, shape[2] + 1, (*shape[:2], 1))
    live[1::3] = front[1::3]
    live[2::3] = False
    return live


def _stored(rng, stored, live, keys: bool):
    """Numbers of size 1 as they are stored."""
    if not isinstance(stored, Packed):
        there = live[:, :, None] if keys else live[..., None]
        x = rng.standard_normal(stored.shape)
        return np.where(there, x, np.nan if keys else 1e30).astype(stored.dtype)
    dead = ~live[:, :, None]
    bits, shape = stored.bits, stored.codes.shape
    bfloat16 = lambda x: np.asarray(x, jnp.bfloat16).view(np.uint16)
    if bits == 16:
        codes = np.where(dead, np.uint16(0x7FC0 if keys else 0x7149), bfloat16(rng.standard_normal(shape)))
        return stored._replace(codes=codes)
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    levels = np.asarray(stored.level(np.arange(2**bits, dtype=np.uint8)), np.float64)
    if not np.isfinite(levels).all():  # float8: infinities and NaN are never stored; numbers of size 1
        dtype = jnp.float8_e5m2 if np.isinf(levels).any() else jnp.float8_e4m3fn
        codes = np.asarray(np.clip(rng.standard_normal(shape), -3, 3), dtype).view(np.uint8)
        levels = np.array([-1.0, 1.0])
    codes = np.where(dead, np.uint8(0x7B), codes)
    width = levels.std()
    size = (0.5 + rng.random(stored.scale.shape)) / width
    gone = dead.reshape(*dead.shape[:3], stored.scale.shape[3], -1).all(axis=-1)
    factor = lambda x: np.where(gone, np.uint16(0x7149), bfloat16(x))
    zero = None if stored.zero is None else factor(-levels.mean() * size + rng.normal(size=size.shape) / 4)
    return stored._replace(codes=codes, scale=factor(size), zero=zero)
