"""AdamW by optax: schedules by name, groups of parameters by patterns of their paths.

Parameters are a flat dict, path -> array ("layers_0/attention/qkv/kernel"), so that one pattern table serves groups,
freezing, adapters and sharding.
"""

import fnmatch
import functools
from collections.abc import Mapping

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax

from train.config import Optimizer, Schedule, TrainError

Flat = dict[str, jax.Array]


def flatten(params) -> Flat:
    """The tree of a decoder's parameters by path."""
    return flax.traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping):
    """`flatten` undone."""
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")


def matches(path: str, patterns) -> bool:
    """Whether a path matches one of the shell patterns, in which * also stands for slashes."""
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def check_patterns(name: str, patterns, paths) -> None:
    """Raises: TrainError for a pattern that no path matches: it is a slip of the pen."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(path, pattern) for path in paths):
            raise TrainError(
                f"{name}: no parameter matches {pattern!r}; paths are such as {', '.join(sorted(paths)[:3])}"
            )


def split_frozen(flat: Flat, frozen) -> tuple[Flat, Flat]:
    """Parameters that are trained, and those that are not.

    Raises: TrainError if a pattern matches none, or all are frozen.
    """
    check_patterns("optimizer.frozen", frozen, flat)
    trained = {path: x for path, x in flat.items() if not matches(path, frozen)}
    if not trained:
        raise TrainError(f"optimizer.frozen {', '.join(frozen)} leaves nothing to train")
    return trained, {path: x for path, x in flat.items() if path not in trained}


def _constant(rate, schedule, steps):
    return optax.constant_schedule(rate)


def _cosine(rate, schedule, steps):
    return optax.cosine_decay_schedule(rate, steps, alpha=schedule.end)


def _linear(rate, schedule, steps):
    return optax.linear_schedule(rate, rate * schedule.end, steps)


def _wsd(rate, schedule, steps):
    """Warmup, stable, decay (MiniCPM, arXiv 2404.06395): linear to the end in the last `decay` steps."""
    if schedule.decay is None or not 0 < schedule.decay <= steps:
        raise TrainError(f"schedule.decay must be 1 to {steps} steps for 'wsd', got {schedule.decay}")
    return optax.linear_schedule(rate, rate * schedule.end, schedule.decay, transition_begin=steps - schedule.decay)


def _inverse_sqrt(rate, schedule, steps):
    """rate sqrt(w / (w + step)) after a warmup of w steps (Attention Is All You Need, arXiv 1706.03762)."""
    start = max(schedule.warmup, 1)
    return lambda step: rate * jnp.sqrt(start / (start + step))


SCHEDULES = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}


def make_schedule(schedule: Schedule, rate: float, steps: int) -> optax.Schedule:
    """Step (from 0) -> learning rate. The first step of a warmup of w has rate / w, not 0.

    Raises: TrainError for an unknown name, and for a warmup that leaves no step.
    """
    if schedule.name not in SCHEDULES:
        raise TrainError(f"schedule.name {schedule.name!r} is not known; accepted: {', '.join(SCHEDULES)}")
    warmup = schedule.warmup
    if warmup >= steps:
        raise TrainError(f"schedule.warmup {warmup} leaves none of the {steps} steps; lower it")
    made = SCHEDULES[schedule.name](rate, schedule, steps - warmup)
    if warmup:
        rise = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
        made = optax.join_schedules([rise, made], [warmup])
    return _promoting(made)


def _promoting(function):
    """optax mixes counts and floats, also where JAX is told to be strict."""

    @functools.wraps(function)
    def run(*args):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return run


def make_optimizer(optimizer: Optimizer, schedule: optax.Schedule, trained) -> optax.GradientTransformation:
    """The chain over the flat dict of trained parameters (arrays or shapes): clip, Adam, decay of matrices but those of
    `no_decay`, rates.

    Raises: TrainError for a group that no parameter belongs to.
    """
    check_patterns("optimizer.groups", [pattern for pattern, _ in optimizer.groups], trained)
    factor = lambda path: next((f for pattern, f in optimizer.groups if matches(path, [pattern])), 1.0)
    factors = {path: factor(path) for path in trained}
    parts = [optax.clip_by_global_norm(optimizer.clip)] if optimizer.clip is not None else []
    parts.append(optax.scale_by_adam(b1=optimizer.b1, b2=optimizer.b2, eps=optimizer.eps))
    if optimizer.weight_decay:
        decays = {path: x.ndim >= 2 and not matches(path, optimizer.no_decay) for path, x in trained.items()}
        parts.append(optax.add_decayed_weights(optimizer.weight_decay, mask=decays))
    for value in sorted(set(factors.values()) - {1.0}):
        parts.append(optax.masked(optax.scale(value), {path: f == value for path, f in factors.items()}))
    made = optax.chain(*parts, optax.scale_by_learning_rate(schedule))
    return optax.GradientTransformation(_promoting(made.init), _promoting(made.update))
