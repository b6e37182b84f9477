"""Writing a file so that it appears complete or not at all."""

import os
import pathlib
import tempfile


def replace_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Puts `data` in the place of `path`: written beside it under another name, then renamed.

    Raises: OSError if the place cannot be written; the old file and the folder are then as they were.
    """
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".partial")
    try:
        with open(handle, "wb") as file:
            file.write(data)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes files private
        os.replace(name, path)
    finally:
        pathlib.Path(name).unlink(missing_ok=True)  # gone already when the replace succeeded
