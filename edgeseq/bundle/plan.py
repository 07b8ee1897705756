"""The plan: what a target executes for one call, as the compiler builds it and the reader gives it back.

Everything is by name here; `writer` turns names into indices and lays sections out. The same record serves CPU,
OpenCL and CUDA: a launch is a kernel, a grid, a block and arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from edgeseq.spec import Manifest, StateSlot, TensorSpec

Space = Literal["weights", "arena", "state", "io"]
Access = Literal["r", "w", "rw"]
Direction = Literal["in", "out"]
Backend = Literal["cpu", "opencl", "cuda"]

ALIGNMENT = 64
"""Every tensor, slot, input and output starts at a multiple of this many bytes within its block."""


@dataclass(frozen=True)
class PlanTensor:
    """One packed weight.

    layout: name of the packing, in the compiler's own words ("rows16", "plain").
    dtype, shape: of the packed array (rank <= 4); sub-byte weights are stored as uint8.
    nbytes: exact size; `data()` returns any C-contiguous buffer of that many bytes and is called once, in order.
    """

    name: str
    layout: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    data: Callable[[], Any] = field(compare=False, repr=False)


@dataclass(frozen=True)
class PlanKernel:
    """One kernel. CPU: `name` is the C symbol and `code` is empty. GPU: `code` is source text or a binary."""

    name: str
    n_args: int
    backend: Backend = "cpu"
    code: bytes = field(default=b"", repr=False)
    code_kind: Literal["none", "source", "binary"] = "none"


@dataclass(frozen=True)
class PlanArg:
    """One kernel argument: `nbytes` bytes at `offset`.

    weights: `offset` counts within the tensor named by `tensor`; elsewhere within the block, and `tensor` is None.
    """

    space: Space
    access: Access
    tensor: str | None
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PlanLaunch:
    """One launch: `kernel` over `grid` blocks. `outputs_only`: it feeds outputs alone, skipped when none is wanted.

    traffic: bytes that one execution moves, where the arguments' sizes would mislead. Keys, all optional:
        weights      bytes of weights read (an embedding gather reads one row, not the table)
        state        bytes of state read plus written, whatever the depth
        kv           bytes of cache read per cached position
        kv_rows      largest number of cached positions read; 0 = the bundle's context
        activations  bytes of arena and io read plus written
    A missing key is derived from the arguments (see `ledger.launch_traffic`).
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    args: tuple[PlanArg, ...]
    outputs_only: bool = False
    traffic: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanIO:
    """One input or output of a graph at `offset` of the io block; `spec.role` says what the runtime does with it."""

    spec: TensorSpec
    direction: Direction
    offset: int


@dataclass(frozen=True)
class PlanGraph:
    """One call consuming exactly `tokens` steps. The graph with tokens = 1 is the step."""

    name: str
    tokens: int
    arena_bytes: int
    launches: tuple[PlanLaunch, ...]
    io: tuple[PlanIO, ...]


@dataclass(frozen=True)
class Plan:
    """Everything a bundle holds but the CPU library.

    target: name, triple, cpu, features, for people and tools.
    state:  slots with their offsets in the state block of `state_bytes` bytes.
    meta:   what else the compiler wants to keep, as JSON (tuning results, versions).
    """

    manifest: Manifest
    target: dict[str, Any]
    graphs: tuple[PlanGraph, ...]
    kernels: tuple[PlanKernel, ...]
    tensors: tuple[PlanTensor, ...]
    state: tuple[tuple[StateSlot, int], ...]
    state_bytes: int
    io_bytes: int
    tokenizer: Literal["bytes", "none"] = "none"
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> PlanGraph:
        return next(g for g in self.graphs if g.tokens == 1)

    @property
    def backend(self) -> Backend:
        """What runs every kernel."""
        return self.kernels[0].backend if self.kernels else "cpu"


def align(offset: int, alignment: int = ALIGNMENT) -> int:
    """The smallest multiple of `alignment` that is not below `offset`."""
    return -(-offset // alignment) * alignment
