"""From what a user asks for ("20%", "64MiB", 1024) to the shape of a cache, and what it takes.

A share counts an unquantized entry at 16 bits, whether the computation runs in bfloat16 or float32, and keys and values
only: "20%" keeps a fifth of the tokens. `bytes_per_row` counts all that is allocated, at its real width: keys, values,
positions and what the policy keeps.
"""

import dataclasses
import math
import re

import jax
import numpy as np

from jaxkv.cache.state import empty_state
from jaxkv.config import DecoderConfig
from jaxkv.policies import Full, Policy
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

    spec: a LayerSpec per layer. limits: int [L, 1, B]. slots: per layer. bytes_per_row: allocated for one row.
    share: kept keys and values over those of a full cache of this length, both at 16 bits; the longest row's.
    note: what was adjusted, or "".
    """

    spec: tuple[LayerSpec, ...]
    limits: np.ndarray
    slots: list[int]
    bytes_per_row: int
    share: float
    note: str

    def describe(self) -> str:
        """One line for people: bytes, tokens and share."""
        low, high = int(self.limits.min()), int(self.limits.max())
        tokens = str(high) if low == high else f"{low} to {high}"
        line = (
            f"{self.spec[0].policy.name} cache: {format_bytes(self.bytes_per_row)} per sequence, {tokens} tokens per"
            f" kv head and layer ({self.share:.1%} of the keys and values of a full cache at equal width)"
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
    return -(-tokens // step) * step


def plan(
    config: DecoderConfig, policy: Policy, budget, *, lengths: list[int], dtype: str, layer_weights=None
) -> Plan:  # fmt: skip
    """The cache of one layer after another for rows of these planned total lengths (prompt plus new tokens).

    Args: layer_weights: None (uniform), or a number > 0 per layer: a layer gets budget * weight / mean(weights), at
      most the length of the row and its own window; what it cannot use is not given to others.
    Raises: ValueError for a budget that cannot hold the protected tokens, with the least that can; for `full` with less
      than everything; for weights that do not fit the model.
    """
    asked = parse_budget(budget)
    longest, note = max(lengths), ""
    weights = _relative(layer_weights, config.num_layers)
    build = lambda wanted: _build(config, policy, wanted, lengths, dtype, weights)
    if asked.kind == "share":
        wanted = [max(1, math.ceil(asked.amount * n)) for n in lengths]
        small = [n for n in wanted if n < policy.least_budget]
        if small and asked.amount < 1:
            wanted = [max(n, min(policy.least_budget, longest)) for n in wanted]
            note = f"raised from {min(small)} to {policy.least_budget} tokens, the least that holds the protected ones"
    elif asked.kind == "tokens":
        wanted = [int(asked.amount)] * len(lengths)
    else:
        wanted = [_tokens_in(config, policy, asked.amount, longest, dtype, asked.text, weights)] * len(lengths)
    if asked.kind != "share" and min(wanted) < policy.least_budget and min(wanted) < longest:
        raise ValueError(
            f"budget {asked.text} gives {min(wanted)} tokens per kv head and layer, less than the {policy.least_budget}"
            f" that {policy.name!r} protects ({policy.recent} newest, {policy.sinks} first); the least is"
            f" {policy.least_budget} tokens or {build([policy.least_budget])[1]} bytes"
        )
    if all(w >= n for w, n in zip(wanted, lengths, strict=True)):
        if asked.kind != "share":
            note = f"budget {asked.text} holds all {longest} tokens, so nothing is evicted"
        wanted, weights = list(lengths), [1.0] * config.num_layers
    elif isinstance(policy, Full):
        raise ValueError(
            f"the full cache of {longest} tokens does not fit budget {asked.text}; leave the budget out, or choose an"
            " evicting policy"
        )
    elif layer_weights is not None:
        thin = min(range(config.num_layers), key=lambda index: weights[index])
        if min(_tokens_of(w, n, weights[thin]) for w, n in zip(wanted, lengths, strict=True)) < policy.least_budget:
            raise ValueError(
                f"budget {asked.text} with these layer_weights gives layer {thin} fewer than the {policy.least_budget}"
                f" tokens that {policy.name!r} protects; give it more weight or the cache a larger budget"
            )
    spec, size, limits = build(wanted)
    kept = limits[:, 0, lengths.index(longest)].sum()
    full = sum(longest if c.window is None else min(longest, c.window) for c in config.layers)
    return Plan(
        spec=spec, limits=limits, slots=[s.tiers[0].slots for s in spec], bytes_per_row=size,
        share=float(min(1.0, kept / full)), note=note,
    )  # fmt: skip


def _relative(layer_weights, layers: int) -> list[float]:
    """Weights over their mean."""
    if layer_weights is None:
        return [1.0] * layers
    weights = [float(w) for w in layer_weights]
    if len(weights) != layers or not all(0 < w < math.inf for w in weights):
        raise ValueError(f"layer_weights must be {layers} numbers > 0, one per layer, got {weights}")
    return [w * layers / sum(weights) for w in weights]


def _tokens_of(wanted: int, length: int, weight: float) -> int:
    """What a layer of this weight gets of `wanted` tokens; a uniform layer keeps exactly what was asked for."""
    return wanted if weight == 1.0 else max(1, min(length, int(wanted * weight)))


def _build(config, policy, wanted, lengths, dtype, weights):
    scheme = (SCHEME[dtype], SCHEME[dtype])
    spec, limits = [], []
    for layer, weight in zip(config.layers, weights, strict=True):
        cap = [_tokens_of(w, n, weight) for w, n in zip(wanted, lengths, strict=False)]
        cap = [w if layer.window is None else min(w, layer.window) for w in cap]
        size = slot_grid(max(cap))
        size = size if layer.window is None else min(size, slot_grid(layer.window))
        spec.append(LayerSpec(policy=policy, tiers=(TierSpec(slots=size, scheme=scheme),)))
        limits.append([cap])
    spec = tuple(spec)
    return spec, state_bytes(config, spec), np.asarray(limits, np.int32)


def _tokens_in(config, policy, budget, longest, dtype, text, weights):
    """The largest allocation size whose bytes stay within the budget, by bisection over the grid."""
    low, high = 0, max(1, longest)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _build(config, policy, [middle], [longest], dtype, weights)[1] <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    if low == 0:
        least = _build(config, policy, [policy.least_budget], [1], dtype, weights)[1]
        raise ValueError(f"budget {text} holds not one slot; the least for {policy.name!r} is {least} bytes")
    return low


def state_bytes(config: DecoderConfig, spec: tuple[LayerSpec, ...]) -> int:
    """Bytes that the state of one row takes, from its shapes; nothing is allocated."""
    limits = np.zeros((len(spec), len(spec[0].tiers), 1), np.int32)
    shapes = jax.eval_shape(lambda: empty_state(config, spec, limits=limits, lengths=np.ones(1, np.int32)))
    return tree_bytes(shapes)


def tree_bytes(tree) -> int:
    """Bytes of all arrays of a pytree. Carriers are whole bytes wide, so shapes and dtypes tell the truth."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
