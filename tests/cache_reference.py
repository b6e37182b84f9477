"""The cache in numpy and plain Python: one row, one kv head, one token after another. The oracle of `test_cache.py`.

run = Reference(params, config, policy, limits)      one row; limits [L][tier]
hidden = run.read(tokens)                            a prompt, or a decode step of one token
run.layers[l][k][tier]                               the `Token`s that kv head k of layer l still holds; the tiers of
                                                     its first block row, then of its second
"""

import dataclasses
import itertools
import math

import numpy as np


@dataclasses.dataclass
class Token:
    """One remembered token of one kv head. seen: for each query that saw it (step, probability, keys it saw).

    queries: those of its step, one per head of the group, before RoPE. expected: the score of expected attention.
    peak: the most that a query head of a later read gave it. fading: SnapKV's score. likeness: KeyDiff's cosine. norm: of the
    key as it was given. group: of the tier that it lies in, if that keeps groups. given: key and value before that tier stored
    them.
    """

    position: int
    key: np.ndarray
    value: np.ndarray
    seen: list[tuple[int, float, int]] = dataclasses.field(default_factory=list)
    given: tuple = ()
    peak: float = 0.0
    fading: float = 0.0
    likeness: float = 0.0
    norm: float = 0.0
    group: list | None = dataclasses.field(default=None, repr=False)
    squares: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    queries: tuple[np.ndarray, ...] = ()
    expected: float = 0.0


def insert(slots, entries, limit):
    """Keeps the best `limit`. slots: list of (score, position) or None; entries: the same, None = not valid.

    Returns: what each slot holds after it, as ("slot", i), ("entry", j) or None; and the set of those that left.
    """
    candidates = [("slot", i, *one) for i, one in enumerate(slots) if one is not None]
    candidates += [("entry", j, *one) for j, one in enumerate(entries) if one is not None]
    candidates.sort(key=lambda c: (c[2], c[3]), reverse=True)  # the higher score, then the newer
    kept = {c[:2] for c in candidates[:limit]}
    gone = {c[:2] for c in candidates[limit:]}
    after = [("slot", i) if ("slot", i) in kept else None for i in range(len(slots))]
    for j in range(len(entries)):
        if ("entry", j) in kept:
            after[after.index(None)] = ("entry", j)
    return after, gone


def pass_down(tiers, arriving, limits, granules, rank):
    """One token list after another: what each tier holds after `arriving` have gone down the chain, and who left it.

    A tier with granule g > 1 keeps whole groups, as good as their best member; above it, a surplus that is no multiple of g
    waits, unless no tier of groups below has room. rank: (token, tier number) -> what is compared, before the position.
    Returns: per tier (held, newcomers in the groups that they are encoded in, ranks of the last kept and the first displaced
    or None); the `group` of tokens is set.
    """
    steps = []
    for number, (held, limit, granule) in enumerate(zip(tiers, limits, granules, strict=True)):
        if granule == 1:
            groups, fresh = [[token] for token in held], [[token] for token in arriving]
        else:
            groups = [[t for t in held if t.group is one] for one in {id(t.group): t.group for t in held}.values()]
            line = sorted(arriving, key=lambda t: t.position)
            fresh = [line[i : i + granule] for i in range(0, len(line), granule)]
        best = lambda group, number=number: (max(rank(t, number) for t in group), max(t.position for t in group))
        ranked = sorted(groups + fresh, key=best, reverse=True)
        room, surplus = limit // granule, max(0, len(ranked) - limit // granule)
        below = list(
            itertools.takewhile(lambda one: one[1] > 1, zip(limits[number + 1 :], granules[number + 1 :], strict=True))
        )
        if granule == 1 and any(limit for limit, _ in below):
            room += surplus % below[0][1]
        kept = ranked[:room]
        newcomers = [group for group in kept if any(group is one for one in fresh)]
        for group in newcomers:
            for token in group:
                token.group = None if granule == 1 else group
        arriving = [token for group in ranked[room:] for token in group]
        edge = (best(ranked[room - 1])[0], best(ranked[room])[0]) if kept and arriving else None
        steps.append(([token for group in kept for token in group], newcomers, edge))
    return steps


