"""The documents stay true: the worked example runs, the README's table is the code's."""

import importlib.util
import pathlib
import re

import cache_reference
import jax.numpy as jnp
import numpy as np
from cache_harness import MIXED, B, check_oracle, check_promises, make_case, newcomers, run_case

from jaxkv.types import Rows

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
    p = jnp.array([[[[[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]]]], jnp.float32)
    rows = Rows(remaining=remaining, valid=valid, replay=valid & False, count=count, live=live, own=True)
    new = newcomers(jnp.zeros((1, 1, 3, 2)))
    slots = policy.absorb(policy.enter(new, ()), policy.row_statistic(p, p[:, :, 0] > 0, rows, ()), (), count)
    score = policy.score(slots, (), jnp.arange(3, dtype=jnp.int32)[None, None])
    np.testing.assert_allclose(score, np.array([[[0.5, 0.25, 0.25]]]), rtol=0)


class PeakReference(cache_reference.Reference):
    """What the example says it keeps, from every probability that a token ever got."""

    def _score(self, token, index, head):
        return max(share for _, share, _ in token.seen)


class SumReference(cache_reference.Reference):
    """Not what it keeps: the sum of all that a token got."""

    def _score(self, token, index, head):
        return sum(share for _, share, _ in token.seen)


def test_the_worked_example_of_contributing_runs():
    """Through a prompt and single steps, in a whole and a local layer, it keeps what the reference keeps."""
    policy, case = example(recent=2), make_case(0)
    results = run_case(policy, case)
    check_promises(policy, case, results, MIXED)
    verdicts = lambda reference: [check_oracle(policy, case, results, MIXED, row, reference)[0] for row in range(B)]
    assert all(verdicts(PeakReference)) and not all(verdicts(SumReference))


def test_readme_tables_are_the_codes():
    place = importlib.util.spec_from_file_location("make_tables", ROOT / "docs" / "make_tables.py")
    tables = importlib.util.module_from_spec(place)
    place.loader.exec_module(tables)
    readme = (ROOT / "README.md").read_text()
    assert tables.fill(readme) == readme, "run: python docs/make_tables.py"
