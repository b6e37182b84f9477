"""Long real text for demos and measurements that need no download: Python's own language reference."""

import re


def python_reference() -> str:
    """The prose of the Python language reference as the standard library ships it, about half a million characters."""
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[name] for name in sorted(topics))
    return re.sub(r"[*`~^=\"|]{2,}", " ", prose)
