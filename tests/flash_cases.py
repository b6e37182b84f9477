"""The cases of flash attention: one table for the numeric tests, the gradients and the compilation for TPUs."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """keys: how many more than queries. view: causal, and a window. temperatures, relative: whose they are, a head's or
    shared; "wide": with a channel more than q. A batch of 5 is ragged: its segments end early."""

    group: int
    size: int
    length: int
    more: int
    batch: int
    dtype: str
    view: str
    segments: str | None
    softcap: float | None
    query_temperature: str | None
    value_temperature: str | None
    relative: str | None

    @property
    def heads(self) -> int:
        return 2 if self.batch * self.group * self.length < 2000 else 1


# fmt: off
CASES = [  # every pair of values of two fields is in one of them, save those in `never`
    Case(1, 64, 1, 0, 1, "float32", "window", None, None, "row", "head", "head"),
    Case(4, 80, 1, 0, 1, "float32", "behind and ahead", "dead", 1.5, "row", "head", None),
    Case(7, 96, 1, 0, 1, "float32", "all", None, None, "row", "head", None),
    Case(8, 128, 1, 0, 1, "bfloat16", "causal", "ids", None, "row", None, "wide"),
    Case(3, 96, 1, 37, 5, "float32", "window", None, 1.5, "head", None, "shared"),
    Case(4, 256, 1, 37, 5, "float32", "window", "dead", None, "head", None, "wide"),
    Case(7, 64, 1, 37, 5, "bfloat16", "behind and ahead", "dead", None, None, "row", None),
    Case(1, 80, 127, 0, 1, "bfloat16", "all", None, None, "head", None, None),
    Case(1, 96, 128, 0, 1, "bfloat16", "causal", "dead", None, "head", "row", "shared"),
    Case(3, 96, 127, 37, 1, "float32", "window", "ids", 1.5, None, "row", "head"),
    Case(4, 128, 127, 0, 1, "float32", "window", "ids", None, "head", "row", "head"),
    Case(1, 256, 640, 37, 1, "bfloat16", "behind and ahead", "ids", None, None, "head", None),
    Case(1, 96, 128, 0, 5, "float32", "window", "dead", None, None, "row", "wide"),
    Case(7, 128, 127, 0, 1, "bfloat16", "all", "dead", 1.5, "row", "head", None),
    Case(8, 64, 127, 37, 1, "bfloat16", "causal", None, None, "head", "head", "wide"),
    Case(8, 96, 127, 0, 1, "bfloat16", "behind and ahead", "ids", 1.5, None, None, None),
    Case(3, 256, 127, 0, 5, "float32", "window", None, 1.5, None, "head", None),
    Case(3, 64, 640, 0, 1, "bfloat16", "all", "ids", None, None, None, None),
    Case(3, 128, 128, 0, 5, "float32", "behind and ahead", None, None, "head", "head", None),
    Case(4, 64, 128, 37, 5, "bfloat16", "causal", "dead", 1.5, "row", None, "shared"),
    Case(4, 64, 128, 0, 5, "bfloat16", "all", "dead", 1.5, None, "row", None),
    Case(1, 128, 640, 37, 5, "float32", "causal", "ids", 1.5, None, "row", None),
    Case(7, 128, 127, 0, 5, "bfloat16", "causal", None, None, None, "head", "shared"),
    Case(7, 256, 128, 0, 5, "bfloat16", "window", "dead", None, "row", None, "head"),
    Case(7, 80, 128, 37, 5, "float32", "window", "ids", 1.5, None, "head", "wide"),
    Case(7, 256, 640, 0, 1, "bfloat16", "causal", "ids", 1.5, "head", "head", "shared"),
    Case(8, 256, 127, 37, 5, "float32", "all", None, 1.5, "row", "row", None),
    Case(8, 80, 640, 0, 1, "bfloat16", "window", "dead", None, None, "row", "shared"),
    Case(8, 80, 128, 37, 5, "float32", "causal", "dead", None, None, "row", "head"),
    Case(3, 80, 640, 37, 5, "float32", "causal", "dead", 1.5, "row", "row", "wide"),
    Case(4, 96, 640, 37, 5, "bfloat16", "causal", None, 1.5, None, "head", "head"),
]
# fmt: on


def never(one: dict) -> bool:
    """What cannot be, and what would only be long."""
    bidirectional = one.get("view") in ("all", "behind and ahead")
    return (bidirectional and one.get("relative") is not None) or (
        one.get("batch") == 5 and one.get("length") == 640 and one.get("group") in (7, 8)
    )


VIEWS = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": 50},
    "all": {"causal": False},
    "behind and ahead": {"causal": False, "window": (90, 30)},
}


def make(case: Case, seed: int = 0):
    """q, k, v and the other arguments by name, numpy float32 and int32, of size 1; what is dead is not finite."""
    rng = np.random.default_rng(seed)
    batch, heads, group, length, size = case.batch, case.heads, case.group, case.length, case.size
    keys = length + case.more
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, v = (
        normal(batch, heads, group, length, size),
        normal(batch, heads, keys, size),
        normal(batch, heads, keys, size),
    )
    options = {"scale": size**-0.5, "softcap": case.softcap} | VIEWS[case.view]
    if "window" in options and case.batch == 5:  # positions that have gaps
        steps = np.cumsum(rng.integers(1, 3, (batch, keys)), axis=1).astype(np.int32)
        options |= {"key_positions": steps, "query_positions": steps[:, keys - length :]}
    end = keys - rng.integers(0, keys // 2 + 1, (batch, 1)) if batch == 5 else np.full((batch, 1), keys)
    if case.segments == "ids":
        ids = np.sort(rng.integers(0, 4, (batch, keys)), axis=1)
        ids = np.where(rng.random((batch, keys)) < 0.05, -1, ids)
        options["key_segments"] = np.where(np.arange(keys) < end, ids, -2).astype(np.int32)
        options["query_segments"] = options["key_segments"][:, keys - length :]
    elif case.segments == "dead":
        live = (rng.random((batch, heads, keys)) < 0.7) & (np.arange(keys) < end)[:, None]
        options["key_segments"] = np.where(live, 0, -2).astype(np.int32)
    if "key_segments" in options:
        dead = options["key_segments"] == -2
        dead = np.broadcast_to(dead if dead.ndim == 3 else dead[:, None], k.shape[:3])
        k[dead], v[dead] = np.nan, np.inf
    if case.query_temperature is not None:
        ours = (heads, group) if case.query_temperature == "head" else (1, 1)
        options["query_temperature"] = 1 + 0.5 * normal(batch, *ours, length)
    if case.value_temperature is not None:
        options["value_temperature"] = 1 + 0.5 * normal(batch, heads if case.value_temperature == "head" else 1, keys)
    if case.relative is not None:
        wide = size + (case.relative == "wide")
        ours = (1, 1) if case.relative == "shared" else (heads, 1 if case.relative == "wide" else group)
        options["relative"] = normal(batch, heads, group, length, wide), normal(*ours, keys, wide)
    return q, k, v, options


def cast(q, k, v, options: dict, dtype):
    """The same as an accelerator gets them: what is attended with in `dtype`."""
    to = lambda x: np.asarray(x).astype(dtype)
    if "relative" in options:
        options = options | {"relative": tuple(map(to, options["relative"]))}
    return to(q), to(k), to(v), options
