"""The Mosaic GPU kernel of decode attention: one tier, a row and a part of its slots at a time. See `gpu` for the whole.

    logits [slots, heads] = K^T [slots, H] q^T [H, heads]          out [H, heads] += V^T [H, slots] p [slots, heads]

Few query heads share a row, so slots are the rows of the products and heads their columns: 8 columns hold up to 8 heads,
where queries first would fill 64 rows. Codes become bfloat16 in shared memory, where every integer code is exact; scales
and zeros multiply logits and weights, one number per slot. float32 queries and weights are the sum of two bfloat16 terms.
Blocks of slots are copied ahead while others are computed.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.decode_attention.gpu import Form
from pallas_kernels.decode_attention.xla import NEGATIVE

BLOCK = 128  # slots at a time
PROCESSORS = 132  # of an H100 or H200
SHARED = 227 << 10  # bytes of shared memory of one
SPARE = 8 << 10  # of these, for what the compiler keeps there
KEPT = 2 << 10  # bytes that it was seen to keep, rounded up
ONCE = ("queries", "sums", "blocks")  # operands that are not copied block by block
LOG2E = float(np.log2(np.e))
F32, BF16 = jnp.float32, jnp.bfloat16
BY_SLOT = plgpu.Layout.WGMMA.reduce(1)  # registers of one number per row of a product, or per column
BY_HEAD = plgpu.Layout.WGMMA.reduce(0)
# Codes of [8 n, BLOCK]: a warp has two rows, a lane 8 adjacent slots; neither the bytes nor the swizzled bfloat16 collide
CODES = plgpu.Layout.TILED(
    plgpu.Tiling(((8, BLOCK), (2, BLOCK), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


@functools.partial(jax.jit, static_argnames=("kernel", "interpret"))
def run(kernel: "Kernel", inputs: dict, *, interpret: bool):
    """Calls a kernel; tiers of the same shapes are traced and lowered once."""
    return kernel(inputs, interpret=interpret)


def _bytes(scratch) -> int:
    """What an allocation takes at most."""
    if not hasattr(scratch, "dtype") or isinstance(scratch, plgpu.Barrier):
        return 128
    return -(-int(np.prod(scratch.shape)) * jnp.dtype(scratch.dtype).itemsize // 1024) * 1024


def _swizzled(*shape):
    """Shared memory for an operand of a product."""
    return plgpu.SMEM(shape, BF16, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def _turned(ref):
    """A reference to the transposed matrix."""
    return ref.transpose((1, 0)) if jax.__version_info__ >= (0, 12) else plgpu.transpose_ref(ref, (1, 0))


def _codes(rows, ref):
    """Rows of bytes as integers in registers."""
    return plgpu.layout_cast(ref.at[rows][...], CODES).astype(jnp.int32)


def _product(pairs, shape):
    """The sum of the products of pairs of references, float32 in registers."""

    def run(accumulator):
        for a, b in pairs:
            plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return plgpu.layout_cast(pl.run_scoped(run, plgpu.ACC(shape, F32)), plgpu.Layout.WGMMA)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of one tier, fixed by shapes. rows: block rows of the batch; columns: query heads, padded to 8s; terms: of
    queries and weights. scores: whether the logits are wanted."""

    keys: Form
    values: Form
    rows: int
    slots: int
    channels: int
    columns: int
    scale: float
    softcap: float | None
    terms: int
    scores: bool

    def __call__(self, inputs: dict, *, interpret=False):
        """Returns, in float32: out [R, splits, H, N], tops and totals [R, splits, N], and logits [R, N, S] if wanted."""
        names = list(inputs)
        total = -(-self.slots // BLOCK)
        per = -(-total // max(1, min(total, -(-2 * PROCESSORS // self.rows))))
        splits = -(-total // per)
        rows, n = self.rows, self.columns
        results = [(rows, splits, self.channels, n), (rows, splits, n), (rows, splits, n)]
        results += [(rows, n, self.slots)] * self.scores

        def decode_attention_kernel(*refs, **scratch):
            given, results = dict(zip(names, refs, strict=False)), refs[len(names) :]
            self.run(given, *results, s=scratch, per=per)

        options = {"interpret": plgpu.InterpretGPUParams(detect_races=True)} if interpret else {}
        return plgpu.kernel(
            decode_attention_kernel,
            out_type=[jax.ShapeDtypeStruct(shape, F32) for shape in results],
            scratch_types=self.scratch(inputs),
            grid=(rows, splits),
            grid_names=("row", "split"),
            compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
            **options,
        )(*inputs.values())

    def scratch(self, inputs: dict) -> dict:
        """Shared memory: as many blocks of what is copied as let two programs share a processor, or else one have it."""
        sizes = [self._scratch(inputs, stages) for stages in (4, 3, 2, 1)]
        for most, scratch in itertools.product((SHARED // 2, SHARED), sizes[:3]):
            if sum(map(_bytes, scratch.values())) + SPARE <= most:
                return scratch
        return sizes[3]

    def shared(self, inputs: dict) -> int:
        """Bytes of shared memory that it needs at least."""
        return sum(map(_bytes, self._scratch(inputs, 1).values())) + KEPT

    def _scratch(self, inputs: dict, stages: int) -> dict:
        n, h, copied = self.columns, self.channels, [name for name in inputs if name not in ONCE]
        scratch = {
            "queries": _swizzled(1, self.terms * n, h),
            "weights": _swizzled(1, self.values.groups * self.terms * n, BLOCK),
            "out": plgpu.SMEM((h, n), F32),
            "top": plgpu.SMEM((n,), F32),
            "total": plgpu.SMEM((n,), F32),
            "arrived": plgpu.Barrier(num_arrivals=len(self._copies(copied)), num_barriers=stages),
            "ready": plgpu.Barrier(num_arrivals=1 + self.keys.zeroed),
        }
        if self.scores:
            scratch["logits"] = plgpu.SMEM((n, BLOCK), F32)
        if self.keys.zeroed:
            scratch["sums"] = plgpu.SMEM((self.keys.groups, n), F32)
        for kind in ("keys", "values"):
            if getattr(self, kind).bits < 16:
                scratch[f"{kind}.block"] = _swizzled(1, h, BLOCK)
        for name in copied:
            kind, _, part = name.rpartition(".")
            if part == "codes" and getattr(self, kind).bits == 16:
                scratch[name] = _swizzled(stages, *((h, BLOCK) if getattr(self, kind).minor else (BLOCK, h)))
                continue
            if part == "codes" and getattr(self, kind).bits == 3:
                shape = (2, h // 8, BLOCK)
            elif part == "high":
                shape = (h // 8, BLOCK)
            else:
                shape = (*inputs[name].shape[1:-1], BLOCK)
            scratch[name] = plgpu.SMEM((stages, *shape), inputs[name].dtype)
        return scratch

    def _copies(self, staged) -> list[tuple[str, int | None]]:
        """(name, plane) of each copy of one block."""
        return list(
            itertools.chain.from_iterable(
                [(name, 0), (name, 1)]
                if name.endswith("codes") and getattr(self, name[:-6]).bits == 3
                else [(name, None)]
                for name in staged
            )
        )

    def run(self, given, out, tops, totals, logits=None, *, s, per):
        """One program: the blocks of one split of one row. s: scratch."""
        row, split = lax.axis_index("row"), lax.axis_index("split")
        first = split * per
        last = jnp.minimum(first + per, given["blocks"][row])
        stages = s["live"].shape[0]
        copies = self._copies([name for name in given if name not in ONCE])

        def fetch(block, stage):
            at = pl.ds(block * BLOCK, BLOCK)
            for name, plane in copies:
                source, target = given[name].at[row], s[name].at[stage]
                if name == "live":
                    source = source.at[at]
                elif plane is not None:
                    source, target = source.at[pl.ds(0, self.channels // 8), plane, at], target.at[plane]
                elif name.endswith("high"):
                    source = source.at[pl.ds(self.channels // 4, self.channels // 8), at]
                elif name == "values.codes" and not self.values.minor:
                    source = source.at[at]
                else:
                    source = source.at[:, at]
                plgpu.copy_gmem_to_smem(source, target, s["arrived"].at[stage])

        plgpu.copy_gmem_to_smem(given["queries"].at[row], s["queries"].at[0], s["ready"])
        if self.keys.zeroed:
            plgpu.copy_gmem_to_smem(given["sums"].at[row], s["sums"], s["ready"])
        for ahead in range(stages):
            pl.when(first + ahead < last)(functools.partial(fetch, first + ahead, ahead))
        plgpu.barrier_wait(s["ready"])

        def step(block, carry):
            stage = lax.rem(block - first, stages)
            plgpu.barrier_wait(s["arrived"].at[stage])
            arrived = {name: s[name].at[stage] for name in given if name in s and name not in ONCE}
            # Addresses that depend on the block are not all held in registers from before the loop, as constant ones are
            nought = jnp.minimum(block, 0)
            operands = {
                name: s[name].at[nought] for name in s if name in ("queries", "weights") or name.endswith(".block")
            }
            carry = self.step(arrived, s | operands, carry)
            if self.scores:
                plgpu.copy_smem_to_gmem(s["logits"], logits.at[row, :, pl.ds(block * BLOCK, BLOCK)])
            pl.when(block + stages < last)(functools.partial(fetch, block + stages, stage))
            if self.scores:
                plgpu.wait_smem_to_gmem(0)
            return carry

        flat = lambda value: plgpu.layout_cast(jnp.full((self.columns,), value, F32), BY_HEAD)
        size = self.channels // self.values.groups
        zeros = plgpu.layout_cast(jnp.zeros((size, self.columns), F32), plgpu.Layout.WGMMA)
        top, total, sums = lax.fori_loop(first, last, step, (flat(NEGATIVE), flat(0.0), (zeros,) * self.values.groups))
        for group, x in enumerate(sums):
            s["out"][pl.ds(group * size, size), :] = x
        s["top"][...], s["total"][...] = top, total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(s["out"], out.at[row, split])
        plgpu.copy_smem_to_gmem(s["top"], tops.at[row, split])
        plgpu.copy_smem_to_gmem(s["total"], totals.at[row, split])
        plgpu.wait_smem_to_gmem(0)

    def step(self, arrived, s, carry):
        """One block of slots. arrived: references to what was copied of it."""
        top, total, sums = carry
        keys, values = (self._operand(kind, arrived, s) for kind in ("keys", "values"))
        plgpu.commit_smem()
        per_slot = lambda ref: plgpu.layout_cast(ref[...], BY_SLOT).astype(F32)
        shape, n = (BLOCK, self.columns), self.columns
        over_slots = lambda x: plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [0]), plgpu.Layout.WGMMA)
        over_heads = lambda x, shape=shape: plgpu.layout_cast(lax.broadcast_in_dim(x, shape, [1]), plgpu.Layout.WGMMA)
        logits = None
        for group, ref in enumerate(keys):
            size = self.channels // self.keys.groups
            queries = [s["queries"].at[pl.ds(t * n, n), pl.ds(group * size, size)] for t in range(self.terms)]
            part = _product([(_turned(ref), _turned(q)) for q in queries], shape)
            if self.keys.scaled:
                part = part * over_slots(per_slot(arrived["keys.scale"].at[group]))
            if self.keys.zeroed:
                own = plgpu.layout_cast(s["sums"].at[group][...], BY_HEAD)
                part = part + over_heads(own) * over_slots(per_slot(arrived["keys.zero"].at[group]))
            logits = part if logits is None else logits + part
        logits = logits * self.scale
        if self.softcap is not None:
            logits = jnp.tanh(logits / self.softcap) * self.softcap
        live = over_slots(per_slot(arrived["live"])) > 0.5
        logits = jnp.where(live, logits, NEGATIVE)
        if self.scores:
            _turned(s["logits"])[...] = plgpu.layout_cast(logits, plgpu.Layout.WGMMA_TRANSPOSED)
        highest = jnp.maximum(top, logits.max(axis=0))
        weights = jnp.where(live, jnp.exp2((logits - over_heads(highest)) * LOG2E), 0.0)
        shrink = jnp.exp2((top - highest) * LOG2E)
        total = total * shrink + weights.sum(axis=0)
        for group in range(self.values.groups):
            scaled = weights
            if self.values.scaled:
                scaled = weights * over_slots(per_slot(arrived["values.scale"].at[group]))
            self._store_weights(scaled, s["weights"], group)
        plgpu.commit_smem()
        after = []
        for group, ref in enumerate(values):
            pairs = [(ref, _turned(self._weights(s["weights"], group, term))) for term in range(self.terms)]
            size = (self.channels // self.values.groups, n)
            x = sums[group] * over_heads(shrink, size) + _product(pairs, size)
            if self.values.zeroed:
                zero = weights * over_slots(per_slot(arrived["values.zero"].at[group]))
                x = x + over_heads(zero.sum(axis=0), size)
            after.append(x)
        plgpu.commit_smem()  # all warps have read the block, and its place may be filled again
        return highest, total, tuple(after)

    def _weights(self, ref, group, term):
        return ref.at[pl.ds((group * self.terms + term) * self.columns, self.columns)]

    def _store_weights(self, weights, ref, group):
        rest = weights
        for term in range(self.terms):
            high = rest.astype(BF16)
            _turned(self._weights(ref, group, term))[...] = plgpu.layout_cast(high, plgpu.Layout.WGMMA_TRANSPOSED)
            rest = rest - high.astype(F32)

    def _operand(self, kind, arrived, s) -> list:
        """References to bfloat16 blocks: keys [size, BLOCK], or values the same, of each group."""
        form, codes = getattr(self, kind), arrived[f"{kind}.codes"]
        if form.bits == 16:
            return [codes if form.minor else _turned(codes)]
        block, size = s[f"{kind}.block"], self.channels // form.groups
        count = size // form.planes  # rows of bytes of a group
        for group in range(form.groups):
            read = functools.partial(_codes, pl.ds(group * count, count))
            if form.bits == 3:
                planes, high = [read(codes.at[0]), read(codes.at[1])], read(arrived[f"{kind}.high"])
            else:
                whole = read(codes)
            for place in range(form.planes):
                if form.bits == 3:
                    code = ((planes[place // 4] >> (2 * (place % 4))) & 3) | (((high >> place) & 1) << 2)
                else:
                    code = whole if form.bits == 8 else (whole >> (form.bits * place)) & (2**form.bits - 1)
                levels = plgpu.layout_cast(form.level(code).astype(BF16), CODES)
                block[pl.ds(group * size + place * count, count), :] = levels
        return [block.at[pl.ds(group * size, size)] for group in range(form.groups)]
