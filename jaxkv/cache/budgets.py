"""From what a user asks for ("20%", "64MiB", 1024) to the shape of a cache, and what it takes.

"20%" is a fifth of the bytes that the keys and values of a full bfloat16 cache of this length take, whatever the
computation's own precision. All that a cache allocates counts against it: codes, factors, positions, what the policy
keeps per slot and per row. Slots come in steps of 8 (a tier that is cut) or of `slot_grid` (one that holds everything),
so a cache may take a little less than it was given, never more. Where all tokens fit, and age alone says which of them lie in
which tier, there is nothing to choose: the policy is `Full`, which keeps nothing of its own and asks for no second reading.
A scheme that stores groups (KIVI, 32 tokens) gets whole ones; up to 31 more tokens wait above until they are one, in slots
that count. They are not among the tokens asked for.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.shares import share_rows
from jaxkv.cache.state import empty_state, even_owners
from jaxkv.calibration import find
from jaxkv.config import DecoderConfig
from jaxkv.policies import Full, Policy
from jaxkv.presets import COMPUTE, STEP, Part, Preset, make_preset, one_tier, split
from jaxkv.types import LayerSpec, TierSpec

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
SCHEME = {"float32": "f32", "bfloat16": "bf16"}


@dataclasses.dataclass(frozen=True)
class Budget:
    """What was asked for: kind is "tokens", "bytes" or "share" (amount in 0..1]."""

    kind: str
    amount: float
    text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The shape of a cache and its price.

    preset: what was planned. spec: a LayerSpec per layer. limits: int [L, tiers, B], of each block row. owners: int [B, P] per
    layer, the kv head of each block row, or None: one each. bytes_per_row: allocated for one row of the batch.
    share: of the bytes of a full bfloat16 cache of the longest row's length; of a full cache in float32 it is 2.
    note: what was adjusted, or "".
    """

    preset: Preset
    spec: tuple[LayerSpec, ...]
    limits: np.ndarray
    owners: tuple[np.ndarray, ...] | None = None
    bytes_per_row: int
    share: float
    note: str

    def sizes(self, row: int | None = None, batch: int | None = None) -> dict:
        """limits and owners, what `empty_state` and `compress` want: of all rows, or of one, for a batch of its copies."""
        if row is None:
            return {"limits": self.limits, "owners": self.owners}
        one = lambda x, axis: np.repeat(np.take(x, [row], axis), batch or 1, axis)
        owners = None if self.owners is None else tuple(one(owner, 0) for owner in self.owners)
        return {"limits": one(self.limits, 2), "owners": owners}

    @property
    def tokens(self) -> np.ndarray:
        """int [L, B, K] or [L, B, 1]: how many each kv head may hold, or all alike."""
        held = self.limits.sum(axis=1)[:, :, None]
        if self.owners is None:
            return held
        heads = max(owner.max() for owner in self.owners) + 1
        return np.stack([held[i] * (o[:, :, None] == np.arange(heads)).sum(1) for i, o in enumerate(self.owners)])

    def describe(self) -> str:
        """One line for people: bytes, tokens, tiers and share."""
        low, high = int(self.tokens.min()), int(self.tokens.max())
        tokens = str(high) if low == high else f"{low} to {high}"
        stored = ", ".join(
            f"{self.limits[:, number].max()} {'/'.join(dict.fromkeys(tier.scheme))}"
            for number, tier in enumerate(self.spec[0].tiers)
        )
        rows = "" if self.owners is None else "in blocks of "
        line = (
            f"{self.preset.name} cache: {format_bytes(self.bytes_per_row)} per sequence, {tokens} tokens per kv head and"
            f" layer ({rows}{stored}), {self.share:.1%} of a full bfloat16 cache"
        )
        return f"{line}; {self.note}" if self.note else line


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def parse_budget(budget: int | float | str | None) -> Budget:
    """A budget as written: 1024 or "1024" tokens, "64MiB" bytes of one sequence's whole cache, "20%" of a full cache.

    Raises: ValueError for any other spelling, for zero and for negative amounts.
    """
    accepted = (
        "an int is tokens per kv head and layer, '64MiB' is bytes per sequence, '20%' is a share of the full cache"
    )
    if budget is None:
        return Budget("share", 1.0, "100%")
    text = str(budget).strip()
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(%|[a-zA-Z]*)", text)
    if isinstance(budget, bool) or match is None:
        raise ValueError(f"budget {budget!r} is not understood; {accepted}")
    amount, unit = float(match[1]), match[2].lower()
    if not 0 < amount < 1e15:
        raise ValueError(f"budget {budget!r:.40} must be more than 0 and below 10**15; {accepted}")
    if unit == "%":
        if amount > 100:
            raise ValueError(f"budget {budget!r} is more than 100%; {accepted}")
        return Budget("share", amount / 100, text)
    if unit == "":
        if amount != int(amount):
            raise ValueError(f"budget {budget!r} is not a whole number of tokens; {accepted}")
        return Budget("tokens", int(amount), text)
    if unit not in UNITS:
        raise ValueError(f"budget {budget!r} has an unknown unit {match[2]!r}; units: {', '.join(UNITS)}")
    return Budget("bytes", int(amount * UNITS[unit]), text)


