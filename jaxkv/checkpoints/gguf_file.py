"""Reading the GGUF container: metadata, tensor table, and rows of a tensor dequantized on demand.

The `gguf` package dequantizes; its reader is not used, because it makes a numpy object for every string of the
vocabulary (1.6 s for 98,000 strings, 0.1 s here) and maps the whole file into the process.
Source: ggml/docs/gguf.md (version 3).
"""

import dataclasses
import mmap
import pathlib
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from jaxkv.checkpoints.errors import CheckpointError

_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAGIC = b"GGUF"


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """shape: as PyTorch writes it (GGUF lists it reversed). offset: of the data in the file. row_bytes: of one row."""

    name: str
    shape: tuple[int, ...]
    type: Any
    offset: int
    row_bytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """Contents of a GGUF file without the tensor data."""

    path: pathlib.Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Header:
    """A cursor over the header that checks every read against the end of the file."""

    def __init__(self, data: mmap.mmap, path: pathlib.Path):
        self.data, self.path, self.at = data, path, 0

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise CheckpointError(f"{self.path} is cut short: it ends within its header; download it again")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        text = self.take(self.number("Q"))
        return text.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _SCALARS:
                dtype = np.dtype("<" + _SCALARS[inner])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return [self.value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path} is damaged: metadata of unknown type {kind}")
        return self.number(_SCALARS[kind])


def read_gguf(path: pathlib.Path) -> GgufFile:
    """Reads metadata and tensor table, and checks that all tensor data is there.

    Raises:
      CheckpointError: no GGUF file, one of another version or byte order, a part of a split one, or cut short.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _MAGIC:
                raise CheckpointError(f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()!r}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Header(data, path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(header: _Header) -> GgufFile:
    import gguf

    path = header.path
    header.take(4)
    version = header.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported; accepted: 2, 3, little-endian")
    tensor_count, key_count = header.number("Q"), header.number("Q")
    metadata = {}
    for _ in range(key_count):
        key = header.string()
        metadata[key] = header.value(header.number("I"))
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(f"{path} is one of {metadata['split.count']} parts; join them first: llama-gguf-split")
    found = []
    for _ in range(tensor_count):
        name = header.string()
        shape = tuple(header.number("Q") for _ in range(header.number("I")))[::-1]
        found.append((name, shape, header.number("I"), header.number("Q")))
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    start = -(-header.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in found:
        tensors[name] = _tensor(path, name, shape, kind, start + offset)
        end = start + offset + tensors[name].row_bytes * int(np.prod(shape[:-1], dtype=np.int64))
        if end > len(header.data):
            raise CheckpointError(
                f"{path} is cut short: tensor {name!r} ends at byte {end:,}, the file at {len(header.data):,}; "
                "download it again"
            )
    return GgufFile(path, metadata, tensors)


def _tensor(path: pathlib.Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
    import gguf

    try:
        quantization = gguf.GGMLQuantizationType(kind)
        block, size = gguf.GGML_QUANT_SIZES[quantization]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: tensor {name!r} has the unknown type {kind}") from error
    if not shape or shape[-1] % block:
        raise CheckpointError(f"{path}: tensor {name!r} of shape {list(shape)} is not made of blocks of {block}")
    return GgufTensor(name, shape, quantization, offset, shape[-1] // block * size)


def check_types(file: GgufFile) -> None:
    """Refuses a tensor type that the gguf package cannot dequantize, before anything is loaded."""
    import gguf

    seen = set()
    for tensor in file.tensors.values():
        if tensor.type not in seen:
            seen.add(tensor.type)
            block = np.zeros((1, gguf.GGML_QUANT_SIZES[tensor.type][1]), np.uint8)
            try:
                gguf.quants.dequantize(block, tensor.type)
            except NotImplementedError as error:
                raise CheckpointError(
                    f"{file.path}: tensor {tensor.name!r} has dtype {tensor.type.name}, which is not supported; "
                    "accepted: F32, F16, BF16, and the quantized types Q4_0 to Q8_0, Q2_K to Q6_K, TQ, MXFP4 and IQ"
                ) from error


def rows_reader(file: GgufFile, data: BinaryIO) -> Callable[[str, int, int], np.ndarray]:
    """Returns (name, first row, end row) -> float32 rows; a vector's rows are its elements. data: the open file."""
    from gguf.quants import dequantize

    def read(name: str, first: int, end: int) -> np.ndarray:
        tensor = file.tensors[name]
        vector = len(tensor.shape) == 1
        skip, count = (0, 1) if vector else (first, end - first)
        data.seek(tensor.offset + skip * tensor.row_bytes)
        raw = np.frombuffer(data.read(count * tensor.row_bytes), np.uint8).reshape(count, tensor.row_bytes)
        values = dequantize(raw, tensor.type)
        return values[0, first:end] if vector else values

    return read
