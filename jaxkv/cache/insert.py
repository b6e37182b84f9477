"""The one write path: entries compete with the live slots of a tier for its `limit` places.

candidates   live slots  a b c d          entries  x y z           limit 5
scores                   3 9 1 4                   7 2 8
kept                     a b   d                   x   z           survivors keep their slots
tier after               a b x d z                                 newcomers take free or freed slots
displaced                c y                                       and go to the next tier, or nowhere
"""

import jax
import jax.numpy as jnp

from jaxkv.cache.state import EMPTY, live_count, live_slots, tier_keys, tier_values
from jaxkv.quantization import get_scheme
from jaxkv.types import Array, Encoded, Entries, Tier


def insert(tier: Tier, entries: Entries, *, scores: tuple[Array, Array], displace: bool) -> tuple[Tier, Entries | None]:
    """Keeps the best `limit` of the live slots and the valid entries; survivors are neither moved nor encoded again.

    Args:
      entries: n of them, n static; a prompt is n = T, a decode step n = 1.
      scores: of the slots [B, P, S] and of the entries [B, P, n], float32, highest stay; among equals the newer stays.
      displace: whether the displaced are wanted.
    Returns: the tier, and the displaced as n entries, or None.
    """
    if entries.positions.shape[-1] == 1 and not displace:
        return _insert_one(tier, entries, scores), None
    slots = tier.positions.shape[-1]
    live = jnp.concatenate([live_slots(tier), entries.valid], axis=-1)
    positions = jnp.concatenate([tier.positions, entries.positions], axis=-1)
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
        rows = jnp.take_along_axis(new, index, axis=2)
        mask = fresh.reshape(fresh.shape + (1,) * (new.ndim - 3))
        return jnp.where(jnp.moveaxis(mask, 2, axis), jnp.moveaxis(rows, 2, axis), old)

    def encoded(side, x, old, axis):
        new = get_scheme(tier.scheme[side]).encode(x)
        factors = tuple(take(f, o, 3) for f, o in zip(new.factors, old.factors, strict=True))
        return Encoded(codes=take(new.codes, old.codes, axis), factors=factors)

    return Tier(
        keys=encoded(0, entries.keys, tier.keys, 3),
        values=encoded(1, entries.values, tier.values, 2),
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

    return Entries(
        keys=pick(jnp.swapaxes(tier_keys(tier), -1, -2), entries.keys),
        values=pick(tier_values(tier), entries.values),
        positions=jnp.where(valid, pick(tier.positions, entries.positions), EMPTY),
        slots=jax.tree.map(pick, tier.slots, entries.slots),
        valid=valid,
    )


def _insert_one(tier, entries, scores):
    """`insert` for n = 1: one comparison with the worst live slot and one write, in place under jit with donation."""
    slots = tier.positions.shape[-1]
    live, index = live_slots(tier), jax.lax.broadcasted_iota(jnp.int32, tier.positions.shape, 2)
    score, position = scores[1][..., 0], entries.positions[..., 0]
    least = jnp.where(live, scores[0], jnp.inf).min(axis=-1)
    oldest = jnp.where(live & (scores[0] == least[..., None]), tier.positions, jnp.iinfo(jnp.int32).max)
    age = oldest.min(axis=-1)
    worst = jnp.where(oldest == age[..., None], index, slots).min(axis=-1)
    room = live_count(tier) < tier.limit
    better = (score > least) | ((score == least) & (position > age))
    slot = jnp.where(room, jnp.where(live, slots, index).min(axis=-1), jnp.where(better, worst, slots))
    slot = jnp.where(entries.valid[..., 0] & (tier.limit > 0), slot, slots)  # past the end = nowhere
    batch, heads = slot.shape
    row, head = jnp.arange(batch)[:, None], jnp.arange(heads)[None, :]

    def put(old, new):  # slots at axis 2
        return old.at[row, head, slot].set(new[:, :, 0].astype(old.dtype), mode="drop")

    def put_minor(old, new):  # slots at axis 3
        return old.at[row, head, :, slot].set(new[:, :, 0].astype(old.dtype), mode="drop")

    def encoded(side, x, old, place):
        new = get_scheme(tier.scheme[side]).encode(x)
        factors = tuple(put_minor(o, f) for o, f in zip(old.factors, new.factors, strict=True))
        return Encoded(codes=place(old.codes, new.codes), factors=factors)

    return Tier(
        keys=encoded(0, entries.keys, tier.keys, put_minor),
        values=encoded(1, entries.values, tier.values, put),
        positions=put(tier.positions, entries.positions),
        slots=jax.tree.map(put, tier.slots, entries.slots),
        limit=tier.limit,
        scheme=tier.scheme,
    )
