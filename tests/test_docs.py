"""The examples of the documentation run, and say what is true."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import PLAIN
from test_model import model

from jaxkv.cache import live_count

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "how-the-cache-works.md"


@pytest.fixture(scope="module")
def names():
    """What the page's blocks define, run one after the other; the model is a tiny one."""
    lm = model()
    lm.encode = lambda text: [ord(letter) % PLAIN.vocab_size for letter in text]
    given: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        source = block.replace('infer.load("smollm2")', "tiny_model")
        given["tiny_model"] = lm
        exec(compile(source, str(PAGE), "exec"), given)  # noqa: S102 our own page
    return given


def test_a_model_of_jaxkv(names):
    length = names["prompt"].shape[1]
    assert int(names["everything"].next_position[0]) == length
    assert int(live_count(names["half"].layers[0].tiers[0]).max()) == 24 == names["planned"].limits.max()
    assert int(live_count(names["shorter"].layers[0].tiers[0]).max()) == length - 3
    assert int(live_count(names["both"].layers[0].tiers[0]).max()) == 2 * length - 3
    assert int(names["both"].next_position[0]) == 2 * length


def test_a_model_of_your_own(names):
    """48 tokens stay; with room for all, five pieces are one."""
    assert int(live_count(names["memory"].layers[2].tiers[0]).max()) == 48
    mine, forward = names["mine"], names["forward"]
    roomy = names["plan"](mine, names["Full"](), None, lengths=[200], dtype="float32")
    new = lambda: names["empty_state"](mine, roomy.spec, limits=roomy.limits, lengths=[200])
    x, state, outs = names["normal"](9, 1, 160, names["D"]), new(), []
    whole, _ = forward(x, jnp.ones((1, 160), bool), state)
    for piece in jnp.split(x, 5, axis=1):
        out, state = forward(piece, jnp.ones((1, 32), bool), state)
        outs.append(out)
    np.testing.assert_allclose(jnp.concatenate(outs, axis=1), whole, atol=tolerances.HIDDEN)
    assert np.abs(np.asarray(names["out"]) - np.asarray(whole[:, -32:])).max() > 1e-3  # what evicting costs
    assert jax.tree.all(jax.tree.map(lambda x: x.shape[0] == 1, state))
