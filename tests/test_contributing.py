"""The documents stay true: the worked example runs, the README's table is the code's."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache import empty_state, extend, forward
from jaxkv.config import DecoderConfig, LayerConfig, RopeConfig
from jaxkv.decoder import init_params
from jaxkv.types import LayerSpec, Rows, TierSpec

ROOT = pathlib.Path(__file__).parent.parent


def example(**options):
    """The policy in CONTRIBUTING.md, from the text as it stands there."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    space = {"__name__": "example"}
    exec(compile(code, "CONTRIBUTING.md", "exec"), space)
    return space["Peak"](**options)


def test_the_score_of_the_worked_example_on_hand_made_attention():
    policy = example()
    count, live = jnp.array([1], jnp.int32), jnp.full((1, 1, 2), 3, jnp.int32)
    remaining, valid = jnp.array([[0, 0]], jnp.int32), jnp.array([[True, False]])  # the second row is padding
    p = jnp.array([[[[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]]], jnp.float32)
    rows = Rows(remaining=remaining, valid=valid, count=count, live=live)
    slots = policy.absorb(policy.enter((1, 1, 3)), policy.row_statistic(p, p > 0, rows, ()), (), count)
    score = policy.score(slots, (), jnp.arange(3, dtype=jnp.int32)[None, None])
    np.testing.assert_allclose(score, np.array([[[2.0**-8, 2.0**-16, 2.0**-16]]]), rtol=1e-6)


def test_the_worked_example_of_contributing_runs():
    policy = example(recent=2)
    rope = RopeConfig(kind="default", theta=10000.0, rotary_dim=8)
    config = DecoderConfig(
        model_type="llama", vocab_size=32, hidden_size=16, intermediate_size=24, num_heads=4, num_kv_heads=2, head_dim=8,
        layers=(LayerConfig(window=None, rope=rope),) * 2, max_positions=64, norm_eps=1e-5, norm_offset=0.0,
        activation="silu", query_scale=8**-0.5, embedding_scale=1.0, tie_embeddings=True,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    spec = (LayerSpec(policy=policy, tiers=(TierSpec(slots=6, scheme=("f32", "f32")),)),) * 2
    state = empty_state(config, spec, limits=np.full((2, 1, 1), 6), lengths=[20])
    tokens = jax.random.randint(jax.random.key(1), (1, 20), 0, 32)
    hidden, state = extend(params, tokens, state, config=config)
    np.testing.assert_allclose(hidden, forward(params, tokens, config=config), atol=1e-5)
    for layer in state.layers:
        positions, peaks = np.asarray(layer.tiers[0].positions)[0], np.asarray(layer.tiers[0].slots["sum"])[0]
        for kept, peak in zip(positions, peaks, strict=True):
            assert {18, 19} <= set(kept.tolist()) and (kept >= 0).all()
            assert peak[kept < 18].min() > 0


def test_readme_tables_are_the_codes():
    place = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    tables = importlib.util.module_from_spec(place)
    place.loader.exec_module(tables)
    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme) == readme, "run: python docs/make_tables.py"
