"""Loss, gradients and one step, against the cached forward pass, float64 arithmetic and finite differences."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tolerances
from cache_harness import MIXED, PLAIN
from train_harness import new_state, packed_batch, parameters, plan

from jaxkv import decoder
from jaxkv.cache.extend import forward
from jaxkv.causal import causal_forward
from train.config import Lora, Optimizer, Schedule, TrainError
from train.lora import adapted, make_adapters
from train.optimizer import SCHEDULES, make_optimizer, make_schedule, split_frozen, unflatten
from train.step import batch_loss, train_step

FLAT = parameters()


def loss_of_cache(flat, batch, edge, length, config):
    """Mean loss by the forward pass of inference, each text of the packed rows alone."""
    params, total = unflatten(flat), 0.0
    for first, last in ((0, edge), (edge, length)):
        hidden = forward(params, batch["tokens"][:, first:last], config=config)
        logits = np.asarray(decoder.logits(params, hidden, config=config), np.float64)
        targets = np.asarray(batch["targets"])[:, first : last - 1, None]
        at_target = np.take_along_axis(logits[:, :-1], targets, axis=-1)[..., 0]
        total += (np.log(np.exp(logits[:, :-1]).sum(-1)) - at_target).sum()
    return total / float(batch["weights"].sum())


def mean_loss(flat, batch, made):
    return batch_loss(flat, batch, None, made)[0].loss / batch["weights"].sum()


@pytest.mark.parametrize("config", [PLAIN, MIXED], ids=["whole", "local"])
def test_loss_is_that_of_inference(config):
    """Of packed rows, with padding that is not counted; a text that saw its neighbour, or another's positions, would show."""
    batch, edge, length = packed_batch()
    expected = loss_of_cache(FLAT, batch, edge, length, config)
    loss = jax.jit(lambda batch: mean_loss(FLAT, batch, plan(config)))
    assert abs(loss(batch) / expected - 1) < tolerances.LOSS
    one = jnp.ones_like(batch["segments"])
    for wrong in ({"segments": one}, {"positions": jnp.cumsum(one, axis=1)}, {"weights": one.astype(jnp.float32)}):
        changed = abs(loss(batch | wrong) / expected - 1)
        far = wrong.keys() == {"positions"}  # rotary attention knows distances only, so this changes nothing
        assert (changed < tolerances.LOSS) if far else (changed > 1e-3)


def test_padding_and_neighbours_have_no_part_in_it():
    batch, edge, length = packed_batch()
    tokens = batch["tokens"].at[:, length:].set(0)
    options = dict(config=MIXED, positions=batch["positions"], segments=batch["segments"], remat="none")
    run = jax.jit(lambda tokens: causal_forward(unflatten(FLAT), tokens, **options))
    before, after = run(batch["tokens"]), run(tokens)
    np.testing.assert_array_equal(before[:, :length], after[:, :length])
    swapped = batch["tokens"].at[:, :edge].set(5)
    np.testing.assert_array_equal(run(swapped)[:, edge:length], before[:, edge:length])
    assert (run(swapped)[:, :edge] != before[:, :edge]).any()


@pytest.mark.parametrize("remat, loss_tokens", [("block", 4096), ("dots", 4096), ("none", 20)])
def test_memory_options_change_no_gradient(remat, loss_tokens):
    batch, *_ = packed_batch()
    gradient = lambda made: jax.jit(jax.value_and_grad(lambda flat: mean_loss(flat, batch, made)))(FLAT)
    (loss, expected), (other, got) = gradient(plan()), gradient(plan(remat=remat, loss_tokens=loss_tokens))
    assert abs(loss / other - 1) < tolerances.LOSS
    for path, x in expected.items():
        assert jnp.abs(got[path] - x).max() <= tolerances.LOSS_GRADIENT * jnp.abs(x).max(), path
        assert jnp.abs(x).max() > 0, path


