"""The table of caches by name: a policy and the tiers under it. A preset is data, not code.

Preset   policy          which entries move down, and out
         parts           the tiers, first to last: how many entries each takes, and how it stores them
         funnel          how much more the first layer gets than the last
    ladder          other tiers for other budgets
"""

import dataclasses
import math

from jaxkv.policies import H2O, POLICIES, Full, KVzip, Policy, Recency, Replay, Scissorhands, SnapKV, make_policy
from jaxkv.quantization import get_scheme

COMPUTE = "compute"  # stored as it was computed
STEP = 8  # of places that a share is cut into
RESIDUAL = 32  # newest tokens that quantized presets keep in bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One tier. keys, values: storage schemes. share: of the entries that the fixed tiers leave; slots: a fixed number."""

    keys: str
    values: str
    share: float = 0.0
    slots: int | None = None

    @property
    def granule(self) -> int:
        """Slots that are filled together."""
        return 1 if self.keys == COMPUTE else get_scheme(self.keys).granule

    def __post_init__(self):
        for name in (self.keys, self.values):
            if name != COMPUTE:
                get_scheme(name)
        if self.slots is None and not 0 < self.share <= 1:
            raise ValueError(f"a part takes a share in (0, 1] of the entries or a number of slots, got {self.share}")
        if self.slots is not None and (self.slots < 1 or self.share):
            raise ValueError(f"a part of a fixed size has at least 1 slot and no share, got {self.slots}, {self.share}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A named cache.

    source: of the whole, where it is not the policy's. funnel: the first layer's budget over the last one's, linear in
    between. ladder: (least share, parts), the largest share first: the first whose share the budget reaches, else `parts`.
    calibrated: such a ladder for models that `jaxkv.calibration` knows, whose kv heads get what it says; () = they do not.
    """

    name: str
    summary: str
    policy: Policy
    parts: tuple[Part, ...]
    source: str = ""
    funnel: float = 1.0
    ladder: tuple[tuple[float, tuple[Part, ...]], ...] = ()
    calibrated: tuple[tuple[float, tuple[Part, ...]], ...] = ()

    def __post_init__(self):
        for parts in (self.parts, *(parts for _, parts in (*self.ladder, *self.calibrated))):
            if not parts:
                raise ValueError(f"preset {self.name!r} has no tiers; give at least one Part")
            if abs(sum(part.share for part in parts) - 1) > 1e-6:
                raise ValueError(f"the shares of preset {self.name!r} must add up to 1, got {[p.share for p in parts]}")
            if parts[0].granule > 1:
                raise ValueError(
                    f"preset {self.name!r} starts with {parts[0].keys!r}, whose groups of {parts[0].granule} tokens need a tier"
                    " above them to wait in; put a Part of 'bf16' first"
                )
            if any((part.slots or 0) % part.granule for part in parts):
                raise ValueError(f"preset {self.name!r} has a part whose slots are not whole groups: {parts}")
        if not self.funnel > 0:
            raise ValueError(f"funnel must be more than 0, got {self.funnel}")

    def at(self, share: float, *, calibrated: bool = False) -> "Preset":
        """The preset for a budget of this share of a full bfloat16 cache, without ladders."""
        ladder = self.calibrated if calibrated else self.ladder
        parts = next((parts for least, parts in ladder if share >= least), self.parts)
        return dataclasses.replace(self, parts=parts, ladder=(), calibrated=())

    @property
    def exact(self) -> bool:
        """Whether nothing is quantized below bfloat16."""
        return all(name in (COMPUTE, "bf16", "f32") for part in self.parts for name in (part.keys, part.values))


def one_tier(scheme: str) -> tuple[Part, ...]:
    """Everything in one tier."""
    return (Part(keys=scheme, values=scheme, share=1.0),)


def tiers(*shares: tuple[float, str, str] | tuple[float, str], residual: int = RESIDUAL) -> tuple[Part, ...]:
    """A bfloat16 residual, then (share, scheme) or (share, key scheme, value scheme) each."""
    parts = tuple(Part(share=share, keys=schemes[0], values=schemes[-1]) for share, *schemes in shares)
    return (Part(keys="bf16", values="bf16", slots=residual), *parts) if residual else parts


def _preset(name, summary, policy, parts, **more):
    return Preset(name=name, summary=summary, policy=policy, parts=parts, **more)


def _auto(evicting: float):
    """The ladder of `auto`, measured by benchmarks/auto.py: as many bits as all tokens can have, keys more than values, down to
    8 and 4; from the share `evicting` on those stay and tokens go, below it tokens have fewer bits, down to 3 and 2."""
    return (
        (1.0, one_tier("bf16")),
        (0.57, tiers((1.0, "int8"))),
        (0.48, tiers((0.5, "int8"), (0.5, "int8", "rotated4"))),
        (evicting, tiers((1.0, "int8", "rotated4"))),
        (0.1, tiers((0.3, "rotated4"), (0.7, "rotated4", "rotated3"))),
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(name="full", summary=Full.summary, policy=Full(), parts=one_tier(COMPUTE)),
        *(
            Preset(name=name, summary=policy.summary, policy=policy(), parts=one_tier("bf16"))
            for name, policy in POLICIES.items()
            if name not in ("full", "kvzip")
        ),
        Preset(
            name="kvzip", summary=KVzip.summary, policy=KVzip(), parts=one_tier("bf16"), calibrated=((0.0, one_tier("bf16")),)
        ),
        _preset("streaming", "recency by its paper's name", Recency(), one_tier("bf16")),
        _preset("pyramid", "snapkv, early layers keep four times what late ones do", SnapKV(), one_tier("bf16"), funnel=4,
            source="PyramidKV, arXiv 2406.02069",
        ),
        _preset(
            "scissorhands-4bit", "scissorhands, all but the newest in 4 bits", Scissorhands(recent=RESIDUAL),
            tiers((1.0, "int4")),
        ),
        _preset(
            "mikv", "h2o, a fifth in bfloat16, the rest in 2 bits", H2O(),
            tiers((0.2, "bf16"), (0.8, "balanced-int2", "int2"), residual=0), source="MiKV, arXiv 2402.18096",
        ),
        *(
            _preset(
                f"rotated-{bits}", f"all but the newest rotated, {bits} bits", H2O(recent=RESIDUAL, recent_share=0.0),
                tiers((1.0, f"rotated{bits}")),
            )
            for bits in (4, 3, 2)
        ),
        *(
            _preset(
                name, f"the newest, 32 exact, the rest in {bits} bits, keys per channel", Recency(recent=RESIDUAL),
                tiers((1.0, f"kivi{bits}", f"int{bits}")), source="KIVI, arXiv 2402.02750",
            )
            for name, bits in (("kivi", 2), ("kivi-4", 4), ("kivi-2", 2))
        ),
        Preset(
            name="auto", summary="replay over quantized tiers, as many bits as the bytes allow", policy=Replay(),
            parts=tiers((0.4, "rotated4", "rotated3"), (0.6, "rotated3", "rotated2")), ladder=_auto(0.4),
            calibrated=_auto(0.2),  # heads that get what they deserve lose less by fewer tokens than by fewer bits
        ),
    )
}  # fmt: skip


def split(parts: tuple[Part, ...], tokens: int) -> list[int]:
    """Places per tier for so many tokens: the fixed parts first, the rest by shares, in steps; the last takes what is left.

    A tier of groups takes whole ones. What is left of one waits above it, without a place of its own; if there is no whole
    group, nothing waits, and the tier above takes it.
    """
    fixed, left = [], tokens
    for part in parts:
        fixed.append(min(part.slots or 0, left) // part.granule * part.granule)
        left -= fixed[-1]
    shares = [part.share for part in parts]
    last = max(index for index, share in enumerate(shares) if share)
    steps = [math.lcm(STEP, part.granule) for part in parts]
    places = [int(share * left) // step * step for share, step in zip(shares, steps, strict=True)]
    places[last] = 0
    left -= sum(places)
    places[last] = left // parts[last].granule * parts[last].granule
    places = [a + b for a, b in zip(fixed, places, strict=True)]
    first = next(index for index in range(last, -1, -1) if parts[index].granule == 1)
    if not any(places[first + 1 : last + 1]):
        places[first] += left - places[last]
    return places


def make_preset(spec: str | Policy | Preset, **options) -> Preset:
    """A cache by name, with options of its policy; a policy alone keeps what it keeps in bfloat16.

    Raises: ValueError for a name that is not in the table or an option that the policy does not have.
    """
    if isinstance(spec, str):
        if spec not in PRESETS:
            raise ValueError(f"unknown cache {spec!r}; known: {', '.join(PRESETS)}")
        spec = PRESETS[spec]
    if isinstance(spec, Preset):
        return dataclasses.replace(spec, policy=make_policy(spec.policy, **options)) if options else spec
    policy = make_policy(spec, **options)
    parts = one_tier(COMPUTE if isinstance(policy, Full) else "bf16")
    return Preset(name=policy.name, summary=policy.summary, policy=policy, parts=parts)
