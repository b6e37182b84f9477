"""Checkpoints by orbax: written beside the run, atomically, by a thread of their own.

    out/recipe.json, tokenizer         of the run that the folder belongs to
    out/checkpoints/STEP/arrays        parameters, optimizer, key, step: what cannot be made again
                        /meta          recipe, data iterator, fingerprints of data and base, shapes
    out/damaged/STEP                   a checkpoint that could not be read, put aside

Parameters that are not trained are not stored: they come from the base checkpoint, or from the seed, and are checked.
"""

import contextlib
import dataclasses
import gc
import inspect
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import numpy as np

from jaxkv.checkpoints import Tokenizer
from train.config import Recipe, TrainError
from train.fields import changed_fields, to_json
from train.step import TrainState

RECIPE, TOKENIZER, FOLDER, DAMAGED = "recipe.json", "tokenizer", "checkpoints", "damaged"
PARTIAL = ".partial"  # end of the names of files that a crash may leave behind
DAMAGE = (OSError, KeyError, ValueError)  # what orbax and tensorstore raise about bad files, beside Exception itself


def open_run(recipe: Recipe) -> bool:
    """Checks the folder that a run goes to; nothing is written. Returns: whether it holds this run already.

    Raises: TrainError if it holds something else, or a run of another recipe.
    """
    folder = pathlib.Path(recipe.out)
    if not folder.exists():
        return False
    if not folder.is_dir():
        raise TrainError(f"{folder} is a file; --out must be a folder")
    path = folder / RECIPE
    if not path.exists():
        names = sorted(one.name for one in folder.iterdir() if not one.name.endswith(PARTIAL))
        if names:
            raise TrainError(f"{folder} is not empty (it has {names[0]!r}) and holds no run; choose another --out")
        return False
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainError(f"{path} is damaged ({error}); choose another --out, or remove the folder") from error
    changed = changed_fields(stored, recipe)
    if changed:
        raise TrainError(
            f"{folder} holds a run of another recipe ({'; '.join(changed)}); give the same fields to go on with it, or choose"
            " another --out"
        )
    return True


def begin_run(recipe: Recipe, tokenizer: Tokenizer) -> None:
    """Makes the folder this run's. Raises: TrainError if it cannot be written."""
    from infer.files import replace_file

    folder = pathlib.Path(recipe.out)
    together("checked")  # before the first process makes the folder look different to others
    if jax.process_index():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / RECIPE, to_json(recipe).encode())
        if not (folder / TOKENIZER).exists():
            beside = pathlib.Path(tempfile.mkdtemp(dir=folder, prefix=".", suffix=PARTIAL))
            beside.chmod(0o755)  # mkdtemp makes private ones
            tokenizer.save(beside)
            beside.rename(folder / TOKENIZER)
    except OSError as error:
        raise TrainError(f"{folder} cannot be written: {error.strerror or error}") from error


def together(name: str) -> None:
    """Waits for all processes, if there are several."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def to_arrays(state: TrainState) -> dict[str, Any]:
    """What of a state is stored, by name."""
    stored = dataclasses.replace(state, frozen={})
    leaves = jax.tree_util.tree_leaves_with_path(stored)
    name = lambda path: "".join(map(str, path)).replace("/", ".").strip(".")
    return {name(path): leaf for path, leaf in leaves}


def from_arrays(arrays: dict[str, Any], like: TrainState) -> TrainState:
    """`to_arrays` undone; frozen parameters are those of `like`."""
    names = to_arrays(like)
    leaves = [arrays[name] for name in names]
    stored = dataclasses.replace(like, frozen={})
    return dataclasses.replace(jax.tree.unflatten(jax.tree.structure(stored), leaves), frozen=like.frozen)


def _shapes(arrays) -> dict[str, list]:
    return {name: [list(x.shape), str(x.dtype)] for name, x in arrays.items()}


class _Unreadable(contextlib.AbstractContextManager):
    """Takes what orbax raises for files that it cannot read: DAMAGE, and the bare class `Exception`, none that derives from
    it; never a TrainError. reason: one line, or None."""

    reason = None

    def __exit__(self, kind, error, traceback):
        damaged = kind is Exception or (kind is not None and issubclass(kind, DAMAGE))
        if not damaged or issubclass(kind, TrainError):
            return False
        said = str(error.__cause__ or error)
        self.reason = said.splitlines()[0][:200] if said else kind.__name__
        return True


def _drop_unfinished() -> None:
    """Collects the reads that orbax leaves pending when one array fails; each would complain on stderr, at any time later."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda about: None if inspect.iscoroutine(about.object) else hook(about)
    try:
        gc.collect()
    finally:
        sys.unraisablehook = hook


