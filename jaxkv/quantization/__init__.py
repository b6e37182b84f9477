"""The table of storage schemes for keys and values: one file and one line each."""

from jaxkv.quantization.base import Scheme
from jaxkv.quantization.floats import BF16, F32

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in (F32, BF16)}


def get_scheme(name: str) -> Scheme:
    """The scheme of this name. Raises: ValueError naming the known ones."""
    if name not in SCHEMES:
        raise ValueError(f"unknown storage scheme {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
