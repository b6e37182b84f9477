"""Budgets: spelling, exactness, bytes against the compiled program, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances

from infer import generate as generation
from infer.prefill import new_state, read
from infer.sampling import Sampling, make_sampling
from infer.stops import build_stops
from jaxkv.cache import budgets, decode, empty_state, live_count
from jaxkv.cache.budgets import STEP, parse_budget, plan, slot_grid, tree_bytes
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.decoder import init_params
from jaxkv.policies import POLICIES, Full, Recency, make_policy
from jaxkv.presets import PRESETS, Preset, make_preset, tiers
from jaxkv.quantization import SCHEMES, get_scheme

ROPE = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
CONFIG = DecoderConfig(
    model_type="llama", vocab_size=64, hidden_size=32, intermediate_size=48, num_heads=4, num_kv_heads=2, head_dim=8,
    layers=(LayerConfig(window=None, rope=ROPE), LayerConfig(window=16, rope=ROPE)), max_positions=512, norm_eps=1e-5,
    norm_offset=0.0, activation="silu", query_scale=8**-0.5, embedding_scale=1.0, tie_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        (1024, "tokens", 1024), ("512", "tokens", 512), ("64MiB", "bytes", 64 * 2**20), ("1.5kb", "bytes", 1500),
        ("20%", "share", 0.2), ("12.5 %", "share", 0.125), (None, "share", 1.0),
    ],
)  # fmt: skip
def test_spellings(text, kind, amount):
    got = parse_budget(text)
    assert (got.kind, got.amount) == (kind, amount)


@pytest.mark.parametrize("text", ["", "abc", "-5", 0, "0%", "120%", "3 parsecs", "1.5", True, "5 %%"])
def test_refused_spellings(text):
    with pytest.raises(ValueError, match="budget"):
        parse_budget(text)


def test_slot_grid_is_small_and_covers():
    sizes = {slot_grid(n) for n in range(1, 8193)}
    assert all(slot_grid(n) >= n for n in range(1, 8193)) and len(sizes) < 60


LENGTHS = [200, 120, 40]  # of three rows


def bytes_of_arguments(memory, beside):
    """What a compiled program takes as arguments, without `beside`."""
    return memory.argument_size_in_bytes - tree_bytes(beside)


CUT = [(name, 0.6) for name in PRESETS if name != "full"]
WHOLE = [
    (name, 1.0) for name, preset in PRESETS.items() if name == "full" or not preset.exact
]  # of others it is full's
QUICK = {("full", 1.0), ("h2o", 0.6), ("mikv", 0.6), ("auto", 0.6), ("rotated-3", 1.0), ("keydiff", 0.6)}
later = lambda cases, mark: [one if one in QUICK else pytest.param(*one, marks=mark) for one in cases]


@pytest.mark.parametrize(("name", "share"), [*later(CUT, pytest.mark.slow), *later(WHOLE, pytest.mark.exhaustive)])
def test_bytes_are_the_compiled_programs(name, share):
    """What is reported for a row, three times, is what the program takes: its arguments without parameters and flags."""
    check_program(plan(CONFIG, name, f"{share:.0%}", lengths=LENGTHS, dtype="float32"))


@pytest.mark.parametrize(
    "scheme", [s if s == "int3" else pytest.param(s, marks=pytest.mark.slow) for s in [*SCHEMES, "balanced-rotated2"]]
)
def test_bytes_of_every_scheme_are_the_compiled_programs(scheme):
    values = "int4" if get_scheme(scheme).keys_only else scheme.removeprefix("balanced-")
    parts = tiers((1.0, scheme, values))
    check_program(
        plan(
            CONFIG,
            Preset(name=scheme, summary="", policy=Recency(), parts=parts),
            "60%",
            lengths=LENGTHS,
            dtype="float32",
        )
    )


def check_program(planned):
    params = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0)))
    state = new_state(CONFIG, planned, LENGTHS)
    step = jax.jit(functools.partial(decode, config=CONFIG), donate_argnums=2)
    token, valid = jnp.zeros((3,), jnp.int32), jnp.ones((3,), bool)
    memory = step.lower(params, token, state, valid=valid).compile().memory_analysis()
    arguments = bytes_of_arguments(memory, (params, token, valid))
    assert tree_bytes(state) == 3 * planned.bytes_per_row
    np.testing.assert_allclose(arguments, 3 * planned.bytes_per_row, rtol=tolerances.BYTES)


def loop_arguments(planned, lengths, dtype):
    """Arguments of the decode loop of `infer`, sampling and stopping included, at its start."""
    rows = len(lengths)
    loop = generation.Loop(
        state=new_state(CONFIG, planned, lengths), token=jnp.zeros((rows,), jnp.int32), running=jnp.ones((rows,), bool),
        made=jnp.zeros((rows,), jnp.int32), stop=jnp.zeros((rows,), jnp.int32), seen=None,
        tokens=jnp.zeros((rows, generation.BLOCK), jnp.int32), logprobs=jnp.zeros((rows, generation.BLOCK), jnp.float32),
        place=jnp.zeros((), jnp.int32),
    )  # fmt: skip
    params = jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0), dtype=jnp.dtype(dtype)))
    sampling = make_sampling([Sampling(temperature=1.0, top_p=0.9)] * rows)
    stops, limit = build_stops([], [], {3}, CONFIG.vocab_size), jnp.full((rows,), 9, jnp.int32)
    return params, loop, sampling, stops, limit, jnp.asarray(generation.BLOCK, jnp.int32)


@pytest.mark.parametrize(
    ("lengths", "share", "dtype"),
    [(LENGTHS, "100%", "float32"), (LENGTHS, "30%", "float32"), ([200], "30%", "bfloat16")],
)
def test_bytes_are_those_of_the_generation_loop(lengths, share, dtype):
    """The program that `generate` runs takes the reported bytes per row, and gives them back in place."""
    planned = plan(CONFIG, make_policy("scissorhands"), share, lengths=lengths, dtype=dtype)
    given = loop_arguments(planned, lengths, dtype)
    state = given[1].state
    beside = (given[0], dataclasses.replace(given[1], state=None), *given[2:])
    memory = generation._block.lower(*given, config=CONFIG, greedy=False).compile().memory_analysis()
    reported = len(lengths) * planned.bytes_per_row
    assert tree_bytes(state) == reported
    np.testing.assert_allclose(bytes_of_arguments(memory, beside), reported, rtol=tolerances.BYTES)
    assert memory.alias_size_in_bytes >= reported


def test_the_state_that_generation_leaves_keeps_the_budget():
    """Counted in the state itself, after a prompt and some answers of rows that stop at different times."""
    prompts, new, policy = (
        [list(range(1, 50)), list(range(5, 30)), [7, 8]],
        [30, 9, 9],
        make_policy("scissorhands", recent=4),
    )
    lengths = [len(prompt) + count for prompt, count in zip(prompts, new, strict=True)]
    planned = plan(CONFIG, policy, "60%", lengths=lengths, dtype="float32")
    assert planned.limits[:, 0].tolist() == [[24, 8, 4], [16, 8, 4]]  # 76 bytes a slot and layer of 3,648, 1,920, 844
    params = init_params(CONFIG, jax.random.key(0))
    hidden, state = read(params, prompts, new_state(CONFIG, planned, lengths), config=CONFIG)
    stops = build_stops([], [], set(), CONFIG.vocab_size)
    request = generation.Request(samplings=[Sampling()] * 3, max_new_tokens=new, stops=stops)
    rows, state, _ = generation.collect(
        generation.run(params, hidden, state, request, config=CONFIG, prompts=prompts), 0.0
    )
    assert [len(row.token_ids) for row in rows] == new
    assert tree_bytes(state) == 3 * planned.bytes_per_row
    read_in = np.array(lengths) - 1  # the last token of an answer is never in the state
    np.testing.assert_array_equal(state.next_position, read_in)
    for limits, layer in zip(planned.limits, state.layers, strict=True):
        held = np.asarray(live_count(layer.tiers[0]))
        assert (held <= limits[0][:, None]).all() and (held >= 4).all()
    np.testing.assert_array_equal(live_count(state.layers[0].tiers[0]), np.repeat(planned.limits[0, 0][:, None], 2, 1))
    newest = np.asarray(state.layers[0].tiers[0].positions).max(axis=-1)
    np.testing.assert_array_equal(newest, np.repeat(read_in[:, None] - 1, 2, axis=1))


@pytest.mark.parametrize("asked", ["20kb", "31kb", "40kb", "80kb"])
@pytest.mark.parametrize("name", [n for n in PRESETS if n != "full"])
def test_bytes_are_never_exceeded(name, asked):
    planned = plan(CONFIG, make_preset(name, recent=1), asked, lengths=[500], dtype="float32")
    given = parse_budget(asked).amount
    assert planned.bytes_per_row <= given
    group = max(part.granule for part in planned.preset.parts)
    if (
        planned.limits.sum(axis=1).max() + group - 1 < 500
    ):  # what is left would not pay for one more step in every layer
        step = plan(CONFIG, make_preset(name, recent=1), f"{2 * given}b", lengths=[500], dtype="float32")
        per_token = (step.bytes_per_row - planned.bytes_per_row) / max(1, (step.limits - planned.limits).sum())
        steps = 2 * max(STEP, group) * len(CONFIG.layers) * len(planned.spec[0].tiers)
        assert given - planned.bytes_per_row <= steps * per_token


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125])
@pytest.mark.parametrize("name", ["h2o", "mikv", "rotated-3", "pyramid"])
def test_a_share_is_of_the_bytes_of_a_full_bfloat16_cache(name, share):
    big = dataclasses.replace(CONFIG, num_heads=4, head_dim=64)
    planned = plan(big, name, f"{share:.1%}", lengths=[2000], dtype="float32")
    full = (2000 + 16) * 2 * 64 * 2 * 2  # the second layer's window is 16
    assert planned.share == planned.bytes_per_row / full
    assert share - 0.02 < planned.share <= share or planned.limits[0].sum() == 2000


def test_tiers_share_the_tokens_as_their_preset_says():
    parts = tiers((0.25, "int8"), (0.75, "int4", "int2"), residual=16)
    preset = Preset(name="mix", summary="", policy=Recency(), parts=parts)
    planned = plan(CONFIG, preset, 216, lengths=[500], dtype="float32")
    assert planned.limits[0, :, 0].tolist() == [16, 48, 152]  # a quarter of 200 is 50, in steps of 8
    assert [tier.scheme for tier in planned.spec[0].tiers] == [("bf16", "bf16"), ("int8", "int8"), ("int4", "int2")]
    assert planned.limits[1, :, 0].tolist() == [16, 0, 0]  # the window


@pytest.mark.parametrize(
    ("name", "budget"),
    [("full", "100%"), *((n, b) for n in ("h2o", "mikv", "kivi-2", "rotated-4") for b in ("100%", "20%", "6.25%"))],
)
def test_slots_that_kernels_read_where_they_lie(name, budget):
    """Tiers of more than four multiples are multiples, and what is allocated stays within the budget and is all counted."""
    config = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1] * 2, max_positions=8192)
    planned = plan(config, name, budget, lengths=[8000], dtype="bfloat16", multiple=128)
    fine = plan(config, name, budget, lengths=[8000], dtype="bfloat16")
    for tier in planned.spec[0].tiers:
        assert tier.slots % 128 == 0 or tier.slots <= 512
    assert any(tier.slots % 128 for tier in fine.spec[0].tiers) or budget == "100%"
    assert tree_bytes(new_state(config, planned, [8000])) == planned.bytes_per_row
    if budget != "100%":
        assert 0.85 * fine.share < planned.share <= float(budget[:-1]) / 100


@pytest.mark.parametrize("tokens, limits, slots", [
    (20, [20, 0], [24, 32]), (63, [63, 0], [64, 32]), (64, [32, 32], [64, 32]), (216, [32, 160], [64, 160]),
    (300, [32, 256], [64, 256]),
])  # fmt: skip
def test_groups_are_whole_and_what_waits_has_room(tokens, limits, slots):
    planned = plan(CONFIG, "kivi-2", tokens, lengths=[500], dtype="float32") if tokens > 36 else None
    layout = budgets._Layout(
        config=CONFIG, policy=Recency(), dtype="float32", positions="int16", parts=PRESETS["kivi-2"].parts,
        grid=budgets.fine_grid,
    )  # fmt: skip
    found = layout.limits(tokens, 500)
    assert found.tolist() == [limits, [16, 0]] and layout.slots(found).tolist() == [slots, [16, 32]]
    if planned is not None:
        np.testing.assert_array_equal(planned.limits[..., 0], found)
        assert [tier.slots for tier in planned.spec[0].tiers] == slots
        assert tree_bytes(new_state(CONFIG, planned, [500])) == planned.bytes_per_row


@pytest.mark.parametrize("length", [95, *(pytest.param(n, marks=pytest.mark.slow) for n in (40, 64, 200))])
def test_everything_fits_groups_and_their_waiting_room(length):
    """A full budget keeps every token, though limits are whole groups."""
    planned = plan(CONFIG, "kivi-4", None, lengths=[length], dtype="float32")
    tokens = [list(np.random.default_rng(0).integers(0, 64, length))]
    _, state = read(init_params(CONFIG, jax.random.key(0)), tokens, new_state(CONFIG, planned, [length]), config=CONFIG)
    held = sum(np.asarray(live_count(tier)) for tier in state.layers[0].tiers)
    assert (held == length).all() and planned.limits[0].sum() > length - 32


def test_pyramid_gives_early_layers_more():
    deep = dataclasses.replace(CONFIG, layers=(CONFIG.layers[0],) * 4)
    limits = plan(deep, "pyramid", 100, lengths=[500], dtype="float32").limits[:, 0, 0].tolist()
    assert limits == [160, 120, 80, 40]


def test_local_layers_never_hold_more_than_their_window():
    planned = plan(CONFIG, Full(), None, lengths=[200], dtype="float32")
    assert planned.limits[:, 0, 0].tolist() == [200, 16]


def test_ragged_shares_are_per_row():
    planned = plan(CONFIG, Recency(), "40%", lengths=[100, 400], dtype="float32")
    alone = [plan(CONFIG, Recency(), "40%", lengths=[n], dtype="float32").limits[0, 0, 0] for n in (100, 400)]
    assert planned.limits[0, 0].tolist() == alone and alone[0] < alone[1]


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        (Recency(), 3, "gives 3 tokens .* less than the 5 that 'recency' protects .* the least is 5 tokens"),
        (Recency(), "1kb", "the least"),
        (Full(), "50%", "does not fit budget 50%"),
    ],
)
def test_impossible_budgets_name_the_least(policy, budget, message):
    with pytest.raises(ValueError, match=message):
        plan(CONFIG, policy, budget, lengths=[200], dtype="float32")


def test_more_than_everything_is_full_and_said_so():
    planned = plan(CONFIG, Recency(), 4000, lengths=[200], dtype="float32")
    assert planned.limits[0, 0, 0] == 200 and "nothing is evicted" in planned.note
    assert "raised" in plan(CONFIG, Recency(), "1%", lengths=[200], dtype="float32").note


def test_tiers_without_a_place_are_told():
    planned = plan(CONFIG, "kivi-2", 60, lengths=[500], dtype="float32")
    assert planned.note == "so few tokens that none is stored as kivi2/int2" and planned.limits[0, :, 0].tolist() == [
        60,
        0,
    ]
    assert plan(CONFIG, "kivi-2", 64, lengths=[500], dtype="float32").note == ""


@pytest.mark.parametrize("name", POLICIES)
def test_more_bytes_than_the_full_cache_is_full_and_said_so(name):
    policy = make_policy(name)
    full = plan(CONFIG, policy, None, lengths=LENGTHS, dtype="float32")
    assert full.note == "" and full.limits[0, 0].tolist() == LENGTHS
    for asked in (f"{full.bytes_per_row}b", "64MiB"):
        planned = plan(CONFIG, policy, asked, lengths=LENGTHS, dtype="float32")
        assert (planned.spec, planned.bytes_per_row, planned.share) == (full.spec, full.bytes_per_row, full.share)
        np.testing.assert_array_equal(planned.limits, full.limits)
        assert planned.note == f"budget {asked} holds all 200 tokens, so nothing is evicted"
        assert planned.note in planned.describe()
    less = f"{full.bytes_per_row - 1}b"
    if name == "full":
        with pytest.raises(ValueError, match=f"the full cache of 200 tokens does not fit budget {less}"):
            plan(CONFIG, policy, less, lengths=LENGTHS, dtype="float32")
    else:
        planned = plan(CONFIG, policy, less, lengths=LENGTHS, dtype="float32")
        assert planned.bytes_per_row < full.bytes_per_row and planned.note == ""
        assert {tier.scheme for layer in planned.spec for tier in layer.tiers} == {("bf16", "bf16")}


@pytest.mark.parametrize(
    ("name", "share", "chooses"),
    [
        ("h2o", "100%", False),  # one tier
        ("rotated-4", "100%", False),  # 32 in bfloat16, the newest, which the policy protects
        ("auto", "100%", False),
        ("auto", "55%", True),  # half have more bits than the other half
        ("mikv", "100%", True),  # a fifth has
        ("h2o", "50%", True),
    ],
)
def test_where_nothing_is_to_be_chosen_the_policy_is_full(name, share, chooses):
    planned = plan(CONFIG, name, share, lengths=LENGTHS, dtype="float32")
    policy = PRESETS[name].policy if chooses else Full()
    assert {layer.policy for layer in planned.spec} == {policy} and planned.preset.name == name


@pytest.mark.parametrize("name", ["rotated-4", "kvzip"])
def test_the_policy_that_has_no_say_would_have_said_the_same(name, monkeypatch):
    lengths = [90, 60]
    prompts = np.random.default_rng(0).integers(0, 64, (2, 80)).astype(np.int32)
    params = init_params(CONFIG, jax.random.key(1))
    step = jax.jit(functools.partial(decode, config=CONFIG))

    def run(budget=None):
        planned = plan(CONFIG, name, budget, lengths=lengths, dtype="float32")
        _, state = read(
            params, [prompts[0].tolist(), prompts[1, :50].tolist()], new_state(CONFIG, planned, lengths), config=CONFIG
        )
        hiddens = []
        for token in range(10):
            hidden, state = step(params, jnp.full((2,), token, jnp.int32), state, valid=jnp.ones((2,), bool))
            hiddens.append(hidden)
        return planned, np.stack(hiddens), state

    planned, found, state = run()
    monkeypatch.setattr(budgets, "_chooses", lambda policy, limits: True)
    asked, expected, other = run()
    assert {layer.policy for layer in asked.spec} == {PRESETS[name].policy}
    assert planned.bytes_per_row < asked.bytes_per_row and planned.tokens.tolist() == asked.tokens.tolist()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.HIDDEN)
    for mine, theirs in zip(state.layers, other.layers, strict=True):
        for tier, its in zip(mine.tiers, theirs.tiers, strict=True):
            np.testing.assert_array_equal(np.sort(tier.positions), np.sort(its.positions))
    _, wrong, _ = run(80)  # a budget at which it does choose
    assert np.abs(found - wrong).max() > 10 * tolerances.HIDDEN


def test_limits_that_do_not_fit_are_refused():
    planned = plan(CONFIG, Recency(), 64, lengths=[200], dtype="float32")
    with pytest.raises(ValueError, match="do not fit"):
        empty_state(CONFIG, planned.spec, limits=np.full((2, 1, 1), 999), lengths=[200])
