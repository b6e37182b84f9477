"""What kv heads deserve: the file's numbers, and what `auto` makes of them."""

import dataclasses
import json

import numpy as np
import pytest
import tolerances

from infer.prefill import new_state
from jaxkv.cache import shares
from jaxkv.cache.budgets import full_bytes, plan, tree_bytes
from jaxkv.calibration import FOLDER, Calibration, digest_of, find
from jaxkv.checkpoints import read_config
from jaxkv.policies import KeyDiff
from jaxkv.presets import PRESETS

pytestmark = pytest.mark.smollm2


def test_every_file_is_whole():
    for path in FOLDER.glob("*.json"):
        found = json.loads(path.read_text())
        levels, heads = np.asarray(found["levels"]), np.asarray(found["heads"])
        assert heads.shape == (*heads.shape[:2], len(levels)) and levels[-1] == 1 and (heads[..., -1] == 1).all()
        assert (np.diff(levels) > 0).all() and (np.diff(heads, axis=-1) >= 0).all() and (heads > 0).all()
        np.testing.assert_allclose(
            heads.mean(axis=(0, 1)), levels, atol=tolerances.CALIBRATION
        )  # a level is what all heads keep together


def test_between_the_levels():
    one = Calibration(np.array([0.2, 0.6, 1.0]), np.array([[[0.1, 0.4, 1.0], [0.3, 0.8, 1.0]]]))
    np.testing.assert_allclose(one.shares(0.4), [[0.25, 0.55]])
    np.testing.assert_allclose(one.shares(0.6), [[0.4, 0.8]])
    np.testing.assert_allclose(one.shares(0.1), [[0.05, 0.15]])
    np.testing.assert_array_equal(one.shares(1.0), [[1.0, 1.0]])


@pytest.mark.parametrize(
    ("wanted", "least", "most", "owner"),
    [
        ((0.2, 5.1, 2.6), 1, 20, (0, *[1] * 5, *[2] * 3)),  # 9 is one of the sizes
        ((0.2, 5.1, 2.6), 2, 20, (0, 0, *[1] * 5, 2, 2)),  # the same 9
        ((1.0, 9.0, 2.0), 1, 4, (0, *[1] * 4, 2, 2)),  # 7 after the cap; 12 would not fit
        ((4.0, 4.0, 4.0), 1, 5, (*[0] * 4, *[1] * 4, *[2] * 4)),  # so is 12
        ((0.0, 0.0, 0.0), 1, 8, (0, 1, 2)),
        ((0.0, 0.0, 0.0), 3, 8, (0, 0, 0, 1, 1, 1, 2, 2, 2)),
    ],
)
def test_rows_go_where_they_are_wanted(wanted, least, most, owner):
    assert shares.divided(np.asarray(wanted), least, most) == owner


@pytest.mark.parametrize(("multiple", "budget"), [(128, "25%"), (128, "12.5%"), (16, "12.5%"), (16, "50%")])
def test_block_rows_that_kernels_read_where_they_lie(smollm2, multiple, budget):
    """Long tiers are multiples; what is allocated, all counted, is within the budget and not much below it."""
    config, length = read_config(smollm2), 2000 if budget == "50%" else 8000
    planned, fine = (
        plan(config, "auto", budget, lengths=[length], dtype="bfloat16", multiple=n) for n in (multiple, 1)
    )
    assert planned.owners is not None
    assert all(tier.slots % multiple == 0 or tier.slots <= 4 * multiple for tier in planned.spec[0].tiers)
    assert any(tier.slots % multiple and tier.slots > 4 * multiple for tier in fine.spec[0].tiers)
    assert tree_bytes(new_state(config, planned, [length])) == planned.bytes_per_row
    assert planned.share == planned.bytes_per_row / full_bytes(config, length)
    assert 0.95 * fine.share < planned.share <= float(budget[:-1]) / 100


@pytest.mark.parametrize("cache", ["auto", "kvzip"])
@pytest.mark.parametrize(("budget", "length"), [("128", 500), ("64", 500), ("40", 2000), ("6.25%", 2000), ("3%", 2000)])
def test_every_head_holds_the_protected_tokens(smollm2, cache, budget, length):
    planned = plan(read_config(smollm2), cache, budget, lengths=[length], dtype="float32")
    assert planned.preset.policy.sinks == 4 and planned.tokens.min() >= planned.preset.policy.least_budget


def test_auto_follows_the_model_that_was_measured(smollm2):
    config = read_config(smollm2)
    assert find(config) is not None and len(digest_of(config)) == 16
    for share in (0.25, 0.125, 0.0625):
        planned = plan(config, "auto", f"{share:.2%}", lengths=[2028], dtype="float32")
        held = planned.tokens[:, 0]
        assert share * 0.97 < planned.bytes_per_row / full_bytes(config, 2028) <= share
        assert held.shape == (30, 3) and held.min() >= 32 and (share == 0.25 or held.max() > 4 * held.min())
        assert len({layer.rows for layer in planned.spec}) <= 9  # every size is a program to compile
        if share < 0.25:  # there nearly everything fits, and heads share evenly
            deserved = find(config).shares(held.mean() / 2028)
            assert np.corrcoef(held.ravel(), deserved.ravel())[0, 1] > 0.9


