"""A run, from its recipe to a model that `infer` loads."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import signal
import threading
from typing import Any

import jax
import numpy as np

from jaxkv.checkpoints import save, save_adapters
from train.checkpoint import Checkpoints, begin_run, fingerprint
from train.config import Recipe, TrainError
from train.data import first_batches, make_batches
from train.fields import to_json
from train.lora import A, B
from train.optimizer import flatten
from train.prepare import Prepared, first_memory, first_state
from train.report import Report, draw_curves, peak_flops, step_flops
from train.sharding import put_batch
from train.step import TrainState, evaluation_step, merged, train_step

MODEL, ADAPTER = "model", "adapter"  # folders in a run's


@dataclasses.dataclass(frozen=True)
class Result:
    """step: how many are done; model: folder of the exported model, None if the run was stopped; losses: by step, of this
    process's part of the run."""

    step: int
    model: pathlib.Path | None
    losses: dict[int, float]


def train(prepared: Prepared, *, quiet: bool = False) -> Result:
    """Takes the steps that are left, with checkpoints, evaluations and reports as the recipe says.

    Raises: TrainError when the loss is no number any more, when a checkpoint cannot be written, and when the folder's run
    is of other data.
    """
    recipe = prepared.recipe

    # The folder, and where to go on

    begin_run(recipe, prepared.tokenizer)
    checkpoints = Checkpoints(recipe.out, keep=recipe.checkpoints.keep)
    with contextlib.closing(checkpoints):
        state, batches, identity = _start(prepared, checkpoints)
        start = int(state.step)
        report = _report(prepared, start, quiet)
        if start:
            report.say(f"going on from the checkpoint of step {start}")

        # The steps

        with _stop_signal() as stopped, contextlib.closing(report):
            settle = Settle(checkpoints, report, recipe)
            step_function, evaluate = compiled(prepared)
            for step in range(start + 1, recipe.steps + 1):
                state, metrics = step_function(state, put_batch(next(batches), prepared.mesh))
                settle(step, metrics)
                stopping = stopped.is_set()
                last = stopping or step == recipe.steps
                saving = last or _due(step, recipe.checkpoints.every)
                evaluating = (last and not stopping) or _due(step, recipe.evaluation.every)
                loss = None
                if saving or evaluating:
                    settle()  # nothing is stored or evaluated that is not known to be good
                if evaluating:
                    state, loss = _evaluate(prepared, state, evaluate, report)
                if saving:
                    checkpoints.save(state, identity | {"data": batches.get_state()}, loss=loss)
                if last:
                    break
            checkpoints.wait()

            # The result

            done = int(state.step)
            if done < recipe.steps:
                report.say(f"stopped after step {done}, which is saved; the same command goes on from there")
                return Result(done, None, settle.losses)
            report.say(f"model in {export(prepared, state)}")
            if recipe.logging.curves:
                report.say(draw_curves(recipe.out))
    return Result(done, pathlib.Path(recipe.out) / MODEL, settle.losses)


class Settle:
    """Reads the metrics of a step once the next one is under way, so that the device never waits for them.

    Called with a step's metrics it reads those before; with nothing, all. losses: by step, of those that were read.
    Raises: TrainError if one is no number.
    """

    def __init__(self, checkpoints: Checkpoints, report: Report, recipe: Recipe):
        self._checkpoints, self._report, self._recipe = checkpoints, report, recipe
        self._waiting: tuple[int, Any] | None = None
        self.losses: dict[int, float] = {}

    def __call__(self, step: int | None = None, metrics=None) -> None:
        waiting, self._waiting = self._waiting, None if step is None else (step, metrics)
        if waiting is None:
            return
        step, metrics = waiting[0], {name: float(x) for name, x in waiting[1].items()}
        _check_finite(step, metrics, self._checkpoints, self._recipe.out)
        self.losses[step] = metrics["loss"]
        self._report.step(step, metrics, write=step % self._recipe.logging.every == 0 or step == self._recipe.steps)


