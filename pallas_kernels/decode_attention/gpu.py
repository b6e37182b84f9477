"""Decode attention on Hopper GPUs: one Mosaic GPU kernel per tier that reads the codes as they lie, merged by XLA.

The slots of a row are split over the processors. Splits and tiers are merged exactly, by their largest logits and their
sums; probabilities, if wanted, are computed from the kernel's logits after the merge. Sources of few slots, which are new
tokens, are computed beside the kernels by XLA. GPUs other than Hopper have other instructions for products of matrices:
there, XLA reads the tiers.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.decode_attention import packed, xla
from pallas_kernels.decode_attention.merge import Part, merge
from pallas_kernels.decode_attention.packed import Packed
from pallas_kernels.decode_attention.xla import NEGATIVE
from pallas_kernels.dispatch import device_of

SHORT = 64  # a source of fewer slots is no tier
ARITHMETIC = frozenset("add sub mul neg integer_pow square convert_element_type".split())  # of levels, in registers
F32, BF16 = jnp.float32, jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Form:
    """How keys or values lie in memory. groups: of channels that share factors; scaled, zeroed: by which. minor: [H', S] and
    not [S, H]. level: codes -> float32; of 16 bits, which are bfloat16, none."""

    bits: int
    groups: int
    scaled: bool
    zeroed: bool
    minor: bool
    level: object = None

    @property
    def planes(self) -> int:
        """How many channels share a byte of the narrowest plane."""
        return {16: 1, 8: 1, 4: 2, 3: 8, 2: 4}[self.bits]

    def order(self, channels: int) -> np.ndarray:
        """order[row] = the channel in that row of an unpacked block: in each group, one place in the bytes after another."""
        return np.arange(channels).reshape(self.groups, -1, self.planes).swapaxes(1, 2).reshape(-1)


def form_of(x, *, minor: bool) -> Form:
    """minor: of keys or values that are no codes."""
    if not isinstance(x, Packed):
        return Form(16, 1, False, False, minor)
    groups = 1 if x.scale is None else x.scale.shape[2]
    level = None if x.bits == 16 else x.level
    return Form(x.bits, groups, x.scale is not None, x.zero is not None, x.slots_minor, level)


def why_not(sources, *, scores=True, **_) -> str | None:
    """The reason why these sources are not for this kernel, as a sentence; shapes and dtypes are enough."""
    capability = getattr(device_of("gpu"), "compute_capability", None)  # None: compiled where there is no GPU
    if capability not in (None, "9.0"):
        return f"its products of matrices need a Hopper GPU, of compute capability 9.0; this one has {capability}"
    if jax.__version_info__ < (0, 12) and importlib.util.find_spec("absl") is None:
        return "Mosaic GPU of this JAX needs the package absl-py, which is not installed"
    tiers = [source for source in sources if slots_of(source) >= SHORT]
    if not tiers:
        return f"no source has {SHORT} slots or more, and so few are not worth a kernel"
    return next(filter(None, map(_refused, tiers)), None) or next(
        filter(None, (_too_large(x, scores) for x in tiers)), None
    )


def _refused(source) -> str | None:
    heads, channels = source.queries.shape[2:]
    if channels not in (64, 128, 256):
        return f"heads must be of 64, 128 or 256 channels, got {channels}"
    if source.queries.dtype not in (F32, BF16):
        return f"queries must be bfloat16 or float32, got {source.queries.dtype}"
    if heads > 32:
        return f"at most 32 query heads of a key head fit in registers, got {heads}"
    if source.bias is not None:
        return "a bias per slot is not read by this kernel"
    if slots_of(source) % 16:
        return f"the copy engine takes rows of multiples of 16 bytes, so slots must be a multiple of 16, got {slots_of(source)}"
    for name, x in (("keys", source.keys), ("values", source.values)):
        reason = _unreadable(x, channels)
        if reason:
            return f"{name} {reason}"
    return None


def _too_large(source, scores) -> str | None:
    """Whether a block does not fit shared memory; those of narrower heads do."""
    if source.queries.shape[3] < 256:
        return None
    from pallas_kernels.decode_attention.gpu_kernel import SHARED  # loads Mosaic: not when nothing needs it

    like = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if hasattr(x, "shape") else x, source)
    inputs = jax.eval_shape(lambda: _inputs(like()))
    needed = _kernel(source, scale=1.0, softcap=None, scores=scores).shared(inputs)
    if needed <= SHARED:
        return None
    group, channels = source.queries.shape[2:]
    return f"{group} query heads of {channels} channels take {needed} bytes of shared memory with this tier; there are {SHARED}"


def _unreadable(x, channels: int) -> str | None:
    if not isinstance(x, Packed):
        return (
            None
            if x.dtype == BF16
            else f"of {x.dtype} would lose precision as bfloat16, which the kernel multiplies in"
        )
    if x.granule > 1:
        return f"whose factors belong to one channel of {x.granule} slots are not read by this kernel"
    if x.bits not in (16, 8, 4, 3, 2):
        return f"of {x.bits} bits are not read by this kernel"
    if x.bits == 3 and channels % 128:
        return f"of 3 bits are taken by the copy engine for heads of 128 or 256 channels, got {channels}"
    form = form_of(x, minor=True)
    size = channels // form.groups
    if size % 64 or channels % form.groups:
        return f"share factors in groups of {size} channels; the kernel takes multiples of 64"
    if form.bits == 16:
        return None
    used = _operations(form.level) - ARITHMETIC
    if used:
        return f"are decoded by {', '.join(sorted(used))}; registers do {', '.join(sorted(ARITHMETIC))}"
    return None


@functools.cache
def _operations(level) -> frozenset[str]:
    """Names of the primitives that turn codes into levels."""
    names, todo = set(), [jax.make_jaxpr(level)(jax.ShapeDtypeStruct((1,), jnp.uint8)).jaxpr]
    while todo:
        for one in todo.pop().eqns:
            inner = [x.jaxpr for x in one.params.values() if hasattr(x, "jaxpr")]
            names |= set() if inner else {one.primitive.name}
            todo += inner
    return frozenset(names)


def slots_of(source) -> int:
    """S of a source."""
    return source.live.shape[-1]


def decode_attention(sources, *, scale, softcap, scores=True, interpret=False):
    """As `pallas_kernels.decode_attention`. interpret: run the kernels by the GPU interpreter, anywhere (JAX 0.12)."""
    options = {"scale": float(scale), "softcap": softcap}
    parts = [
        _by_xla(source, **options) if slots_of(source) < SHORT
        else _by_kernel(source, **options, scores=scores, interpret=interpret)
        for source in sources
    ]  # fmt: skip
    return merge(parts, sources, scores=scores)


def _by_xla(source, *, scale, softcap) -> Part:
    live, keys, values = source.live[:, :, None], source.keys, source.values
    queries = source.queries.astype(F32) * scale
    logits = packed.logits(queries, keys) if isinstance(keys, Packed) else xla.product("bpgh,bphs->bpgs", queries, keys)
    logits = logits if source.bias is None else logits + source.bias
    logits = jnp.where(live, xla.softcapped(logits, softcap), NEGATIVE)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.where(live, jnp.exp(logits - top), 0.0)
    if isinstance(values, Packed):
        out = packed.weighted(weights, values, queries.shape[-1])
    else:
        out = jnp.einsum("bpgs,bpsh->bpgh", weights, values.astype(F32), precision="highest")
    return _part(out, weights.sum(axis=-1, keepdims=True), top, logits)


def _part(out, total, top, logits) -> Part:
    """out, total: sums of exp(logit - top), with and without values."""
    there = total > 0
    safe = jnp.where(there, total, 1.0)
    return Part(jnp.where(there, out / safe, 0.0), jnp.where(there, top + jnp.log(safe), NEGATIVE), logits)


def _by_kernel(source, *, scale, softcap, scores, interpret) -> Part:
    """Runs the kernel, and merges its splits."""
    from pallas_kernels.decode_attention.gpu_kernel import run

    batch, rows, heads, _ = source.queries.shape
    kernel = _kernel(source, scale=scale, softcap=softcap, scores=scores)
    out, tops, totals, *logits = run(kernel, _inputs(source), interpret=interpret)
    top = tops.max(axis=1, keepdims=True)  # [R, splits, N]
    weight = jnp.exp(tops - top)
    out = jnp.einsum("rshn,rsn->rnh", out, weight, precision="highest")
    out = out[:, :, np.argsort(kernel.values.order(kernel.channels))]
    back = lambda x: x[:, :heads].reshape(batch, rows, heads, -1)
    if scores:  # blocks behind the last live slot were not visited
        logits = jnp.where(source.live[:, :, None], back(logits[0]), NEGATIVE)
    return _part(back(out), back((totals * weight).sum(axis=1)), back(top[:, 0]), logits if scores else None)


def _kernel(source, *, scale, softcap, scores):
    """The kernel of a source, of which shapes and dtypes are enough."""
    from pallas_kernels.decode_attention.gpu_kernel import Kernel

    batch, rows, heads, channels = source.queries.shape
    return Kernel(
        keys=form_of(source.keys, minor=True), values=form_of(source.values, minor=False), rows=batch * rows,
        slots=slots_of(source), channels=channels, columns=_columns(heads), scale=scale, softcap=softcap,
        terms=1 if source.queries.dtype == BF16 else 2, scores=scores,
    )  # fmt: skip


def _columns(heads: int) -> int:
    """Query heads, padded."""
    return -(-heads // 8) * 8


def _inputs(source) -> dict:
    """The source's arrays as the kernel takes them, without a copy of any as large as the tier."""
    from pallas_kernels.decode_attention.gpu_kernel import BLOCK

    batch, rows, heads, channels = source.queries.shape
    keys, values, slots = form_of(source.keys, minor=True), form_of(source.values, minor=False), slots_of(source)
    columns, count = _columns(heads), batch * rows
    flat = lambda x: x.reshape(count, *x.shape[2:])
    queries = jnp.pad(flat(source.queries), ((0, 0), (0, columns - heads), (0, 0)))
    inputs = {"queries": _terms(queries[:, :, keys.order(channels)])}
    if keys.zeroed:
        sums = queries.astype(F32).reshape(count, columns, keys.groups, -1).sum(axis=-1)
        inputs["sums"] = jnp.swapaxes(sums, 1, 2)
    live = flat(source.live)
    blocks = jnp.where(live, jnp.arange(slots, dtype=jnp.int32) // BLOCK + 1, 0).max(axis=-1)
    inputs |= {"blocks": blocks, "live": live.astype(jnp.int8)}
    for name, x, form in (("keys", source.keys, keys), ("values", source.values, values)):
        inputs |= {f"{name}.{part}": flat(array) for part, array in _arrays(x, form).items()}
    return inputs


def _terms(x):
    """bfloat16 [R, N, H] as it is; float32 as two bfloat16 [R, 2 N, H], one after the other, whose sum it is."""
    if x.dtype == BF16:
        return x
    high = lax.reduce_precision(x, 8, 7)  # and not a cast and back, which XLA may take for nothing
    return jnp.concatenate([high.astype(BF16), (x - high).astype(BF16)], axis=1)


def _arrays(x, form: Form) -> dict:
    """The operands of keys or values, by what they are."""
    if not isinstance(x, Packed):
        return {"codes": x}
    codes = lax.bitcast_convert_type(x.codes, BF16) if form.bits == 16 else x.codes
    arrays = {"codes": codes}
    if form.bits == 3:  # one byte of the plane of 1 bit belongs to two of the plane of 2 bits
        pairs = codes.reshape(*codes.shape[:2], codes.shape[2] // 2, 2, codes.shape[3])
        arrays = {"codes": pairs, "high": codes}
    for name, factor in (("scale", x.scale), ("zero", x.zero)):
        if factor is not None:
            arrays[name] = lax.bitcast_convert_type(factor, BF16) if factor.dtype == jnp.uint16 else factor
    return arrays
