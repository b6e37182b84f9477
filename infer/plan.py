"""What a model and its cache will take on devices that are not here: memory, whether it fits, and the speed that bandwidth
allows.

The programs of prefill and decode are compiled for the topology by its own compiler (`infer.programs`); weights and state
are counted from shapes. Of a decode program that has all layers only a short one is compiled, with one layer of each kind,
and then with two of each, one kind after the other:

    all(x) = one(x) + sum over kinds k of (layers of k - 1) * (two_k(x) - one(x))

Prefill runs one program per layer, the same for all layers of a kind, so that nothing needs to be extrapolated there.
"""

import dataclasses
import itertools
import time

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer import programs
from infer.chips import CHIPS, COMPARED, Chip, find_devices, parse_topology
from infer.replay import with_replay
from jaxkv.cache.budgets import Plan, format_bytes, slot_grid
from jaxkv.cache.budgets import plan as plan_cache
from jaxkv.config import DecoderConfig
from jaxkv.sharding import DATA, TENSOR, ShardingError, param_specs, shard_config, state_specs
from pallas_kernels.decode_attention import slot_multiple

MANY = (
    4  # kinds of layers that are compiled one by one; of more, the largest per kind of attention stand for the others
)
MOST_ROWS = 2**20  # of a batch, looked for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Bytes are of one device, and `read` is one decode step's.

    mesh: devices along data and tensor. prefill, decode: what the programs need beyond weights and state at their peak;
    prefill_program: the one that needs it. total: weights, state and the larger of the two. counted: bytes that the compiler
    counts in its decode program, loops inside of it once, or None. speeds: per generation of chip, with as many devices:
    (fits, tokens/s of the batch from read, from counted). largest_context, largest_batch: 0 = none fits.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    chip_hbm: int
    context: int
    batch: int
    dtype: str
    cache: str
    kernels: str
    layers: str
    weights: int
    state: int
    prefill: int
    prefill_program: str
    decode: int
    total: int
    fits: bool
    refused: tuple[str, ...]
    read: int
    read_per_token: float
    counted: float | None
    speeds: dict[str, dict]
    largest_context: int
    largest_batch: int
    compile_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is planned, checked, before anything is compiled."""

    config: DecoderConfig
    planned: Plan
    topology: str
    mesh: Mesh
    context: int
    batch: int
    cache: str
    budget: str | None
    dtype: str

    @property
    def job(self) -> programs.Job:
        return programs.Job(
            config=self.config, spec=self.planned.spec, owners=self.planned.owners, prompt=prompt_shapes(self),
            batch=self.batch, dtype=self.dtype,
        )  # fmt: skip


def check(
    config: DecoderConfig, *, topology: str, context: int, batch: int, cache: str, budget: str | None, dtype: str,
    tensor: int | None = None,
) -> Case:  # fmt: skip
    """Refuses what cannot be planned; nothing is compiled.

    Args: context: tokens of a row, prompt and answer. tensor: devices that share heads; None = as many as the model takes.
    Raises: TopologyError, ShardingError, ValueError: what was given, and what is accepted.
    """
    parse_topology(topology)
    if context > config.max_positions:
        raise ValueError(
            f"a context of {context} tokens is beyond the model's window, {config.max_positions}; choose a shorter one"
        )
    planned = plan_cache(config, cache, budget, lengths=[context] * batch, dtype=dtype, multiple=slot_multiple("tpu"))
    devices = find_devices(topology)
    tensor = _most_shards(config, planned, len(devices)) if tensor is None else tensor
    if len(devices) % tensor:
        raise ShardingError(f"{len(devices)} devices of {topology} cannot be shared by groups of {tensor}")
    shard_config(config, tensor)
    if tensor > 1 and planned.owners is not None:
        raise ShardingError(
            f"the {planned.preset.name} cache shares block rows out among the heads of this model, which then lie on one"
            f" device; use 1 over {TENSOR!r}"
        )
    data = len(devices) // tensor
    if batch % data:
        raise ShardingError(
            f"a batch of {batch} cannot be cut over {data} devices along {DATA!r} ({len(devices)} devices, {tensor} along"
            f" {TENSOR!r}); choose a multiple of {data}"
        )
    mesh = Mesh(np.array(devices).reshape(data, tensor), (DATA, TENSOR))
    return Case(
        config=config, planned=planned, topology=topology, mesh=mesh, context=context, batch=batch, cache=cache,
        budget=budget, dtype=dtype,
    )  # fmt: skip


def _most_shards(config, planned, devices: int) -> int:
    def taken(count):
        try:
            shard_config(config, count)
        except ShardingError:
            return False
        return True

    if planned.owners is not None:
        return 1
    return next(n for n in range(min(devices, config.num_kv_heads), 0, -1) if devices % n == 0 and taken(n))


def prompt_shapes(case: Case) -> dict:
    """What `infer.prefill.read` gives to `extend` for a prompt that fills the context; policies that read again do."""
    shape = lambda dtype, length: programs.SHAPE((case.batch, length), dtype)
    if not any(layer.policy.needs_replay for layer in case.planned.spec):
        length = slot_grid(case.context)
        return {"tokens": shape(jnp.int32, length), "valid": shape(jnp.bool_, length)}
    window, table = case.config.max_positions, case.config.most_positions
    laid = with_replay([[0] * case.context], start=0, window=window, table=table, repeat=[], grid=slot_grid)
    return {name: shape(x.dtype, x.shape[1]) for name, x in laid.items()}


def kinds_of(job: programs.Job) -> tuple[list[list[int]], bool]:
    """Layers by kind: those of one run the same programs. If there are too many (a cache that gives each layer its own
    size), layers count as one kind with the largest of the same attention, first in the list; then False."""
    kinds: dict = {}
    for index, (layer, spec) in enumerate(zip(job.config.layers, job.spec, strict=True)):
        kinds.setdefault((layer, spec), []).append(index)
    if len(kinds) <= MANY:
        return list(kinds.values()), True
    slots = lambda index: sum(tier.slots for tier in job.spec[index].tiers) * (job.spec[index].rows or 1)
    alike: dict = {}
    for index, layer in enumerate(job.config.layers):
        alike.setdefault(layer, []).append(index)
    return [sorted(layers, key=slots, reverse=True) for layers in alike.values()], False


def extrapolate(one: float, two: list[float], counts: list[int]) -> float:
    """From one layer of each kind, and two of the k-th, to counts[k] of each; a value never falls with more layers."""
    return one + sum((count - 1) * max(0, more - one) for more, count in zip(two, counts, strict=True))


def make_plan(case: Case, *, exact: bool = False) -> Report:
    """Compiles, and adds up. exact: compile all layers."""
    started = time.perf_counter()
    job, mesh = case.job, case.mesh
    kinds, alike = kinds_of(job)
    if exact:
        shorts, reading = [list(range(job.config.num_layers))], job
    else:
        one = [kind[0] for kind in kinds]
        shorts = [one] + [one + [kind[1]] for kind in kinds if len(kind) > 1]
        reading = job.keep(sorted(itertools.chain(*(kind[:2] for kind in kinds))))
    shorts = [job.keep(sorted(layers)) for layers in shorts]
    walked = programs.prefill_jaxpr(reading, mesh)
    launched = programs.launched(walked)
    traced = [programs.decode_traced(short, mesh) for short in shorts]
    costs = programs.compile_all(traced + [programs.program_traced(equation, mesh) for equation in launched])
    decoding, reads = costs[: len(shorts)], costs[len(shorts) :]
    by_program = {id(e.params["jaxpr"]): cost for e, cost in zip(launched, reads, strict=True)}
    prefill, where = programs.walk(walked, by_program)
    counts = [len(kind) for kind in kinds if len(kind) > 1]
    beyond = [c.arguments + c.extra - _resident(short, mesh) for c, short in zip(decoding, shorts, strict=True)]
    counted = extrapolate(decoding[0].read, [c.read for c in decoding[1:]], [] if exact else counts)
    decode = int(extrapolate(beyond[0], beyond[1:], [] if exact else counts))
    refused = [
        name
        for name, cost in zip(["decode"] * len(shorts) + [e.params["name"] for e in launched], costs, strict=True)
        if not cost.fits
    ]
    kernels = sum(c.pallas for c in costs)
    said = "all layers compiled" if exact else _said(kinds, alike)
    return _report(
        case, prefill=int(prefill), decode=decode, counted=None if np.isnan(counted) else counted, where=where,
        refused=tuple(dict.fromkeys(name.strip("_") for name in refused)), layers=said,
        kernels=f"Pallas ({kernels} calls in {len(costs)} programs) and XLA" if kernels else "XLA only",
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _said(kinds, alike):
    sizes = " + ".join(str(len(kind)) for kind in kinds)
    unlike = "" if alike else "; layers differ in size, and the largest stand for all"
    return f"one and two of each kind compiled, extrapolated linearly to all ({sizes} layers){unlike}"


def _resident(job, mesh) -> int:
    params, state = programs.params_of(job), programs.state_of(job)
    return programs.device_bytes(params, param_specs(params), mesh) + programs.device_bytes(
        state, state_specs(state), mesh
    )


def _report(case: Case, *, prefill, decode, counted, where, refused, layers, kernels, seconds) -> Report:
    job, mesh, chip = case.job, case.mesh, CHIPS[parse_topology(case.topology)]
    params, state = programs.params_of(job), programs.state_of(job)
    weights = programs.device_bytes(params, param_specs(params), mesh)
    held = programs.device_bytes(state, state_specs(state), mesh)
    table = {"embedder": params["embedder"]} if "embedder" in params else {}
    read = weights - programs.device_bytes(table, param_specs(table), mesh) + held
    total = weights + held + max(prefill, decode)
    fits = lambda chip: total <= chip.hbm
    speed = lambda chip, count: None if count is None else case.batch * chip.bytes_per_second / count
    grow = Growth(case=case, weights=weights, state=held, prefill=prefill, decode=decode, chip=chip)
    return Report(
        topology=case.topology, devices=mesh.size, mesh=dict(mesh.shape), chip_hbm=chip.hbm, context=case.context,
        batch=case.batch, dtype=case.dtype, cache=case.planned.describe(), kernels=kernels, layers=layers,
        weights=weights, state=held, prefill=prefill, prefill_program=where, decode=decode, total=total,
        fits=fits(chip) and not refused, refused=refused, read=read, read_per_token=read * mesh.size / case.batch,
        counted=counted,
        speeds={
            name: {
                "hbm": CHIPS[name].hbm, "bytes_per_second": CHIPS[name].bytes_per_second, "fits": fits(CHIPS[name]),
                "tokens_per_second": speed(CHIPS[name], read),
                "tokens_per_second_counted": speed(CHIPS[name], counted),
            }
            for name in COMPARED
        },
        largest_context=grow.largest_context(), largest_batch=grow.largest_batch(), compile_seconds=seconds,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """How memory grows with context and batch: the state as `jaxkv.cache.budgets` plans it; what prefill needs in proportion to
    the tokens read, what decode needs in proportion to the state. Bytes of one device, as compiled for `case`."""

    case: Case
    weights: int
    state: int
    prefill: int
    decode: int
    chip: Chip

    def total(self, context: int, batch: int) -> float:
        """Bytes of one device; infinite where the budget does not allow such a cache."""
        case = self.case
        try:
            planned = plan_cache(
                case.config, case.cache, case.budget, lengths=[context], dtype=case.dtype, multiple=slot_multiple("tpu")
            )
        except ValueError:  # a full cache of more tokens than the budget holds
            return float("inf")
        rows = batch / case.batch
        state = self.state * rows * planned.bytes_per_row / case.planned.bytes_per_row
        prefill = self.prefill * rows * slot_grid(context) / slot_grid(case.context)
        return self.weights + state + max(prefill, self.decode * state / self.state)

    def largest_context(self) -> int:
        """For the batch."""
        fits = lambda context: self.total(context, self.case.batch) <= self.chip.hbm
        return _largest(fits, self.case.config.max_positions)

    def largest_batch(self) -> int:
        """For the context."""
        step = self.case.mesh.shape[DATA]
        fits = lambda rows: self.total(self.case.context, rows * step) <= self.chip.hbm
        return step * _largest(fits, MOST_ROWS // step)


def _largest(fits, most: int) -> int:
    """The largest number in 0..most that fits, 0 always doing so; what fits is a range from 1."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def describe(report: Report) -> str:
    """The report as a table for people."""
    gib = format_bytes
    over = f"; the compiler itself refused {', '.join(report.refused)}" if report.refused else ""
    counted = "not known" if report.counted is None else f"{gib(report.counted)} (loops in it counted once)"
    lines = [
        f"{report.topology}: {report.devices} devices, {report.mesh[DATA]} along data x {report.mesh[TENSOR]} along tensor",
        f"{report.cache}; {report.batch} rows of {report.context} tokens, {report.dtype}",
        f"compiled for the topology without the hardware, in {report.compile_seconds:.0f} s; kernels: {report.kernels}",
        f"decode: {report.layers}; prefill: every program of the layer loop compiled, a prompt as long as the context",
        "",
        f"{'memory of one device':36}{'bytes':>18}",
        *(
            f"  {name:34}{size:18,}  ({gib(size)})"
            for name, size in (
                ("weights", report.weights),
                ("state", report.state),
                (f"prefill, beyond them ({report.prefill_program})", report.prefill),
                ("decode, beyond them", report.decode),
                ("total, the larger of the two", report.total),
                ("datasheet HBM", report.chip_hbm),
            )
        ),
        f"  {'fits' if report.fits else 'does NOT fit'}{over}",
        "",
        f"read by one decode step: {gib(report.read)} of weights and state on each device,"
        f" {gib(report.read_per_token)} per token over all; counted in the compiled program: {counted}",
        "",
        f"{'as many devices of':20}{'HBM':>10}{'GB/s':>8}{'fits':>6}{'tokens/s at most':>18}{'by the count':>14}",
        *(_speed_line(name, row) for name, row in report.speeds.items()),
        "  (HBM and GB/s of a device from datasheets; tokens/s of the whole batch, bound by bandwidth alone, not measured)",
        "",
        f"by growth in proportion: largest context for a batch of {report.batch}: {report.largest_context}; largest batch at"
        f" {report.context} tokens: {report.largest_batch}",
    ]
    return "\n".join(lines)


def _speed_line(name: str, row: dict) -> str:
    speed = lambda value: "-" if value is None else f"{value:,.0f}"
    return (
        f"  {name:18}{format_bytes(row['hbm']):>10}{row['bytes_per_second'] / 1e9:8.0f}{'yes' if row['fits'] else 'no':>6}"
        f"{speed(row['tokens_per_second']):>18}{speed(row['tokens_per_second_counted']):>14}"
    )
