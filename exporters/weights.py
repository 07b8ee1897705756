"""`weights.safetensors`: one copy of every weight for all graphs, written tensor by tensor, hashed on the way."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgeseq.errors import ExportError
from edgeseq.spec import DTYPE_BYTES, DType

FILE = "weights.safetensors"
ALIGNMENT = 64
SAFETENSORS_DTYPE = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "int32": "I32", "int8": "I8",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
NUMPY_DTYPE = {"bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class StoredWeight:
    """Where one tensor lies: `offset` and `nbytes` from the start of the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """The whole file before a byte of it is read: `header` and the tensors in file order."""

    header: bytes
    tensors: dict[str, StoredWeight]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(t.nbytes for t in self.tensors.values())


def plan(tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> Layout:
    """Lay out (name, dtype, shape) in the order given, wider dtypes first so that each tensor is aligned to its type.

    Bytes that fill whole words go among the words: the codes of a quantised matrix lie beside its scales, and both can
    be written before the next matrix is read. The data begin at a multiple of 64 bytes.
    """
    ordered = sorted(tensors, key=lambda t: -_alignment(t[1], t[2]))
    entries: dict[str, dict[str, object]] = {}
    end = 0
    for name, dtype, shape in ordered:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": SAFETENSORS_DTYPE[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    stored, offset = {}, len(header)
    for name, dtype, shape in ordered:
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        stored[name] = StoredWeight(name, dtype, shape, offset, nbytes)
        offset += nbytes
    return Layout(header, stored)


def _alignment(dtype: DType, shape: tuple[int, ...]) -> int:
    return 4 if dtype == "uint8" and math.prod(shape) % 4 == 0 else DTYPE_BYTES[dtype]


def write(
    path: Path, layout: Layout, read: Callable[[str], NDArray], progress: Callable[[int], None] = lambda nbytes: None
) -> hashlib._Hash:
    """Write the file, one tensor in memory at a time; returns SHA-256 over every name, dtype, shape and its bytes.

    read: name -> array of the tensor's shape, of any float dtype; converted here.
    """
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(layout.header)
        for tensor in layout.tensors.values():
            data = convert(tensor, read(tensor.name))
            digest.update(f"{tensor.name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
            digest.update(data)  # type: ignore[arg-type]
            file.write(data)  # type: ignore[arg-type]
            progress(tensor.nbytes)
    return digest


def convert(tensor: StoredWeight, array: NDArray) -> NDArray[np.uint8]:
    """The bytes of `array` in the stored dtype, rounded to nearest even; ExportError where it cannot hold a value."""
    if array.shape != tensor.shape:
        raise ExportError(f"weight {tensor.name} has shape {array.shape}, the model wants {tensor.shape}")
    dtype = NUMPY_DTYPE.get(tensor.dtype) or np.dtype(tensor.dtype)
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(array.astype(dtype, copy=False))
    if dtype != array.dtype and dtype.itemsize < 4 and not np.isfinite(stored.astype(np.float32)).all():
        raise ExportError(
            f"weight {tensor.name} reaches {np.abs(array).max():.6g}, which {tensor.dtype} cannot hold",
            "export with --dtype fp32 or bf16",
        )
    return stored.reshape(-1).view(np.uint8)
