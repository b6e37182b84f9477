"""From a state that kept everything to the state a policy would have reached."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.attend import retention
from jaxkv.cache.insert import insert
from jaxkv.cache.state import live_slots, tier_keys, tier_values
from jaxkv.policies import Full, Policy
from jaxkv.types import Encoded, Entries, LayerState, State, Tier


def compress(state: State, policy: Policy, *, slots: list[int], limits) -> State:
    """The state that `policy` would have reached, had it been in place of the `Full` policy of `state`.

    Comparisons prefill once: make the state with `Full(observe=policies)`, then compress it for each policy and budget.
    The source is not consumed.

    Args:
      slots: per layer, slots of the new tier. limits: int [L, B], how many of them each row may use.
    Raises: ValueError if `state` was not made with `Full`, or needs attention statistics that it did not observe.
    """
    limits = np.asarray(limits)
    layers = []
    for index, layer in enumerate(state.layers):
        if not isinstance(layer.policy, Full) or len(layer.tiers) != 1:
            raise ValueError(f"compress needs a state with one tier under the full policy, got {layer.policy.name!r}")
        observed = {p.name: p for p in layer.policy.observe}
        if policy.needs_attention and observed.get(policy.name) != policy:
            raise ValueError(
                f"policy {policy.name!r} needs attention that this state has not observed; it observed"
                f" {list(observed.values())}; make it with Full(observe=...)"
            )
        layers.append(
            _compress_layer(
                layer,
                state.next_position,
                jnp.asarray(limits[index], jnp.int32),
                jnp.asarray(index, jnp.int32),
                policy=policy,
                slots=int(slots[index]),
            )  # fmt: skip
        )
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # an extend donates its state; the source must survive it
    return State(
        layers=tuple(layers),
        offsets=copy(state.offsets),
        rotary=copy(state.rotary),
        next_position=copy(state.next_position),
    )


def _compress(layer, next_position, limit, index, *, policy, slots):
    source = layer.tiers[0]
    batch, heads = source.limit.shape
    shape = source.positions.shape
    if isinstance(policy, Full):
        kept = {p.name: source.slots[p.name] for p in policy.observe}
        row = {p.name: layer.row[p.name] for p in policy.observe}
    elif policy.needs_attention:
        kept, row = source.slots[policy.name], layer.row[policy.name]
    else:
        kept = policy.enter(shape)
        row = jax.tree.map(lambda x: x + index.astype(x.dtype), policy.enter_row(batch, 0))
    empty = lambda x, axis: jnp.zeros((*x.shape[:axis], slots, *x.shape[axis + 1 :]), x.dtype)
    tier = Tier(
        keys=Encoded(codes=empty(source.keys.codes, 3)),
        values=Encoded(codes=empty(source.values.codes, 2)),
        positions=jnp.full((batch, heads, slots), -1, jnp.int32),
        slots=jax.tree.map(lambda x: empty(x, 2), kept),
        limit=jnp.broadcast_to(limit[:, None], (batch, heads)),
        scheme=source.scheme,
    )
    entries = Entries(
        keys=jnp.swapaxes(tier_keys(source), -1, -2),
        values=tier_values(source),
        positions=source.positions,
        slots=kept,
        valid=live_slots(source),
    )
    newest = next_position - 1
    scores = tuple(retention(policy, x.slots, row, x.positions, tier.limit, newest) for x in (tier, entries))
    tier, _ = insert(tier, entries, scores=scores, displace=False)
    return LayerState(tiers=(tier,), row=row, policy=policy)


_compress_layer = jax.jit(_compress, static_argnames=("policy", "slots"))
