"""Every pytree that crosses a jit boundary.

Axes: B batch row, T query, S slot of a tier, n new entries, P block row of a cache (one or more per kv head),
K kv heads, N query heads, G = N / K, H head dim, R = rotary_dim, D model dim, V vocabulary, L layers.
Every leaf of a state has B as axis 0 and rows share nothing, so placing, copying or freeing a row is one tree map.

    State ── layers[L] ── tiers[...] ── keys, values   codes (and factors, for quantized schemes) per slot
      │          │            ├──────── positions      which token a slot holds; -1 = empty
      │          │            ├──────── slots          what the policy keeps per slot; moves with the entry
      │          │            └──────── limit          how many slots this row may use
      │          ├── row                               what the policy keeps once per row: leaves [B] or [B, P, ...]
      │          ├── taps                              the last projections, if attention convolves over time
      │          ├── owner                             which kv head a block row serves, if not each its own
      │          └── balance                           MiKV's factors between queries and keys, if a tier wants them
      ├── offsets[tier]    added to the stored positions of that tier, in all layers
      ├── rotary[kind]     RoPE frequencies, fixed when the state was made
      └── next_position    of the next token
"""

import dataclasses
from typing import Any, NamedTuple

import jax

Array = jax.Array


def _pytree(cls=None, *, static: tuple[str, ...] = ()):
    def register(cls):
        cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]
        return jax.tree_util.register_dataclass(cls, data_fields=data, meta_fields=list(static))

    return register if cls is None else register(cls)


@_pytree
class Encoded:
    """Keys or values of a tier as its scheme stores them.

    codes: carrier array. Keys are slots-minor [B, P, H', S]; float values are [B, P, S, H'].
    factors: the scheme's scales and zeros, [B, P, groups, S] each, or [B, P, H, S / granule] where slots share them; empty
    for floats. While a decode step is stored, both are tuples of arrays, one of each layer (`jaxkv.cache.pool`).
    """

    codes: Array
    factors: tuple[Array, ...] = ()


@_pytree(static=("scheme",))
class Tier:
    """A fixed number of slots with one storage scheme.

    positions [B, P, S] int16 or int32: position of the token in each slot before `State.offsets`; -1 = empty.
    slots: the policy's pytree, leaves [B, P, S, ...].
    limit [B, P] int32: slots this row may use, <= S. Data, so that a sweep over budgets runs one program. Whole groups, where
    the scheme has those; above such a tier, up to granule - 1 more entries wait.
    scheme: (key scheme, value scheme), rows of the table of `jaxkv.quantization`.
    """

    keys: Encoded
    values: Encoded
    positions: Array
    slots: Any
    limit: Array
    scheme: tuple[str, str]


@_pytree(static=("policy",))
class LayerState:
    """The cache of one layer: its tiers, first to last, and what the policy keeps once per row (leaves [B, ...]).

    balance [B, K, H] uint16 (bfloat16 bits): balanced schemes store keys times this; 0 = not known yet, which counts as 1.
    owner [B, P] int16: the kv head that each block row serves, -1 = none; None: row p serves head p. A head that owns n rows
    gives the token at position t to its row number t mod n: so heads hold different numbers of tokens in rows of one size.
    taps [B, Kw - 1, C] float32: what a convolution over time has yet to meet of the tokens before (`DecoderConfig.taps`).
    """

    tiers: tuple[Tier, ...]
    row: Any
    policy: Any
    balance: Array | None = None
    owner: Array | None = None
    taps: Array | None = None


@_pytree
class Rotary:
    """RoPE of one kind of layer, fixed per row: frequencies [B, R/2] in radians per position, scale [B] of cos and sin."""

    frequencies: Array
    scale: Array


@_pytree
class State:
    """All that a row remembers. next_position [B] int32; offsets: one [B] int32 per tier index."""

    layers: tuple[LayerState, ...]
    offsets: tuple[Array, ...]
    rotary: tuple[Rotary, ...]
    next_position: Array


