"""The programs of prefill and decode, compiled for devices that are not there, and the memory that each needs.

Everything is a shape: nothing is allocated. Each device runs the library's own functions on its shard (`jaxkv.sharding`).

    decode     one program: the jitted block of `infer.generate`, its state donated
    prefill    a sequence of programs, as the loop of `jaxkv.cache.extend` launches them: traced once, each different one
               compiled, then walked in order with what is alive between them
"""

import concurrent.futures
import dataclasses
import functools
import math
import re

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from infer import generate
from infer.prefill import last_hidden
from infer.sampling import Sampling, make_sampling
from infer.stops import build_stops
from jaxkv.cache import empty_state, extend
from jaxkv.config import DecoderConfig
from jaxkv.decoder import init_params
from jaxkv.sharding import DATA, TENSOR, param_specs, shard_config, state_specs
from jaxkv.types import LayerSpec

SHAPE = jax.ShapeDtypeStruct
WHOLE = PartitionSpec()
WORKERS = 2  # compilations at a time; each runs on about one core
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be compiled. spec: LayerSpec per layer of config. prompt: what prefill is given by name, [B, T] shapes.

    rows: block rows of a layer's tiers per kv head follow from spec; owners as `jaxkv.cache.state.even_owners`.
    """

    config: DecoderConfig
    spec: tuple[LayerSpec, ...]
    owners: tuple | None
    prompt: dict
    batch: int
    dtype: str

    def keep(self, layers: list[int]) -> "Job":
        """The same with these layers alone."""
        pick = lambda items: None if items is None else tuple(items[i] for i in layers)
        config = dataclasses.replace(self.config, layers=pick(self.config.layers))
        return dataclasses.replace(self, config=config, spec=pick(self.spec), owners=pick(self.owners))


@dataclasses.dataclass(frozen=True)
class Cost:
    """Bytes of one device. arguments, outputs: of the program. extra: what it needs beyond its arguments, at its peak. read:
    accessed, as the compiler counts. pallas: kernels in it. fits: whether the compiler placed it; if not, extra is what it
    said that it would have needed, and read is unknown (nan)."""

    arguments: int
    extra: int
    read: float
    pallas: int
    fits: bool = True


def params_of(job: Job):
    """Shapes of the parameters."""
    new = functools.partial(init_params, job.config, dtype=jnp.dtype(job.dtype))
    return jax.eval_shape(lambda: new(jax.random.key(0)))


def state_of(job: Job):
    """Shapes of the state."""
    limits = np.zeros((len(job.spec), len(job.spec[0].tiers), job.batch), np.int32)
    new = functools.partial(empty_state, job.config, job.spec, limits=limits, owners=job.owners)
    return jax.eval_shape(lambda: new(lengths=jnp.ones((job.batch,), jnp.int32)))


def device_bytes(tree, specs, mesh) -> int:
    """Bytes of a tree of shapes on one device. mesh: {axis: size}, or a Mesh."""
    sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else mesh

    def one(leaf, spec):
        cut = math.prod(sizes[axis] for axis in spec if axis is not None)
        return math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize // cut

    return sum(jax.tree.leaves(jax.tree.map(one, tree, specs)))


def decode_traced(job: Job, mesh: Mesh):
    """The decode block, traced for the mesh."""
    params, state, batch = params_of(job), state_of(job), job.batch
    rows = lambda *more, dtype: SHAPE((batch, *more), dtype)
    columns = {
        name: rows(generate.BLOCK, dtype=dtype) for name, dtype in (("tokens", jnp.int32), ("logprobs", jnp.float32))
    }
    loop = generate.Loop(
        state=state, token=rows(dtype=jnp.int32), running=rows(dtype=bool), made=rows(dtype=jnp.int32),
        stop=rows(dtype=jnp.int32), seen=None, place=SHAPE((), jnp.int32), **columns,
    )  # fmt: skip
    by_row = jax.tree.map(lambda leaf: PartitionSpec(DATA), loop)
    loop_specs = dataclasses.replace(by_row, state=state_specs(state), place=WHOLE)
    arrays = jax.eval_shape(lambda: make_sampling([Sampling()] * batch))
    stops = build_stops([], [], {0}, job.config.vocab_size)
    limit, steps = rows(dtype=jnp.int32), SHAPE((), jnp.int32)
    given = (params, loop, arrays, stops, limit, steps)
    data = lambda tree: jax.tree.map(lambda leaf: PartitionSpec(DATA), tree)
    whole = lambda tree: jax.tree.map(lambda leaf: WHOLE, tree)
    specs = (param_specs(params), loop_specs, data(arrays), whole(stops), PartitionSpec(DATA), WHOLE)
    config = shard_config(job.config, mesh.shape[TENSOR])
    block = functools.partial(generate._block, config=config, greedy=True)
    run = jax.shard_map(block, mesh=mesh, in_specs=specs, out_specs=loop_specs, check_vma=False)
    with use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(run, donate_argnums=1).trace(*_placed(given, specs, mesh))


def prefill_jaxpr(job: Job, mesh: Mesh):
    """What one device runs to read a prompt into an empty state, with the programs as its `jit` equations; the invars of
    parameters and state come first, in that order."""
    params, state = params_of(job), state_of(job)
    config = shard_config(job.config, mesh.shape[TENSOR])
    own_rows = job.batch // mesh.shape[DATA]

    def read(params, state, prompt):
        # Known to be zero, so that prompts take the path of an empty state, as they do outside of a trace.
        state = dataclasses.replace(state, next_position=np.zeros(own_rows, np.int32))
        hidden, state = extend(params, prompt["tokens"], state, config=config, **_without(prompt, "tokens"))
        return last_hidden(hidden, prompt["valid"]), state

    given = (params, state, job.prompt)
    states = state_specs(state)
    rows = jax.tree.map(lambda leaf: PartitionSpec(DATA), job.prompt)
    specs, out = (param_specs(params), states, rows), (PartitionSpec(DATA), states)
    run = jax.shard_map(read, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
    with use_abstract_mesh(mesh.abstract_mesh):
        (whole,) = jax.make_jaxpr(run)(*_placed(given, specs, mesh)).eqns
    return whole.params["jaxpr"]


def launched(jaxpr) -> list:
    """The programs of `prefill_jaxpr`, each different one once, as (jaxpr, equation)."""
    programs = {}
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("jit", "pjit"):
            programs.setdefault(id(equation.params["jaxpr"]), equation)
    return list(programs.values())


def program_traced(equation, mesh: Mesh):
    """One program of a prefill, traced for the mesh; every device has arrays of the shapes that the equation says."""
    function = jax.extend.core.jaxpr_as_fun(equation.params["jaxpr"])
    run = jax.shard_map(function, mesh=mesh, in_specs=WHOLE, out_specs=WHOLE, check_vma=False)
    donated = tuple(i for i, given in enumerate(equation.params["donated_invars"]) if given)
    sharding = NamedSharding(mesh, WHOLE)
    given = [SHAPE(x.aval.shape, x.aval.dtype, sharding=sharding) for x in equation.invars]
    with use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(run, donate_argnums=donated).trace(*given)


def compile_all(traced: list, platform: str = "tpu") -> list[Cost]:
    """Compiles programs, a few at a time."""
    lowered = [one.lower(lowering_platforms=(platform,)) for one in traced]
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(_compile, lowered))


def _compile(lowered) -> Cost:
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        found = re.search(r"total memory required for .*?\(([0-9.]+)([KMGT]?)\)", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or found is None:
            raise
        total = int(float(found[1]) * UNITS[found[2]])
        return Cost(arguments=0, extra=total, read=math.nan, pallas=0, fits=False)
    memory = compiled.memory_analysis()
    read = (compiled.cost_analysis() or {}).get("bytes accessed", math.nan)
    arguments = memory.argument_size_in_bytes
    pallas = compiled.as_text().count('custom_call_target="tpu_custom_call"')
    return Cost(arguments=arguments, extra=memory.peak_memory_in_bytes - arguments, read=read, pallas=pallas)


def walk(jaxpr, costs: dict[int, Cost]) -> tuple[int, str]:
    """The most bytes that one device holds beyond parameters and state while it reads, and the program that holds them.

    A value dies with its last use; Python's loop holds what it has named until the next round's program has run, so others
    than donated ones live one program longer. costs: by id of the program's jaxpr.
    """
    size = lambda v: math.prod(v.aval.shape) * np.dtype(v.aval.dtype).itemsize
    is_program = lambda equation: equation.primitive.name in ("jit", "pjit")
    variables = lambda items: [v for v in items if not hasattr(v, "val")]  # literals have a value
    number = {id(e): i for i, e in enumerate(jaxpr.eqns)}
    last = {v: number[id(e)] for e in jaxpr.eqns for v in variables(e.invars)}
    ends = [i for i, e in enumerate(jaxpr.eqns) if is_program(e)]
    after = lambda i: next((end for end in ends if end > i), len(jaxpr.eqns))
    live = {v: size(v) for v in jaxpr.invars}
    held, kept = sum(live.values()), set(jaxpr.invars)
    most, where, dying = 0, "", {}
    for i, equation in enumerate(jaxpr.eqns):
        if is_program(equation):
            cost = costs[id(equation.params["jaxpr"])]
            beside = sum(live.values()) - held
            needs = cost.extra if cost.fits else cost.extra - sum(map(size, set(variables(equation.invars))))
            if beside + needs > most:
                most, where = beside + needs, equation.params["name"].strip("_")
            for v, given in zip(equation.invars, equation.params["donated_invars"], strict=True):
                if given:
                    live.pop(v, None)
        for v in equation.outvars:
            live[v] = size(v)
            if v not in last and v not in jaxpr.outvars:
                dying.setdefault(after(i), []).append(v)
        for v in variables(equation.invars):
            if last[v] == i and v not in kept and v not in jaxpr.outvars:
                dying.setdefault(after(i), []).append(v)
        for v in dying.pop(i, ()):
            live.pop(v, None)
    return most, where


def _placed(trees, specs, mesh):
    place = lambda leaf, spec: SHAPE(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))
    return jax.tree.map(place, trees, specs)


def _without(named: dict, name: str) -> dict:
    return {key: value for key, value in named.items() if key != name}
