"""Which implementation of an operation runs. The only code that knows platforms.

An operation keeps a table {name: Implementation}. `implementation=None` picks the first that takes the case on the
platform being compiled for, XLA being always the last; a named one runs or raises NotImplementedError with its reason.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Implementation:
    """run: the function. why_not: (arguments, options) -> None if it takes the case, else the reason as a sentence."""

    run: Callable
    why_not: Callable[..., str | None]


def takes_all(*args, **options) -> None:
    """`why_not` of an implementation without limits."""


def choose(op: str, table: dict[str, Implementation], implementation: str | None, *args, **options) -> Callable:
    """The function that runs `op` for these arguments.

    Raises: ValueError for a name that is not in the table; NotImplementedError if the named one cannot take the case.
    """
    return table[chosen(op, table, implementation, *args, **options)].run


def chosen(op: str, table: dict[str, Implementation], implementation: str | None, *args, **options) -> str:
    """The name of what `choose` returns; arguments may be shapes only. Raises: as `choose`."""
    if implementation is None:
        for name, candidate in table.items():
            if candidate.why_not(*args, **options) is None:
                return name
        raise NotImplementedError(f"no implementation of {op} takes this case")
    if implementation not in table:
        raise ValueError(f"{op} has no implementation {implementation!r}; it has: {', '.join(table)}")
    reason = table[implementation].why_not(*args, **options)
    if reason is not None:
        raise NotImplementedError(f"{op}: implementation {implementation!r} cannot take this case: {reason}")
    return implementation
