"""Editing what a state remembers: dropping a range of positions, joining two states."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.cache.state import EMPTY, encode_keys, granule_of, live_slots, plain_entries, positions_of
from jaxkv.config import DecoderConfig
from jaxkv.quantization import get_scheme
from jaxkv.rope import angles, rotate
from jaxkv.types import Array, Encoded, State, Tier
from pallas_kernels.causal_conv import carry
from pallas_kernels.decode_attention.owners import to_rows


def drop(state: State, *, start: Array, stop: Array) -> State:
    """Forgets the tokens at positions start <= position < stop, [B] int32 each.

    If the range reaches the end of the row, the next token takes position `start`. What other tokens computed from the
    dropped ones stays in their keys and values: to prune a passage exactly, drop it and all that follows, then `extend`
    the surviving suffix again. A sliding-window layer has already forgotten what left its window by then, so after dropping
    the end of a row it sees less than it would have seen the first time; and a convolution over time begins anew there.
    """

    def forget(tier, offset):
        at = positions_of(tier) + offset[:, None, None]
        inside = (at >= start[:, None, None]) & (at < stop[:, None, None])
        return dataclasses.replace(tier, positions=jnp.where(inside, EMPTY, tier.positions))

    shorter = (stop >= state.next_position) & (start < state.next_position)
    begin = lambda taps: None if taps is None else jnp.where(shorter[:, None, None], 0, taps)
    layers = tuple(
        dataclasses.replace(layer, tiers=tuple(map(forget, layer.tiers, state.offsets)), taps=begin(layer.taps))
        for layer in state.layers
    )
    return dataclasses.replace(state, layers=layers, next_position=jnp.where(shorter, start, state.next_position))


def concat(first: State, second: State, *, config: DecoderConfig) -> State:
    """`second` behind `first` in one state, its positions shifted by what `first` holds, its keys turned along.

    Both must have the same tiers and policy, the same RoPE frequencies and the same balance. Each tier of the result has
    the slots and limits of both; in a sliding-window layer the limit of a tier without groups is at most the window, and
    what the next token cannot see is empty. Keys of `second` are encoded once more, in the groups that they lie in. The
    tokens of `second` have not seen those of `first`, and temperatures in them (`jaxkv.attention.ssa`) remain those of the
    positions that they were read at; convolved over time are the tokens of each on their own.
    Raises: ValueError for states that do not match; frequencies and balances are compared outside jit only. For a model
      with learned positions, which are in every key and value and cannot be moved.
    """
    if config.learned_positions is not None:
        raise ValueError(
            "concat moves the second state's positions; those of a model that has learned them cannot move"
        )
    for name, a, b in (
        ("rows", first.next_position.shape, second.next_position.shape),
        ("layers", len(first.layers), len(second.layers)),
        ("policies", [x.policy for x in first.layers], [x.policy for x in second.layers]),
        ("tiers", [len(x.tiers) for x in first.layers], [len(x.tiers) for x in second.layers]),
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
    for index, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        if not _same_owner(a.owner, b.owner):
            raise ValueError(
                f"concat of states whose kv heads own different block rows (layer {index}): give both the same budget and"
                " planned length, or a cache whose heads share evenly"
            )
        if a.balance is not None and not isinstance(a.balance, jax.core.Tracer) and (a.balance != b.balance).any():
            raise ValueError(
                f"concat of states whose balances differ (layer {index}): each was found at its own prompt; use schemes"
                " that are not balanced"
            )
    shift = first.next_position
    if config.most_positions is not None and not any(
        isinstance(s.next_position, jax.core.Tracer) for s in (first, second)
    ):
        together = int((shift + second.next_position).max())
        if together > config.most_positions:
            raise ValueError(
                f"rows of {together} tokens together: the model has learned {config.most_positions} positions"
            )
    newest = shift + second.next_position - 1
    layers = []
    for index, (a, b) in enumerate(zip(first.layers, second.layers, strict=True)):
        rotary = second.rotary[config.ropes.index(config.layers[index].rope)]
        window, tiers = config.layers[index].window, []
        for number, (mine, theirs) in enumerate(zip(a.tiers, b.tiers, strict=True)):
            start = first.offsets[number]
            balance = None if a.balance is None else to_rows(a.balance, a.owner)
            tier = _join(mine, theirs, shift + second.offsets[number] - start, rotary, balance)
            if window is not None:
                gone = (newest + 1 - start)[:, None, None] - positions_of(tier) >= window
                most = (
                    window if granule_of(tier) == 1 else tier.positions.shape[-1]
                )  # few of a group may be in the window
                tier = dataclasses.replace(
                    tier, positions=jnp.where(gone, EMPTY, tier.positions), limit=jnp.minimum(tier.limit, most)
                )
            tiers.append(tier)
        kept = (a.row, a.balance, a.owner, _join_taps(a.taps, b.taps, second.next_position))
        kept = jax.tree.map(jnp.copy, kept)  # the result may be donated; `first` and `second` must survive it
        layers.append(
            dataclasses.replace(a, tiers=tuple(tiers), row=kept[0], balance=kept[1], owner=kept[2], taps=kept[3])
        )
    return State(
        layers=tuple(layers),
        offsets=first.offsets,
        rotary=first.rotary,
        next_position=shift + second.next_position,
    )


def _join_taps(first: Array | None, second: Array | None, count: Array) -> Array | None:
    """The last of what both have read; `second` has read count [B] tokens, and zeros stand before those."""
    if first is None or second is None:
        return None
    width = first.shape[1]
    return carry(first, second, jnp.arange(width)[None] >= width - count[:, None])


def _same_owner(a: Array | None, b: Array | None) -> bool:
    if a is None or b is None:
        return a is b
    if a.shape != b.shape:
        return False
    return isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer) or bool((a == b).all())


def _join(a: Tier, b: Tier, shift: Array, rotary, balance) -> Tier:
    """Both tiers in one; keys of the second are turned, and therefore encoded again."""
    turn = dataclasses.replace(rotary, scale=jnp.ones_like(rotary.scale))
    cos, sin = angles(turn, shift[:, None])
    keys, _ = plain_entries(b, balance)
    flat = keys.reshape(keys.shape[0], 1, -1, keys.shape[-1])
    turned = encode_keys(b.scheme[0], rotate(flat, cos, sin).reshape(keys.shape), balance, live_slots(b))
    both = lambda x, y, axis: jnp.concatenate([x, y], axis=axis)
    minor = jax.tree.map(lambda x: jnp.swapaxes(x, 2, 3), turned)
    values_axis = 3 if get_scheme(b.scheme[1]).slots_minor else 2
    return Tier(
        keys=jax.tree.map(lambda x, y: both(x, y, 3), a.keys, minor),
        values=Encoded(
            codes=both(a.values.codes, b.values.codes, values_axis),
            factors=tuple(both(x, y, 3) for x, y in zip(a.values.factors, b.values.factors, strict=True)),
        ),
        positions=both(positions_of(a), jnp.where(live_slots(b), positions_of(b) + shift[:, None, None], EMPTY), 2),
        slots=jax.tree.map(lambda x, y: both(x, y, 2), a.slots, b.slots),
        limit=a.limit + b.limit,
        scheme=a.scheme,
    )
