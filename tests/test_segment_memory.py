"""Segments that see a memory of those before them: the whole text's results, no gradient through it, streams, refusals."""

import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from cache_harness import MIXED, PARAMS, PLAIN
from rcmha_harness import OPTIONS, reference_of, stirred, with_rcmha
from train_harness import new_state, parameters, plan

import infer
from jaxkv import decoder
from jaxkv.cache.attend import by_group, relative_by_group
from jaxkv.causal import causal_forward, empty_memory, segment_forward
from jaxkv.config import SsaConfig
from jaxkv.rope import angles, make_rotary
from jaxkv.types import Place
from train.config import Checkpoints as Keeping
from train.config import Compute, Data, Evaluation, Logging, Model, Optimizer, Rcmha, Recipe, TrainError
from train.data import Corpus, Windows, first_batches
from train.loop import train
from train.optimizer import flatten
from train.prepare import first_memory, prepare
from train.report import read_metrics
from train.step import batch_loss, train_step

SEGMENT, ROWS, LENGTH = 4, 2, 12
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 64, (ROWS, LENGTH)), jnp.int32)
ONE = jnp.ones((ROWS, LENGTH), jnp.int32)
AT = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH))
MODELS = {name: with_rcmha(MIXED, options) for name, options in OPTIONS.items()} | {"rotary": MIXED}


def model(name):
    config = MODELS[name]
    return config, *(stirred(config) if config.rcmha else (PARAMS, None))


def read_segments(params, config, tokens, memory, segments=ONE, remat="none"):
    """Hidden states of all tokens, read a segment at a time; the memory after them."""
    found, past = [], empty_memory(config, rows=ROWS, tokens=memory, dtype="float32")
    read = jax.jit(functools.partial(segment_forward, config=config, remat=remat))
    for start in range(0, tokens.shape[1], SEGMENT):
        part = slice(start, start + SEGMENT)
        x, past = read(params, tokens[:, part], past, positions=AT[:, :SEGMENT], segments=segments[:, part])
        found.append(x)
    return jnp.concatenate(found, axis=1), past


