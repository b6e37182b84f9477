"""The forward path: a state and new tokens in, hidden states and the grown state out.

`extend` runs layer by layer over the whole input: at any moment one layer's uncompressed keys and values exist, never
all layers'. It is a Python loop over one jitted layer function, compiled once per kind of layer; called under `jax.jit`
it becomes the whole-program form. `decode` is the case of one token, meant to be called inside a jitted loop.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv import decoder
from jaxkv.cache.attend import Context, New, attend_decode, attend_extend, make_context, store
from jaxkv.cache.pool import store_all
from jaxkv.cache.state import granule_of
from jaxkv.config import DecoderConfig, LayerConfig
from jaxkv.policies import Full
from jaxkv.types import Array, LayerState, Place, State

VISIBILITIES = ("causal", "bidirectional")
MLP_TOKENS = 512  # of a long prompt go through the MLP at a time, whose width is several times the model's


def extend(
    params,
    tokens: Array,
    state: State,
    *,
    config: DecoderConfig,
    valid: Array | None = None,
    candidates: Array | None = None,
    visibility: str = "causal",
    segments: Array | None = None,
    replay: Array | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Array, State]:
    """Runs T new tokens through the model on top of `state`, and stores the candidates among them.

    Each token attends to the live slots and to the new tokens that `visibility` shows it; then, layer by layer, the
    candidates compete for the slots. The state's buffers are donated: use the returned one.

    Args:
      tokens: [B, T] int32. state: from `empty_state`, or what an earlier call returned.
      valid: [B, T] bool, default all: padding and stopped rows are False, anywhere in the row; they take no position,
        are seen by no one and store nothing, and their hidden states mean nothing.
      candidates: [B, T] bool, default all: tokens that may be stored; others look without being remembered.
      visibility: "causal" or "bidirectional", further cut by each layer's sliding window.
      segments: [B, T] int32: tokens see their own segment, and -1 sees and is seen by all. None: one segment.
      replay: [B, T] int32, default all 0: n > 0 is the n-th token of a passage that only looks at what precedes it, for
        policies that learn from that (KVzip): it is not stored, stands at the n-th position behind the row's last token,
        and the row's next token takes no notice of it. Passages behind one another are kept apart by `segments`.
      progress: called with (layers done, layers) from the Python loop.
    Returns: hidden [B, T, D] before the head, after the final norm (`jaxkv.decoder.logits` makes logits); the state.
    Raises: ValueError for shapes that disagree, an unknown visibility, or a `full` state without room (outside jit).
    """
    batch, length = tokens.shape
    if state.next_position.shape != (batch,):
        raise ValueError(f"tokens have {batch} rows, the state has {state.next_position.shape[0]}")
    if visibility not in VISIBILITIES:
        raise ValueError(f"unknown visibility {visibility!r}; known: {', '.join(VISIBILITIES)}")
    if visibility != "causal" and config.rcmha is not None:
        raise ValueError(
            f"attention 'rcmha' has learned what lies behind a token, nothing ahead; {visibility!r} needs that"
        )
    everything = jnp.ones((batch, length), bool)
    valid = everything if valid is None else valid
    candidates = everything if candidates is None else candidates
    for name, array in (("valid", valid), ("candidates", candidates), ("segments", segments), ("replay", replay)):
        if array is not None and array.shape != (batch, length):
            raise ValueError(f"{name} must be [B, T] = {(batch, length)}, got {array.shape}")
    lasting = valid if replay is None else valid & (replay == 0)
    _refuse_overflow(state, lasting & candidates, config)
    _refuse_distant(state, lasting, None if replay is None else jnp.where(valid, replay, 0), config)
    outer = {name: params[name] for name in ("embedder", "positions", "head") if name in params}
    x, context = _begin(
        outer, tokens, state.offsets, state.rotary, state.next_position, valid, candidates, segments, replay,
        config=config,
    )  # fmt: skip
    fresh = _is_fresh(state)
    layers = []
    for index, layer in enumerate(state.layers):
        kind, watch = config.layers[index], bool(layer.tiers) and layer.policy.needs_attention
        # What differs from layer to layer in shape would make a program for each, so a prompt is shown nothing of it.
        seen = dataclasses.replace(layer, tiers=(), owner=None, row=layer.row if watch else ()) if fresh else layer
        x, new = _attend_layer(
            params[f"layers_{index}"], x, seen, context,
            config=config, kind=kind, causal=visibility == "causal", watch=watch,
        )  # fmt: skip
        keep = _store_layer if layer.tiers else store  # without tiers there is nothing to compile
        layers.append(keep(layer, new, context, config=config, kind=kind))
        if progress is not None:
            progress(index + 1, len(state.layers))
    hidden = _end({"final_norm": params["final_norm"]}, x, config=config)
    state = State(
        layers=tuple(layers),
        offsets=context.offsets,
        rotary=context.rotary,
        next_position=context.newest + 1,
    )
    return hidden, state


def decode(params, token: Array, state: State, *, config: DecoderConfig, valid: Array) -> tuple[Array, State]:
    """`extend` by one token per row, unrolled over layers, for use inside a jitted loop.

    Args: token [B] int32; valid [B] bool, False for rows that have stopped: they insert and evict nothing.
    Returns: hidden [B, D]; the state.
    """
    context = make_context(state, valid[:, None], valid[:, None], None)
    x = _embed(params, token[:, None], context, config)
    news = []
    for index, layer in enumerate(state.layers):
        kind = config.layers[index]
        x, new = _decode_layer(params[f"layers_{index}"], x, layer, context, config=config, kind=kind)
        news.append(new)
    hidden = decoder.final_norm(params, x, config=config)[:, 0]
    layers = store_all(state.layers, news, context, config=config)
    state = State(layers=layers, offsets=state.offsets, rotary=state.rotary, next_position=context.newest + 1)
    return hidden, state


def forward(params, tokens: Array, *, config: DecoderConfig, valid: Array | None = None) -> Array:
    """The plain forward pass, hidden [B, T, D]: `extend` on a state that stores nothing."""
    from jaxkv.cache.state import empty_state
    from jaxkv.types import LayerSpec

    batch, length = tokens.shape
    lengths = jnp.full((batch,), length, jnp.int32) if valid is None else valid.sum(axis=1, dtype=jnp.int32)
    spec = (LayerSpec(policy=Full(), tiers=()),) * config.num_layers
    state = empty_state(config, spec, limits=np.zeros((config.num_layers, 0, batch), np.int32), lengths=lengths)
    return extend(params, tokens, state, config=config, valid=valid)[0]


def _block(params, x, taps, context: Context, config: DecoderConfig, kind: LayerConfig, attend):
    frames = context.angles[config.ropes.index(kind.rope)]
    place = Place(
        context.positions, frames[0], frames, valid=context.valid, lasting=context.lasting, segments=context.segments,
        passages=context.passages, taps=taps,
    )  # fmt: skip
    block, params = decoder.Block(config), {"params": params}
    x, aux = block.apply(params, x, place, attend, method="mix_tokens")
    feed_forward = functools.partial(block.apply, params, method="feed_forward")
    return _by_tokens(feed_forward, x, MLP_TOKENS), aux


def _by_tokens(function, x: Array, size: int) -> Array:
    """function(x) of [B, T, D], for a function under which tokens are independent, `size` of them at a time."""
    tokens = x.reshape(1, -1, x.shape[-1])
    whole = tokens.shape[1] // size
    if whole <= 1:
        return function(x)
    cut = whole * size
    blocks = jax.lax.map(function, tokens[:, :cut].reshape(whole, 1, size, -1)).reshape(1, cut, -1)
    out = blocks if cut == tokens.shape[1] else jnp.concatenate([blocks, function(tokens[:, cut:])], axis=1)
    return out.reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("config",))
def _begin(params, tokens, offsets, rotary, next_position, valid, candidates, segments, replay, *, config):
    state = State(layers=(), offsets=offsets, rotary=rotary, next_position=next_position)
    context = make_context(state, valid, candidates, segments, replay)
    return _embed(params, tokens, context, config), context


def _embed(params, tokens, context: Context, config: DecoderConfig) -> Array:
    """Embeddings; those of pads are of position 0, which every table has."""
    return decoder.embed(params, tokens, config=config, positions=jnp.where(context.valid, context.positions, 0))


@functools.partial(jax.jit, static_argnames=("config", "kind", "causal", "watch"), donate_argnames=("x",))
def _attend_layer(
    params, x: Array, layer: LayerState, context: Context, *, config, kind, causal, watch
) -> tuple[Array, New]:
    """The arithmetic of a layer, apart from its storage: a prompt runs one program whatever its layers keep."""
    attend = functools.partial(
        attend_extend, layer=layer, context=context, config=config, kind=kind, causal=causal, watch=watch
    )
    return _block(params, x, layer.taps, context, config, kind, attend)


_store_layer = jax.jit(store, static_argnames=("config", "kind"), donate_argnames=("layer",))


@functools.partial(jax.jit, static_argnames=("config", "kind"))
def _decode_layer(params, x: Array, layer: LayerState, context: Context, *, config, kind) -> tuple[Array, New]:
    """A layer of `decode`, without storing. Jitted so that layers of a kind are traced and lowered once; XLA inlines calls."""
    attend = functools.partial(attend_decode, layer=layer, context=context, config=config, kind=kind)
    return _block(params, x, layer.taps, context, config, kind, attend)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("x",))
def _end(params, x, *, config):
    return decoder.final_norm(params, x, config=config)


def _is_fresh(state: State) -> bool:
    """Whether no row has read anything, as far as can be told before tracing; then attention skips the empty tiers."""
    return not isinstance(state.next_position, jax.core.Tracer) and not state.next_position.any()


def _refuse_distant(state: State, lasting: Array, replay: Array | None, config: DecoderConfig) -> None:
    """Positions beyond a table of learned ones, or what a tier can count, are an error. Under jit, embeddings or logits are
    NaN there, and positions wrap: `jaxkv.cache.budgets.plan` chooses a type for the length that it is told. Replayed tokens
    stand behind the lasting ones, the n-th of each passage at the same place, and are not stored."""
    far, learned = np.iinfo(np.int32).max, config.most_positions
    countable = min((np.iinfo(tier.positions.dtype).max for layer in state.layers for tier in layer.tiers), default=far)
    known = not any(isinstance(x, jax.core.Tracer) for x in (state.next_position, lasting, replay))
    if not known or learned is None and countable == far:
        return
    stored = state.next_position + lasting.sum(axis=1)
    if int(stored.max()) > countable:
        raise ValueError(f"{stored.max()} positions are needed; tiers of this state count to {countable}; use int32")
    seen = stored if replay is None else stored + replay.max(axis=1)
    if learned is not None and int(seen.max()) > learned:
        raise ValueError(f"{seen.max()} positions are needed; the model has learned {learned}")


def _refuse_overflow(state: State, storing: Array, config: DecoderConfig) -> None:
    """A `full` layer that would have to drop a token it can still see is an error, never a silent truncation."""
    full = tuple(
        layer.tiers
        for layer, kind in zip(state.layers, config.layers, strict=True)
        if isinstance(layer.policy, Full) and layer.tiers and kind.window is None
    )
    if not full or isinstance(state.next_position, jax.core.Tracer) or isinstance(storing, jax.core.Tracer):
        return
    room = _room(
        tuple(tuple((tier.limit, tier.positions) for tier in tiers) for tiers in full),
        granules=tuple(tuple(map(granule_of, tiers)) for tiers in full),
    )
    wanted = storing.sum(axis=1)
    if (wanted > room).any():
        row = int((wanted - room).argmax())
        raise ValueError(
            f"row {row}: the full cache has room for {int(room[row])} more tokens and was given"
            f" {int(wanted[row])}; make the state with a larger capacity, or choose an evicting policy"
        )


@functools.partial(jax.jit, static_argnames=("granules",))
def _room(layers, *, granules):
    """Free slots of the fullest layer, [B]: of all its tiers together, whole groups where a tier has those, and the places
    to wait above them. layers: (limit, positions) per tier of each."""

    def free(tiers, sizes):
        total, waits = 0, 0
        for (limit, at), size in zip(tiers, sizes, strict=True):
            held = (at >= 0).reshape(*at.shape[:-1], -1, size).any(axis=-1).sum(axis=-1, dtype=jnp.int32)
            total = total + limit - size * held
            waits = jnp.maximum(waits, jnp.where(limit > 0, size - 1, 0))
        return total + waits

    rows = [free(tiers, sizes).min(axis=-1) for tiers, sizes in zip(layers, granules, strict=True)]
    return functools.reduce(jnp.minimum, rows)
