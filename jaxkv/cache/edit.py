"""Editing what a state remembers: dropping a range of positions, joining two states."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.cache.state import EMPTY, tier_keys
from jaxkv.config import DecoderConfig
from jaxkv.quantization import get_scheme
from jaxkv.rope import angles, rotate
from jaxkv.types import Array, Encoded, LayerState, State, Tier


def drop(state: State, *, start: Array, stop: Array) -> State:
    """Forgets the tokens at positions start <= position < stop, [B] int32 each.

    If the range reaches the end of the row, the next token takes position `start`. What other tokens computed from the
    dropped ones stays in their keys and values: to prune a passage exactly, drop it and all that follows, then `extend`
    the surviving suffix again. A sliding-window layer has already forgotten what left its window by then, so after dropping
    the end of a row it sees less than it would have seen the first time.
    """

    def forget(tier, offset):
        at = tier.positions + offset[:, None, None]
        inside = (at >= start[:, None, None]) & (at < stop[:, None, None])
        return dataclasses.replace(tier, positions=jnp.where(inside, EMPTY, tier.positions))

    layers = tuple(
        dataclasses.replace(layer, tiers=tuple(map(forget, layer.tiers, state.offsets))) for layer in state.layers
    )
    shorter = (stop >= state.next_position) & (start < state.next_position)
    return dataclasses.replace(state, layers=layers, next_position=jnp.where(shorter, start, state.next_position))


def concat(first: State, second: State, *, config: DecoderConfig) -> State:
    """`second` behind `first` in one state, its positions shifted by what `first` holds, its keys turned along.

    Both must have one tier per layer, of the same scheme and policy, and the same RoPE frequencies. The tier of the
    result has the slots and limits of both; in a sliding-window layer the limit is at most the window, and what the next
    token cannot see is empty. The tokens of `second` have not seen those of `first`.
    Raises: ValueError for states that do not match; frequencies are compared outside jit only.
    """
    for name, a, b in (
        ("rows", first.next_position.shape, second.next_position.shape),
        ("layers", len(first.layers), len(second.layers)),
        ("policies", [x.policy for x in first.layers], [x.policy for x in second.layers]),
        ("tiers", [len(x.tiers) for x in first.layers], [1] * len(second.layers)),
        (
            "schemes",
            [t.scheme for x in first.layers for t in x.tiers],
            [t.scheme for x in second.layers for t in x.tiers],
        ),
    ):
        if a != b:
            raise ValueError(f"concat of states with different {name}: {a} and {b}")
    for kind, a, b in zip(config.ropes, first.rotary, second.rotary, strict=True):
        arrays = jax.tree.leaves((a, b))
        if not any(isinstance(x, jax.core.Tracer) for x in arrays) and any(
            (x != y).any() for x, y in zip(arrays[:2], arrays[2:], strict=True)
        ):
            raise ValueError(
                f"concat of states with different RoPE frequencies ({kind.kind}): they depend on the length that a state"
                " is made for; make both with the same `lengths`"
            )
    shift = first.next_position
    newest = shift + second.next_position - 1
    layers = []
    for index, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        rotary = second.rotary[config.ropes.index(config.layers[index].rope)]
        tier = _join(a.tiers[0], b.tiers[0], shift + second.offsets[0] - first.offsets[0], rotary)
        window = config.layers[index].window
        if window is not None:
            gone = (newest + 1 - first.offsets[0])[:, None, None] - tier.positions >= window
            tier = dataclasses.replace(
                tier, positions=jnp.where(gone, EMPTY, tier.positions), limit=jnp.minimum(tier.limit, window)
            )
        layers.append(LayerState(tiers=(tier,), row=a.row, policy=a.policy))
    return State(
        layers=tuple(layers),
        offsets=first.offsets,
        rotary=first.rotary,
        next_position=shift + second.next_position,
    )


def _join(a: Tier, b: Tier, shift: Array, rotary) -> Tier:
    turn = dataclasses.replace(rotary, scale=jnp.ones_like(rotary.scale))
    cos, sin = angles(turn, shift[:, None])
    scheme, keys = get_scheme(b.scheme[0]), tier_keys(b)
    batch, heads, size, slots = keys.shape
    keys = jnp.swapaxes(keys, 2, 3).reshape(batch, 1, heads * slots, size)
    keys = scheme.encode(rotate(keys, cos, sin).reshape(batch, heads, slots, size)).codes
    both = lambda x, y, axis: jnp.concatenate([x, y], axis=axis)
    return Tier(
        keys=Encoded(codes=both(a.keys.codes, jnp.swapaxes(keys, 2, 3), 3)),
        values=Encoded(codes=both(a.values.codes, b.values.codes, 2)),
        positions=both(a.positions, jnp.where(b.positions >= 0, b.positions + shift[:, None, None], EMPTY), 2),
        slots=jax.tree.map(lambda x, y: both(x, y, 2), a.slots, b.slots),
        limit=a.limit + b.limit,
        scheme=a.scheme,
    )
