"""The fields of a recipe by their paths: set from a command line, written to a file, compared with those of a stored run."""

import dataclasses
import json
import types
import typing

from train.config import Recipe, TrainError, nearest

FREE = ("out", "checkpoints", "evaluation", "logging")  # may differ when a run goes on: they change no parameter
FREE_IN_COMPUTE = ("remat", "loss_tokens", "accumulation", "data", "fsdp", "tensor")  # change rounding only


def fields(recipe) -> dict[str, tuple[type, object]]:
    """Every field by its path -> its type, and its value here."""
    hints, found = typing.get_type_hints(type(recipe)), {}
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if dataclasses.is_dataclass(value):
            found |= {f"{field.name}.{path}": entry for path, entry in fields(value).items()}
        else:
            found[field.name] = (hints[field.name], value)
    return found


def override(recipe: Recipe, words: list[str]) -> Recipe:
    """The recipe with fields set as on a command line: --steps 10 --data.train a.txt,b.txt --optimizer.clip none.

    Lists go with commas, pairs with an equals sign (--optimizer.groups '*/scale=0.5'), an absent value is `none`.
    Raises: TrainError for a field that does not exist, with the nearest that does; a value that cannot be read.
    """
    known, changes, words = fields(recipe), {}, list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise TrainError(f"{word!r} is not a field; fields are given as --name value")
        path, equals, text = word[2:].replace("-", "_").partition("=") if "=" not in word else _cut(word)
        if path not in known:
            raise TrainError(f"there is no field --{path}{nearest(path, list(known))}; known: {', '.join(known)}")
        if not equals:
            if not words:
                raise TrainError(f"--{path} needs a value")
            text = words.pop(0)
        changes[path] = _parse(path, known[path][0], text)
    return _changed(recipe, changes)


def _cut(word):
    path, equals, text = word[2:].partition("=")
    return path.replace("-", "_"), equals, text


def _changed(config, changes):
    own = {path: value for path, value in changes.items() if "." not in path}
    for name in dict.fromkeys(path.partition(".")[0] for path in changes if "." in path):
        inner = {path.partition(".")[2]: value for path, value in changes.items() if path.startswith(name + ".")}
        own[name] = _changed(getattr(config, name), inner)
    return dataclasses.replace(config, **own)


def _parse(path, kind, text):
    """A field's value from its text, by its type."""
    optional = isinstance(kind, types.UnionType)
    if optional:
        if text.lower() == "none":
            return None
        kind = next(one for one in typing.get_args(kind) if one is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            words = [word for word in text.split(",") if word]
            if item is str:
                return tuple(words)
            return tuple((pattern, float(number)) for pattern, _, number in (word.rpartition("=") for word in words))
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}[text.lower()]
        return kind(text.replace("_", "") if kind is int else text)
    except (ValueError, KeyError):
        name = {bool: "true or false"}.get(kind, getattr(kind, "__name__", str(kind)))
        raise TrainError(
            f"--{path} {text!r} cannot be read; {name}{' or none' if optional else ''} is needed"
        ) from None


def to_json(recipe: Recipe) -> str:
    """The recipe as text, as a run's folder keeps it."""
    return json.dumps(dataclasses.asdict(recipe), indent=2, ensure_ascii=False) + "\n"


def changed_fields(stored: dict, recipe: Recipe) -> list[str]:
    """Fields that decide the parameters and differ from those of a stored recipe, each 'name: stored -> now'.

    A field that the stored recipe lacks is younger than the run: it stands for its default, which changes nothing.
    """
    now, found = json.loads(to_json(recipe)), []
    free = {*FREE, *(f"compute.{name}" for name in FREE_IN_COMPUTE)}

    def compare(old, new, level, path):
        if path in free:
            return
        if isinstance(old, dict) and isinstance(new, dict):
            defaults = {field.name: field.default for field in dataclasses.fields(level)}
            for name in dict.fromkeys([*old, *new]):
                below = f"{path}.{name}" if path else name
                compare(old.get(name, _plain(defaults.get(name))), new.get(name), getattr(level, name, None), below)
        elif old != new:
            found.append(f"{path}: {old!r} -> {new!r}")

    compare(stored, now, recipe, "")
    return found


def _plain(default):
    """A field's default as JSON has it; None where it has none."""
    if dataclasses.is_dataclass(default):
        default = dataclasses.asdict(default)
    return None if default is dataclasses.MISSING else json.loads(json.dumps(default))
