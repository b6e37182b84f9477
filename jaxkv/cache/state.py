"""Making a state, and looking into a tier."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.config import DecoderConfig
from jaxkv.policies import Full
from jaxkv.quantization import get_scheme
from jaxkv.quantization.balance import factor_of
from jaxkv.rope import make_rotary
from jaxkv.types import Array, Encoded, LayerSpec, LayerState, Newcomers, Rotary, State, Tier, TierSpec
from pallas_kernels.decode_attention import Packed

EMPTY = -1  # position of a slot that holds nothing
POSITIONS = ("int16", "int32")


def empty_state(config: DecoderConfig, spec: tuple[LayerSpec, ...], *, limits, lengths, owners=None) -> State:
    """A state that has seen nothing.

    Args:
      spec: one LayerSpec per layer; all layers have the same number of tiers.
      limits: int, [L, tiers, B]: slots that each row may use, at most the tier's `slots`.
      lengths: [B] int: planned total length of each row (prompt plus new tokens), which fixes RoPE kinds that depend on
        length.
      owners: for layers whose spec has `rows`, int [B, rows] each: the kv head of each block row, -1 = none; each head owns
        at least one.
    Raises: ValueError if the shapes of spec, limits and config disagree, for a scheme that is unknown or does not take
      heads of this size, for lengths beyond the positions that a model has learned.
    """
    limits, lengths = np.asarray(limits), jnp.asarray(lengths, jnp.int32)
    tiers = {len(layer.tiers) for layer in spec}
    if len(spec) != config.num_layers or len(tiers) != 1:
        raise ValueError(
            f"{config.num_layers} layer specs with equally many tiers needed, got {len(spec)} with {tiers}"
        )
    batch = lengths.shape[0]
    if limits.shape != (len(spec), *tiers, batch):
        raise ValueError(f"limits must be [L, tiers, B] = {(len(spec), *tiers, batch)}, got {limits.shape}")
    longest = 0 if isinstance(lengths, jax.core.Tracer) else int(lengths.max())
    if config.most_positions is not None and longest > config.most_positions:
        raise ValueError(f"rows of {longest} tokens: the model has learned {config.most_positions} positions")
    layers = []
    for index, layer in enumerate(spec):
        check_tiers(index, layer, limits[index], longest)
        owner = checked_owner(owners, index, layer, batch, config.num_kv_heads)
        shape = (batch, config.num_kv_heads if owner is None else layer.rows, config.head_dim)
        built = tuple(
            empty_tier(layer.policy, tier, jnp.asarray(limits[index, number], jnp.int32), shape)
            for number, tier in enumerate(layer.tiers)
        )
        per_head = (batch, config.num_kv_heads, config.head_dim)
        balance = jnp.zeros(per_head, jnp.uint16) if wants_balance(layer) else None
        row = layer.policy.enter_row(shape, index)
        taps = None if config.taps is None else jnp.zeros((batch, *config.taps), jnp.float32)
        layers.append(LayerState(tiers=built, row=row, policy=layer.policy, balance=balance, owner=owner, taps=taps))
    return State(
        layers=tuple(layers),
        offsets=tuple(jnp.zeros((batch,), jnp.int32) for _ in spec[0].tiers),
        rotary=tuple(make_rotary(rope, lengths) for rope in config.ropes),
        next_position=jnp.zeros((batch,), jnp.int32),
    )


def checked_owner(owners, index: int, layer: LayerSpec, batch: int, heads: int) -> Array | None:
    """`LayerState.owner` of a layer, [B, P]."""
    given = None if owners is None or index >= len(owners) else owners[index]
    if (layer.rows is None) != (given is None):
        raise ValueError(f"layer {index}: its spec has rows {layer.rows}, and owners say {given}; give both or neither")
    if given is None:
        return None
    given = np.asarray(given, np.int16)
    if given.shape != (batch, layer.rows) or not all(
        {*range(heads)} <= set(row) <= {*range(-1, heads)} for row in given.tolist()
    ):
        raise ValueError(
            f"layer {index}: owners must be [B, rows] = {(batch, layer.rows)} and name each of {heads} kv heads in every"
            f" row, got {given.tolist()}"
        )
    if isinstance(layer.policy, Full):
        raise ValueError(f"layer {index}: the full policy keeps all tokens of every head; it takes one row per head")
    return jnp.asarray(given)


def even_owners(spec: tuple[LayerSpec, ...], batch: int, heads: int) -> list | None:
    """Owners that any spec takes: heads take turns."""
    if all(layer.rows is None for layer in spec):
        return None
    turns = lambda rows: np.broadcast_to(np.arange(rows, dtype=np.int16) % heads, (batch, rows))
    return [None if layer.rows is None else turns(layer.rows) for layer in spec]


def check_tiers(index: int, layer: LayerSpec, limits, longest: int) -> None:
    """Raises: ValueError for tiers that cannot be, or limits [tiers, B] that they cannot hold. longest: position."""
    for tier, limit in zip(layer.tiers, limits, strict=True):
        if tier.positions not in POSITIONS:
            raise ValueError(f"layer {index}: positions are {' or '.join(POSITIONS)}, got {tier.positions!r}")
        if longest > np.iinfo(tier.positions).max:
            raise ValueError(f"layer {index}: {tier.positions} positions do not reach {longest} tokens; use int32")
        values = get_scheme(tier.scheme[1])
        if values.balanced or values.keys_only:
            why = "have no queries to balance with" if values.balanced else "are stored per token, as by 'int4'"
            raise ValueError(f"layer {index}: {tier.scheme[1]!r} stores keys; values {why}")
        if tier.slots < 1:
            raise ValueError(f"layer {index}: a tier has at least 1 slot, got {tier.slots}")
        if limit.max() > tier.slots or limit.min() < 0:
            raise ValueError(f"layer {index}: limits {limit} do not fit {tier.slots} slots")
    _check_granules(f"layer {index}", layer.tiers, limits)


def _check_granules(where: str, tiers: tuple[TierSpec, ...], limits) -> None:
    """Raises: ValueError if whole groups do not fit their tier, or have no room to wait in above it."""
    granules = [get_scheme(tier.scheme[0]).granule for tier in tiers]
    for number, (tier, granule) in enumerate(zip(tiers, granules, strict=True)):
        groups = f"{where}: tier {number} stores {tier.scheme[0]!r} in groups of {granule} tokens"
        if granule == 1:
            continue
        if number == 0:
            raise ValueError(
                f"{groups}, which need a tier above them to wait in until they are whole; put 'bf16' there"
            )
        if tier.slots % granule or (limits[number] % granule).any():
            raise ValueError(f"{groups}; slots and limits must be multiples, got {tier.slots} and {limits[number]}")
        if granules[number - 1] not in (1, granule):
            raise ValueError(
                f"{groups} and the tier above in groups of {granules[number - 1]}; use one size, or 1 above"
            )
        run = next((n for n in range(number, len(tiers)) if granules[n] == 1), len(tiers))
        needed = (limits[number - 1] + granule - 1) * limits[number:run].any(axis=0)
        if granules[number - 1] == 1 and (needed > tiers[number - 1].slots).any():
            raise ValueError(
                f"{groups}, of which up to {granule - 1} wait above: tier {number - 1} has {tiers[number - 1].slots} slots"
                f" and needs {needed.max()}"
            )


def granule_of(tier: Tier) -> int:
    """How many adjacent slots are encoded together."""
    return get_scheme(tier.scheme[0]).granule


def empty_tier(policy, spec: TierSpec, limit: Array, shape: tuple[int, int, int]) -> Tier:
    """A tier that holds nothing. limit: [B] int32, of each block row. shape: (B, P, H)."""
    batch, heads, size = shape
    slots = (batch, heads, spec.slots)
    vectors = jax.ShapeDtypeStruct((*slots, size), jnp.float32)
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)

    def encoded(name, slots_minor):
        scheme = get_scheme(name)
        scheme.check(size)
        one = jax.eval_shape(scheme.encode, vectors)
        minor = lambda x: jnp.zeros((*x.shape[:-2], x.shape[-1], x.shape[-2]), x.dtype)
        return Encoded(
            codes=minor(one.codes) if slots_minor else zeros(one.codes), factors=tuple(map(minor, one.factors))
        )

    return Tier(
        keys=encoded(spec.scheme[0], True),
        values=encoded(spec.scheme[1], get_scheme(spec.scheme[1]).slots_minor),
        positions=jnp.full(slots, EMPTY, spec.positions),
        slots=jax.tree.map(
            zeros, jax.eval_shape(policy.enter, _any_newcomers(shape, spec.slots), policy.enter_row(shape, 0))
        ),
        limit=jnp.broadcast_to(limit[:, None], (batch, heads)),
        scheme=spec.scheme,
    )


def _any_newcomers(shape: tuple[int, int, int], count: int) -> Newcomers:
    """What `Policy.enter` is given, as shapes only; shape: (B, P, H)."""
    batch, heads, size = shape
    floats = lambda *axes: jax.ShapeDtypeStruct((batch, *axes), jnp.float32)
    whole = lambda *axes: jax.ShapeDtypeStruct((batch, *axes), jnp.int32)
    return Newcomers(
        queries=floats(heads, 1, count, size),
        keys=floats(heads, count, size),
        values=floats(heads, count, size),
        positions=whole(count),
        valid=jax.ShapeDtypeStruct((batch, count), bool),
        count=whole(),
        offset=whole(),
        rotary=Rotary(frequencies=floats(size // 2), scale=floats()),
        scale=1.0,
    )


def positions_of(tier: Tier) -> Array:
    """Positions [B, P, S] int32, however narrow they are stored."""
    return tier.positions.astype(jnp.int32)


def live_slots(tier: Tier) -> Array:
    """Which slots hold a token, [B, P, S] bool."""
    return tier.positions >= 0


def live_count(tier: Tier) -> Array:
    """How many slots hold a token, [B, P] int32."""
    return live_slots(tier).sum(axis=-1, dtype=jnp.int32)


def tier_keys(tier: Tier) -> Array:
    """Keys [B, P, H, S] in the basis and dtype that the scheme reads as, rotated at `tier.positions`; dead slots hold
    anything."""
    return get_scheme(tier.scheme[0]).decode(tier.keys, -2)


def tier_values(tier: Tier) -> Array:
    """Values [B, P, S, H] in the basis and dtype that the scheme reads as; dead slots hold anything finite."""
    scheme = get_scheme(tier.scheme[1])
    return (
        jnp.swapaxes(scheme.decode(tier.values, -2), -1, -2) if scheme.slots_minor else scheme.decode(tier.values, -1)
    )


def packed_keys(tier: Tier) -> Array | Packed:
    """Keys as codes, for kernels that read those; float32 keys as they are."""
    return _packed(tier.keys, tier.scheme[0], True)


def packed_values(tier: Tier) -> Array | Packed:
    """Values as codes, for kernels that read those; float32 values as they are."""
    return _packed(tier.values, tier.scheme[1], get_scheme(tier.scheme[1]).slots_minor)


def _packed(encoded: Encoded, name: str, slots_minor: bool) -> Array | Packed:
    scheme = get_scheme(name)
    if scheme.level is None:
        return encoded.codes
    scale, zero = (*encoded.factors, None, None)[:2]
    return Packed(encoded.codes, int(scheme.bits), scheme.level, scale, zero, slots_minor, scheme.granule)


def plain_entries(tier: Tier, balance: Array | None) -> tuple[Array, Array]:
    """Keys and values [B, P, S, H] of all slots, out of their schemes' bases. balance [B, P, H]: of the
    tier's layer, for each block row."""
    keys, values = (get_scheme(name) for name in tier.scheme)
    plain = keys.out_of_basis(jnp.swapaxes(tier_keys(tier), -1, -2))
    if keys.balanced:
        plain = plain.astype(jnp.float32) / factor_of(balance)[:, :, None]
    return plain, values.out_of_basis(tier_values(tier))


def encode_keys(name: str, keys: Array, balance: Array | None, valid: Array) -> Encoded:
    """Keys [B, P, n, H] as the scheme stores them, channels last. valid [B, P, n]: others do not count in their group."""
    scheme = get_scheme(name)
    if scheme.granule > 1:
        groups, there = (x.reshape(*x.shape[:2], -1, scheme.granule, *x.shape[3:]) for x in (keys, valid))
        first = jnp.take_along_axis(groups, there.argmax(axis=3)[..., None, None], axis=3)
        keys = jnp.where(there[..., None], groups, first).reshape(keys.shape)
    return scheme.encode(keys.astype(jnp.float32) * factor_of(balance)[:, :, None] if scheme.balanced else keys)


def wants_balance(layer: LayerSpec) -> bool:
    """Whether a layer keeps MiKV's balance."""
    observed = isinstance(layer.policy, Full) and layer.policy.balance
    return observed or any(get_scheme(tier.scheme[0]).balanced for tier in layer.tiers)
