"""The table of caches: what each is made of, its bytes, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import MIXED, PARAMS, T, new_state, small

from jaxkv.cache import compress, empty_state, extend
from jaxkv.cache.budgets import plan
from jaxkv.policies import H2O, POLICIES, Full, KVzip, Recency
from jaxkv.presets import COMPUTE, PRESETS, Part, Preset, make_preset, one_tier, tiers
from jaxkv.quantization import BALANCED, SCHEMES, get_scheme
from jaxkv.quantization.balance import LIMIT, factor_of, find_balance
from jaxkv.types import LayerSpec, TierSpec


def test_every_policy_is_a_preset_and_every_scheme_is_known():
    assert set(POLICIES) <= set(PRESETS)
    for preset in PRESETS.values():
        for _, parts in (*preset.ladder, (0, preset.parts)):
            assert {n for part in parts for n in (part.keys, part.values)} - {COMPUTE} <= {
                *SCHEMES,
                *(BALANCED + name for name in SCHEMES),
            }


def test_a_ladder_is_climbed_by_share():
    auto = PRESETS["auto"]
    rungs = [least for least, _ in auto.ladder]
    assert rungs == sorted(rungs, reverse=True)
    for least, parts in auto.ladder:
        assert auto.at(least).parts == parts
    assert auto.at(0.01).parts == auto.parts and not auto.at(0.01).ladder


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Preset(name="none", summary="", policy=Recency(), parts=()), "'none' has no tiers"),
        (lambda: tiers((0.5, "int4")) and make_preset(dataclasses.replace(PRESETS["h2o"], parts=tiers((0.5, "int4")))),
         "must add up to 1, got"),
        (lambda: Part(keys="int4", values="int4", slots=0), "at least 1 slot"),
        (lambda: Part(keys="int4", values="int4"), r"a share in \(0, 1\] .* got 0.0"),
        (lambda: Part(keys="int5", values="int4", share=1), "unknown storage scheme 'int5'; known: f32, bf16"),
        (lambda: make_preset("h3o"), "unknown cache 'h3o'; known: full, recency"),
        (lambda: make_preset("h2o", window=3), "policy 'h2o' has no option window; it has: recent, recent_share, sinks"),
        (lambda: dataclasses.replace(PRESETS["pyramid"], funnel=0.0), "funnel must be more than 0"),
    ],
)  # fmt: skip
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        (("int4", "balanced-int4"), "stores keys"),
        (("int4", "int7"), "unknown storage scheme 'int7'"),
        (("int4", "kivi2"), "'kivi2' stores keys; values are stored per token"),
        (("kivi2", "int2"), "layer 0: tier 0 stores 'kivi2' in groups of 32 tokens, which need a tier above"),
    ],
)
def test_refused_tiers(scheme, message):
    spec = (LayerSpec(policy=Recency(), tiers=(TierSpec(slots=8, scheme=scheme),)),) * 2
    with pytest.raises(ValueError, match=message):
        empty_state(MIXED, spec, limits=np.full((2, 1, 1), 8), lengths=[8])


@pytest.mark.parametrize(
    ("slots", "limits", "message"),
    [
        ((63, 40), (32, 32), "slots and limits must be multiples, got 40"),
        ((63, 64), (32, 40), r"slots and limits must be multiples, got 64 and \[40\]"),
        ((62, 64), (32, 64), "up to 31 wait above: tier 0 has 62 slots and needs 63"),
    ],
)
def test_groups_that_do_not_fit_are_refused(slots, limits, message):
    schemes = (("bf16", "bf16"), ("kivi4", "int4"))
    spec = (
        LayerSpec(
            policy=Recency(), tiers=tuple(TierSpec(slots=n, scheme=s) for n, s in zip(slots, schemes, strict=True))
        ),
    ) * 2
    with pytest.raises(ValueError, match=message):
        empty_state(MIXED, spec, limits=np.asarray([limits] * 2)[..., None], lengths=[8])
    if slots[1] == 64:  # where nothing goes down, nothing waits
        empty_state(MIXED, spec, limits=np.asarray([(32, 0)] * 2)[..., None], lengths=[8])


def test_positions_too_narrow_are_refused():
    spec = (LayerSpec(policy=Recency(), tiers=(TierSpec(slots=8, scheme=("f32", "f32"), positions="int16"),)),) * 2
    with pytest.raises(ValueError, match="int16 positions do not reach 40000 tokens; use int32"):
        empty_state(MIXED, spec, limits=np.full((2, 1, 1), 8), lengths=[40000])
    state = empty_state(MIXED, spec, limits=np.full((2, 1, 1), 8), lengths=[8])
    late = dataclasses.replace(state, next_position=jnp.full((1,), 32765, jnp.int32))
    with pytest.raises(ValueError, match="32769 positions are needed; tiers of this state count to 32767; use int32"):
        extend(PARAMS, jnp.zeros((1, 4), jnp.int32), late, config=MIXED)
    whole = (LayerSpec(policy=Full(), tiers=(TierSpec(slots=8, scheme=("f32", "f32")),)),) * 2
    full = empty_state(MIXED, whole, limits=np.full((2, 1, 1), 8), lengths=[8])
    far = dataclasses.replace(full, next_position=jnp.full((1,), 40000, jnp.int32))
    with pytest.raises(ValueError, match="int16 positions do not reach 40000 tokens; use int32"):
        compress(far, spec, limits=np.full((2, 1, 1), 8))
    for wrong in ((), (LayerSpec(policy=Recency(), tiers=()),) * 2):
        with pytest.raises(ValueError, match="a spec for each of 2 layers, with equally many tiers, at least one"):
            compress(full, wrong, limits=np.zeros((2, 0, 1)))
    odd = (LayerSpec(policy=Recency(), tiers=(TierSpec(slots=8, scheme=("f32", "f32"), positions="uint16"),)),) * 2
    with pytest.raises(ValueError, match="positions are int16 or int32, got 'uint16'"):
        empty_state(MIXED, odd, limits=np.full((2, 1, 1), 8), lengths=[8])


# MiKV


@pytest.mark.parametrize(
    ("high", "papers", "ours"),
    [("bf16", 32.5, 36.3), ("int8", 23.1, 26.5), ("int4", 18.1, 21.3), ("int2", 15.6, 18.7)],
)
def test_mikvs_own_accounting_and_ours(high, papers, ours):
    """A fifth of the tokens at some bits, the rest in INT2; theirs: 16-bit scale and zero per group of 64 counted, no more."""
    bits = lambda name: get_scheme(name).bytes_per_vector(64) * 8 / 64
    assert abs(100 * (0.2 * bits(high) + 0.8 * bits("int2")) / 16 - papers) < 0.05
    config = dataclasses.replace(MIXED, layers=MIXED.layers[:1] * 30, num_heads=6, num_kv_heads=3, head_dim=64)
    parts = tiers((0.2, high), (0.8, "balanced-int2", "int2"), residual=0)
    planned = plan(
        config, Preset(name="mikv", summary="", policy=H2O(), parts=parts), 2000, lengths=[2000], dtype="float32"
    )
    assert abs(100 * planned.share - ours) < 0.05


def rows(seed, scale=1.0):
    """Queries [B, P, G, T, H] and keys [B, P, T, H]; the rotated pair (3, 7) of keys is `scale` times larger."""
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((2, 2, 9, 8)).astype(np.float32)
    keys[..., 3::4] *= scale
    return jnp.asarray(rng.standard_normal((2, 2, 3, 9, 8)).astype(np.float32)), jnp.asarray(keys)


def test_balance_by_hand():
    queries = jnp.asarray([[[[[4.0, 0.0, -16.0, 1.0]]]]])
    keys = jnp.asarray([[[[1.0, 0.0, 1.0, -2.0]]]])
    found = find_balance(jnp.zeros((1, 1, 4), jnp.uint16), queries, keys, jnp.ones((1, 1), bool), rotary_dim=4)
    pairs = [4.0, np.sqrt(0.5), 4.0, np.sqrt(0.5)]  # pairs (0, 2): max 16 over 1; (1, 3): 1 over 2
    np.testing.assert_allclose(factor_of(found)[0, 0], pairs, rtol=2**-8)


def test_balance_is_found_once_and_never_from_padding():
    queries, keys = rows(0)
    unknown = jnp.zeros((2, 2, 8), jnp.uint16)
    valid = jnp.asarray(np.array([[True] * 9, [False] * 9]))
    found = find_balance(unknown, queries, keys, valid, rotary_dim=8)
    assert (found[0] > 0).all() and (found[1] == 0).all() and (factor_of(found)[1] == 1).all()
    again = find_balance(found, 3 * queries, keys, jnp.ones((2, 9), bool), rotary_dim=8)
    np.testing.assert_array_equal(again[0], found[0])
    nothing = find_balance(unknown, 0 * queries, keys, jnp.ones((2, 9), bool), rotary_dim=8)
    assert (factor_of(nothing) == 1).all()
    huge = find_balance(unknown, 1e30 * queries, keys, jnp.ones((2, 9), bool), rotary_dim=8)
    assert (factor_of(huge) <= LIMIT * 1.01).all()


def test_balanced_keys_do_not_mind_an_outlier_that_queries_undo():
    """Two channels of keys times s, of queries over s: the same attention. Plain INT2 suffers, balanced INT2 does not."""

    def error(s, balanced):
        queries, keys = rows(1, s)
        queries = queries.at[..., 3::4].multiply(1 / s)
        scheme = get_scheme("int2")
        b = find_balance(jnp.zeros((2, 2, 8), jnp.uint16), queries, keys, jnp.ones((2, 9), bool), rotary_dim=8)
        b = factor_of(b)[:, :, None] if balanced else jnp.ones((1, 1, 1, 1))
        stored = scheme.decode(scheme.encode(keys * b), -1)
        exact = jnp.einsum("bpgth,bpsh->bpgts", queries, keys)
        return float(
            jnp.sqrt(jnp.square(jnp.einsum("bpgth,bpsh->bpgts", queries / b[:, :, None], stored) - exact).mean())
        )

    assert error(64.0, False) > 4 * error(1.0, False)
    assert error(64.0, True) < 1.5 * error(1.0, True)


# KVzip's second reading


def test_a_replay_looks_and_leaves_nothing_behind():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 2 * T)).astype(np.int32))
    again = jnp.asarray(np.r_[np.zeros(T), np.arange(1, T + 1)].astype(np.int32))[None]
    policy = KVzip(recent=1)
    make = lambda: new_state(policy, [[T]])
    hidden, plain = extend(PARAMS, tokens[:, :T], make(), config=MIXED)
    seen, state = extend(PARAMS, tokens, make(), config=MIXED, replay=again)
    np.testing.assert_allclose(seen[:, :T], hidden, rtol=0, atol=tolerances.HIDDEN)
    assert int(state.next_position[0]) == T
    for one, other in zip(state.layers, plain.layers, strict=True):
        np.testing.assert_array_equal(one.tiers[0].positions, other.tiers[0].positions)
        np.testing.assert_allclose(one.tiers[0].keys.codes, other.tiers[0].keys.codes, rtol=0, atol=tolerances.ENTRIES)
    score = lambda s: np.asarray(policy.score(s.layers[0].tiers[0].slots, (), None))
    assert not score(plain).any() and (score(state)[0, :, :T] > 0).all()


def test_a_replay_is_the_largest_attention_of_its_own_rows():
    """Against a second extend on the full cache whose tokens are not candidates, and the attention it gives."""
    tokens = np.random.default_rng(1).integers(0, 64, (1, 2 * T)).astype(np.int32)
    again = np.r_[np.zeros(T), np.arange(1, T + 1)].astype(np.int32)[None]
    policy = KVzip(recent=1)
    _, once = extend(PARAMS, jnp.asarray(tokens), new_state(policy, [[T]]), config=MIXED, replay=jnp.asarray(again))
    _, state = extend(PARAMS, jnp.asarray(tokens[:, :T]), new_state(policy, [[T]]), config=MIXED)
    _, twice = extend(
        PARAMS, jnp.asarray(tokens[:, T:]), state, config=MIXED, candidates=jnp.zeros((1, T), bool)
    )  # later rows count for tokens that are stored
    for one, other in zip(once.layers, twice.layers, strict=True):
        a, b = (np.asarray(policy.score(x.tiers[0].slots, (), None)) for x in (one, other))
        live = np.asarray(one.tiers[0].positions) >= 0
        np.testing.assert_allclose(a[live], b[live], rtol=2**-7)


@pytest.mark.slow
def test_others_do_not_hear_a_replay():
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (1, 2 * T)).astype(np.int32))
    again = jnp.asarray(np.r_[np.zeros(T), np.arange(1, T + 1)].astype(np.int32))[None]
    for policy in (
        H2O(),
        small("scissorhands"),
        small("snapkv"),
        small("tova"),
        small("keydiff"),
        small("expected-attention"),
    ):
        _, plain = extend(PARAMS, tokens[:, :T], new_state(policy, [[9]]), config=MIXED)
        _, heard = extend(PARAMS, tokens, new_state(policy, [[9]]), config=MIXED, replay=again)
        for a, b in zip(jax.tree.leaves(heard), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerances.HIDDEN if a.dtype.kind == "f" else 0)


def test_one_tier_is_what_a_policy_alone_gets():
    assert make_preset(H2O()).parts == one_tier("bf16") and make_preset("full").parts == one_tier(COMPUTE)
