"""From a state that kept everything to the state a policy would have reached."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.attend import retention, takes
from jaxkv.cache.insert import insert
from jaxkv.cache.state import (
    check_tiers,
    checked_owner,
    empty_tier,
    live_slots,
    plain_entries,
    positions_of,
    wants_balance,
)
from jaxkv.policies import Full
from jaxkv.types import Entries, LayerSpec, LayerState, State
from pallas_kernels.decode_attention.owners import to_rows


def compress(state: State, spec: tuple[LayerSpec, ...], *, limits, owners=None) -> State:
    """The state that `spec` would have reached, had it been in place of the `Full` policy of `state`.

    Comparisons prefill once: make the state with `Full(observe=policies)`, then compress it for each policy and budget.
    The source is not consumed.

    Args: spec: a LayerSpec per layer, all of one policy. limits: int [L, tiers, B], slots that each row may use. owners: as
      `empty_state` takes them.
    Raises: ValueError if `state` was not made with `Full`, or needs attention statistics that it did not observe; for
      tiers, limits and owners that `empty_state` would refuse.
    """
    limits, layers = np.asarray(limits), []
    if len(spec) != len(state.layers) or not all(len(wanted.tiers) == len(spec[0].tiers) > 0 for wanted in spec):
        raise ValueError(
            f"compress needs a spec for each of {len(state.layers)} layers, with equally many tiers, at least one; got"
            f" {[len(wanted.tiers) for wanted in spec]} tiers"
        )
    longest = 0 if isinstance(state.next_position, jax.core.Tracer) else int(state.next_position.max())
    wanted_shape = (len(state.layers), len(spec[0].tiers), state.next_position.shape[0])
    if limits.shape != wanted_shape:
        raise ValueError(f"limits must be [L, tiers, B] = {wanted_shape}, got {limits.shape}")
    checked = []
    for index, (layer, wanted) in enumerate(zip(state.layers, spec, strict=True)):
        policy = wanted.policy
        if not isinstance(layer.policy, Full) or len(layer.tiers) != 1:
            raise ValueError(f"compress needs a state with one tier under the full policy, got {layer.policy.name!r}")
        observed = {p.name: p.watcher for p in layer.policy.observe}
        for needed in policy.observe if isinstance(policy, Full) else (policy,):
            if needed.stateful and observed.get(needed.name) != needed.watcher:
                raise ValueError(
                    f"policy {needed.name!r} keeps what this state has not observed; it observed"
                    f" {list(observed.values())}; make it with Full(observe=...)"
                )
        if wants_balance(wanted) and layer.balance is None:
            raise ValueError("a balanced scheme needs queries that this state has not kept: Full(balance=True)")
        check_tiers(index, wanted, limits[index], longest)
        checked.append(checked_owner(owners, index, wanted, limits.shape[-1], layer.tiers[0].positions.shape[1]))
    for index, (layer, wanted, owner) in enumerate(zip(state.layers, spec, checked, strict=True)):
        number, limit = (jnp.asarray(x, jnp.int32) for x in (index, limits[index]))
        layers.append(_compress_layer(layer, state.next_position, limit, number, owner, spec=wanted))
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # an extend donates its state; the source must survive it
    zeros = lambda: jnp.zeros_like(state.next_position)
    return State(
        layers=tuple(layers),
        offsets=tuple(zeros() for _ in spec[0].tiers),
        rotary=copy(state.rotary),
        next_position=copy(state.next_position),
    )


def _compress(layer, next_position, limits, index, owner, *, spec):
    source, policy = layer.tiers[0], spec.policy
    to_mine = lambda x: to_rows(x, owner)
    keys, values = map(to_mine, plain_entries(source, layer.balance))
    batch, heads = keys.shape[:2]
    positions = to_mine(positions_of(source))
    live = to_mine(live_slots(source)) & takes(owner, positions)
    balance = layer.balance if wants_balance(spec) else None
    if isinstance(policy, Full):
        kept = {p.name: source.slots[p.name] for p in policy.observe}
        row = {p.name: layer.row[p.name] for p in policy.observe}
    elif policy.stateful:
        kept = jax.tree.map(to_mine, source.slots[policy.name])
        row = jax.tree.map(lambda x: to_mine(x) if x.ndim > 1 else x, layer.row[policy.name])
    else:
        row = policy.enter_row((batch, heads, keys.shape[-1]), index)
        kept = ()
    entries = Entries(
        keys=keys, values=values, positions=positions, slots=kept, valid=live,
        balance=None if balance is None else to_mine(balance),
    )  # fmt: skip
    shape = (batch, heads, keys.shape[-1])
    empty = tuple(empty_tier(policy, wanted, limit, shape) for wanted, limit in zip(spec.tiers, limits, strict=True))
    tiers, upto = [], jnp.zeros((batch, heads), jnp.int32)
    for number, tier in enumerate(empty):
        upto = upto + tier.limit
        scores = tuple(
            retention(policy, x.slots, row, positions_of(x), upto, next_position - 1, owner) for x in (tier, entries)
        )
        tier, entries = insert(tier, entries, scores=scores, below=empty[number + 1 :])
        tiers.append(tier)
    return LayerState(tiers=tuple(tiers), row=row, policy=policy, balance=balance, owner=owner, taps=layer.taps)


_compress_layer = jax.jit(_compress, static_argnames=("spec",))
