"""Compiles training steps for a TPU topology over a mesh of its chips, without a TPU. Run as a program.

python tests/train_compile.py TOPOLOGY  ->  a line of JSON per step: name, kernels in it, bytes beyond the state, error
"""

import json
import os
import sys

from tpu_compile import ENVIRONMENT

SHAPE = dict(hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=128,
             max_positions=1024)  # fmt: skip
CASES = {  # mesh, memory, model
    "rows and heads": ((2, 1, 2), 0, {}),
    "parameters": ((1, 4, 1), 0, {"window": 200}),
    "relative, with a memory": ((2, 1, 2), 256, {"attention": "rcmha", "rope": "none"}),
}


def compiled(devices, sizes, memory: int, model: dict):
    """The program of a step of 8 rows of 512 tokens."""
    import jax
    import jax.numpy as jnp

    from jaxkv.causal import empty_memory
    from jaxkv.decoder import init_params
    from train.config import Compute, Lora, Model, Optimizer, decoder_config
    from train.optimizer import flatten, make_optimizer
    from train.sharding import batch_sharding, make_mesh, make_spread, state_shardings
    from train.step import Plan, TrainState, train_step

    mesh = make_mesh(Compute(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))), devices)
    config = decoder_config(Model(**SHAPE, **model), 512)
    trained = jax.eval_shape(lambda: flatten(init_params(config, jax.random.key(0))))
    optimizer = make_optimizer(Optimizer(learning_rate=1e-3), lambda _: 1e-3, trained)
    plan = Plan(
        config=config, optimizer=optimizer, lora=Lora(), dtype="bfloat16", remat="block", loss_tokens=4096, z_loss=0.0,
        parts=1, spread=make_spread(mesh),
    )  # fmt: skip
    remembered = lambda: empty_memory(config, rows=8, tokens=memory, dtype="bfloat16") if memory else None
    state = TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32), trained=trained, frozen={}, optimizer=jax.eval_shape(optimizer.init, trained),
        key=jax.ShapeDtypeStruct((2,), jnp.uint32), memory=jax.eval_shape(remembered),
    )  # fmt: skip
    placed = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    state = jax.tree.map(placed, state, state_shardings(state, mesh))
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"weights": jnp.float32}
    batch = {
        name: jax.ShapeDtypeStruct((8, 512), dtype, sharding=batch_sharding(mesh)) for name, dtype in batch.items()
    }
    step = lambda state, batch: train_step(state, batch, plan=plan, schedule=lambda _: 1e-3)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def main() -> None:
    """One line for each case."""
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
    for name, case in CASES.items():
        error, kernels, beyond = None, 0, 0
        try:
            program = compiled(devices, *case)
            kernels = program.as_text().count('custom_call_target="tpu_custom_call"')
            beyond = program.memory_analysis().temp_size_in_bytes
        except (RuntimeError, ValueError) as caught:  # NotImplementedError and the compiler's are of the first kind
            error = f"{type(caught).__name__}: {str(caught)[:2000]}"
        print(json.dumps([name, kernels, beyond, error]), flush=True)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    main()
