"""A state in a file: what comes back, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cache_harness import (
    EVICTING,
    MIXED,
    PARAMS,
    PLAIN,
    assert_rows_equal,
    go_on,
    make_case,
    new_state,
    of_each_kind,
    read,
    small,
)

from jaxkv import decoder
from jaxkv.cache import StateFileError, fingerprint, pack_state, unpack_state
from jaxkv.policies import Full

LIMITS = ((6, 8, 4, 3), (12, 5, 9, 2))
MODEL = fingerprint(MIXED, PARAMS)
TIERS = {"slots": (16, 16), "scheme": ("bf16", ("balanced-rotated3", "int2"))}


def packed(name="h2o", extra=None):
    case = make_case(0, limits=LIMITS)
    _, state = read(small(name), case, **TIERS)
    return case, state, pack_state(state, model=MODEL, extra=extra or {})


@pytest.mark.parametrize("name", of_each_kind(EVICTING, ("h2o", "keydiff")))
def test_a_loaded_state_goes_on_as_the_saved_one(name):
    case, state, data = packed(name, {"note": [1, "two"]})
    back, extra = unpack_state(data, config=MIXED, model=MODEL, where="here")
    assert extra == {"note": [1, "two"]}
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_rows_equal(back, state, range(4))
    one, other = go_on(case, back), go_on(case, state)
    assert_rows_equal(one[0], other[0], range(4), axis=1)
    assert_rows_equal(one[2], other[2], range(4))


def test_the_file_takes_what_the_state_takes():
    _, state, data = packed()
    arrays = sum(x.nbytes for x in jax.tree.leaves(state))
    assert arrays < len(data) < arrays + 8000  # names and metadata


def edited(data, change):
    """The file with its header changed."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


BAD = {
    "cut short": (lambda data: data[:-100], "cut short"),
    "cut to nothing": (lambda data: data[:5], "cut short"),
    "not a state": (lambda data: b"GGUF" + data, "cut short, or not a saved state"),
    "a byte changed": (lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:], "altered"),
    "another version": (
        lambda data: edited(data, lambda h: h["__metadata__"].update(jaxkv="9.9")), "was written by jaxkv 9.9, this is"
    ),
    "another format": (lambda data: edited(data, lambda h: h["__metadata__"].update(format="x")), "is 'x'; this version"),
    "no metadata": (lambda data: edited(data, lambda h: h.pop("__metadata__")), "is 'no saved state'"),
    "another policy": (lambda data: edited(data, with_spec(lambda layer: layer.update(policy="snapkv"))), "altered"),
    "another scheme": (lambda data: edited(data, with_spec(lambda layer: layer["tiers"][1].__setitem__(2, "int4"))), "altered"),
    "a spec that is none": (lambda data: edited(data, lambda h: h["__metadata__"].update(spec="[")), "altered"),
    "no spec": (lambda data: edited(data, lambda h: h["__metadata__"].pop("spec")), "altered"),
    "another extra": (lambda data: edited(data, lambda h: h["__metadata__"].update(extra="{}")), "altered"),
    "a model that is not its own": (lambda data: edited(data, lambda h: h["__metadata__"].update(model="x")), "altered"),
    "no digest": (lambda data: edited(data, lambda h: h["__metadata__"].pop("digest")), "altered"),
}  # fmt: skip


def with_spec(change):
    """A change of every layer of the spec, as one of the header."""

    def of_header(header):
        spec = json.loads(header["__metadata__"]["spec"])
        list(map(change, spec))
        header["__metadata__"]["spec"] = json.dumps(spec)

    return of_header


@pytest.mark.parametrize("what", BAD)
def test_refused(what):
    change, message = BAD[what]
    with pytest.raises(StateFileError, match=f"here: .*{message}"):
        unpack_state(change(packed(extra={"position": 3})[2]), config=MIXED, model=MODEL, where="here")


def test_the_state_of_another_model_is_refused():
    with pytest.raises(StateFileError, match="here: is the state of another model, dtype or revision"):
        unpack_state(packed()[2], config=MIXED, model="x", where="here")


def test_a_spec_that_does_not_fit_the_arrays_is_refused():
    wider = dataclasses.replace(MIXED, head_dim=16)
    with pytest.raises(StateFileError, match=r"should be .* \(4, 2, 16, 16\), it is .* \(4, 2, 8, 16\)"):
        unpack_state(packed()[2], config=wider, model=MODEL, where="here")


def test_fingerprints_tell_models_apart():
    other = decoder.init_params(PLAIN, jax.random.key(4))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    wider = dataclasses.replace(MIXED, norm_eps=1e-5)
    nearly = jax.tree.map(jnp.copy, PARAMS)
    nearly["embedder"]["embedding"] = nearly["embedder"]["embedding"].at[-1, -1].multiply(1 + 2**-20)
    assert len({MODEL, *(fingerprint(MIXED, p) for p in (other, half, nearly)), fingerprint(wider, PARAMS)}) == 5
    assert MODEL == fingerprint(MIXED, jax.tree.map(np.asarray, PARAMS))


def test_a_state_that_observes_is_refused():
    state = new_state(Full(observe=(small("h2o"),)), [[9] * 4])
    with pytest.raises(StateFileError, match="compress it first"):
        pack_state(state, model=MODEL, extra={})
