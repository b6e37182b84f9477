"""A state as one safetensors file: its arrays, and metadata that says what they are and whose.

    metadata   format, jaxkv          which layout, written by which version
               model                  `fingerprint` of the configuration and the parameters
               spec                   policies, their options, tiers: what `empty_state` was given
               extra                  what the caller wants back, JSON
               digest                 sha256 of all arrays and of the metadata above

Nothing in it is code, and nothing of it is used before digest and model have been checked.
"""

import dataclasses
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np

from jaxkv.cache.state import empty_state, even_owners
from jaxkv.config import DecoderConfig
from jaxkv.policies import make_policy
from jaxkv.types import LayerSpec, State, TierSpec

FORMAT = "jaxkv-state-4"


class StateFileError(ValueError):
    """A saved state cannot be read or written; the message says what was given and what is accepted."""


def fingerprint(config: DecoderConfig, params) -> str:
    """Identifies a model: sha256 over its configuration and the shape, dtype and a checksum of every parameter."""
    digest = hashlib.sha256(repr(config).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype} {int(_checksum(leaf))}".encode())
    return digest.hexdigest()


@jax.jit
def _checksum(x):
    """All bits of an array in one number, read once, where it lies: sum of bits * (2 place + 1), modulo 2**32. No single
    change goes unnoticed."""
    bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
    place = jax.lax.iota(jnp.uint32, x.size)
    return (bits.reshape(-1).astype(jnp.uint32) * (2 * place + 1)).sum(dtype=jnp.uint32)


def pack_state(state: State, *, model: str, extra: dict) -> bytes:
    """The file's bytes. model: from `fingerprint`. extra: any JSON.

    Raises: StateFileError for a state that observes for other policies; compress it first.
    """
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(x) for name, x in _named(jax.device_get(state)).items()}
    metadata = {
        "format": FORMAT,
        "jaxkv": _version(),
        "model": model,
        "spec": json.dumps([_layer_to_json(layer) for layer in state.layers]),
        "extra": json.dumps(extra),
    }
    return save(arrays, metadata=metadata | {"digest": _digest(arrays, metadata)})


def unpack_state(data: bytes, *, config: DecoderConfig, model: str, where: str) -> tuple[State, dict]:
    """The state and the extra of `pack_state`. where: the file's name, for messages.

    Raises: StateFileError for a file that is cut short or altered, of another format, version or model.
    """
    arrays, metadata = _open(data, where)
    refuse = lambda what: StateFileError(f"{where}: {what}")
    if metadata.get("format") != FORMAT:
        raise refuse(f"is {metadata.get('format', 'no saved state')!r}; this version reads {FORMAT!r}")
    if metadata.get("jaxkv") != _version():
        raise refuse(f"was written by jaxkv {metadata.get('jaxkv')}, this is {_version()}; read the document again")
    if metadata.pop("digest", None) != _digest(arrays, metadata):
        raise refuse("was altered: its arrays or its metadata are not those that were saved")
    if metadata.get("model") != model:
        raise refuse("is the state of another model, dtype or revision; load that model, or read the document again")
    spec = tuple(_layer_from_json(one) for one in json.loads(metadata["spec"]))
    rows = len(arrays[".next_position"])
    zeros = np.zeros((len(spec), len(spec[0].tiers), rows), np.int32)
    owners = even_owners(spec, rows, config.num_kv_heads)
    new = lambda: empty_state(config, spec, limits=zeros, lengths=np.ones(rows, np.int32), owners=owners)
    shapes = jax.eval_shape(new)
    wanted = _named(shapes)
    for name, shape in wanted.items():
        found = arrays.get(name)
        if found is None or (found.shape, found.dtype) != (shape.shape, shape.dtype):
            raise refuse(f"{name} should be {shape.dtype} {shape.shape}, it is {_kind(found)}")
    if unknown := arrays.keys() - wanted.keys():
        raise refuse(f"holds {min(unknown)}, which a state of this model has not")
    state = jax.tree.unflatten(jax.tree.structure(shapes), [jnp.asarray(arrays[name]) for name in wanted])
    return state, json.loads(metadata["extra"])


def _open(data, where):
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        length = int.from_bytes(data[:8], "little")
        return arrays, json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except (SafetensorError, ValueError) as error:
        raise StateFileError(f"{where}: cut short, or not a saved state: {error}") from error


def _named(state) -> dict:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _digest(arrays, metadata) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _layer_to_json(layer) -> dict:
    options = {f.name: getattr(layer.policy, f.name) for f in dataclasses.fields(layer.policy)}
    if any(options.pop(name, None) for name in ("observe", "balance")):
        raise StateFileError("a state that observes for other policies is not saved; compress it first")
    tiers = [[tier.positions.shape[-1], *tier.scheme, str(tier.positions.dtype)] for tier in layer.tiers]
    rows = None if layer.owner is None else layer.owner.shape[1]
    return {"policy": layer.policy.name, "options": options, "tiers": tiers, "rows": rows}


def _layer_from_json(one: dict) -> LayerSpec:
    tiers = tuple(
        TierSpec(slots=slots, scheme=(keys, values), positions=at) for slots, keys, values, at in one["tiers"]
    )
    return LayerSpec(policy=make_policy(one["policy"], **one["options"]), tiers=tiers, rows=one["rows"])


def _kind(array) -> str:
    return "missing" if array is None else f"{array.dtype} {array.shape}"


def _version() -> str:
    from jaxkv import __version__

    return __version__