def _start(prepared: Prepared, checkpoints: Checkpoints):
    """Returns: the state to go on from; the batches behind it; what a checkpoint says of the run it belongs to."""
    recipe = prepared.recipe
    state = first_state(prepared)
    identity = {
        "recipe": to_json(recipe),
        "data_fingerprint": prepared.data,
        "frozen_fingerprint": fingerprint(state.frozen),
    }
    batches = make_batches(
        prepared.windows,
        batch=recipe.batch,
        seed=None if recipe.memory else recipe.seed,
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    batches = iter(batches)
    restored = checkpoints.restore(dataclasses.replace(prepared.shapes, frozen=state.frozen))
    if restored is not None:
        state, meta = restored
        _check_same(meta, identity, recipe.out)
        batches.set_state(meta["data"])
    return state, batches, identity


def _report(prepared: Prepared, start: int, quiet: bool) -> Report:
    recipe, shapes = prepared.recipe, prepared.shapes
    matrices = lambda shapes: sum(
        x.size for path, x in shapes.items() if x.ndim == 2 and not path.endswith("/embedding")
    )
    tokens = recipe.batch * recipe.sequence
    return Report(
        recipe.out, steps=recipe.steps, start=start, quiet=quiet, tensorboard=recipe.logging.tensorboard,
        flops=step_flops(
            prepared.config, trained=matrices(shapes.trained), frozen=matrices(shapes.frozen), tokens=tokens,
            sequence=recipe.sequence, memory=recipe.memory,
        ),
        peak=peak_flops(prepared.mesh.devices.flatten()),
    )  # fmt: skip


def compiled(prepared: Prepared):
    """The jitted step and the jitted evaluation of a batch; they are compiled when they are first called."""
    places = jax.tree.map(lambda x: x.sharding, prepared.shapes)
    judged = (None, places.memory)
    step = functools.partial(train_step, plan=prepared.plan, schedule=prepared.schedule)
    evaluate = functools.partial(evaluation_step, plan=prepared.plan)
    return jax.jit(step, donate_argnums=0, out_shardings=(places, None)), jax.jit(evaluate, out_shardings=judged)


def export(prepared: Prepared, state: TrainState) -> pathlib.Path:
    """The model as a directory of safetensors, adapters merged, and those alone beside it. Returns: where the model is."""
    recipe, config = prepared.recipe, prepared.config
    folder = pathlib.Path(recipe.out) / MODEL
    params, trained = _whole(merged(state, lora=recipe.lora)), _whole(state.trained)
    if jax.process_index() == 0:
        save(folder, config, params, tokenizer=prepared.tokenizer, generation=prepared.generation, overwrite=True)
        if recipe.lora.rank:
            kernels = [path.removesuffix(A) for path in trained if path.endswith(A)]
            pairs = {tuple(path.split("/")): (trained[path + A], trained[path + B]) for path in kernels}
            place = pathlib.Path(recipe.out) / ADAPTER
            save_adapters(place, config, pairs, alpha=recipe.lora.alpha, base=recipe.model.base)
    return folder


def _whole(params):
    """Parameters gathered from all devices, on the host."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, params)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(params, tiled=True)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _check_same(meta, identity, out: str) -> None:
    for name, what in (
        ("data_fingerprint", "the training text"),
        ("frozen_fingerprint", "the parameters that are not trained"),
    ):
        if meta[name] != identity[name]:
            raise TrainError(
                f"{what} changed since the checkpoint in {out} was written ({meta[name]} -> {identity[name]}); bring the"
                " old one back, or choose another --out"
            )


def _check_finite(step: int, metrics: dict[str, float], checkpoints: Checkpoints, out: str) -> None:
    bad = [f"{name} is {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        checkpoints.wait()
        steps = checkpoints.steps()
        good = f"the last good checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint before it"
        raise TrainError(
            f"step {step}: {bad[0]}; {good} in {out}. Lower optimizer.learning_rate, or set optimizer.clip, in another --out"
        )


def _evaluate(prepared: Prepared, state: TrainState, evaluate, report: Report) -> tuple[TrainState, float | None]:
    """Validation loss, and a sample from a budgeted cache. Returns: the state with its key moved on; the loss."""
    report.stop_clock()
    recipe, loss, text = prepared.recipe, None, None
    asked = recipe.evaluation
    if asked.tokens:
        key, drawn = jax.random.split(jax.random.wrap_key_data(state.key))
        state = dataclasses.replace(state, key=jax.device_put(jax.random.key_data(key), state.key.sharding))
        text = sample(prepared, state, seed=int(jax.random.bits(drawn, dtype="uint32")))
    if prepared.validation is not None:
        sums, memory = [], first_memory(prepared)
        for batch in first_batches(prepared.validation, batch=recipe.batch, count=asked.batches):
            found, memory = evaluate(state, put_batch(_my_rows(batch), prepared.mesh), memory)
            sums.append(found)
        loss = float(sum(float(s.cross_entropy) for s in sums) / max(sum(float(s.weight) for s in sums), 1.0))
        report.validation(int(state.step), loss, loss / math.log(2) / prepared.bytes_per_token, text)
    elif text is not None:
        report.say(f"step {int(state.step)}, sample:\n  | " + text.replace("\n", "\n  | "))
    report.restart_clock()
    return state, loss


def _my_rows(batch):
    """This process's rows of a global batch."""
    share = lambda x: np.split(x, jax.process_count())[jax.process_index()]
    return {name: share(x) for name, x in batch.items()}


def sample(prepared: Prepared, state: TrainState, *, seed: int) -> str | None:
    """What the model says after `evaluation.prompt`, under the evaluation's cache and budget; the first process's device."""
    from infer.model import LanguageModel
    from infer.sampling import Sampling
    from jaxkv.checkpoints import Checkpoint

    asked = prepared.recipe.evaluation
    params = _whole(merged(state, lora=prepared.recipe.lora))
    if jax.process_index():
        return None
    params = jax.device_put(params, jax.local_devices()[0])
    model = LanguageModel(
        Checkpoint(prepared.config, params, prepared.tokenizer, prepared.generation, pathlib.Path(prepared.recipe.out)),
        dtype=str(next(iter(flatten(params).values())).dtype),
    )
    out = model.generate(
        asked.prompt, max_new_tokens=asked.tokens, cache=asked.cache, budget=asked.budget,
        sampling=Sampling(temperature=asked.temperature, seed=seed),
    )  # fmt: skip
    return asked.prompt + out[0].text


@contextlib.contextmanager
def _stop_signal():
    """An event that the first SIGINT or SIGTERM sets; the second one raises KeyboardInterrupt."""
    stopped = threading.Event()

    def handle(number, frame):
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {n: signal.signal(n, handle) for n in numbers if signal.getsignal(n) not in (None, signal.SIG_IGN)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