class Checkpoints:
    """The checkpoints of one run. keep: the newest so many stay, beside the best by validation loss."""

    def __init__(self, out: str, *, keep: int):
        self._out, self._keep = pathlib.Path(out).absolute(), keep
        self._manager = self._open()

    def _open(self):
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

        best = BestN(
            get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=AnyPreservationPolicy([LatestN(self._keep), best]), cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(self._out / FOLDER, options=options, item_names=("arrays", "meta"))

    def steps(self) -> list[int]:
        """Of the checkpoints that are complete, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any], *, loss: float | None) -> None:
        """Starts writing; returns once the arrays are copied. An earlier one is waited for.

        Args: meta: any JSON. loss: of validation at this step, if it was computed.
        Raises: TrainError if this or the one before cannot be written.
        """
        import orbax.checkpoint as ocp

        step, arrays = int(state.step), to_arrays(state)
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(
            arrays=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta | {"shapes": _shapes(arrays)})
        )
        try:
            self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})
        except (OSError, ValueError, RuntimeError) as error:  # orbax passes on what its writers raise
            raise self._unwritten(error) from error

    def wait(self) -> None:
        """Until all is on disk. Raises: as `save`."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as error:
            raise self._unwritten(error) from error

    def close(self) -> None:
        """Ends the writer's threads."""
        self._manager.close()

    def _unwritten(self, error) -> TrainError:
        steps = self.steps()
        last = f"the last good one is of step {steps[-1]}" if steps else "there is no earlier one"
        return TrainError(f"a checkpoint cannot be written to {self._out / FOLDER}: {error}; {last}")

    def restore(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest that can be read, onto the devices of `like` (shapes with shardings); None if there is none.

        Damaged ones are said aloud and put aside.
        Raises: TrainError for checkpoints of another model.
        """
        arrays = to_arrays(like)
        for step in reversed(self.steps()):
            with _Unreadable() as unreadable:
                return self._read(step, like, arrays)
            self._put_aside(step, unreadable.reason)
        return None

    def _read(self, step: int, like: TrainState, arrays) -> tuple[TrainState, dict[str, Any]]:
        import orbax.checkpoint as ocp

        meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        if not isinstance(meta, dict) or "shapes" not in meta:
            raise OSError("its description is missing")
        _check_shapes(meta["shapes"], _shapes(arrays), f"{self._out / FOLDER}/{step}")
        _check_files(self._out / FOLDER / str(step) / "arrays")
        found = self._manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(arrays)))
        return from_arrays(found.arrays, like), meta

    def _put_aside(self, step: int, reason: str) -> None:
        _drop_unfinished()
        folder = self._out / DAMAGED
        folder.mkdir(exist_ok=True)
        place = next(p for p in (folder / f"{step}{'+' * n}" for n in range(100)) if not p.exists())
        print(f"the checkpoint of step {step} is damaged ({reason}); moved to {place}", file=sys.stderr)
        self._manager.close()
        if jax.process_index() == 0:
            (self._out / FOLDER / str(step)).rename(place)
        together(f"put aside {step}")
        self._manager = self._open()


def _check_files(folder: pathlib.Path) -> None:
    """Reads what is stored of every array, one after another, and forgets it. Raises: DAMAGE where something is missing.

    Orbax reads all at once; where one read fails it leaves the others pending, and they complain on stderr, at any time later.
    """
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}).result()
    for key in store.list().result():
        if store.read(key).result().state != "value":
            raise OSError(f"{key.decode()} is missing")


def _check_shapes(stored, wanted, where):
    for name in dict.fromkeys([*stored, *wanted]):
        if stored.get(name) != wanted.get(name):
            given, needed = stored.get(name, "absent"), wanted.get(name, "absent")
            raise TrainError(f"{where} is of another model: {name} is {given}, and {needed} is needed")


def fingerprint(flat) -> str:
    """Identifies parameters by their shapes and some of their values."""
    import hashlib

    found = hashlib.sha256()
    for path in sorted(flat):
        x = flat[path]
        few = jax.lax.slice(x, (0,) * x.ndim, tuple(min(size, 8) for size in x.shape))
        found.update(f"{path} {x.shape} {x.dtype}".encode())
        found.update(np.asarray(few).tobytes())
    return found.hexdigest()[:16]