def test_a_row_of_a_batch_gets_what_it_gets_alone(smollm2):
    config, lengths = read_config(smollm2), [700, 2028, 1100]
    both = plan(config, "auto", "12.5%", lengths=lengths, dtype="float32")
    for row, length in enumerate(lengths):
        one = plan(config, "auto", "12.5%", lengths=[length], dtype="float32")
        np.testing.assert_array_equal(both.limits[:, :, row], one.limits[:, :, 0])
        for mine, theirs in zip(both.sizes(row)["owners"], one.owners, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    for budget, ragged in ((512, [2048, 200]), ("3MiB", [2028, 700])):
        both = plan(config, "auto", budget, lengths=ragged, dtype="float32")
        assert (both.tokens[:, 1] >= 200).all() or budget != 512  # what fits stays, whatever its mates
        assert both.bytes_per_row <= 3 * 2**20 or budget == 512
    uneven = plan(config, "auto", "25%", lengths=[2028, 200], dtype="float32")
    assert uneven.owners is None and uneven.note.startswith("kv heads share evenly: ")


def test_auto_takes_the_bits_that_it_is_given(smollm2):
    """More bytes are more bits, up to the exact cache; nothing is evicted where everything fits at 8 bits."""
    config = read_config(smollm2)
    schemes = lambda planned: [tier.scheme for tier in planned.spec[0].tiers]
    planned = lambda budget: plan(config, "auto", budget, lengths=[2028], dtype="float32")
    full = plan(config, "full", None, lengths=[2028], dtype="float32")
    assert planned("100%").spec[0].tiers == planned("1GiB").spec[0].tiers == full.spec[0].tiers
    assert schemes(planned("60%"))[1:] == [("int8", "int8")] and planned("60%").tokens.min() == 2028
    assert schemes(planned("50%"))[1:] == [("int8", "int8"), ("int8", "rotated4")]
    assert planned("50%").tokens.min() >= 2028


@pytest.mark.parametrize(
    "budget", ["38%", "12.5%", "4%", *(pytest.param(budget, marks=pytest.mark.slow) for budget in (140, "3MiB"))]
)
def test_every_length_has_a_plan(smollm2, budget):
    """Lengths one after another, so that every size of a block row comes up: places fit slots, and bytes the budget."""
    config = read_config(smollm2)
    for length in (285, 340, 480, 513, 2048):
        planned = plan(config, "auto", budget, lengths=[length], dtype="float32")
        slots = np.asarray([[tier.slots for tier in layer.tiers] for layer in planned.spec])
        assert (planned.limits[:, :, 0] <= slots).all() and (slots > 0).all()
        if isinstance(budget, int):
            assert planned.tokens.mean() <= max(budget, planned.tokens.min()) and planned.tokens.mean() > 0.85 * min(
                budget, length
            )
        else:
            most = 3 * 2**20 if budget == "3MiB" else float(budget[:-1]) / 100 * full_bytes(config, length)
            assert planned.bytes_per_row <= most or "raised" in planned.note


def test_what_a_policy_keeps_per_row_is_counted(smollm2):
    config = read_config(smollm2)
    preset = dataclasses.replace(PRESETS["auto"], policy=KeyDiff())
    planned = plan(config, preset, "6.25%", lengths=[2028], dtype="float32")
    assert planned.owners is not None and planned.bytes_per_row <= 0.0625 * full_bytes(config, 2028)


def test_auto_of_heads_is_what_the_program_takes(smollm2):
    config = read_config(smollm2)
    for lengths, budget in (([2028], "6.25%"), ([900], "2MiB")):
        planned = plan(config, "auto", budget, lengths=lengths, dtype="float32")
        assert planned.owners is not None and "in blocks of" in planned.describe()
        held = new_state(config, planned, lengths)
        assert tree_bytes(held) == planned.bytes_per_row * len(lengths)
        assert planned.bytes_per_row <= (2 * 2**20 if budget == "2MiB" else 0.0625 * full_bytes(config, 2028))


def test_even_weights_leave_the_calibration_out(smollm2):
    config = read_config(smollm2)
    even = plan(config, "auto", "12.5%", lengths=[2028], dtype="float32", layer_weights=[1.0] * config.num_layers)
    assert len(set(even.limits.sum(axis=1)[:, 0].tolist())) == 1


def test_other_models_share_evenly(smollm2):
    config = dataclasses.replace(read_config(smollm2), norm_eps=1e-3)
    assert find(config) is None
    limits = plan(config, "auto", "25%", lengths=[500], dtype="float32").limits
    assert len(set(limits.sum(axis=1)[:, 0].tolist())) == 1