@_pytree
class Memory:
    """What a row of a stream hands on from one segment to the next while a model is trained (`jaxkv.causal`): of its last R
    tokens hidden, the input [B, R, D] of each layer, and segments [B, R] int32, -2 where there was no token yet."""

    hidden: tuple[Array, ...]
    segments: Array


class Place(NamedTuple):
    """Where the tokens [B, T] of a forward pass stand, for attention variants (`jaxkv.attention`).

    positions [B, T] int32, from 0. key_angles: their (cos, sin), [B, T, R/2] each; query_angles: such a pair per tier.
    valid [B, T] bool: others are pads; None: all. lasting [B, T] bool: those that also take a place in the row; None: the
    valid ones. segments [B, T] int32: tokens see their own, and -1 sees and is seen by all; None: one. passages [B, T] int32:
    n > 0 is the n-th token of a passage behind the lasting ones, which knows nothing of other passages; None: there are none.
    taps: the layer's; None: nothing came before, and nothing is carried on. recalled [B, T] bool: tokens of earlier segments,
    of which only keys and values are wanted; None: there are none.
    """

    positions: Array
    key_angles: tuple[Array, Array]
    query_angles: tuple[tuple[Array, Array], ...]
    valid: Array | None = None
    lasting: Array | None = None
    segments: Array | None = None
    passages: Array | None = None
    taps: Array | None = None
    recalled: Array | None = None


class Relative(NamedTuple):
    """A term of the logits that goes by distance: scale * queries . table[distance], distance = position of the query minus
    that of the key, from 0. queries [B, T, N, C]; table [N or 1, distances, C]."""

    queries: Array
    table: Array


class Projected(NamedTuple):
    """What an attention variant makes of a layer's input: queries, a tuple of [B, T, N, H], one per tier; keys and values
    [B, T, K, H]; the relative term of the logits, or None; the taps after these tokens, or None."""

    queries: tuple[Array, ...]
    keys: Array
    values: Array
    relative: Relative | None = None
    taps: Array | None = None


@_pytree
class Entries:
    """Tokens on their way into a tier: keys, values [B, P, n, H] in compute dtype, keys rotated at `positions`
    [B, P, n] int32; slots: the policy's leaves [B, P, n, ...]; valid [B, P, n] bool; balance: of their layer."""

    keys: Array
    values: Array
    positions: Array
    slots: Any
    valid: Array
    balance: Array | None = None


@_pytree(static=("scale",))
class Newcomers:
    """The tokens of one extend, for `Policy.advance` and `Policy.enter`.

    queries [B, P, G, n, H] (None unless the policy needs them), keys [B, P, n, H]: rotated by `rotary` at positions - offset;
    values [B, P, n, H].
    positions [B, n] int32. valid [B, n] bool: tokens that take a place in the row; count [B] int32: how many those are.
    offset [B] int32: of the first tier. scale: of the logits, query . key.
    """

    queries: Array | None
    keys: Array
    values: Array
    positions: Array
    valid: Array
    count: Array
    offset: Array
    rotary: Rotary
    scale: float


@_pytree(static=("own",))
class Rows:
    """What a policy may know of the query rows of one extend, for `Policy.row_statistic`.

    remaining [B, t] int32: valid rows that follow this one in the same extend (0 = the last).
    valid [B, t] bool: rows of the sequence. replay [B, t] bool: rows that only look, and are then forgotten (KVzip).
    count [B] int32: valid rows of the whole extend. live [B, P, t] int32: keys each row sees.
    own: whether the slots are those of the extend's own tokens, in their order, or those of a tier, in any.
    """

    remaining: Array
    valid: Array
    replay: Array
    count: Array
    live: Array
    own: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class TierSpec:
    """Shape of a tier: slots allocated per block row, (key scheme, value scheme), dtype of positions."""

    slots: int
    scheme: tuple[str, str]
    positions: str = "int32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Shape of one layer's cache; no tiers = nothing is stored (the plain forward pass).

    rows: block rows that the kv heads share out among them (`LayerState.owner`); None = one per head.
    """

    policy: Any
    tiers: tuple[TierSpec, ...]
    rows: int | None = None
