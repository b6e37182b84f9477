"""`insert`: which entries stay, which move down, and that each is stored once."""

import cache_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_harness import (
    live_set,
    numbers,
    value_codes,
)

from jaxkv.cache import insert
from jaxkv.quantization import get_scheme
from jaxkv.types import Encoded, Entries, Tier


def placed(values, scheme):
    """Values [B, P, S, H] laid out as the scheme wants them."""
    return np.swapaxes(values, 2, 3) if get_scheme(scheme).slots_minor else values


def make_insert(rng, slots, count, scheme):
    """A random tier and entries; scores of few values, so that ties abound. The dead hold garbage."""
    stored = lambda x: np.asarray(x, jnp.bfloat16).view(np.uint16) if scheme == "bf16" else x.astype(np.float32)
    rows = (3, 2)
    at = np.argsort(rng.random((*rows, slots + count)), axis=-1).astype(np.int32)
    live, valid = rng.random((*rows, slots)) < 0.7, rng.random((*rows, count)) < 0.7
    normal = lambda *shape: rng.standard_normal((*rows, *shape)).astype(np.float32)
    tier = Tier(
        keys=Encoded(codes=stored(np.where(live[:, :, None], normal(4, slots), np.nan))),
        values=Encoded(codes=placed(stored(np.where(live[..., None], normal(slots, 4), 1e30)), scheme)),
        positions=np.where(live, at[..., :slots], -1).astype(np.int32),
        slots={"mark": normal(slots), "bits": rng.integers(0, 255, (*rows, slots, 2)).astype(np.uint8)},
        limit=np.maximum(live.sum(-1), rng.integers(0, slots + 1, rows)).astype(np.int32),
        scheme=(scheme, scheme),
    )
    entries = Entries(
        keys=np.where(valid[..., None], normal(count, 4), np.nan).astype(np.float32),
        values=normal(count, 4),
        positions=at[..., slots:],
        slots={"mark": normal(count), "bits": rng.integers(0, 255, (*rows, count, 2)).astype(np.uint8)},
        valid=valid,
    )
    values = np.array([0.0, 1.0, 2.0, -1.5, np.inf], np.float32)
    return tier, entries, (rng.choice(values, (*rows, slots)), rng.choice(values, (*rows, count)))


@pytest.mark.parametrize("slots, count, scheme", [
    (6, 1, "f32"), (1, 1, "f32"), (6, 4, "f32"), (1, 3, "f32"), (3, 9, "f32"), (6, 1, "bf16"), (6, 4, "bf16"),
])  # fmt: skip
@pytest.mark.parametrize("displace", [False, True])
def test_insert(slots, count, scheme, displace):
    """Positions, keys, values and policy state, to the last bit; what a bfloat16 tier takes in is rounded once."""
    jitted = jax.jit(insert)
    rng = np.random.default_rng(slots * 100 + count)
    for _ in range(40):
        tier, entries, scores = make_insert(rng, slots, count, scheme)
        after, displaced = jax.device_get(jitted(tier, entries, scores=scores, below=(tier,) * displace))
        for b, p in np.ndindex(3, 2):
            held = [(scores[0][b, p, i], x) if x >= 0 else None for i, x in enumerate(tier.positions[b, p])]
            coming = [(scores[1][b, p, j], x) if entries.valid[b, p, j] else None
                      for j, x in enumerate(entries.positions[b, p])]  # fmt: skip
            expected, gone = cache_reference.insert(held, coming, tier.limit[b, p])
            assert live_set(after.positions[b, p]) == {parts_of(tier, entries, b, p, e)[0] for e in expected if e}
            for slot, origin in enumerate(expected):
                if origin is not None and origin[0] == "slot":
                    assert after.positions[b, p, slot] == tier.positions[b, p, slot]  # survivors do not move
            check_parts(after, tier, entries, b, p, [e for e in expected if e], stored=True)
            if displace:
                left = Tier(
                    keys=Encoded(codes=np.swapaxes(displaced.keys, 2, 3)),
                    values=Encoded(codes=placed(displaced.values, tier.scheme[1])),
                    positions=np.where(displaced.valid, displaced.positions, -1), slots=displaced.slots,
                    limit=tier.limit, scheme=tier.scheme,
                )  # fmt: skip
                assert live_set(left.positions[b, p]) == {parts_of(tier, entries, b, p, e)[0] for e in gone}
                check_parts(left, tier, entries, b, p, gone, stored=False)
    assert displace or displaced is None


def parts_of(tier, entries, b, p, origin):
    """Position, key, value and policy state of one candidate."""
    kind, i = origin
    if kind == "slot":
        source, key, value = tier, numbers(tier.keys.codes)[b, p, :, i], numbers(value_codes(tier))[b, p, i]
    else:
        source, key, value = entries, entries.keys[b, p, i], entries.values[b, p, i]
    return int(source.positions[b, p, i]), key, value, source.slots["mark"][b, p, i], source.slots["bits"][b, p, i]


def check_parts(after, tier, entries, b, p, origins, stored):
    """Key, value and policy state travel with their position. stored: as the tier's scheme encodes them, else as given."""
    rounded = lambda x: np.asarray(np.asarray(x, jnp.bfloat16), np.float32) if stored and "bf16" in tier.scheme else x
    for origin in origins:
        at, key, value, mark, bits = parts_of(tier, entries, b, p, origin)
        (slot,) = np.flatnonzero(after.positions[b, p] == at)
        np.testing.assert_array_equal(numbers(after.keys.codes)[b, p, :, slot], rounded(key))
        np.testing.assert_array_equal(numbers(value_codes(after))[b, p, slot], rounded(value))
        np.testing.assert_array_equal(after.slots["mark"][b, p, slot], mark)
        np.testing.assert_array_equal(after.slots["bits"][b, p, slot], bits)
