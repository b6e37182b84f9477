"""The one exception of this package, and reading JSON files with it."""

import json
import pathlib
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message says what was given, what is accepted, and the fix."""


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
      CheckpointError: the file is missing, is not UTF-8 JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download or write the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}; an object {{...}} is needed")
    return value
