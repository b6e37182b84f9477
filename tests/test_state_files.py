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


@pytest.mark.parametrize(
    "name", [n if n in ("h2o", "keydiff") else pytest.param(n, marks=pytest.mark.slow) for n in EVICTING]
)
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
    "another model": (lambda data: edited(data, lambda h: h["__metadata__"].update(model="x")), "of another model"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_refused(what):
    change, message = BAD[what]
    with pytest.raises(StateFileError, match=f"here: .*{message}"):
        unpack_state(change(packed()[2]), config=MIXED, model=MODEL, where="here")


def test_a_spec_that_does_not_fit_the_arrays_is_refused():
    def shrink(header):
        spec = json.loads(header["__metadata__"]["spec"])
        spec[0]["tiers"][1][0] = 8
        header["__metadata__"]["spec"] = json.dumps(spec)

    with pytest.raises(StateFileError, match=r"should be uint8 \(4, 2, 3, 8\), it is uint8 \(4, 2, 3, 16\)"):
        unpack_state(edited(packed()[2], shrink), config=MIXED, model=MODEL, where="here")


def test_fingerprints_tell_models_apart():
    other = decoder.init_params(PLAIN, jax.random.key(4))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    wider = dataclasses.replace(MIXED, norm_eps=1e-5)
    assert len({MODEL, fingerprint(MIXED, other), fingerprint(MIXED, half), fingerprint(wider, PARAMS)}) == 4
    assert MODEL == fingerprint(MIXED, jax.tree.map(np.asarray, PARAMS))


def test_a_state_that_observes_is_refused():
    state = new_state(Full(observe=(small("h2o"),)), [[9] * 4])
    with pytest.raises(StateFileError, match="compress it first"):
        pack_state(state, model=MODEL, extra={})
