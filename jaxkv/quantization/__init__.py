"""The table of storage schemes for keys and values: one file and one line each."""

import dataclasses

from jaxkv.quantization.base import Scheme
from jaxkv.quantization.floats import BF16, E4M3, E5M2, F32
from jaxkv.quantization.integers import INT2, INT3, INT4, INT8
from jaxkv.quantization.kivi import KIVI2, KIVI4
from jaxkv.quantization.rotated import ROTATED2, ROTATED3, ROTATED4

SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (F32, BF16, E4M3, E5M2, INT8, INT4, INT3, INT2, ROTATED4, ROTATED3, ROTATED2, KIVI4, KIVI2)
}


BALANCED = "balanced-"  # in front of a scheme's name: the same for balanced keys, see `jaxkv.quantization.balance`


def get_scheme(name: str) -> Scheme:
    """The scheme of this name. Raises: ValueError naming the known ones."""
    plain = name.removeprefix(BALANCED)
    if plain not in SCHEMES:
        raise ValueError(
            f"unknown storage scheme {name!r}; known: {', '.join(SCHEMES)}, and for keys {BALANCED!r} in front of each"
        )
    scheme = SCHEMES[plain]
    return scheme if plain == name else dataclasses.replace(scheme, name=name, balanced=True)
