"""What a graph becomes on its way to a plan: storages, values that look into them, and kernel calls in order."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeseq.spec import DTYPE_BYTES

Kind = Literal["weight", "arena", "state", "io"]


@dataclass(eq=False)
class Storage:
    """A block of memory with one owner.

    weight: tensor `name` packed by `layout`; arena: activation of one graph; state, io: the slot or port `name`.
    """

    kind: Kind
    name: str
    nbytes: int
    layout: str = ""
    offset: int = -1


@dataclass(eq=False)
class Value:
    """A tensor of an ONNX graph: `shape` at `offset` elements of a storage.

    ld: elements between consecutive rows when the tensor is seen as [rows, last axis]; equal to the last axis when
    contiguous. A slice of the last axis has a larger ld.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    storage: Storage
    offset: int = 0
    ld: int = 0

    def __post_init__(self) -> None:
        self.ld = self.ld or self.cols

    @property
    def cols(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def contiguous(self) -> bool:
        return self.ld == self.cols or self.rows <= 1

    @property
    def span(self) -> int:
        """Elements from the first to the last one, both included."""
        return (self.rows - 1) * self.ld + self.cols if self.shape else 1

    @property
    def item_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Arg:
    """One pointer of a call: a value, how it is used, and for weights how the kernel wants it packed."""

    value: Value
    access: Literal["r", "w", "rw"]


@dataclass(eq=False)
class Call:
    """One launch. `kernel` is hashable and names the code: equal kernels are compiled once."""

    kernel: Any
    args: tuple[Arg, ...]
    outputs_only: bool = False
    traffic: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class KernelRef:
    """A kernel of `kernels/<op>.py` with its parameters."""

    op: str
    params: Any


@dataclass(frozen=True)
class GenericRef:
    """A kernel TVM derived: `key` its structure, `label` a readable name, `func` the PrimFunc, `grid` its blocks, of
    `threads` threads each on a GPU."""

    key: str
    label: str = field(compare=False)
    func: Any = field(compare=False, repr=False)
    grid: int = field(compare=False)
    threads: int = field(compare=False, default=1)