def read_banded(params, config, tokens, memory, detach=0):
    """Hidden states of the whole text at once, a token seeing `memory` tokens before its own segment: all logits in memory.
    detach: no gradient goes through the inputs of layers of so many first tokens."""
    x = decoder.embed(params, tokens, config=config)
    size = tokens.shape[1]
    behind = np.arange(size)[:, None] - np.arange(size)
    near = np.arange(size) >= np.arange(size)[:, None] // SEGMENT * SEGMENT - memory

    def attend(projected, kind):
        seen = (behind >= 0) & near & (behind < (kind.window or size))
        q, k = by_group(projected.queries[0], config.num_kv_heads), jnp.moveaxis(projected.keys, 1, 2)
        logits = jnp.einsum("bkgth,bksh->bkgts", q, k)
        if projected.relative is not None:
            r, table = relative_by_group(projected.relative, config.num_kv_heads)
            table = jnp.broadcast_to(table, (*r.shape[1:3], *table.shape[2:]))
            logits += jnp.einsum("bkgth,kgtsh->bkgts", r, table[:, :, np.maximum(behind, 0)])
        p = jax.nn.softmax(jnp.where(jnp.asarray(seen), logits * config.query_scale, -1e30))
        out = jnp.einsum("bkgts,bskh->btkgh", p, projected.values)
        return out.reshape(*tokens.shape, -1, config.head_dim), None

    for index, kind in enumerate(config.layers):
        x = jnp.concatenate([jax.lax.stop_gradient(x[:, :detach]), x[:, detach:]], axis=1)
        turned = angles(make_rotary(kind.rope, jnp.full((ROWS,), size, jnp.int32)), AT[:, :size])
        place, own = Place(AT[:, :size], turned, (turned,)), functools.partial(attend, kind=kind)
        x = decoder.Block(config).apply({"params": params[f"layers_{index}"]}, x, place, own)[0]
    return decoder.final_norm(params, x, config=config)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_memory_of_all_is_the_whole_text(name):
    """By the float64 reference, which reads the segments one after another and forgets nothing."""
    config, params, wide = model(name)
    found, _ = read_segments(params, config, TOKENS, memory=LENGTH)
    for row in range(ROWS):
        reference = reference_of(wide, config)
        parts = [reference.read(part) for part in np.split(np.asarray(TOKENS[row]), LENGTH // SEGMENT)]
        np.testing.assert_allclose(found[row], np.vstack(parts), rtol=0, atol=tolerances.HIDDEN)


@pytest.mark.parametrize("name", ["RCMHA", "sinusoidal", "RMHA", "rotary"])
@pytest.mark.parametrize("memory", [1, 6])
def test_a_short_memory_is_the_whole_text_in_bands(name, memory):
    """Keys of the oldest remembered token have met what stood before it; a shorter or longer memory would show."""
    config, params, _ = model(name)
    found, _ = read_segments(params, config, TOKENS, memory)
    expected = read_banded(params, config, TOKENS, memory)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerances.HIDDEN)
    for other in (memory - 1, memory + 1):
        assert np.abs(found - read_banded(params, config, TOKENS, other)).max() > tolerances.VISIBLE


@pytest.mark.parametrize("name", ["RCMHA", "filters of each head", "rotary"])
def test_texts_of_a_stream_do_not_see_each_other(name):
    """Borders within segments and between them; packed as wholes they give the same."""
    config, params, _ = model(name)
    segments = jnp.asarray([[7] * 5 + [8] * 7, [3] * 8 + [9] * 4], jnp.int32)
    found, after = read_segments(params, config, TOKENS, LENGTH, segments)
    whole = causal_forward(params, TOKENS, config=config, positions=AT, segments=segments, remat="none")
    np.testing.assert_allclose(found, whole, rtol=0, atol=tolerances.HIDDEN)
    assert np.abs(found - read_segments(params, config, TOKENS, LENGTH)[0]).max() > tolerances.VISIBLE
    np.testing.assert_array_equal(after.segments[:, -LENGTH:], segments)


@pytest.mark.parametrize(
    "name, memory",
    [("RCMHA", 3), *(pytest.param(name, LENGTH, marks=pytest.mark.slow) for name in ("RCMHA", "rotary"))],
)
def test_no_gradient_goes_into_the_memory(name, memory):
    """That of the last segment's loss is the whole text's with the inputs of layers before it held fast."""
    config, params, _ = model(name)
    first = LENGTH - SEGMENT
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((ROWS, SEGMENT, 32)), jnp.float32)

    def segment_loss(p):
        return (read_segments(p, config, TOKENS, memory, remat="block")[0][:, first:] * weights).sum()

    def whole_loss(p, detach):
        return (read_banded(p, config, TOKENS, memory, detach)[:, first:] * weights).sum()

    found = jax.jit(jax.grad(segment_loss))(params)
    expected, through = (jax.jit(jax.grad(lambda p, n=n: whole_loss(p, n)))(params) for n in (first, 0))
    apart = lambda a, b: jax.tree.map(lambda x, y: float(jnp.abs(x - y).max() / (jnp.abs(y).max() + 1e-9)), a, b)
    assert max(jax.tree.leaves(apart(found, expected))) < tolerances.LOSS_GRADIENT
    assert max(jax.tree.leaves(apart(found, through))) > tolerances.VISIBLE


# Streams


def corpus(*lengths):
    return Corpus(np.arange(sum(lengths), dtype=np.int32) % 64, np.cumsum([0, *lengths[:-1]]))


