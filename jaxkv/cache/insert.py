"""The one write path: entries compete with the live slots of a tier for its `limit` places.

candidates   live slots  a b c d          entries  x y z           limit 5
scores                   3 9 1 4                   7 2 8
kept                     a b   d                   x   z           survivors keep their slots
tier after               a b x d z                                 newcomers take free or freed slots
displaced                c y                                       and go to the next tier, or nowhere
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxkv.cache.state import EMPTY, encode_keys, live_count, live_slots, plain_entries, positions_of
from jaxkv.quantization import get_scheme
from jaxkv.types import Array, Encoded, Entries, Tier

SIGNALING_NAN = 0x7F800001  # arithmetic gives quiet NaNs only


def insert(tier: Tier, entries: Entries, *, scores: tuple[Array, Array], displace: bool) -> tuple[Tier, Entries | None]:
    """Keeps the best `limit` of the live slots and the valid entries; survivors are neither moved nor encoded again.

    Args:
      entries: n of them, n static; a prompt is n = T, a decode step n = 1.
      scores: of the slots [B, P, S] and of the entries [B, P, n], float32, highest stay; among equals the newer stays.
      displace: whether the displaced are wanted.
    Returns: the tier, and the displaced as n entries, or None.
    """
    if entries.positions.shape[-1] == 1:
        return _insert_one(tier, entries, scores, displace)
    slots = tier.positions.shape[-1]
    live = jnp.concatenate([live_slots(tier), entries.valid], axis=-1)
    positions = jnp.concatenate([positions_of(tier), entries.positions], axis=-1)
    keep = live & (_rank(live, jnp.concatenate(scores, axis=-1), positions) < tier.limit[..., None])
    kept, entering = keep[..., :slots], keep[..., slots:]
    free = jnp.cumsum(~kept, axis=-1, dtype=jnp.int32) - 1  # of slots: which free slot this is
    order = _compact(entering)  # of entries: the i-th that enters, n where there is none
    source = jnp.where(kept, entries.positions.shape[-1], _pick(order, free))
    grown = _place(tier, entries, source, kept)
    if not displace:
        return grown, None
    leaving = _compact(live & ~keep)[..., : entries.positions.shape[-1]]
    return grown, _gather(tier, entries, leaving)


def _encode(tier, side, x, balance):
    """Keys (side 0) or values (side 1) [B, P, n, H] as the tier stores them, channels last."""
    return encode_keys(tier.scheme[0], x, balance) if side == 0 else get_scheme(tier.scheme[1]).encode(x)


def _slot_axis(tier, side):
    return 3 if side == 0 or get_scheme(tier.scheme[1]).slots_minor else 2


def _rank(live, scores, positions):
    """Rank of each candidate, 0 = best: live before dead, then the higher score, then the newer position."""
    index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)
    order = jax.lax.sort((~live, -scores, -positions, index), num_keys=3, is_stable=True)[-1]
    return jnp.argsort(order, axis=-1)


def _compact(flags):
    """Indices of the set flags in order, then the length of the axis ("none")."""
    length = flags.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, flags.shape, flags.ndim - 1)
    return jnp.sort(jnp.where(flags, index, length), axis=-1)


def _pick(order, rank):
    """order[rank], "none" where rank is past the end. [B, P, n], [B, P, S] -> [B, P, S]."""
    none = order.shape[-1]
    inside = jnp.clip(rank, 0, none - 1)
    return jnp.where((rank >= 0) & (rank < none), jnp.take_along_axis(order, inside, axis=-1), none)


def _place(tier, entries, source, kept):
    """Slots take entry `source`; where that is "none" they keep what they have, and are empty unless `kept`."""
    count = entries.positions.shape[-1]
    fresh = source < count
    at = jnp.minimum(source, count - 1)

    def take(new, old, axis):
        """new [B, P, n, ...] into old, whose slots lie at `axis`."""
        index = at.reshape(at.shape + (1,) * (new.ndim - 3))
        rows = jnp.take_along_axis(new, index, axis=2).astype(old.dtype)
        mask = fresh.reshape(fresh.shape + (1,) * (new.ndim - 3))
        return jnp.where(jnp.moveaxis(mask, 2, axis), jnp.moveaxis(rows, 2, axis), old)

    def encoded(side, x, old):
        new, axis = _encode(tier, side, x, entries.balance), _slot_axis(tier, side)
        factors = tuple(take(f, o, 3) for f, o in zip(new.factors, old.factors, strict=True))
        return Encoded(codes=take(new.codes, old.codes, axis), factors=factors)

    return Tier(
        keys=encoded(0, entries.keys, tier.keys),
        values=encoded(1, entries.values, tier.values),
        positions=take(entries.positions, jnp.where(kept, tier.positions, EMPTY), 2),
        slots=jax.tree.map(lambda new, old: take(new, old, 2), entries.slots, tier.slots),
        limit=tier.limit,
        scheme=tier.scheme,
    )


def _gather(tier, entries, index):
    """Candidates by index into (slots, entries) as entries; an index past the end is not valid."""
    slots = tier.positions.shape[-1]
    valid = index < slots + entries.positions.shape[-1]
    index = jnp.where(valid, index, 0)

    def pick(old, new):  # [B, P, S, ...], [B, P, n, ...]
        both = jnp.concatenate([old.astype(new.dtype), new], axis=2)  # what was not stored stays as it was given
        return jnp.take_along_axis(both, index.reshape(index.shape + (1,) * (both.ndim - 3)), axis=2)

    keys, values = plain_entries(tier, entries.balance)
    return Entries(
        keys=pick(keys, entries.keys),
        values=pick(values, entries.values),
        positions=jnp.where(valid, pick(tier.positions, entries.positions), EMPTY),
        slots=jax.tree.map(pick, tier.slots, entries.slots),
        valid=valid,
        balance=entries.balance,
    )


def after(result: Array, new: Array) -> Array:
    """`new` [B, P, 1, H] unchanged, but computed after `result` [B, P, ...].

    XLA cannot see that a loop may overwrite a slot in place unless the write depends on what has read it; it would copy
    the whole cache at every step. So the write is made to depend on a test that no result of arithmetic passes.
    """
    one = result.reshape(*result.shape[:2], -1)[:, :, :1, None]
    bits = jax.lax.bitcast_convert_type(one.astype(jnp.float32), jnp.int32)
    return jnp.where(bits == SIGNALING_NAN, jnp.zeros_like(new), new)


def _insert_one(tier, entries, scores, displace):
    """`insert` for n = 1: one comparison with the worst live slot and one write, in place under jit with donation."""
    slots = tier.positions.shape[-1]
    live, index = live_slots(tier), jax.lax.broadcasted_iota(jnp.int32, tier.positions.shape, 2)
    score, position = scores[1][..., 0], entries.positions[..., 0]
    least = jnp.where(live, scores[0], jnp.inf).min(axis=-1)
    oldest = jnp.where(live & (scores[0] == least[..., None]), positions_of(tier), jnp.iinfo(jnp.int32).max)
    age = oldest.min(axis=-1)
    worst = jnp.where(oldest == age[..., None], index, slots).min(axis=-1)
    room = live_count(tier) < tier.limit
    better = (score > least) | ((score == least) & (position > age))
    slot = jnp.where(room, jnp.where(live, slots, index).min(axis=-1), jnp.where(better, worst, slots))
    slot = jnp.where(entries.valid[..., 0] & (tier.limit > 0), slot, slots)  # past the end = nowhere
    displaced = _displaced(tier, entries, slot, room) if displace else None
    if displace:  # a slot must be read before it is overwritten
        entries = dataclasses.replace(
            entries, keys=after(displaced.keys, entries.keys), values=after(displaced.values, entries.values)
        )
    batch, heads = slot.shape
    row, head = jnp.arange(batch)[:, None], jnp.arange(heads)[None, :]

    def put(old, new):  # slots at axis 2
        return old.at[row, head, slot].set(new[:, :, 0].astype(old.dtype), mode="drop")

    def put_minor(old, new):  # slots at axis 3
        return old.at[row, head, :, slot].set(new[:, :, 0].astype(old.dtype), mode="drop")

    def encoded(side, x, old):
        new, place = _encode(tier, side, x, entries.balance), put_minor if _slot_axis(tier, side) == 3 else put
        factors = tuple(put_minor(o, f) for o, f in zip(old.factors, new.factors, strict=True))
        return Encoded(codes=place(old.codes, new.codes), factors=factors)

    grown = Tier(
        keys=encoded(0, entries.keys, tier.keys),
        values=encoded(1, entries.values, tier.values),
        positions=put(tier.positions, entries.positions),
        slots=jax.tree.map(put, tier.slots, entries.slots),
        limit=tier.limit,
        scheme=tier.scheme,
    )
    return grown, displaced


def _displaced(tier, entries, slot, room):
    """The entry that goes on: what `slot` [B, P] held, or the new one if it found no slot; nothing while there is room."""
    at = jnp.minimum(slot, tier.positions.shape[-1] - 1)

    def pick(x, axis):
        """[B, P, ...] with slots at `axis` -> the same with one."""
        index = at.reshape(at.shape + (1,) * (x.ndim - 2))
        return jnp.take_along_axis(x, index, axis=axis)

    def encoded(side, x):
        axis = _slot_axis(tier, side)
        return Encoded(codes=pick(x.codes, axis), factors=tuple(pick(f, 3) for f in x.factors))

    one = dataclasses.replace(
        tier,
        keys=encoded(0, tier.keys),
        values=encoded(1, tier.values),
        positions=pick(tier.positions, 2),
        slots=jax.tree.map(lambda x: pick(x, 2), tier.slots),
    )
    keys, values = plain_entries(one, entries.balance)
    old = (keys.astype(entries.keys.dtype), values.astype(entries.values.dtype), one.positions, one.slots)
    new = (entries.keys, entries.values, entries.positions, entries.slots)
    swapped = slot < tier.positions.shape[-1]
    choose = lambda a, b: jnp.where(swapped.reshape(swapped.shape + (1,) * (a.ndim - 2)), a, b.astype(a.dtype))
    keys, values, positions, slots = jax.tree.map(choose, old, new)
    valid = entries.valid & ~room[..., None]
    positions = jnp.where(valid, positions.astype(jnp.int32), EMPTY)
    return dataclasses.replace(entries, keys=keys, values=values, positions=positions, slots=slots, valid=valid)
