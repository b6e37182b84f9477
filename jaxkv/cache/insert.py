"""The one write path: entries compete with the live slots of a tier for its `limit` places.

candidates   live slots  a b c d          entries  x y z           limit 5
scores                   3 9 1 4                   7 2 8
kept                     a b   d                   x   z           survivors keep their slots
tier after               a b x d z                                 newcomers take free or freed slots
displaced                c y                                       and go to the next tier, or nowhere

A tier whose scheme has a granule g (`jaxkv.quantization.kivi`) takes, keeps and displaces aligned groups of g slots; a group
counts as its best member. Above it, up to g - 1 entries beyond the limit wait until they are a whole group:

live and entering  limit ... limit + g - 1    limit + g ... limit + 2g - 1       the surplus waits modulo g
displaced                   none                     the g worst                 in groups by position
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from jaxkv.cache.state import EMPTY, encode_keys, granule_of, live_slots, plain_entries, positions_of
from jaxkv.quantization import get_scheme
from jaxkv.types import Array, Encoded, Entries, Tier
from pallas_kernels.slots import read_slot, write_slot

SIGNALING_NAN = 0x7F800001  # arithmetic gives quiet NaNs only


def insert(
    tier: Tier, entries: Entries, *, scores: tuple[Array, Array], below: tuple[Tier, ...], kernels: str | None = None
) -> tuple[Tier, Entries | None]:
    """Keeps the best `limit` of the live slots and the valid entries; survivors are neither moved nor encoded again.

    Args:
      entries: n of them, n static; a prompt is n = T, a decode step n = 1.
      scores: of the slots [B, P, S] and of the entries [B, P, n], float32, highest stay; among equals the newer stays.
      below: the tiers further down, where the displaced go; () = they are not wanted.
      kernels: which implementation reads and writes a single slot, of `pallas_kernels.slots`; None: as the platform wants.
    Returns: the tier, and the displaced as n entries (rounded up to groups, if they go to a tier that has those), or None.
    """
    granule, group = granule_of(tier), granule_of(below[0]) if below else 1
    if granule > 1:
        entries, scores = _by_position(entries, scores, granule)
    count = entries.positions.shape[-1] // granule  # from here to `_members`, one item is one group
    if count == 1 and (granule > 1 or group == 1):
        return _insert_one(tier, entries, scores, displace=bool(below), kernels=kernels)
    if _is_pooled(tier):
        grown, displaced = insert(_whole(tier), entries, scores=scores, below=below)
        return _in_parts(grown, tier), displaced
    there = _items(live_slots(tier), scores[0], positions_of(tier), granule)
    new = _items(entries.valid, scores[1], entries.positions, granule)
    live, score, position = (jnp.concatenate(pair, axis=-1) for pair in zip(there, new, strict=True))
    held = live.sum(axis=-1, dtype=jnp.int32)
    leave = jnp.maximum(held - _places(tier), 0)
    most = count
    if granule == 1 and group > 1:
        most = (count + group - 1) // group * group
        leave = jnp.where(_grouped(below), leave // group * group, leave)
    if below:  # what cannot be handed on, stays
        leave = jnp.minimum(leave, most)
    nobody = lambda *_: jnp.zeros(live.shape, jnp.int32)
    rank = jax.lax.cond((leave > 0).any(), _rank, nobody, live, score, position)  # most steps of a tier of groups
    keep = live & (rank < (held - leave)[..., None])
    kept, entering = jnp.split(keep, [keep.shape[-1] - count], axis=-1)
    free = jnp.cumsum(~kept, axis=-1, dtype=jnp.int32) - 1  # of slots: which free slot this is
    order = _compact(entering)  # of entries: the i-th that enters, n where there is none
    source = jnp.where(kept, count, _pick(order, free))
    grown = _place(tier, entries, _members(source, granule), jnp.repeat(kept, granule, axis=-1))
    if not below:
        return grown, None
    return grown, _gather(tier, entries, _members(_compact(live & ~keep)[..., :most], granule))


def _is_pooled(tier: Tier) -> bool:
    """Whether codes and factors are tuples of arrays, which lie apart, and together have the block rows of the tier."""
    return isinstance(tier.keys.codes, tuple)


def _whole(tier):
    """A pooled tier with its parts put together."""
    join = lambda parts: jnp.concatenate(parts, axis=1)
    whole = lambda encoded: Encoded(codes=join(encoded.codes), factors=tuple(map(join, encoded.factors)))
    return dataclasses.replace(tier, keys=whole(tier.keys), values=whole(tier.values))


def _in_parts(tier, like):
    """The opposite of `_whole`."""
    cut = lambda new, old: Encoded(
        codes=apart(new.codes, old.codes), factors=tuple(map(apart, new.factors, old.factors))
    )
    return dataclasses.replace(tier, keys=cut(tier.keys, like.keys), values=cut(tier.values, like.values))


def apart(x, parts):
    """x [B, P, ...] cut into as many block rows as each of the parts has."""
    ends = itertools.accumulate(part.shape[1] for part in parts)
    return tuple(x[:, end - part.shape[1] : end] for part, end in zip(parts, ends, strict=True))


def _rows(slot):
    """Indices of axes B and P, for those of slots [B, P]."""
    batch, heads = slot.shape
    return jnp.arange(batch)[:, None], jnp.arange(heads)[None, :]


def _stored(tier):
    """Codes and factors of keys and values, and at which axis the slots of each lie."""
    arrays, axes = [], []
    for side, encoded in enumerate((tier.keys, tier.values)):
        arrays += [encoded.codes, *encoded.factors]
        axes += [_slot_axis(tier, side), *(3 for _ in encoded.factors)]
    return arrays, tuple(axes)


def _with_stored(tier, arrays):
    """The opposite of `_stored`: keys and values."""
    cut = 1 + len(tier.keys.factors)
    encoded = lambda codes, *factors: Encoded(codes=codes, factors=factors)
    return {"keys": encoded(*arrays[:cut]), "values": encoded(*arrays[cut:])}


def _read_stored(tier, slot, groups, kernels):
    """`_stored` with the slots of one group, [B, P, ...]; where arrays lie in parts, put together."""
    arrays, axes = _stored(tier)
    read = functools.partial(read_slot, axes=axes, groups=groups, implementation=kernels)
    if not _is_pooled(tier):
        return read(tuple(arrays), slot)
    found = [read(*part) for part in zip(zip(*arrays, strict=True), apart(slot, arrays[0]), strict=True)]
    return [jnp.concatenate(parts, axis=1) for parts in zip(*found, strict=True)]


def _write_stored(tier, new, slot, groups, kernels):
    """`_stored` with `new` at a slot: one entry or one group of each, channels last."""
    arrays, axes = _stored(tier)

    def write(arrays, new, slot):  # what is turned is a part, not all of them for each
        new = tuple(x if axis == 2 else jnp.swapaxes(x, 2, 3) for x, axis in zip(new, axes, strict=True))
        return write_slot(arrays, new, slot, axes=axes, groups=groups, implementation=kernels)

    if not _is_pooled(tier):
        return write(tuple(arrays), tuple(new), slot)
    parts = (zip(*arrays, strict=True), zip(*(apart(x, arrays[0]) for x in new), strict=True), apart(slot, arrays[0]))
    return list(zip(*(write(*part) for part in zip(*parts, strict=True)), strict=True))


def _items(live, scores, positions, granule):
    """What competes: slots or entries, or groups of them with the score and the position of their best and newest member."""
    if granule == 1:
        return live, scores, positions
    groups = lambda x, dead: jnp.where(live, x, dead).reshape(*live.shape[:-1], -1, granule).max(axis=-1)
    return groups(live, False), groups(scores, -jnp.inf), groups(positions, EMPTY)


def _places(tier):
    """How many items the tier may keep, [B, P]."""
    granule = granule_of(tier)
    return tier.limit if granule == 1 else tier.limit // granule


def _members(index, granule):
    """Indices of groups [..., n] -> of their members [..., n * granule]; "none" stays past the end."""
    if granule == 1:
        return index
    member = jax.lax.broadcasted_iota(index.dtype, (*index.shape, granule), index.ndim)
    return (index[..., None] * granule + member).reshape(*index.shape[:-1], -1)


def _grouped(below):
    """Whether rows have room in the tiers below that take groups, [B, P]; where not, nothing waits for them."""
    return sum(tier.limit for tier in itertools.takewhile(lambda t: granule_of(t) > 1, below)) > 0


def _by_position(entries, scores, granule):
    """Entries in the order of their positions, the valid ones first, filled up to whole groups."""
    order = jnp.argsort(jnp.where(entries.valid, entries.positions, jnp.iinfo(jnp.int32).max), axis=-1)
    order = jnp.pad(order, ((0, 0), (0, 0), (0, -order.shape[-1] % granule)), constant_values=-1)
    filled = order >= 0
    order = jnp.maximum(order, 0)
    take = lambda x: _along(x, order.reshape(order.shape + (1,) * (x.ndim - 3)), axis=2)
    valid = take(entries.valid) & filled
    sorted_ = dataclasses.replace(
        entries,
        keys=take(entries.keys),
        values=take(entries.values),
        positions=jnp.where(valid, take(entries.positions), EMPTY),
        slots=jax.tree.map(take, entries.slots),
        valid=valid,
    )
    return sorted_, (scores[0], take(scores[1]))


def _encode(tier, side, entries):
    """Keys (side 0) or values (side 1) [B, P, n, H] as the tier stores them, channels last."""
    if side == 0:
        return encode_keys(tier.scheme[0], entries.keys, entries.balance, entries.valid)
    return get_scheme(tier.scheme[1]).encode(entries.values)


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


def _along(x, index, axis):
    """jnp.take_along_axis for indices that are known to be inside, without the instructions that would make sure of it."""
    return jnp.take_along_axis(x, index, axis=axis, mode="promise_in_bounds")


def _pick(order, rank):
    """order[rank], "none" where rank is past the end. [B, P, n], [B, P, S] -> [B, P, S]."""
    none = order.shape[-1]
    inside = jnp.clip(rank, 0, none - 1)
    return jnp.where((rank >= 0) & (rank < none), _along(order, inside, axis=-1), none)


def _place(tier, entries, source, kept):
    """Slots take entry `source`; where that is "none" they keep what they have, and are empty unless `kept`."""

    def take(new, old, axis):
        """new [B, P, n, ...] into old, whose slots lie at `axis`; either may have one for each group."""
        count, share = new.shape[2], entries.positions.shape[-1] // new.shape[2]
        from_ = source if share == 1 else source[..., ::share] // share
        fresh, at = from_ < count, jnp.minimum(from_, count - 1)
        index = at.reshape(at.shape + (1,) * (new.ndim - 3))
        rows = _along(new, index, axis=2).astype(old.dtype)
        mask = fresh.reshape(fresh.shape + (1,) * (new.ndim - 3))
        return jnp.where(jnp.moveaxis(mask, 2, axis), jnp.moveaxis(rows, 2, axis), old)

    def encoded(side, old):
        new, axis = _encode(tier, side, entries), _slot_axis(tier, side)
        factors = tuple(take(f, o, 3) for f, o in zip(new.factors, old.factors, strict=True))
        return Encoded(codes=take(new.codes, old.codes, axis), factors=factors)

    return Tier(
        keys=encoded(0, tier.keys),
        values=encoded(1, tier.values),
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
        return _along(both, index.reshape(index.shape + (1,) * (both.ndim - 3)), axis=2)

    keys, values = plain_entries(tier, entries.balance)
    positions = pick(tier.positions, entries.positions)
    valid &= positions >= 0  # a group may have dead members
    return Entries(
        keys=pick(keys, entries.keys),
        values=pick(values, entries.values),
        positions=jnp.where(valid, positions, EMPTY),
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


def _insert_one(tier, entries, scores, displace, kernels):
    """`insert` for one entry, or one group of them: one comparison with the worst and one write, in place under jit with
    donation."""
    granule = granule_of(tier)
    slots = tier.positions.shape[-1] // granule
    kernels = kernels if granule == 1 else "xla"  # groups are XLA's everywhere

    def decide(entries):
        """The slot that each block row takes, what goes down, and what goes in."""
        slot, room = _slot_for(tier, entries, scores)
        displaced = _displaced(tier, entries, slot, room, kernels) if displace else None
        if displace:  # a slot must be read before it is overwritten
            entries = dataclasses.replace(
                entries, keys=after(displaced.keys, entries.keys), values=after(displaced.values, entries.values)
            )
        return slot, displaced, (_encoded(tier, entries), entries.positions, entries.slots)

    def rest(entries):
        """Nothing enters."""
        slot, *others = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(decide, entries))
        return jnp.full_like(slot, slots), *others

    slot, displaced, (stored, positions, kept) = jax.lax.cond(entries.valid.any(), decide, rest, entries)

    def put(old, new):
        if granule == 1:
            return old.at[*_rows(slot), slot].set(new[:, :, 0].astype(old.dtype), mode="drop")
        groups = old.reshape(*old.shape[:2], slots, -1, *old.shape[3:])
        return groups.at[*_rows(slot), slot].set(new.astype(old.dtype), mode="drop").reshape(old.shape)

    grown = Tier(
        **_with_stored(tier, _write_stored(tier, stored, slot, slots, kernels)),
        positions=put(tier.positions, positions),
        slots=jax.tree.map(put, tier.slots, kept),
        limit=tier.limit,
        scheme=tier.scheme,
    )
    return grown, displaced


def _encoded(tier, entries):
    """One entry, or one group, as `_stored` keeps it, channels last."""
    types = [jax.tree.leaves(x)[0].dtype for x in _stored(tier)[0]]
    new = [x for side in (0, 1) for e in [_encode(tier, side, entries)] for x in (e.codes, *e.factors)]
    return [x.astype(dtype) for x, dtype in zip(new, types, strict=True)]


def _slot_for(tier, entries, scores):
    """Where the one entry, or group, of each block row goes, [B, P]: a free slot, else that of the worst if that is worse,
    else past the end, which is nowhere; and whether there was a free slot."""
    granule = granule_of(tier)
    live, standing, ages = _items(live_slots(tier), scores[0], positions_of(tier), granule)
    valid, score, position = (x[..., 0] for x in _items(entries.valid, scores[1], entries.positions, granule))
    slots, index = live.shape[-1], jax.lax.broadcasted_iota(jnp.int32, live.shape, 2)
    least = jnp.where(live, standing, jnp.inf).min(axis=-1)
    oldest = jnp.where(live & (standing == least[..., None]), ages, jnp.iinfo(jnp.int32).max)
    age = oldest.min(axis=-1)
    worst = jnp.where(oldest == age[..., None], index, slots).min(axis=-1)
    room = live.sum(axis=-1, dtype=jnp.int32) < _places(tier)
    better = (score > least) | ((score == least) & (position > age))
    slot = jnp.where(room, jnp.where(live, slots, index).min(axis=-1), jnp.where(better, worst, slots))
    return jnp.where(valid & (tier.limit >= granule), slot, slots), room


def _displaced(tier, entries, slot, room, kernels):
    """What goes on: what `slot` [B, P] held, or the new if it found no slot; nothing while there is room."""
    granule = granule_of(tier)
    slots = tier.positions.shape[-1] // granule
    at = jnp.minimum(slot, slots - 1)[..., None]

    def pick(x):
        """[B, P, S, ...] -> the same with the slots of one group."""
        index = _members(at, granule)
        return _along(x, index.reshape(*index.shape, *(1 for _ in x.shape[3:])), axis=2)

    one = dataclasses.replace(
        tier,
        **_with_stored(tier, _read_stored(tier, slot, slots, kernels)),
        positions=pick(tier.positions),
        slots=jax.tree.map(pick, tier.slots),
    )
    keys, values = plain_entries(one, entries.balance)
    old = (keys.astype(entries.keys.dtype), values.astype(entries.values.dtype), one.positions, one.slots)
    new = (entries.keys, entries.values, entries.positions, entries.slots)
    swapped = slot < slots
    choose = lambda a, b: jnp.where(swapped.reshape(swapped.shape + (1,) * (a.ndim - 2)), a, b.astype(a.dtype))
    keys, values, positions, slots = jax.tree.map(choose, old, new)
    sent = entries.valid[..., :1] & ~room[..., None]  # of a group, its first is valid
    valid = sent if granule == 1 else sent & (positions >= 0)
    positions = jnp.where(valid, positions.astype(jnp.int32), EMPTY)
    return dataclasses.replace(entries, keys=keys, values=values, positions=positions, slots=slots, valid=valid)
