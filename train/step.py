"""The state of a run and the one jitted step that changes it."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxkv.causal import Spread, segment_forward
from jaxkv.config import DecoderConfig
from jaxkv.types import Array, Memory
from train.config import Lora
from train.lora import adapted
from train.losses import Sums, token_losses
from train.optimizer import Flat, flatten, unflatten

Batch = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """step: how many were taken, int32. trained, frozen: parameters by path, float32 (frozen ones in any dtype).
    key: of what is drawn while training (the seeds of samples). memory: of the stream that each row reads; None: none."""

    step: Array
    trained: Flat
    frozen: Flat
    optimizer: Any
    key: Array
    memory: Memory | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step is compiled from. dtype: of the forward pass. parts: of a batch, one after the other.
    spread: over several devices; None: one."""

    config: DecoderConfig
    optimizer: optax.GradientTransformation
    lora: Lora
    dtype: str
    remat: str
    loss_tokens: int
    z_loss: float
    parts: int
    spread: Spread | None = None


def batch_loss(flat: Flat, batch: Batch, memory: Memory | None, plan: Plan) -> tuple[Sums, Memory | None]:
    """Sums over a batch (fields as `train.data.Windows`, with B in front) under the parameters `flat`; the memory after it."""

    def prepare(params):
        """In float32 till here: adapters are added, then all is cast; norms compute in float32 whatever they get."""
        own = {path: x.astype(jnp.dtype(plan.dtype)) for path, x in adapted(flatten(params), plan.lora).items()}
        return unflatten(own)

    params = unflatten(flat)
    hidden, memory = segment_forward(
        params, batch["tokens"], memory, config=plan.config, positions=batch["positions"], segments=batch["segments"],
        remat=plan.remat, prepare=prepare, spread=plan.spread,
    )  # fmt: skip
    head = {"head": prepare(params["head"])}
    sums = token_losses(
        head,
        hidden,
        batch["targets"],
        batch["weights"],
        config=plan.config,
        z_loss=plan.z_loss,
        tokens=plan.loss_tokens,
    )
    return sums, memory


def _gradients(trained: Flat, frozen: Flat, batch: Batch, memory, total: Array, plan: Plan):
    """Of a part's share of the mean loss over `total` weights. Returns: gradients, Sums, the memory after it."""

    def share(trained):
        sums, after = batch_loss(trained | frozen, batch, memory, plan)
        return sums.loss / total, (sums, after)

    gradients, (sums, after) = jax.grad(share, has_aux=True)(trained)
    return gradients, sums, after


def train_step(state: TrainState, batch: Batch, *, plan: Plan, schedule: optax.Schedule):
    """One step. Returns: the state; metrics, scalars float32: loss (cross-entropy, nats per token), accuracy, tokens
    (with a weight), gradient_norm, update_norm, learning_rate."""
    total = jnp.maximum(batch["weights"].sum(), 1.0)
    if plan.parts == 1:
        gradients, sums, memory = _gradients(state.trained, state.frozen, batch, state.memory, total, plan)
    else:

        def add(carry, part):
            *found, after = _gradients(state.trained, state.frozen, *part, total, plan)
            return jax.tree.map(jnp.add, carry, tuple(found)), after

        cut = lambda x: jnp.moveaxis(x.reshape(-1, plan.parts, *x.shape[1:]), 1, 0)
        zero = jnp.zeros((), jnp.float32)
        carry = jax.tree.map(jnp.zeros_like, state.trained), Sums(*(zero,) * len(Sums._fields))
        (gradients, sums), memory = jax.lax.scan(add, carry, jax.tree.map(cut, (batch, state.memory)))
        memory = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), memory)
    updates, optimizer = plan.optimizer.update(gradients, state.optimizer, state.trained)
    metrics = {
        "loss": sums.cross_entropy / total,
        "accuracy": sums.right / total,
        "tokens": sums.weight,
        "gradient_norm": optax.tree.norm(gradients),
        "update_norm": optax.tree.norm(updates),
        "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
    }
    if plan.z_loss:
        metrics["z_loss"] = (sums.loss - sums.cross_entropy) / total
    state = dataclasses.replace(
        state, step=state.step + 1, trained=optax.apply_updates(state.trained, updates), optimizer=optimizer,
        memory=memory,
    )  # fmt: skip
    return state, metrics


def evaluation_step(
    state: TrainState, batch: Batch, memory: Memory | None, *, plan: Plan
) -> tuple[Sums, Memory | None]:
    """Sums over a validation batch; the memory after it. memory: of the validation text's rows, not the state's own."""
    return batch_loss(state.trained | state.frozen, batch, memory, dataclasses.replace(plan, remat="none"))


@functools.partial(jax.jit, static_argnames=("lora",))
def merged(state: TrainState, *, lora: Lora):
    """The parameter tree of the decoder, adapters added, as `infer` runs it."""
    return unflatten(adapted(state.trained | state.frozen, lora))
