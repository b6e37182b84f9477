"""Making a state, and looking into a tier."""

import jax.numpy as jnp
import numpy as np

from jaxkv.config import DecoderConfig
from jaxkv.quantization import get_scheme
from jaxkv.rope import make_rotary
from jaxkv.types import Array, Encoded, LayerSpec, LayerState, State, Tier

EMPTY = -1  # position of a slot that holds nothing


def empty_state(config: DecoderConfig, spec: tuple[LayerSpec, ...], *, limits, lengths) -> State:
    """A state that has seen nothing.

    Args:
      spec: one LayerSpec per layer; all layers have the same number of tiers.
      limits: int, [L, tiers, B]: slots that each row may use, at most the tier's `slots`.
      lengths: [B] int: planned total length of each row (prompt plus new tokens), which fixes RoPE kinds that depend on
        length.
    Raises: ValueError if the shapes of spec, limits and config disagree, or for a scheme that tiers do not read.
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
    layers = []
    for index, layer in enumerate(spec):
        for number, tier in enumerate(layer.tiers):
            for name in tier.scheme:
                if get_scheme(name).factors:
                    raise ValueError(
                        f"layer {index}: tiers do not read the storage scheme {name!r} yet; known: f32, bf16"
                    )
            if tier.slots < 1 or limits[index, number].max() > tier.slots or limits[index, number].min() < 0:
                raise ValueError(f"layer {index}: limits {limits[index, number]} do not fit {tier.slots} slots")
        built = tuple(
            _empty_tier(config, layer.policy, tier, limits[index, number], batch)
            for number, tier in enumerate(layer.tiers)
        )
        layers.append(LayerState(tiers=built, row=layer.policy.enter_row(batch, index), policy=layer.policy))
    return State(
        layers=tuple(layers),
        offsets=tuple(jnp.zeros((batch,), jnp.int32) for _ in spec[0].tiers),
        rotary=tuple(make_rotary(rope, lengths) for rope in config.ropes),
        next_position=jnp.zeros((batch,), jnp.int32),
    )


def _empty_tier(config, policy, tier, limit, batch):
    heads, size = config.num_kv_heads, config.head_dim
    shape = (batch, heads, tier.slots)

    def zeros(scheme, slots_minor):
        one = get_scheme(scheme).encode(jnp.zeros((*shape, size), jnp.float32))
        minor = lambda x: jnp.zeros_like(jnp.swapaxes(x, -1, -2) if slots_minor else x)
        return Encoded(codes=minor(one.codes), factors=tuple(jnp.swapaxes(f, -1, -2) for f in one.factors))

    return Tier(
        keys=zeros(tier.scheme[0], True),
        values=zeros(tier.scheme[1], False),
        positions=jnp.full(shape, EMPTY, jnp.int32),
        slots=policy.enter(shape),
        limit=jnp.broadcast_to(jnp.asarray(limit, jnp.int32)[:, None], (batch, heads)),
        scheme=tier.scheme,
    )


def live_slots(tier: Tier) -> Array:
    """Which slots hold a token, [B, P, S] bool."""
    return tier.positions >= 0


def live_count(tier: Tier) -> Array:
    """How many slots hold a token, [B, P] int32."""
    return live_slots(tier).sum(axis=-1, dtype=jnp.int32)


def tier_keys(tier: Tier) -> Array:
    """Keys [B, P, H, S] in the dtype that the scheme reads as, rotated at `tier.positions`; dead slots hold anything."""
    return get_scheme(tier.scheme[0]).decode(tier.keys, -2)


def tier_values(tier: Tier) -> Array:
    """Values [B, P, S, H] in the dtype that the scheme reads as; dead slots hold anything finite."""
    return get_scheme(tier.scheme[1]).decode(tier.values, -1)