def test_gradients_are_those_of_finite_differences():
    """Along one direction in each parameter, in the loss with its z part, adapters included."""
    batch, *_ = packed_batch(rows=2)
    lora = Lora(rank=2, alpha=3.0, targets=("*/kernel",))
    made = plan(z_loss=0.1, lora=lora)
    drawn = make_adapters(lora, FLAT, jax.random.key(2))
    flat = FLAT | {path: x + 0.05 for path, x in drawn.items()}
    loss = jax.jit(lambda flat: mean_loss(flat, batch, made))
    gradients = jax.jit(jax.grad(lambda flat: mean_loss(flat, batch, made)))(flat)
    for path in ("layers_0/attention/qkv/kernel", "layers_1/attention_norm/scale", "embedder/embedding", "head/kernel",
                 "layers_1/mlp/down/kernel.lora_a", "layers_0/attention/output/kernel.lora_b"):  # fmt: skip
        way = gradients[path] / jnp.linalg.norm(gradients[path])
        step = 1e-2
        slope = (loss(flat | {path: flat[path] + step * way}) - loss(flat | {path: flat[path] - step * way})) / (
            2 * step
        )
        np.testing.assert_allclose(slope, jnp.linalg.norm(gradients[path]), rtol=tolerances.SLOPE, err_msg=path)


def test_parts_add_up_to_the_batch():
    """Though each part has another number of counted tokens."""
    batch, *_ = packed_batch()
    batch["weights"] = batch["weights"].at[0].set(0.0).at[1, 5:].set(0.0)
    results = []
    for parts in (1, 4):
        made = plan(parts=parts)
        step = jax.jit(lambda state, batch, made=made: train_step(state, batch, plan=made, schedule=lambda _: 0.1))
        results.append(step(new_state(FLAT, made), batch))
    (one, first), (four, second) = results
    for name in first:
        np.testing.assert_allclose(first[name], second[name], rtol=tolerances.PARTS)
    for path, x in one.trained.items():
        moved = jnp.abs(x - FLAT[path]).max()
        assert jnp.abs(four.trained[path] - x).max() <= 1e-4 * moved + 1e-7, path


def test_adamw_by_its_definition():
    """Two steps in float64: clipping, decay of matrices alone and of no temperature, a group with a rate of its own."""
    trained = {"a/kernel": jnp.array([[1.0, -2.0]]), "a/scale": jnp.array([1.0]), "b/kernel": jnp.array([[0.5]]),
               "c_temperature/kernel": jnp.array([[2.0]])}  # fmt: skip
    by_path = lambda *values: dict(zip(trained, values, strict=True))
    gradients = by_path([[3.0, 4.0]], [0.0], [[12.0]], [[0.0]]), by_path([[0.1, -0.1]], [0.2], [[0.1]], [[0.3]])
    settings = Optimizer(learning_rate=0.1, weight_decay=0.5, clip=6.5, groups=(("b/*", 0.25),))
    made = make_optimizer(settings, lambda step: 0.1, trained)
    state, now = made.init(trained), trained
    wide = {path: np.asarray(x, np.float64) for path, x in trained.items()}
    m, v = ({path: np.zeros_like(x) for path, x in wide.items()} for _ in range(2))
    for count, given in enumerate(gradients, 1):
        updates, state = made.update({path: jnp.array(x, jnp.float32) for path, x in given.items()}, state, now)
        now = optax.apply_updates(now, updates)
        norm = np.sqrt(sum(np.square(x).sum() for x in given.values()))
        for path in wide:
            g = np.asarray(given[path], np.float64) * min(1, 6.5 / norm)
            m[path], v[path] = 0.9 * m[path] + 0.1 * g, 0.95 * v[path] + 0.05 * g * g
            update = m[path] / (1 - 0.9**count) / (np.sqrt(v[path] / (1 - 0.95**count)) + 1e-8)
            update = update + (0.5 * wide[path] if path in ("a/kernel", "b/kernel") else 0)
            wide[path] = wide[path] - 0.1 * (0.25 if path.startswith("b") else 1) * update
            np.testing.assert_allclose(now[path], wide[path], atol=tolerances.ADAM, err_msg=path)