class Reference:
    """One row through the tiny models of `test_cache.py` (default RoPE, no biases), float64.

    stored: (tier, keys, values, balance) -> what a tier makes of the keys and values [n, H] of entries that enter together:
    of one, or of a group. granules: of the tiers.
    margin: the least distance of any decision from falling the other way: of a probability from the threshold of low
    attention, relative; of the last kept score from the first evicted.
    """

    def __init__(self, params, config, policy, limits, stored=None, granules=None, rows=None):
        self.rows = rows or tuple(range(config.num_kv_heads))  # the kv head of each block row
        self.stored = stored or (lambda tier, keys, values, balance: (keys, values))
        self.granules = granules or [1] * len(limits[0])
        self.balance = [[None] * config.num_kv_heads for _ in config.layers]
        self.params, self.config, self.policy, self.limits = params, config, policy, limits
        self.layers = [
            [[[] for _ in range(self.rows.count(head) * len(limits[0]))] for head in range(config.num_kv_heads)]
            for _ in config.layers
        ]
        self.key_sums = [[np.zeros(config.head_dim) for _ in range(config.num_kv_heads)] for _ in config.layers]
        self.heard = [[[] for _ in range(config.num_kv_heads)] for _ in config.layers]  # all past queries, before RoPE
        self.given = [[0.0] * config.num_kv_heads for _ in config.layers]  # by their mean, to all keys
        self.steps = 0
        self.margin = math.inf
        self.bucket_of, self.filled = [], 0  # of default Scissorhands: each step's bucket, steps in the newest

    def read(self, tokens):
        """Hidden states [T, D] of valid tokens, and the caches of all layers after them."""
        c, p = self.config, self.params
        x = p["embedder"]["embedding"][tokens]
        first, self.steps = self.steps, self.steps + len(tokens)
        self._fill_buckets(len(tokens))
        positions = range(first, self.steps)
        for index, kind in enumerate(c.layers):
            layer = p[f"layers_{index}"]
            heads = self._project(layer["attention"], norm(x, layer["attention_norm"]["scale"], c.norm_eps), positions)
            n, k = c.num_heads, c.num_kv_heads
            out = np.zeros((len(tokens), n, c.head_dim))
            for head in range(k):
                fresh = [
                    Token(at, rotate(heads[i, n + head], at, kind.rope), heads[i, n + k + head])
                    for i, at in enumerate(positions)
                ]
                mine = range(head * (n // k), (head + 1) * (n // k))
                for i, token in enumerate(fresh):
                    token.queries = tuple(heads[i, mine])
                tiers = self.layers[index][head]
                if self.balance[index][head] is None and fresh:
                    asked = [rotate(heads[i, g], at, kind.rope) for i, at in enumerate(positions) for g in mine]
                    self.balance[index][head] = balance(asked, [token.key for token in fresh])
                for i, at in enumerate(positions):
                    crowd = [token for tier in tiers for token in tier] + fresh[: i + 1]
                    if kind.window is not None:
                        crowd = [token for token in crowd if at - token.position < kind.window]
                    queries = [rotate(heads[i, g], at, kind.rope) for g in mine]
                    out[i, mine] = self._look(head, queries, crowd, at, first)
                self._absorb(index, head, fresh, first)
                self._store(index, head, fresh)
            x = x + out.reshape(len(tokens), -1) @ layer["attention"]["output"]["kernel"]
            gate, up = np.split(
                norm(x, layer["mlp_norm"]["scale"], c.norm_eps) @ layer["mlp"]["gate_up"]["kernel"], 2, -1
            )
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
        return norm(x, p["final_norm"]["scale"], c.norm_eps)

    def _project(self, params, x, positions):
        """Queries, keys and values [T, N + 2 K, H] before RoPE, of the normed input of a layer."""
        return (x @ params["qkv"]["kernel"]).reshape(len(x), -1, self.config.head_dim)

    def _logits(self, head, number, query, crowd, step):
        """Of the number-th query head that shares a kv head, at this step, over the tokens of `crowd`."""
        return np.stack([token.key for token in crowd]) @ query * self.config.query_scale

    def _look(self, head, queries, crowd, step, first):
        """Attention of one query per head over `crowd`; each token of it remembers how much it got."""
        values = np.stack([token.value for token in crowd])
        shares = [softmax(self._logits(head, number, query, crowd, step)) for number, query in enumerate(queries)]
        for i, (token, share, most) in enumerate(
            zip(crowd, np.mean(shares, axis=0), np.max(shares, axis=0), strict=True)
        ):
            token.seen.append((step, share, len(crowd)))
            token.squares.append((step, np.mean([one[i] ** 2 for one in shares])))
            if token.position < first:  # of an earlier read
                token.peak = max(token.peak, most)
            if "scissorhands" in self.policy.name and len(crowd) > 1:
                self.margin = min(self.margin, abs(share * len(crowd) - 1))
        return [share @ values for share in shares]

    def _absorb(self, index, head, fresh, first):
        """What SnapKV and KeyDiff remember after a read whose first step was `first`."""
        tokens, count = [token for tier in self.layers[index][head] for token in tier], self.steps - first
        total = self.key_sums[index][head]
        total += sum(token.key / np.linalg.norm(token.key) for token in fresh)
        for token in fresh:
            token.norm = np.linalg.norm(token.key)
            token.likeness = token.key @ total / np.linalg.norm(token.key) / np.linalg.norm(total)
        if self.policy.name == "expected-attention":
            self._expect(index, head, [token for token in fresh if token.position >= self.policy.sinks])
        if self.policy.name == "replay":
            for token in tokens + fresh:
                weight = 2.0 ** (self.steps / self.policy.memory)
                new = sum(s for step, s in token.squares if step >= self.steps - self.policy.window)
                token.fading = self._bf16(token.fading + weight * new, self.steps * 40503 % 2**16 / 2**16)
                token.squares.clear()
        if self.policy.name != "snapkv":
            return
        window, side = self.policy.window, self.policy.pool // 2
        near = [
            sum(share for step, share, _ in token.seen if step >= max(first, self.steps - window))
            for token in tokens + fresh
        ]
        own = np.pad(near[len(tokens) :], side)
        pooled = [own[i : i + 2 * side + 1].sum() / self.policy.pool for i in range(len(fresh))]
        for token, gain in zip(tokens + fresh, near[: len(tokens)] + pooled, strict=True):
            token.fading = token.fading * (1 - 1 / window) ** count + gain

    def _expect(self, index, head, fresh):
        """Scores of newcomers behind the sinks: by the Gaussian of their own queries if they are the first, per head."""
        if not fresh:
            return
        heard, policy, rope = self.heard[index][head], self.policy, self.config.layers[index].rope
        first = not heard
        heard += [np.mean(token.queries, axis=0) for token in fresh]
        ahead = mean_rotation(range(self.steps, self.steps + policy.n_future), rope, len(heard[0]))
        keys, scale = np.stack([token.key for token in fresh]), self.config.query_scale
        plain = np.exp(keys @ (ahead @ np.mean(heard, axis=0)) * scale)
        self.given[index][head] += plain.sum()
        shares = plain / self.given[index][head]
        if first:
            by_head = []
            for queries in zip(*(token.queries for token in fresh), strict=True):
                spread = ahead @ np.cov(np.stack(queries), rowvar=False, bias=True) @ ahead.T
                z = keys @ (ahead @ np.mean(queries, axis=0)) * scale
                by_head.append(softmax(z + np.einsum("ni,ij,nj->n", keys, spread, keys) * scale**2 / 2))
            shares = np.mean(by_head, axis=0)
        for token, share in zip(fresh, shares, strict=True):
            token.expected = self._bf16((share + policy.epsilon) * np.linalg.norm(token.value))

    def _store(self, index, head, arriving):
        """Each block row of the head takes the newcomers whose turn it is."""
        rows = self.rows.count(head)
        for row in range(rows):
            self._store_row(index, head, row, rows, [t for t in arriving if t.position % rows == row])

    def held(self, index, row, number):
        """What a tier of a block row of a layer holds."""
        nth = self.rows[:row].count(self.rows[row])
        return self.layers[index][self.rows[row]][nth * len(self.limits[0]) + number]

    def _store_row(self, index, head, row, rows, arriving):
        """The newcomers go down the chain; each tier keeps its best."""
        window, limits = self.config.layers[index].window, self.limits[index]
        seen = lambda tokens: [t for t in tokens if window is None or self.steps - t.position < window]
        tiers, start = self.layers[index][head], row * len(limits)
        rank = lambda token, number: self._rank(token, index, head, rows * sum(limits[: number + 1]))
        steps = pass_down(
            [seen(tier) for tier in tiers[start : start + len(limits)]], seen(arriving), limits, self.granules, rank
        )
        for number, (held, newcomers, edge) in enumerate(steps):
            tiers[start + number] = held
            for group in newcomers:
                keys, values = ([getattr(t, name) for t in group] for name in ("key", "value"))
                stored = self.stored(number, np.stack(keys), np.stack(values), self.balance[index][head])
                for token, key, value in zip(group, *stored, strict=True):
                    token.given = token.key, token.value
                    token.key, token.value = key, value
            if edge is not None:
                (last, a), (first, b) = edge
                if not last and not first and self.policy.name in ("h2o", "snapkv", "replay"):
                    self.margin = min(self.margin, abs(a - b))

    def _rank(self, token, index, head, limit):
        """(protected, score)."""
        policy, newest = self.policy, self.steps - 1
        recent = max(policy.recent, int(limit * policy.recent_share)) if policy.name == "h2o" else policy.recent
        protected = token.position > newest - recent or token.position < policy.sinks
        return protected, 0.0 if protected else self._score(token, index, head)

    def _score(self, token, index, head):
        policy, newest = self.policy, self.steps - 1
        low = [step for step, share, count in token.seen if share < 1 / count]
        match policy.name:
            case "full" | "recency":
                return token.position
            case "random":
                return random_score(policy.seed, index, head, token.position)
            case "h2o":
                return sum(share for _, share, _ in token.seen)
            case "snapkv" | "replay":
                return token.fading
            case "tova":
                return self._bf16(sum(share for step, share, _ in token.seen if step == newest))
            case "knorm":
                return -self._bf16(token.norm)
            case "keydiff":
                return -self._bf16(token.likeness)
            case "expected-attention":
                return token.expected
            case "kvzip":
                return self._bf16(token.peak)
            case "scissorhands-reference":
                return -sum(step > newest - policy.window for step in low)
            case "scissorhands":
                age = [self.bucket_of[-1] - self.bucket_of[step] for step in low]
                return -sum(a < 4 for a in age)

    def _bf16(self, x, up=0.5):
        """x as bfloat16 rounds it, up if its cut part is `1 - up` or more; the margin is how far it is, relative, from rounding
        the other way."""
        if x == 0:
            return 0.0
        mantissa, exponent = math.frexp(abs(x))
        units = mantissa * 256
        edge = units + up
        if units != math.floor(units):
            self.margin = min(self.margin, abs(edge - round(edge)) / units)
        return math.copysign(math.ldexp(math.floor(edge), exponent - 8), x)

    def _fill_buckets(self, count):
        """A run of a whole window or more starts the buckets anew, so that its last step ends one."""
        if self.policy.name != "scissorhands":
            return
        size, last = self.policy.window // 4, self.bucket_of[-1] if self.bucket_of else 0
        if count >= self.policy.window:
            newest = last + 1 + (count - 1) // size
            self.bucket_of += [newest - left // size for left in range(count - 1, -1, -1)]
            self.filled = size
            return
        for _ in range(count):
            if self.filled == size or not self.bucket_of:
                last, self.filled = last + 1, 0
            self.bucket_of.append(last)
            self.filled += 1


def random_score(seed, layer, head, position):
    """The 24-bit hash of the random policy, in Python's integers."""

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        x = (x ^ x >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return x ^ x >> 16

    mixed = seed % 2**32
    for part in (layer, head, position):
        mixed = mix(mixed ^ mix(part + 0x9E3779B9 & 0xFFFFFFFF))
    return mixed >> 8


def balance(queries, keys):
    """MiKV's factor per channel, shared by rotated pairs: the root of max |q| over max |k|."""
    q, k = (np.abs(x).max(axis=0).reshape(2, -1).max(axis=0) for x in (queries, keys))
    return np.tile(np.sqrt(q / k), 2)


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * scale


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def mean_rotation(positions, rope, size):
    """The matrix that is the mean of the rotations at these positions."""
    half = size // 2
    angles = np.outer(positions, rope.theta ** -(np.arange(half) / half))
    cos, sin = np.diag(np.cos(angles).mean(axis=0)), np.diag(np.sin(angles).mean(axis=0))
    return np.block([[cos, -sin], [sin, cos]])


def rotate(x, position, rope):
    """Channel c pairs with c + half."""
    half = len(x) // 2
    angle = position * rope.theta ** -(np.arange(half) / half)
    a, b = x[:half], x[half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)])