def test_rows_read_on_by_hand():
    windows = Windows(corpus(5, 9, 3), sequence=2, whole=False, seed=None, rows=3)
    assert len(windows) == 6  # 8 windows, 2 for each of 3 rows
    rows = [windows(index, epoch) for epoch in (0, 1) for index in range(6)]
    np.testing.assert_array_equal(
        [row["tokens"] for row in rows[:6]], [[0, 1], [4, 5], [8, 9], [2, 3], [6, 7], [10, 11]]
    )
    np.testing.assert_array_equal([row["segments"][-1] for row in rows], [1, 2, 2, 1, 2, 2, 5, 6, 6, 5, 6, 6])
    np.testing.assert_array_equal(rows[1]["segments"], [1, 2])
    with pytest.raises(TrainError, match="gives 8 sequences of 2, fewer than the 9 rows that read it side by side"):
        Windows(corpus(5, 9, 3), sequence=2, whole=False, seed=None, rows=9)


def test_losses_of_a_stream_are_those_of_its_rows():
    """Two texts and a row's border, in windows of 4, against rows of 12 in one piece."""
    config = MODELS["RCMHA"]
    made, flat = plan(config), flatten(stirred(config)[0])
    source = corpus(10, 15)
    windows = Windows(source, sequence=SEGMENT, whole=False, seed=None, rows=ROWS)
    whole = next(first_batches(Windows(source, sequence=LENGTH, whole=False, seed=None), batch=ROWS, count=1))
    expected, _ = batch_loss(flat, whole, None, made)
    memory = empty_memory(config, rows=ROWS, tokens=LENGTH, dtype="float32")
    losses, weights = [], []
    for batch in first_batches(windows, batch=ROWS, count=9):
        sums, memory = batch_loss(flat, batch, memory, made)
        losses.append(float(sums.loss))
        weights.append(float(sums.weight))
    assert sum(weights) == float(expected.weight) == 2 * LENGTH - 1
    assert abs(sum(losses) / float(expected.loss) - 1) < tolerances.LOSS


def test_parts_of_a_batch_remember_their_own_rows():
    config, flat = MIXED, parameters()
    batch = {"tokens": TOKENS, "targets": TOKENS, "segments": ONE, "positions": AT, "weights": ONE.astype(jnp.float32)}
    batch = {name: jnp.concatenate([x, jnp.flip(x, 1)]) for name, x in batch.items()}
    after = []
    for parts in (1, 2):
        made = plan(config, parts=parts)
        state = new_state(flat, made, memory=empty_memory(config, rows=2 * ROWS, tokens=5, dtype="float32"))
        step = jax.jit(functools.partial(train_step, plan=made, schedule=lambda _: 0.1))
        after.append(step(step(state, batch)[0], batch)[0])
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerances.HIDDEN), *(s.memory for s in after)
    )
    assert np.abs(after[0].memory.hidden[1]).min(axis=-1).max() > 0


# Recipes


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcd "), 600)))
    return str(path)


def recipe(text, out, *, model=None, data=None, **options):
    shape = dict(hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, max_positions=32, rope="none")
    defaults = dict(attention="rcmha") if model is None else model
    return Recipe(
        model=Model(**shape | defaults), data=Data(train=(text,), tokenizer="characters", **(data or {})),
        optimizer=Optimizer(learning_rate=1e-2), out=str(out), steps=5, sequence=8, **{"memory": 12, "batch": 2} | options,
    )  # fmt: skip


