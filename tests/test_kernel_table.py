"""`jaxkv info --kernels`: what would run where, as the kernels say themselves."""

import dataclasses
import importlib
import json
import pathlib
import pkgutil

import jax
import pytest
from cache_harness import PLAIN
from rcmha_harness import with_rcmha

import pallas_kernels
from infer.kernel_table import (
    CASES,
    DIFFERENTIATED,
    PLATFORMS,
    WITHOUT_SCHEME,
    kernel_rows,
    kernels_here,
    kernels_of,
    table,
)
from jaxkv.cache.budgets import plan as plan_cache
from jaxkv.quantization import SCHEMES
from pallas_kernels import causal_conv, decode_attention
from pallas_kernels.dispatch import Implementation, call

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows():
    return kernel_rows(PLAIN, "float32")


def test_every_operation_is_asked(rows):
    """Whoever adds an operation adds a case to the table, and its backward pass is seen with it."""
    modules = [
        importlib.import_module(f"pallas_kernels.{m.name}") for m in pkgutil.iter_modules(pallas_kernels.__path__)
    ]
    operations = {m.__name__.rpartition(".")[2] for m in modules if hasattr(m, "IMPLEMENTATIONS")}
    assert operations == set(CASES)
    assert {row["operation"] for row in rows} == operations | {f"{operation} backward" for operation in DIFFERENTIATED}
    for operation in CASES:
        seen = [(row["scheme"], row["platform"]) for row in rows if row["operation"] == operation]
        names = (None,) if operation in WITHOUT_SCHEME else SCHEMES
        assert seen == [(name, platform) for name in names for platform in PLATFORMS]


def test_reasons_are_those_of_the_implementations(monkeypatch):
    no_int4 = lambda sources, **_: "no int4" if getattr(sources[0].keys, "bits", 0) == 4 else None
    kernels = {
        "mosaic": Implementation(None, no_int4, platform="tpu"),
        "second": Implementation(None, no_int4, platform="tpu"),
        "slow": Implementation(None, lambda *_, **__: "slow", platform="tpu", by_name_only=True),
        "hopper": Implementation(None, lambda *_, **__: "no GPU", platform="cuda"),
        "xla": decode_attention.IMPLEMENTATIONS["xla"],
    }
    monkeypatch.setattr(decode_attention, "IMPLEMENTATIONS", kernels)
    rows = [row for row in kernel_rows(PLAIN, "float32") if row["operation"] == "decode_attention"]
    found = {(row["scheme"], row["platform"]): (row["implementation"], row["why_not"]) for row in rows}
    for name in SCHEMES:
        four = name in ("int4", "rotated4", "kivi4")
        assert found[name, "cpu"] == ("xla", {})
        assert found[name, "gpu"] == ("xla", {"hopper": "no GPU"})
        assert found[name, "tpu"] == (("xla", {"mosaic": "no int4", "second": "no int4"}) if four else ("mosaic", {}))
    lines = table(rows).splitlines()
    assert lines[0].split() == ["operation", "scheme", "cpu", "tpu", "gpu"]
    assert lines[1].split() == ["decode_attention", "f32", "xla", "mosaic", "xla"]
    assert "  tpu decode_attention (int4, rotated4, kivi4): mosaic: no int4" in lines
    assert f"  gpu decode_attention ({', '.join(SCHEMES)}): hopper: no GPU" in lines


def test_own_kernels_are_named(rows):
    """The two operations whose kernels take every case here."""
    for row in rows:
        if row["operation"] in ("quantize", "causal_conv", "causal_conv backward"):
            cast = row["operation"] == "quantize" and SCHEMES[row["scheme"]].how is None
            wanted = "cast" if cast else "tpu" if row["platform"] == "tpu" else "xla"
            assert row["implementation"] == wanted, row
            assert row["why_not"] == ({"": "no kernel of its own"} if row["platform"] == "gpu" and not cast else {})


def test_a_head_that_a_scheme_does_not_store():
    import dataclasses

    odd = dataclasses.replace(PLAIN, head_dim=PLAIN.head_dim + 2)
    rows = [row for row in kernel_rows(odd, "float32") if row["scheme"] == "int3" and row["operation"] == "quantize"]
    assert [row["implementation"] for row in rows] == [""] * 3
    assert "multiples of 8" in rows[0]["why_not"][""] and "none" in table(rows)


def test_a_function_stands_in_for_implementations():
    asked = []
    ask = lambda op, implementations, *args, **options: asked.append((op, list(implementations), options)) or args[0]
    assert call("op", causal_conv.IMPLEMENTATIONS, ask, 7, scale=2) == 7
    assert asked == [("op", ["tpu", "interpret", "xla"], {"scale": 2})]


def test_what_reads_the_full_cache():
    assert kernels_here(PLAIN, "bfloat16") == {"decode_attention": "xla", "extend_attention": "xla"}


@pytest.mark.parametrize(
    "name, kernels, found",
    [
        ("h2o", None, {"extend_attention": "xla", "decode_attention": "xla", "slots": "xla"}),
        ("mikv", "interpret", {"extend_attention": "interpret", "decode_attention": "interpret", "slots": "interpret"}),
        (
            "kivi-2",
            "interpret",
            {"extend_attention": "interpret", "decode_attention": "interpret", "slots": "interpret, xla"},
        ),
    ],
)
def test_what_reads_and_writes_a_cache(name, kernels, found):
    config = dataclasses.replace(PLAIN, kernels=kernels)
    planned = plan_cache(config, name, "50%", lengths=[200], dtype="float32")
    assert kernels_of(config, planned.spec, "float32") == found


def test_what_reads_and_writes_a_cache_on_a_tpu(monkeypatch):
    """Of the tiers that were planned: groups are written by XLA."""
    spec = lambda name: plan_cache(PLAIN, name, "50%", lengths=[200], dtype="float32").spec
    asked = {name: spec(name) for name in ("h2o", "kivi-4")}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    own = {"extend_attention": "tpu", "decode_attention": "tpu"}
    assert kernels_of.__wrapped__(PLAIN, asked["h2o"], "bfloat16") == own | {"slots": "tpu"}
    assert kernels_of.__wrapped__(PLAIN, asked["kivi-4"], "bfloat16") == own | {"slots": "tpu, xla"}


def test_a_term_by_distance_is_asked_with():
    """Of a model whose logits have one, an operation that cannot take it is not said to."""
    asked = [row for row in kernel_rows(with_rcmha(PLAIN), "float32") if row["platform"] == "tpu"]
    found = {row["implementation"] for row in asked if row["operation"] == "extend_attention"}
    assert found == {"xla"} and all(
        "relative term" in r["why_not"]["tpu"] for r in asked if r["operation"] == "extend_attention"
    )


def test_command(command):
    code, out, err = command("info", "--kernels")
    assert (code, err) == (0, "") and out.splitlines()[0].split() == ["operation", "scheme", *PLATFORMS]
    code, out, err = command("info", "--kernels", "--json", "--dtype", "bfloat16")
    facts = json.loads(out)
    assert (code, err) == (0, "") and list(facts) == ["model", "kernels"]
    assert {"operation", "scheme", "platform", "implementation", "why_not"} == set(facts["kernels"][0])
