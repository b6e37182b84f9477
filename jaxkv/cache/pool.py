"""One write for many layers: what a decode step stores is decided for all layers of a kind together.

Layers share nothing, as block rows share nothing, so L layers of P block rows are one layer of L * P: `store` runs once on
that, where it would run L times. Codes and factors are not moved for it. They stay an array for each layer, written in
place: `insert` reads and writes the one entry of each block row there (`pallas_kernels.slots`).

    layer 0   block rows 0 .. P0 - 1         positions, scores, limits, owners   joined, [B, P0 + P1 + ..., ...]
    layer 1   block rows P0 .. P0 + P1 - 1   codes and factors                   (of layer 0, of layer 1, ...)
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp

from jaxkv.cache.attend import Context, New, store
from jaxkv.cache.insert import apart
from jaxkv.config import DecoderConfig
from jaxkv.types import Encoded, LayerState, Tier


def store_all(
    layers: tuple[LayerState, ...], news: list[New], context: Context, *, config: DecoderConfig
) -> tuple[LayerState, ...]:
    """`store` for every layer; for layers that differ in nothing but how many block rows they have, at once."""
    alike = {}
    for index, layer in enumerate(layers):
        alike.setdefault((config.layers[index], _likeness(layer)), []).append(index)
    out = list(layers)
    for (kind, _), indices in alike.items():
        mine, new = ([given[i] for i in indices] for given in (layers, news))
        together = _join([dataclasses.replace(one, taps=None) for one in new])
        stored = _layers(store(_pool(mine, new), together, context, config=config, kind=kind), mine)
        for index, layer, one in zip(indices, stored, new, strict=True):
            out[index] = dataclasses.replace(layer, taps=one.taps)
    return tuple(out)


def _likeness(layer: LayerState):
    """What layers must have in common: all but the numbers, and the size of the axis P."""
    leaves, tree = jax.tree.flatten(layer)
    return tree, tuple((x.ndim, *x.shape[2:], x.dtype.name) for x in leaves)


def _pool(layers: list[LayerState], news: list[New]) -> LayerState:
    """The layers as one."""
    owner = layers[0].owner
    if owner is not None:
        heads = itertools.accumulate((new.keys.shape[1] for new in news[:-1]), initial=0)
        owner = _join([jnp.where(x.owner < 0, x.owner, x.owner + n) for x, n in zip(layers, heads, strict=True)])
    return LayerState(
        tiers=tuple(map(_pool_tiers, zip(*(layer.tiers for layer in layers), strict=True))),
        row=_join([layer.row for layer in layers]),
        policy=layers[0].policy,
        owner=owner,
    )


def _pool_tiers(tiers: tuple[Tier, ...]) -> Tier:
    keys, values = (jax.tree.map(lambda *xs: xs, *(getattr(t, name) for t in tiers)) for name in ("keys", "values"))
    return dataclasses.replace(_join([_small(tier) for tier in tiers]), keys=keys, values=values)


def _layers(pool: LayerState, layers: list[LayerState]) -> list[LayerState]:
    """The opposite of `_pool`, for what `store` made of it."""
    small = lambda layer: (tuple(map(_small, layer.tiers)), layer.row, layer.balance)
    cuts = _cut(small(pool), [small(layer) for layer in layers])
    return [
        dataclasses.replace(
            layer, tiers=tuple(_with_codes(*pair, number) for pair in zip(tiers, pool.tiers, strict=True)), row=row,
            balance=balance,
        )
        for number, (layer, (tiers, row, balance)) in enumerate(zip(layers, cuts, strict=True))
    ]  # fmt: skip


def _with_codes(tier: Tier, pool: Tier, number: int) -> Tier:
    part = lambda e: Encoded(codes=e.codes[number], factors=tuple(factor[number] for factor in e.factors))
    return dataclasses.replace(tier, keys=part(pool.keys), values=part(pool.values))


def _small(tier: Tier) -> Tier:
    return dataclasses.replace(tier, keys=(), values=())


def _join(trees: list):
    """Leaves [B, P, ...] behind one another. What a row keeps once, [B], is the same in every layer."""
    return jax.tree.map(lambda *xs: xs[0] if xs[0].ndim == 1 else jnp.concatenate(xs, axis=1), *trees)


def _cut(joined, trees: list) -> list:
    """The opposite of `_join`."""
    leaves, tree = jax.tree.flatten(joined)
    likes = zip(*map(jax.tree.leaves, trees), strict=True)
    cuts = [[x] * len(trees) if x.ndim == 1 else apart(x, like) for x, like in zip(leaves, likes, strict=True)]
    return [jax.tree.unflatten(tree, mine) for mine in zip(*cuts, strict=True)]