def test_refusals(text, tmp_path):
    ssa = dict(attention="ssa", ssa=SsaConfig(queries="token"), rope="default")
    assert prepare(recipe(text, tmp_path / "run", model=ssa)).shapes.memory is not None
    by_position = dict(attention="ssa", rope="default")
    learned = dict(learned_positions=32)
    both = dict(attention="rcmha", rcmha=Rcmha(relative="none"), learned_positions=32)
    for model, message in (
        (by_position, "known by its distance only, and temperatures of this model go by position; leave out --memory"),
        (learned, "known by its distance only, and this model adds learned positions to its embeddings; leave out"),
        (both, "this model adds learned positions"),
        (
            dict(attention="rcmha", rcmha=Rcmha(distances=19), window=40),
            "relative table of 19 distances does not reach",
        ),
    ):
        with pytest.raises(TrainError, match=message):
            prepare(recipe(text, tmp_path / "run", model=model))
    with pytest.raises(TrainError, match="sequence 8 behind a memory of 25 is longer than model.max_positions 32"):
        recipe(text, tmp_path / "run", memory=25)
    with pytest.raises(TrainError, match="data.whole puts texts where they fit; leave out one"):
        recipe(text, tmp_path / "run", data={"whole": True})
    with pytest.raises(TrainError, match="memory must not be negative"):
        recipe(text, tmp_path / "run", memory=-1)
    with pytest.raises(TrainError, match="validation text gives 7 sequences of 8, fewer than the 8 rows"):
        prepare(recipe(text, tmp_path / "run", batch=8))
    assert not (tmp_path / "run").exists()
    config = MODELS["RCMHA"]
    memory = empty_memory(config, rows=ROWS, tokens=60, dtype="float32")
    options = dict(config=config, positions=AT, segments=ONE, remat="none")
    with pytest.raises(ValueError, match="sequences of 72 tokens: the model has learned 64 positions"):
        segment_forward(stirred(config)[0], TOKENS, memory, **options)
    learned = dataclasses.replace(PLAIN, learned_positions=64, max_positions=64)
    with pytest.raises(ValueError, match="adds learned positions"):
        empty_memory(learned, rows=1, tokens=4, dtype="float32")


def test_a_run_goes_on_with_what_it_remembered(text, tmp_path):
    """From a checkpoint in the middle of an epoch to the same bits, losses of validation included; and it is exported."""
    more = dict(
        checkpoints=Keeping(every=2, keep=3), logging=Logging(every=1, curves=False), batch=4,
        evaluation=Evaluation(every=5, batches=9, tokens=0), compute=Compute(accumulation=2), data={"validation_share": 0.2},
    )  # fmt: skip
    start = recipe(text, tmp_path / "run", **more)
    straight = train(prepare(start), quiet=True)
    judged = [line for line in read_metrics(start.out) if "validation_loss" in line]
    for step in (4, 5):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    again = train(prepare(start), quiet=True)
    assert again.losses == {step: straight.losses[step] for step in (3, 4, 5)}
    assert [line for line in read_metrics(start.out) if "validation_loss" in line] == judged
    forgetful = train(prepare(recipe(text, tmp_path / "other", **more | {"memory": 1})), quiet=True)
    near = lambda step: pytest.approx(forgetful.losses[step], rel=1e-6)  # another program, which rounds as it likes
    assert straight.losses[1] == near(1) and straight.losses[3] != near(3)
    validation = prepare(start).validation
    tokens = np.stack([np.concatenate([validation(row + 4 * n, 0)["tokens"] for n in range(3)]) for row in range(4)])
    targets = np.stack([np.concatenate([validation(row + 4 * n, 0)["targets"] for n in range(3)]) for row in range(4)])
    assert len(validation) == 12 and (targets[:, :-1] == tokens[:, 1:]).all()
    logits = np.asarray(infer.load(again.model).logits(tokens[:, :16].tolist()))  # a memory of 12 holds all till there
    log_p = np.take_along_axis(jax.nn.log_softmax(logits), targets[:, :16, None], -1)[..., 0]
    flat = {path: jnp.asarray(x) for path, x in flatten(infer.load(again.model).params).items()}
    made, memory, found = prepare(start).plan, first_memory(prepare(start)), []
    for batch in first_batches(validation, batch=4, count=2):
        sums, memory = batch_loss(flat, batch, memory, made)
        found.append(float(sums.loss))
    assert abs(sum(found) / -log_p.sum() - 1) < tolerances.LOSS
