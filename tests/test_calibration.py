"""What layers deserve: the file's numbers, and what `auto` makes of them."""

import json

import numpy as np
import pytest
import tolerances

from jaxkv.cache.budgets import full_bytes, plan
from jaxkv.calibration import FOLDER, Calibration, digest_of, find
from jaxkv.checkpoints import read_config

pytestmark = pytest.mark.smollm2


def test_every_file_is_whole():
    for path in FOLDER.glob("*.json"):
        found = json.loads(path.read_text())
        levels, layers = np.asarray(found["levels"]), np.asarray(found["layers"])
        assert layers.shape == (len(layers), len(levels)) and levels[-1] == 1 and (layers[:, -1] == 1).all()
        assert (np.diff(levels) > 0).all() and (np.diff(layers, axis=1) >= 0).all() and (layers > 0).all()
        np.testing.assert_allclose(
            layers.mean(axis=0), levels, atol=tolerances.CALIBRATION
        )  # a level is what all layers keep together
        assert len(np.unique(layers, axis=0)) <= 6  # every size is a program to compile


def test_between_the_levels():
    one = Calibration(np.array([0.2, 0.6, 1.0]), np.array([[0.1, 0.4, 1.0], [0.3, 0.8, 1.0]]))
    np.testing.assert_allclose(one.shares(0.4), [0.25, 0.55])
    np.testing.assert_allclose(one.shares(0.1), [0.05, 0.15])
    assert one.shares(1.0) == [1.0, 1.0]


def test_auto_follows_the_model_that_was_measured(smollm2):
    config = read_config(smollm2)
    assert find(config) is not None and len(digest_of(config)) == 16
    for share in (0.25, 0.125, 0.0625):
        planned = plan(config, "auto", f"{share:.2%}", lengths=[2028], dtype="float32")
        held = planned.limits.sum(axis=1)[:, 0]
        assert share * 0.97 < planned.bytes_per_row / full_bytes(config, 2028) <= share
        assert held.max() > 2 * held.min() or share == 0.25
        assert 2 <= len(set(held.tolist())) <= 6 and held.min() >= 32
    even = plan(config, "auto", "12.5%", lengths=[2028], dtype="float32", layer_weights=[1.0] * config.num_layers)
    assert len(set(even.limits.sum(axis=1)[:, 0].tolist())) == 1


def test_other_models_share_evenly(smollm2):
    import dataclasses

    config = dataclasses.replace(read_config(smollm2), norm_eps=1e-3)
    assert find(config) is None
    limits = plan(config, "auto", "25%", lengths=[500], dtype="float32").limits
    assert len(set(limits.sum(axis=1)[:, 0].tolist())) == 1
