"""Relative convolutional attention under the cache: policies, tiers, pieces, replays, joins; and mistakes that are seen."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import (
    MIXED,
    PLAIN,
    SLOTS,
    B,
    check_oracle,
    check_promises,
    go_on,
    make_case,
    new_state,
    run_case,
    small,
    spec_of,
)
from rcmha_harness import (
    DEFAULT,
    OPTIONS,
    RcmhaReference,
    oracle_of,
    read_all,
    reference_of,
    stirred,
    with_rcmha,
)
from test_tiers import limits_of, options, store

from jaxkv import decoder
from jaxkv.cache import (
    StateFileError,
    compress,
    concat,
    drop,
    empty_state,
    extend,
    fingerprint,
    forward,
    pack_state,
    unpack_state,
)
from jaxkv.causal import causal_forward
from jaxkv.policies import Full

PAIRS = [("full", None), ("h2o", None), ("recency", None)]
LATE = [("scissorhands", None), ("snapkv", None), ("replay", None), ("kvzip", None), ("keydiff", None)]


@pytest.mark.parametrize("name, tiers", [*PAIRS, *(pytest.param(*x, marks=pytest.mark.slow) for x in LATE)])
def test_policies_keep_their_promises_and_what_the_reference_keeps(name, tiers):
    config = with_rcmha(MIXED)
    params, wide = stirred(config)
    case = make_case(0)
    results = run_case(small(name), case, config, params=params)
    check_promises(small(name), case, results, config)
    checks = [check_oracle(small(name), case, results, config, row, oracle=oracle_of(wide)) for row in range(B)]
    assert all(same or margin < tolerances.STORED_MARGIN for same, margin in checks)
    assert sum(same for same, _ in checks) >= B - 1


class OffByOne(RcmhaReference):
    def distance(self, step, token, crowd):
        return step - token.position + 1


class ByIndex(RcmhaReference):
    """What counts keys rather than positions, as a table over the slots of a cache would."""

    def distance(self, step, token, crowd):
        return sorted((t.position for t in crowd), reverse=True).index(token.position)


class Forgetful(RcmhaReference):
    """Every read begins anew, as if nothing were carried."""

    def _convolved(self, params, past, at, first):
        return super()._convolved(params, past[first:], at - first, 0)


@pytest.mark.parametrize("wrong", [OffByOne, ByIndex, Forgetful])
def test_mistakes_are_seen(wrong):
    """On a row that has evicted tokens from between others."""
    config = with_rcmha(PLAIN)
    params, wide = stirred(config)
    case, policy = make_case(0), dataclasses.replace(small("recency"), sinks=4)
    results = run_case(policy, case, config, params=params)
    assert check_oracle(policy, case, results, config, 1, oracle=oracle_of(wide))[0]
    with pytest.raises(AssertionError):
        check_oracle(policy, case, results, config, 1, oracle=oracle_of(wide, wrong))


def test_counting_pads_is_seen():
    config = with_rcmha(PLAIN)
    params, wide = stirred(config)
    tokens = make_case(0).tokens[:1, :9]
    valid = np.array([[True, True, False, True, True, False, False, True, True]])
    right = reference_of(wide, config).read(tokens[0][valid[0]])
    found = forward(params, jnp.asarray(tokens), config=config, valid=jnp.asarray(valid))[0][valid[0]]
    np.testing.assert_allclose(found, right, rtol=0, atol=tolerances.HIDDEN)
    counted = reference_of(wide, config).read(tokens[0])[valid[0]]
    assert np.abs(counted - right).max() > tolerances.VISIBLE


@pytest.mark.slow
@pytest.mark.parametrize("tiers", ["bf16 over int4", "balanced under rotation"])
def test_tiers(tiers):
    config = with_rcmha(MIXED)
    params, wide = stirred(config)
    case = make_case(0, limits=limits_of(tiers))
    results = run_case(small("h2o"), case, config, params=params, **options(tiers))
    check_promises(small("h2o"), case, results, config)
    kept = {"stored": store(tiers), "ties": 2}
    checks = [
        check_oracle(small("h2o"), case, results, config, row, oracle=oracle_of(wide), **kept) for row in range(B)
    ]
    assert all(same or margin < tolerances.STORED_MARGIN for same, margin in checks)


TOKENS = np.random.default_rng(0).integers(0, 64, (2, 20)).astype(np.int32)
ROOM = [[SLOTS] * 2]


def read(params, config, tokens, policy=None):
    return read_all(params, tokens, new_state(policy or small("full"), ROOM, config), config)


def test_pieces_of_any_size_are_the_whole_also_in_a_state_that_stores_nothing():
    config = with_rcmha(MIXED, OPTIONS["filters of each head"])
    params, _ = stirred(config)
    whole, end = read(params, config, TOKENS)
    state, pieces = new_state(small("full"), ROOM, config), []
    for piece in np.split(TOKENS, (1, 2, 9), axis=1):
        out, state = read_all(params, piece, state, config)
        pieces.append(out)
    np.testing.assert_allclose(np.hstack(pieces), whole, rtol=0, atol=tolerances.HIDDEN)
    spec = tuple(dataclasses.replace(layer, tiers=()) for layer in spec_of(Full()))
    bare = empty_state(config, spec, limits=np.zeros((2, 0, 2), np.int32), lengths=[20] * 2)
    _, bare = read_all(params, TOKENS, bare, config)
    for one, other, third in zip(end.layers, state.layers, bare.layers, strict=True):
        np.testing.assert_allclose(one.taps, other.taps, rtol=0, atol=tolerances.HIDDEN)
        np.testing.assert_array_equal(one.taps, third.taps)
        assert np.abs(one.taps).max() > 0.1


def test_replayed_passages_know_the_row_and_nothing_of_each_other():
    config = with_rcmha(MIXED)
    params, _ = stirred(config)
    tokens = np.concatenate([TOKENS, TOKENS[:, :5], TOKENS[:, 5:6], TOKENS[:, 6:9]], axis=1)
    replay, segments = np.zeros_like(tokens), np.full_like(tokens, -1)
    for number, (start, stop) in enumerate(((20, 25), (25, 26), (26, 29))):
        replay[:, start:stop], segments[:, start:stop] = np.arange(1, stop - start + 1), number
    state = new_state(small("full"), ROOM, config)
    given = {"segments": jnp.asarray(segments), "replay": jnp.asarray(replay)}
    hidden, after = extend(params, jnp.asarray(tokens), state, config=config, **given)
    for start, stop in ((20, 25), (25, 26), (26, 29)):
        alone = forward(params, jnp.asarray(np.concatenate([TOKENS, tokens[:, start:stop]], axis=1)), config=config)
        np.testing.assert_allclose(hidden[:, :20], alone[:, :20], rtol=0, atol=tolerances.HIDDEN)
        np.testing.assert_allclose(hidden[:, start:stop], alone[:, 20:], rtol=0, atol=tolerances.HIDDEN)
    for one, other in zip(after.layers, read(params, config, TOKENS)[1].layers, strict=True):
        np.testing.assert_allclose(one.taps, other.taps, rtol=0, atol=tolerances.HIDDEN)


def test_positions_beyond_the_table_are_refused():
    """Replayed tokens count to where they stand, not one by one."""
    config = with_rcmha(MIXED)
    params, _ = stirred(config)
    tokens = np.zeros((1, 3 * 20), np.int32)
    replay = np.tile(np.arange(1, 21), 3)[None].astype(np.int32)
    state = lambda: new_state(small("recency"), [[SLOTS]], config)
    _, filled = extend(params, jnp.zeros((1, 44), jnp.int32), state(), config=config)
    segments = jnp.asarray(np.repeat(np.arange(3), 20)[None], jnp.int32)
    _, again = extend(params, jnp.asarray(tokens), filled, config=config, segments=segments, replay=jnp.asarray(replay))
    assert int(again.next_position[0]) == 44
    for count in (21, 60):
        with pytest.raises(ValueError, match=f"{44 + count} positions are needed; the model has learned 64"):
            extend(params, jnp.asarray(tokens[:, :count]), again, config=config)
    with pytest.raises(ValueError, match="rows of 88 tokens together: the model has learned 64"):
        concat(again, again, config=config)
    with pytest.raises(ValueError, match="sequences of 65 tokens: the model has learned 64"):
        at = jnp.zeros((1, 65), jnp.int32)
        causal_forward(params, at, config=config, positions=at, segments=at, remat="none")
    with pytest.raises(ValueError, match="nothing ahead; 'bidirectional' needs that"):
        extend(params, jnp.asarray(tokens[:, :2]), again, config=config, visibility="bidirectional")


def test_joining_and_dropping():
    """Taps of a joined state are the last that both read; after dropping the end they begin anew, inside they stay."""
    config = with_rcmha(MIXED, OPTIONS["filters of each head"])
    params, _ = stirred(config)
    first = read(params, config, TOKENS[:, :8])[1]
    for count in (1, 2, 5):
        second = read(params, config, TOKENS[:, 8 : 8 + count])[1]
        taken = min(count, 3)
        for a, b, both in zip(*(s.layers for s in (first, second, concat(first, second, config=config))), strict=True):
            expected = np.concatenate([a.taps, b.taps[:, 3 - taken :]], axis=1)[:, -3:]
            np.testing.assert_array_equal(both.taps, expected)
    at = lambda n: jnp.full((2,), n, jnp.int32)
    inside, end = (drop(first, start=at(a), stop=at(b)) for a, b in ((2, 4), (5, 8)))
    assert all((x.taps == y.taps).all() for x, y in zip(inside.layers, first.layers, strict=True))
    assert all((x.taps == 0).all() for x in end.layers)


@pytest.mark.parametrize("rcmha", [DEFAULT, OPTIONS["sinusoidal"]], ids=["learned", "sinusoidal"])
def test_compress_and_files(rcmha):
    config, policy = with_rcmha(MIXED, rcmha), small("h2o")
    params, _ = stirred(config)
    limits = np.full((2, 1, 2), 9, np.int32)
    limits[1] = 7
    _, full = read(params, config, TOKENS, Full(observe=(policy,)))
    half = compress(full, spec_of(policy), limits=limits)
    direct = empty_state(config, spec_of(policy), limits=limits, lengths=[36] * 2)
    _, direct = read_all(params, TOKENS, direct, config)
    key = fingerprint(config, params)
    back, _ = unpack_state(pack_state(half, model=key, extra={}), config=config, model=key, where="here")
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(half))
    hiddens = [read_all(params, TOKENS[:, :3], state, config)[0] for state in (half, direct, back)]
    np.testing.assert_allclose(hiddens[0], hiddens[1], rtol=0, atol=tolerances.HIDDEN)
    np.testing.assert_array_equal(hiddens[0], hiddens[2])
    assert not full.layers[0].taps.is_deleted()


def test_saved_taps_that_do_not_fit_are_refused():
    config = with_rcmha(MIXED, DEFAULT)
    data = pack_state(new_state(small("h2o"), ROOM, config), model="m", extra={})
    load = lambda data, config: unpack_state(data, config=config, model="m", where="here")
    assert load(data, config)[0].layers[1].taps.shape == (2, *config.taps)
    wider = with_rcmha(MIXED, dataclasses.replace(DEFAULT, width=DEFAULT.width + 1))
    with pytest.raises(
        StateFileError, match=r"here: .*taps should be float32 \(2, 3, 64\), it is float32 \(2, 2, 64\)"
    ):
        load(data, wider)
    with pytest.raises(StateFileError, match=r"here: holds \.layers\[0\]\.taps, which a state of this model has not"):
        load(data, MIXED)
    plain = pack_state(new_state(small("h2o"), ROOM, MIXED), model="m", extra={})
    with pytest.raises(StateFileError, match=r"taps should be float32 \(2, 2, 64\), it is missing"):
        load(plain, config)


@pytest.mark.slow
def test_block_rows():
    """Heads with several block rows compute what one each does."""
    config = with_rcmha(MIXED)
    params, _ = stirred(config)
    case = make_case(0, limits=((SLOTS,) * B,))
    found, plain = (
        run_case(small("recency"), case, config, params=params, **x)[2] for x in ({"rows": (0, 1, 1, 0, 1)}, {})
    )
    np.testing.assert_allclose(found[case.then_valid], plain[case.then_valid], rtol=0, atol=tolerances.HIDDEN)


def test_bfloat16():
    config = with_rcmha(PLAIN)
    made = jax.eval_shape(lambda: decoder.init_params(config, jax.random.key(0), dtype=jnp.bfloat16))
    assert {x.dtype.name for x in jax.tree.leaves(made)} == {"bfloat16"}
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stirred(config)[0])
    case = make_case(0)
    found, after = extend(low, jnp.asarray(case.tokens), new_state(small("full"), case.limits, config), config=config)
    whole = forward(jax.tree.map(lambda x: x.astype(jnp.float32), low), jnp.asarray(case.tokens), config=config)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), whole, rtol=0, atol=tolerances.HIDDEN_BF16_MODEL)
    hiddens, _, _ = go_on(case, jax.device_get(after), config, params=low)
    assert hiddens.dtype == jnp.bfloat16 and np.isfinite(np.asarray(hiddens, np.float32)[case.then_valid]).all()
