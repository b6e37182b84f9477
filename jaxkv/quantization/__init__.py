"""The table of storage schemes for keys and values: one file and one line each."""

from jaxkv.quantization.base import Scheme
from jaxkv.quantization.floats import BF16, E4M3, E5M2, F32
from jaxkv.quantization.integers import INT2, INT3, INT4, INT8
from jaxkv.quantization.rotated import ROTATED2, ROTATED3, ROTATED4

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme for scheme in (F32, BF16, E4M3, E5M2, INT8, INT4, INT3, INT2, ROTATED4, ROTATED3, ROTATED2)
}


def get_scheme(name: str) -> Scheme:
    """The scheme of this name. Raises: ValueError naming the known ones."""
    if name not in SCHEMES:
        raise ValueError(f"unknown storage scheme {name!r}; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
