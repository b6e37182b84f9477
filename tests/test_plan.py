"""`jaxkv plan`: what is refused, the sums by hand, and programs compiled for chips that are not here."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tolerances
from command_harness import assert_refused
from sharded_run import CONFIG
from test_goldens import PUBLISHED

from infer import chips, plan, programs
from infer.chips import CHIPS, TopologyError, parse_topology
from jaxkv.cache import empty_state
from jaxkv.cache.budgets import plan as plan_cache
from jaxkv.cache.budgets import tree_bytes
from jaxkv.checkpoints.huggingface_config import parse_config
from jaxkv.decoder import init_params

ROOT = pathlib.Path(__file__).parent.parent


def in_process(python, *arguments):
    """What a program of `tests` or the command prints, in a process that the TPU compiler may end."""
    place = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run([python, *arguments], env=place, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    return done


# Topologies


@pytest.mark.parametrize("name", chips.EXAMPLES.split())
def test_known_topologies(name):
    assert parse_topology(name) == name.split(":")[0]


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:", "v5e:0x1", "v5e:2x", "v5e:2,2", "v9:2x2", "v7x:2x2", "cpu", "", "V5E:1x1"]
)
def test_unknown_topologies(name):
    with pytest.raises(TopologyError, match="unknown topology .*; accepted: .*v5e:2x4.*tpu7x:2x2x1"):
        parse_topology(name)


@pytest.mark.parametrize("name", ["h100:1", "a100:8", "gb200:4", "cuda:1"])
def test_gpu_topologies(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        TopologyError, match=r"needs JAX's CUDA plugin, and that is not installed: pip install 'jaxkv\[cuda\]'"
    ):
        parse_topology(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: package == "jax_cuda13_plugin")
    with pytest.raises(TopologyError, match="a GPU's, and plans are made for TPUs only"):
        parse_topology(name)


def test_without_the_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(TopologyError, match="the package libtpu, and that is not installed: pip install libtpu"):
        chips.find_devices("v5e:1x1")


def test_a_device_may_be_half_a_chip():
    assert CHIPS["v5e"].hbm == 16 * 2**30 and CHIPS["v5e"].bytes_per_second == 819e9
    assert CHIPS["tpu7x"].hbm == 96 * 2**30 and CHIPS["tpu7x"].bytes_per_second == 3690e9


# What is refused


@pytest.fixture
def checked(monkeypatch):
    """`plan.check` of a small model on eight devices, and nothing is compiled."""
    monkeypatch.setattr(plan, "find_devices", lambda name: jax.devices() * 8)
    monkeypatch.setattr(programs, "compile_all", lambda *_: pytest.fail("compiled"))
    monkeypatch.setattr(
        plan, "Mesh", lambda grid, names: types.SimpleNamespace(shape=dict(zip(names, grid.shape, strict=True)))
    )

    def check(config=CONFIG, **changes):
        asked = dict(topology="v5e:2x4", context=96, batch=8, cache="h2o", budget="50%", dtype="bfloat16")
        return plan.check(config, **{**asked, **changes})

    return check


def test_the_mesh(checked):
    """As many devices as the model takes share its heads; rows lie along the rest."""
    assert checked().mesh.shape == {"data": 2, "tensor": 4}
    assert checked(tensor=1).mesh.shape == {"data": 8, "tensor": 1}
    assert checked(dataclasses.replace(CONFIG, intermediate_size=50)).mesh.shape == {"data": 4, "tensor": 2}
    assert checked(dataclasses.replace(CONFIG, mlp_bias=True)).mesh.shape == {"data": 8, "tensor": 1}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"context": 129}, "context of 129 tokens is beyond the model's window, 128"),
        ({"batch": 3}, "batch of 3 cannot be cut over 2 devices along 'data'.*choose a multiple of 2"),
        ({"tensor": 8}, "4 kv heads cannot be cut into 8 equal shards.*takes 1, 2, 4"),
        ({"tensor": 3}, "8 devices of v5e:2x4 cannot be shared by groups of 3"),
        ({"topology": "v5e"}, "unknown topology 'v5e'; accepted: "),
        ({"cache": "mikw"}, "unknown cache 'mikw'; known: full"),
        ({"budget": "200%"}, "budget '200%' is more than 100%"),
        ({"budget": "1B"}, "less than the .* protects"),
        ({"cache": "full", "budget": "20%"}, "the full cache of 96 tokens does not fit budget 20%"),
    ],
)
def test_refused(checked, changes, message):
    with pytest.raises(ValueError, match=message):
        checked(**changes)


def test_heads_that_share_block_rows_stay_together(checked, monkeypatch):
    planned = plan_cache(CONFIG, "h2o", "50%", lengths=[96], dtype="bfloat16")
    owners = (np.zeros((1, 4), np.int16),) * 2
    monkeypatch.setattr(plan, "plan_cache", lambda *_, **__: dataclasses.replace(planned, owners=owners))
    assert checked().mesh.shape == {"data": 8, "tensor": 1}
    with pytest.raises(ValueError, match="shares block rows out among the heads of this model"):
        checked(tensor=2)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--topology", "v5e", "--context", "64"], "unknown topology 'v5e'"),
        (["--topology", "cpu", "--context", "64"], "unknown topology 'cpu'"),
        (["--topology", "v5e:1x1", "--context", "64", "--cache", "mikw"], "unknown cache 'mikw'"),
        (["--topology", "v5e:1x1", "--context", "64", "--budget", "0%"], "must be more than 0"),
        (["--topology", "v5e:1x1", "--context", "0"], "must be at least 1"),
        (["--topology", "v5e:1x1", "--context", "4096"], "beyond the model's window, 2048"),
        (["--context", "64"], "--topology"),
    ],
)
def test_the_command_refuses(command, options, message):
    assert_refused(command("plan", *options), message)


# Sums by hand


def test_extrapolation():
    """One layer of each of two kinds takes 100; a second of the first kind 7 more, of the second 2; five and three of them."""
    assert plan.extrapolate(100, [107, 102], [5, 3]) == 100 + 4 * 7 + 2 * 2
    assert plan.extrapolate(100, [99], [5]) == 100
    assert plan.extrapolate(100, [], []) == 100


def test_kinds():
    """Layers of one attention and one size are of one kind; where all sizes differ, the largest stands first."""
    job = lambda cache: programs.Job(
        config=deep, spec=plan_cache(deep, cache, "50%", lengths=[120], dtype="bfloat16").spec, owners=None, prompt={},
        batch=1, dtype="bfloat16",
    )  # fmt: skip
    deep = dataclasses.replace(CONFIG, layers=(CONFIG.layers[1], CONFIG.layers[0], CONFIG.layers[1]))
    assert plan.kinds_of(job("h2o")) == ([[0, 2], [1]], True)
    deep = dataclasses.replace(CONFIG, layers=(CONFIG.layers[0],) * 12)
    (kind,), alike = plan.kinds_of(job("pyramid"))
    assert not alike and sorted(kind) == list(range(12)) and kind[0] == 0


def test_the_largest():
    asked = []
    fits = lambda n: asked.append(n) or n <= 37
    assert plan._largest(fits, 1000) == 37 and len(asked) <= 10
    assert plan._largest(lambda n: False, 1000) == 0 and plan._largest(lambda n: True, 1000) == 1000


def test_growth(checked):
    """Twice the rows take twice the state and twice the prompt; the rest of the chip says how many fit."""
    case = checked()
    grow = plan.Growth(case=case, weights=1000, state=80, prefill=160, decode=40, chip=types.SimpleNamespace(hbm=1480))
    assert grow.total(96, 8) == 1000 + 80 + 160 and grow.total(96, 16) == 1000 + 160 + 320
    assert grow.largest_batch() == 16  # 18 rows would take 1000 + 180 + 360
    assert grow.total(48, 8) < grow.total(96, 8) and grow.largest_context() == 128
    assert dataclasses.replace(grow, chip=types.SimpleNamespace(hbm=1000)).largest_context() == 0
    full = dataclasses.replace(grow, case=checked(cache="full", budget=None))
    assert full.total(96, 8) == 1240
    few = dataclasses.replace(grow, case=checked(cache="full", budget="96"))
    assert few.total(97, 8) == float("inf") and few.largest_context() <= 96


def test_what_lives_beside_a_program():
    """x of 400 bytes is donated to f, which makes y of 400 and z of 800; g reads z, and z lives until h has run."""
    f = jax.jit(lambda w, x: (x + w, jnp.concatenate([x, x])), donate_argnums=1)
    g = jax.jit(lambda z: z.sum())
    h = jax.jit(lambda y, s: y * s)

    def run(w, x):
        y, z = f(w, x)
        return h(y, g(z))

    floats = lambda n: jax.ShapeDtypeStruct((n,), jnp.float32)
    jaxpr = jax.make_jaxpr(run)(floats(100), floats(100)).jaxpr
    one, two, three = programs.launched(jaxpr)
    cost = lambda extra, fits=True: programs.Cost(arguments=0, extra=extra, read=0.0, pallas=0, fits=fits)
    costs = lambda *extras: {id(e.params["jaxpr"]): cost(n) for e, n in zip((one, two, three), extras, strict=True)}
    beside = lambda *extras: programs.walk(jaxpr, costs(*extras))[0]
    assert beside(5000, 0, 0) == 5000
    assert beside(0, 5000, 0) == 5000 + (400 + 800) - 400  # y and z have come, x has gone
    assert beside(0, 0, 5000) == 5000 + (400 + 800 + 4) - 400
    refused = costs(0, 0, 0) | {id(one.params["jaxpr"]): cost(5000, fits=False)}
    assert programs.walk(jaxpr, refused)[0] == 5000 - 800  # what it said includes its arguments


def test_bytes_of_a_device():
    """A quarter of what is cut twice, half of what is cut once, all of the rest; together the whole on one device."""
    planned = plan_cache(CONFIG, "mikv", "50%", lengths=[96] * 4, dtype="bfloat16")
    job = programs.Job(config=CONFIG, spec=planned.spec, owners=None, prompt={}, batch=4, dtype="bfloat16")
    params, state = programs.params_of(job), programs.state_of(job)
    alone = {"data": 1, "tensor": 1}
    sizes = lambda tree, specs: [programs.device_bytes(tree, specs, mesh) for mesh in (alone, {"data": 2, "tensor": 2})]
    whole, cut = sizes(params, programs.param_specs(params))
    assert whole == tree_bytes(jax.eval_shape(lambda: init_params(CONFIG, jax.random.key(0), dtype=jnp.bfloat16)))
    norms = 2 * (2 * len(CONFIG.layers) + 1) * CONFIG.hidden_size
    assert cut == (whole - norms) // 2 + norms
    whole, cut = sizes(state, programs.state_specs(state))
    new = lambda: empty_state(CONFIG, planned.spec, lengths=jnp.full((4,), 96), **planned.sizes())
    assert whole == tree_bytes(jax.eval_shape(new)) == 4 * planned.bytes_per_row
    assert whole / 4 < cut < whole / 4 * 1.05  # what a row keeps once lies on every device of `tensor`


# Compiled


@pytest.fixture(scope="module")
def one_chip(compilers_python):
    return json.loads(in_process(compilers_python, "tests/plan_run.py", "v5e:1x1", "recency", "recency exact").stdout)


def assert_arguments(found):
    """A compiled program takes what was counted from shapes."""
    assert found["compiled"] == pytest.approx(sum(found["parts"]), rel=tolerances.BYTES)
    assert min(found["parts"]) > 0.02 * found["compiled"]  # each part would be missed


def assert_consistent(found):
    report = found["report"]
    assert report["total"] == report["weights"] + report["state"] + max(report["prefill"], report["decode"])
    assert report["fits"] and not report["refused"] and report["prefill"] > 0 and report["decode"] > 0
    assert 0 < report["read"] < report["weights"] + report["state"]
    assert report["speeds"]["v5e"]["tokens_per_second"] == report["batch"] * 819e9 / report["read"]


@pytest.mark.exhaustive
def test_compiled_for_one_chip(one_chip):
    assert_arguments(one_chip["arguments"])
    for found in one_chip["cases"].values():
        assert_consistent(found)
        assert "XLA only" in found["table"] and "datasheet" in found["table"]
    part, whole = (one_chip["cases"][name]["report"] for name in ("recency", "recency exact"))
    assert (part["weights"], part["state"], part["prefill"]) == (whole["weights"], whole["state"], whole["prefill"])
    assert part["counted"] == pytest.approx(whole["counted"], rel=0.1)  # the third layer, extrapolated
    assert part["decode"] == pytest.approx(whole["decode"], rel=0.5)
    assert "extrapolated linearly to all (3 layers)" in part["layers"] and whole["layers"] == "all layers compiled"


@pytest.mark.exhaustive
def test_compiled_for_four_chips(compilers_python):
    """Two kinds of layers, two tiers, a second reading."""
    run = in_process(compilers_python, "tests/plan_run.py", "v5e:2x2", "full", "gemma tiers", "replay")
    found = json.loads(run.stdout)
    assert_arguments(found["arguments"])
    for one in found["cases"].values():
        assert_consistent(one)
        assert one["report"]["mesh"] == {"data": 1, "tensor": 4}


@pytest.mark.slow
def test_compiled_for_a_chip_without_two_bits(compilers_python):
    """The compiler for v4 ends its process at a kernel that reads codes of 2 bits: there, XLA reads them."""
    found = json.loads(in_process(compilers_python, "tests/plan_run.py", "v4:2x2x1", "two bits", "groups").stdout)
    assert [one["report"]["decode"] > 0 and one["report"]["fits"] for one in found["cases"].values()] == [True] * 2


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name, topology, options",
    [
        ("Llama-3-8B", "v5e:2x4", ["--context", "8192", "--batch", "8", "--cache", "mikv", "--budget", "20%"]),
        (
            "Llama-3.1-70B",
            "v5p:2x2x2",
            ["--context", "131072", "--batch", "1", "--cache", "recency", "--budget", "20%"],
        ),
        ("Qwen3-8B", "v6e:1x1", ["--context", "8192", "--batch", "1"]),
        ("Gemma-3-27B", "tpu7x:2x2x1", ["--context", "16384", "--batch", "2"]),
    ],
)
def test_published(compilers_python, name, topology, options, tmp_path):
    fields, parameters, _ = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    asked = ["--model", str(tmp_path), "--topology", topology, *options, "--json"]
    report = json.loads(in_process(compilers_python, "-m", "infer", "plan", *asked).stdout)
    config = parse_config(fields)
    small = 0.01 * 2 * parameters  # norms, on every device
    assert 0 <= report["weights"] * report["mesh"]["tensor"] - 2 * parameters < small
    assert f"{len(config.layers)} layers" in report["layers"] or " + " in report["layers"]
    assert report["fits"] and report["largest_context"] >= report["context"]
    assert report["largest_batch"] >= report["batch"]
    print(f"{name} for {topology}: {report['compile_seconds']:.0f} s")
