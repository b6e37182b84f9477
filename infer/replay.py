"""A second reading of the context, for policies that keep what a repetition of it looks at (KVzip, arXiv 2505.23416).

    tokens   [ context ......... | "Repeat the previous context exactly." chunk 1 | "Repeat ..." chunk 2 | padding ]
    replay     0 0 0 0 0 0 0 0 0   1 2 3 ...                                        1 2 3 ...
    segments  -1 -1 -1 -1 -1 -1    0 0 0 ...                                        1 1 1 ...

One `extend` does it, layer by layer, so that no full cache of all layers ever exists. Each chunk sees the whole context
and itself, and stands directly behind the context. Where that would reach past the model's window, chunks get shorter,
down to `LEAST` tokens; beyond that they do stand past it, where only RoPE's own extrapolation serves. Past a table of
positions nothing serves: there chunks are as short as they must be, and simply read again where asking would take more than
half of each; a row that fills the table is not read again.
"""

import numpy as np

CHUNK, LEAST = 2048, 256  # tokens of the context that one passage repeats


def repeat_prompt(tokenizer) -> list[int]:
    """What asks the model to repeat; without a tokenizer it simply reads again."""
    return [] if tokenizer is None else list(tokenizer.encode("\n\nRepeat the previous context exactly.\n\n"))


def with_replay(
    rows: list[list[int]], *, start: int, window: int, table: int | None, repeat: list[int], grid
) -> dict[str, np.ndarray]:
    """Rows of ids, each followed by its replay.

    Args: start: positions before these rows. window: of the model. table: positions that it has learned, None = any
      (`DecoderConfig.most_positions`). repeat: ids in front of each chunk. grid: length -> padded length.
    Returns: tokens [B, T] int32, valid [B, T] bool, segments and replay [B, T] int32; what `extend` takes.
    """
    laid = []
    for row in rows:
        ask, behind = repeat, start + len(row)
        size = min(CHUNK, len(row), max(LEAST, window - behind - len(ask)))
        if table is not None and behind + len(ask) + size > table:
            ask = ask if 2 * len(ask) <= table - behind else []
            size = table - behind - len(ask)
        chunks = [[*ask, *row[at : at + size]] for at in range(0, len(row), size)] if size > 0 else []
        laid.append([(row, -1, False), *((chunk, number, True) for number, chunk in enumerate(chunks))])
    length = grid(max(sum(len(part) for part, _, _ in parts) for parts in laid))
    out = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "segments", "replay")}
    out["valid"] = np.zeros((len(rows), length), bool)
    for index, parts in enumerate(laid):
        at = 0
        for part, segment, again in parts:
            here = (index, slice(at, at + len(part)))
            out["tokens"][here], out["segments"][here], out["valid"][here] = part, segment, True
            out["replay"][here] = np.arange(1, len(part) + 1) if again else 0
            at += len(part)
    return out
