"""What a storage scheme is: how the keys or values of tokens become the bytes of a tier."""

import dataclasses
from collections.abc import Callable

from jaxkv.types import Array, Encoded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to store vectors of H channels.

    encode: [..., H] in compute dtype -> Encoded with codes [..., H'] and factors [..., groups].
    decode: Encoded -> [..., H] in the dtype the scheme reads as. Axes may be in any order; only H' and H correspond.
    carrier: dtype name of the codes in a state. bits: of one channel, factors not counted.
    """

    name: str
    carrier: str
    bits: int
    encode: Callable[[Array], Encoded]
    decode: Callable[[Encoded], Array]