def slot_grid(tokens: int) -> int:
    """The next allocation size: multiples of 32 up to 512, then of an eighth of the power of two below."""
    step = 32 if tokens <= 512 else 2 ** (int(math.log2(tokens - 1)) - 3)
    return max(32, -(-tokens // step) * step)


def fine_grid(tokens: int) -> int:
    """The next size of a tier that is cut to a budget: multiples of 8 up to 512, then of a 64th of the power of two below."""
    step = STEP if tokens <= 512 else 2 ** (int(math.log2(tokens - 1)) - 6)
    return max(STEP, -(-tokens // step) * step)


def plan(
    config: DecoderConfig, cache: str | Policy | Preset, budget, *, lengths: list[int], dtype: str, layer_weights=None,
    multiple: int = 1,
) -> Plan:  # fmt: skip
    """The cache of one layer after another for rows of these planned total lengths (prompt plus new tokens).

    Args:
      cache: a preset, its name, or a policy.
      layer_weights: None (the preset's own), or a number > 0 per layer: a layer gets budget * weight / mean(weights), at
        most the length of the row and its own window; what it cannot use is not given to others.
      multiple: of which slots are allocated, in tiers of more than four times as many: kernels read those where they lie, see
        `pallas_kernels.decode_attention.slot_multiple`.
    Raises: ValueError for a budget that cannot hold the protected tokens, with the least that can; for `full` with less
      than everything; for weights that do not fit the model.
    """
    asked, longest = parse_budget(budget), max(lengths)
    share = asked.amount / {"tokens": longest, "bytes": full_bytes(config, longest), "share": 1.0}[asked.kind]
    preset = make_preset(cache)
    calibration = find(config) if preset.calibrated and layer_weights is None else None
    if calibration is not None:
        known = preset.at(share, calibrated=True)
        found = _plan_for(config, known, asked, lengths, dtype, calibration=calibration, multiple=multiple)
        if found is not None:
            return found
    planned = _plan_for(config, preset.at(share), asked, lengths, dtype, layer_weights=layer_weights, multiple=multiple)
    if calibration is None:
        return planned
    why = "kv heads share evenly: what they deserve does not fit rows so different, or so small a budget"
    return dataclasses.replace(planned, note=_joined(planned.note, why))


def _plan_for(
    config, preset: Preset, asked: Budget, lengths, dtype, *, calibration=None, layer_weights=None, multiple=1
) -> Plan | None:
    """`plan` of one list of tiers. With a calibration: None where heads cannot be given what it says."""
    longest = max(lengths)
    funnel = np.linspace(preset.funnel, 1.0, config.num_layers).tolist()
    weights = _relative(funnel if layer_weights is None else layer_weights, config.num_layers)
    least = preset.policy.least_budget
    least = next(n for n in itertools.count(least) if sum(split(preset.parts, n)) >= least)  # in whole groups
    layout = functools.partial(
        _Layout,
        config=config,
        policy=preset.policy,
        dtype=dtype,
        positions="int16" if longest < 2**15 else "int32",
        multiple=multiple,
    )
    whole = layout(parts=one_tier(COMPUTE) if preset.exact else preset.parts, grid=slot_grid)
    cut = layout(parts=preset.parts, grid=fine_grid, weights=weights, floor=least if layer_weights is None else 0)
    if asked.kind == "tokens" or asked.amount == 1 and asked.kind == "share":
        most, room = (int(asked.amount) if asked.kind == "tokens" else longest), [math.inf] * len(lengths)
    else:
        most, room = longest, [
            asked.amount * (full_bytes(config, n) if asked.kind == "share" else 1) for n in lengths
        ]  # fmt: skip
    everything = [whole.limits(n, n) for n in lengths]
    if not isinstance(preset.policy, Full) and not _chooses(preset.policy, np.stack(everything)):
        whole = dataclasses.replace(whole, policy=Full())
    if all(most >= n and whole.bytes(held) <= b for n, held, b in zip(lengths, everything, room, strict=True)):
        note = f"budget {asked.text} holds all {longest} tokens, so nothing is evicted" if asked.kind != "share" else ""
        return _plan(preset, whole, everything, longest, note)
    if isinstance(preset.policy, Full):
        raise ValueError(
            f"the full cache of {longest} tokens does not fit budget {asked.text}; leave the budget out, or choose an"
            " evicting policy"
        )
    if calibration is not None:
        shared = share_rows(cut, calibration, lengths, room, [min(most, n) for n in lengths])
        return None if shared is None else _plan_rows(preset, cut, *shared, longest)
    kept = [cut.most(min(most, n), n, b) for n, b in zip(lengths, room, strict=True)]
    thin = [k < min(least, n) for k, n in zip(kept, lengths, strict=True)]
    note = ""
    if any(thin) and asked.kind == "share":
        note = f"raised from {min(kept)} to {least} tokens, the least that holds the protected ones"
        kept = [max(k, min(least, n)) for k, n in zip(kept, lengths, strict=True)]
    elif any(thin):
        raise ValueError(
            f"budget {asked.text} gives {min(kept)} tokens per kv head and layer, less than the {least} that"
            f" {preset.policy.name!r} protects ({preset.policy.recent} newest, {preset.policy.sinks} first); the least is"
            f" {least} tokens or {cut.bytes(cut.limits(least, least))} bytes"
        )
    limits = [cut.limits(k, n) for k, n in zip(kept, lengths, strict=True)]
    if layer_weights is not None and min(x.sum(axis=1).min() for x in limits) < least:
        thinnest = min(range(config.num_layers), key=lambda index: weights[index])
        raise ValueError(
            f"budget {asked.text} with these layer_weights gives layer {thinnest} fewer than the {least} tokens that"
            f" {preset.policy.name!r} protects; give it more weight or the cache a larger budget"
        )
    return _plan(preset, cut, limits, longest, note)


def _chooses(policy: Policy, limits: np.ndarray) -> bool:
    """Whether a policy has a say when these places [..., tiers] hold all: not where the newest, which it protects, fill the
    tiers above the last."""
    above = np.cumsum(limits, axis=-1, dtype=np.int32)[..., :-1]
    return above.size > 0 and bool((above > policy.protected_recent(jnp.asarray(above))).any())


def _plan_rows(preset, layout, limits, slots, owners, longest) -> Plan:
    """limits [B, tiers], slots [tiers] of each block row; owners: the head of each, [B, P] per layer."""
    layers = len(owners)
    spec = layout.spec(np.tile(slots, (layers, 1)), [owner.shape[1] for owner in owners])
    size = state_bytes(layout.config, spec)
    return Plan(
        preset=preset, spec=spec, limits=np.tile(limits.T, (layers, 1, 1)).astype(np.int32),
        owners=owners,
        bytes_per_row=size, share=size / full_bytes(layout.config, longest), note="",
    )  # fmt: skip


def _plan(preset, layout, limits, longest, note) -> Plan:
    spec = layout.spec(layout.slots(np.max(limits, axis=0)))
    size = state_bytes(layout.config, spec)
    return Plan(
        preset=preset, spec=spec, limits=np.stack(limits, axis=-1).astype(np.int32), bytes_per_row=size,
        share=size / full_bytes(layout.config, longest), note=_joined(note, _unused(layout.parts, limits)),
    )  # fmt: skip


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _unused(parts: tuple[Part, ...], limits) -> str:
    """Says which low-bit tiers have no place in any layer of any row, because all there is lies in those above."""
    held = np.sum(limits, axis=(0, 1))
    names = ["/".join(dict.fromkeys((p.keys, p.values))) for p, n in zip(parts, held, strict=True) if not n]
    return f"so few tokens that none is stored as {' or '.join(names)}" if names else ""


def full_bytes(config: DecoderConfig, length: int) -> int:
    """What "100%" means: the keys and values of one row of this length in a full bfloat16 cache."""
    held = sum(length if layer.window is None else min(length, layer.window) for layer in config.layers)
    return held * config.num_kv_heads * config.head_dim * 2 * 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Layout:
    """How many places the tiers get in each layer, and what they cost. Arrays are [L, tiers].

    positions: dtype, as narrow as the longest row allows. weights: of the layers, None = each holds its whole row. floor:
    tokens that every layer gets if it was to get any. multiple: as `plan` takes it.
    """

    config: DecoderConfig
    policy: Policy
    dtype: str
    positions: str
    parts: tuple[Part, ...]
    grid: Callable[[int], int]
    weights: list[float] | None = None
    floor: int = 0
    multiple: int = 1

    def limits(self, tokens: int, length: int) -> np.ndarray:
        """Places when a layer of weight 1 keeps `tokens` of `length`."""
        rows, weights = [], self.weights or [1.0] * self.config.num_layers
        for weight, kind in zip(weights, self.config.layers, strict=True):
            wanted = tokens if weight == 1.0 else max(1, int(tokens * weight), min(self.floor, tokens))
            rows.append(split(self.parts, min(wanted, length, length if kind.window is None else kind.window)))
        return np.asarray(rows)

    def slots(self, limits: np.ndarray) -> np.ndarray:
        """Allocated for these places, and for those that wait above a tier of groups."""
        granules = np.asarray([part.granule for part in self.parts])
        wait = np.zeros_like(limits)
        for number in range(len(granules) - 1):
            run = list(itertools.takewhile(lambda n: granules[n] > 1, range(number + 1, len(granules))))
            if granules[number] == 1 and run:
                wait[:, number] = (granules[number + 1] - 1) * limits[:, run].any(axis=1)
        slots = np.vectorize(self.grid)(limits + wait)
        steps = np.where(slots > 4 * self.multiple, np.lcm(granules, self.multiple), granules)
        return -(-slots // steps) * steps

    def spec(self, slots: np.ndarray, rows: list[int] | None = None) -> tuple[LayerSpec, ...]:
        """The shape of these slots. rows: block rows of each layer, if heads share them out."""
        stored = lambda name: SCHEME[self.dtype] if name == COMPUTE else name
        schemes = [(stored(part.keys), stored(part.values)) for part in self.parts]
        tiers = lambda row: tuple(
            TierSpec(slots=n, scheme=s, positions=self.positions) for n, s in zip(row, schemes, strict=True)
        )
        rows = rows or [None] * len(slots)
        return tuple(
            LayerSpec(policy=self.policy, tiers=tiers(row), rows=count)
            for row, count in zip(slots.tolist(), rows, strict=True)
        )

    @functools.cached_property
    def costs(self) -> tuple[int, np.ndarray]:
        """Bytes of a state without slots, and of one slot of each tier in one layer."""
        one = dataclasses.replace(self.config, layers=self.config.layers[:1])
        size = lambda row: state_bytes(one, self.spec(row[None]))
        step = math.lcm(STEP, *(part.granule for part in self.parts))
        base = np.full(len(self.parts), step)
        per_slot = np.asarray([(size(base + step * e) - size(base)) // step for e in np.eye(len(base), dtype=int)])
        count = self.config.num_layers
        everything = state_bytes(self.config, self.spec(np.tile(base, (count, 1))))
        return everything - int(step * count * per_slot.sum()), per_slot

    def bytes(self, limits: np.ndarray) -> int:
        """Of one row with these places."""
        fixed, per_slot = self.costs
        return fixed + int((self.slots(limits) * per_slot).sum())

    def most(self, upto: int, length: int, budget: float) -> int:
        """The most tokens whose bytes stay within the budget."""
        low, high = 0, upto
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes(self.limits(middle, length)) <= budget else (low, middle - 1)
        return low


def _relative(layer_weights, layers: int) -> list[float]:
    """Weights over their mean."""
    weights = [float(w) for w in layer_weights]
    if len(weights) != layers or not all(0 < w < math.inf for w in weights):
        raise ValueError(f"layer_weights must be {layers} numbers > 0, one per layer, got {weights}")
    return [w * layers / sum(weights) for w in weights]


@functools.lru_cache(maxsize=256)
def state_bytes(config: DecoderConfig, spec: tuple[LayerSpec, ...]) -> int:
    """Bytes that the state of one row takes, from its shapes; nothing is allocated."""
    limits, owners = np.zeros((len(spec), len(spec[0].tiers), 1), np.int32), even_owners(spec, 1, config.num_kv_heads)
    new = lambda: empty_state(config, spec, limits=limits, lengths=np.ones(1, np.int32), owners=owners)
    return tree_bytes(jax.eval_shape(new))


def tree_bytes(tree) -> int:
    """Bytes of all arrays of a pytree. Carriers are whole bytes wide, so shapes and dtypes tell the truth."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