def test_schedules_by_hand():
    at = lambda schedule, steps, points: [float(make_schedule(schedule, 1.0, steps)(jnp.int32(p))) for p in points]
    close = lambda got, expected: np.testing.assert_allclose(
        got, expected, rtol=tolerances.RATE, atol=tolerances.RATE / 10
    )
    close(at(Schedule(name="constant", warmup=4), 10, [0, 1, 3, 4, 9]), [0.25, 0.5, 1, 1, 1])
    close(at(Schedule(name="cosine", warmup=2, end=0.0), 12, [0, 1, 2, 7, 12]), [0.5, 1, 1, 0.5, 0])
    close(at(Schedule(name="linear", end=0.5), 10, [0, 5, 10]), [1, 0.75, 0.5])
    close(at(Schedule(name="wsd", warmup=2, decay=4, end=0.0), 12, [2, 8, 10, 12]), [1, 1, 0.5, 0])
    close(at(Schedule(name="inverse_sqrt", warmup=4), 100, [3, 4, 16]), [1, 1, 0.5])
    assert set(SCHEDULES) == {"constant", "cosine", "linear", "wsd", "inverse_sqrt"}
    for schedule, message in (
        (Schedule(name="cosin"), "accepted: constant, cosine"),
        (Schedule(warmup=10), "leaves none of the 10 steps"),
        (Schedule(name="wsd"), "schedule.decay must be 1 to 10"),
    ):
        with pytest.raises(TrainError, match=message):
            make_schedule(schedule, 1.0, 10)


def test_frozen_parameters_stay_and_have_no_state():
    batch, *_ = packed_batch()
    trained, frozen = split_frozen(FLAT, ("layers_0/*", "embedder/*"))
    made = plan(optimizer=make_optimizer(Optimizer(learning_rate=0.1), lambda _: 0.1, trained))
    state = new_state(trained, made, frozen)
    step = jax.jit(lambda state, batch: train_step(state, batch, plan=made, schedule=lambda _: 0.1))
    after, _ = step(state, batch)
    assert all((after.frozen[path] == x).all() for path, x in frozen.items())
    assert all((after.trained[path] != x).any() for path, x in trained.items())
    held = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(after.optimizer)}
    assert not any("layers_0" in path for path in held)
    for patterns, message in ((("layer_0/*",), "no parameter matches"), (("*",), "leaves nothing to train")):
        with pytest.raises(TrainError, match=message):
            split_frozen(FLAT, patterns)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32():
    batch, *_ = packed_batch()
    made = plan(dtype="bfloat16")
    state, metrics = jax.jit(lambda s, b: train_step(s, b, plan=made, schedule=lambda _: 0.1))(
        new_state(FLAT, made), batch
    )
    exact = mean_loss(FLAT, batch, plan())
    assert 0 < abs(metrics["loss"] - exact) < 0.02 * exact
    assert {x.dtype for x in state.trained.values()} == {jnp.dtype(jnp.float32)}
    products = list(find_products(jax.make_jaxpr(lambda flat: batch_loss(flat, batch, None, made))(FLAT)))
    assert products and all(x.aval.dtype == jnp.bfloat16 for product in products for x in product.invars)


def find_products(jaxpr):
    """Every dot product of a program and of the programs in it."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from find_products(inner)


def test_adapters_start_as_nothing_and_merge():
    lora = Lora(rank=2, alpha=8.0, targets=("*/attention/*/kernel",))
    adapters = make_adapters(lora, FLAT, jax.random.key(0))
    assert len(adapters) == 2 * 2 * 2  # layers, kernels, A and B
    start = adapted(FLAT | adapters, lora)
    assert start.keys() == FLAT.keys() and all((start[path] == x).all() for path, x in FLAT.items())
    learned = {path: x + 0.1 for path, x in adapters.items()}
    path = "layers_1/attention/output/kernel"
    expected = FLAT[path] + 4.0 * learned[path + ".lora_a"] @ learned[path + ".lora_b"]
    np.testing.assert_allclose(
        adapted(FLAT | learned, lora)[path], expected, rtol=tolerances.RATE, atol=tolerances.RATE
    )
    batch, *_ = packed_batch()
    whole = mean_loss(adapted(FLAT | learned, lora), batch, plan())
    apart = mean_loss(FLAT | learned, batch, dataclasses.replace(plan(), lora=lora))
    assert abs(whole / apart - 1) < tolerances.LOSS
    for targets, message in ((("*/qkw/*",), "no parameter matches"), (("*/scale",), "adapters are for matrices")):
        with pytest.raises(TrainError, match=message):
            make_adapters(Lora(rank=2, targets=targets), FLAT, jax.random.key(0))
