"""The 4-byte history of Scissorhands keeps what the exact one keeps, on the real model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import newcomers

import infer
from infer.prefill import new_state, read
from infer.texts import python_reference
from jaxkv.cache import decode
from jaxkv.policies import make_policy

PROMPT, STEPS, BUDGET = 800, 300, 275  # a quarter of the tokens: the exact history costs more bytes a token


@pytest.mark.slow
@pytest.mark.smollm2
def test_kept_sets_agree_with_the_exact_history(smollm2):
    lm = infer.load(smollm2)
    ids = lm.encode(python_reference()[20000:40000])[: PROMPT + STEPS]
    kept = {}
    for name in ("scissorhands", "scissorhands-reference"):
        assert name != "scissorhands" or _bytes_per_slot(make_policy(name)) <= 4
        planned = lm.plan(name, BUDGET, lengths=[PROMPT + STEPS])
        state = new_state(lm.config, planned, [PROMPT + STEPS])
        _, state = read(lm.params, [ids[:PROMPT]], state, config=lm.config)

        @jax.jit
        def run(params, tokens, state):
            def one(state, token):
                return decode(params, token[None], state, config=lm.config, valid=jnp.ones((1,), bool))[1], None

            return jax.lax.scan(one, state, tokens)[0]

        state = run(lm.params, jnp.asarray(ids[PROMPT:], jnp.int32), state)
        kept[name] = [np.asarray(layer.tiers[0].positions)[0] for layer in state.layers]
    scores = []
    for mine, exact in zip(kept["scissorhands"], kept["scissorhands-reference"], strict=True):
        for a, b in zip(mine, exact, strict=True):
            a, b = set(a[a >= 0].tolist()), set(b[b >= 0].tolist())
            scores.append(len(a & b) / len(a | b))
    print(f"mean Jaccard index {np.mean(scores):.4f}, lowest head {np.min(scores):.4f}")
    assert np.mean(scores) >= tolerances.JACCARD


def _bytes_per_slot(policy):
    return sum(x.nbytes for x in jax.tree.leaves(policy.enter(newcomers(jnp.zeros((1, 1, 1, 4))), ())))
