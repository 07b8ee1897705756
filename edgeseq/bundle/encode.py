"""Plan -> the sections of a bundle, all but the weights themselves. Same plan, same bytes."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any

from edgeseq.bundle import format as f
from edgeseq.bundle.plan import Plan, PlanArg, PlanGraph, PlanTensor, align
from edgeseq.errors import BundleError


class Strings:
    """The STRINGS section while it grows: equal names share one offset, offset 0 is the empty name."""

    def __init__(self) -> None:
        self._offsets = {"": 0}
        self.data = bytearray(b"\0")

    def __call__(self, name: str) -> int:
        if name not in self._offsets:
            if "\0" in name:
                raise BundleError(f"the name {name!r} holds a NUL, which a bundle cannot store")
            self._offsets[name] = len(self.data)
            self.data += name.encode() + b"\0"
        return self._offsets[name]


@dataclass(frozen=True)
class Encoded:
    """Section bytes by kind (without WEIGHTS), record counts by kind, and where each tensor lies in WEIGHTS."""

    sections: dict[int, bytes]
    counts: dict[int, int]
    tensor_offsets: dict[str, int]
    weights_bytes: int

    @property
    def plan_id(self) -> int:
        """CRC-32 of KERNELS, LAUNCHES and ARGS, in that order: stamped into the library that belongs to the plan."""
        crc = 0
        for kind in (f.KERNELS, f.LAUNCHES, f.ARGS):
            crc = zlib.crc32(self.sections[kind], crc)
        return crc


def encode(plan: Plan) -> Encoded:
    """Lay the plan out. Names that nothing defines raise BundleError; `decode` checks everything else."""
    strings = Strings()
    tensor_offsets, weights_bytes = _place(plan.tensors)
    records: dict[int, list[Any]] = {
        f.TENSORS: [_tensor(t, tensor_offsets[t.name], strings) for t in plan.tensors],
        f.SLOTS: [_slot(slot, offset, strings) for slot, offset in plan.state],
    }
    graphs = sorted(plan.graphs, key=lambda g: g.tokens)
    kernels, code = _kernels(plan, strings)
    records |= _graphs(graphs, strings)
    records |= _launches(graphs, {k.name: i for i, k in enumerate(plan.kernels)}, tensor_offsets)
    records[f.KERNELS] = kernels

    try:
        sections = {kind: f.pack(rows) for kind, rows in records.items()}
    except (struct.error, OverflowError) as error:
        raise BundleError(f"the plan holds a number its field cannot store: {error}") from None
    counts = {kind: len(rows) for kind, rows in records.items()}
    sections[f.META] = _meta(plan, graphs)
    sections[f.STRINGS] = bytes(strings.data)
    sections[f.CODE] = code
    sections[f.TOKENIZER] = _number(f.TOKENIZERS, plan.tokenizer, "tokenizer").to_bytes(4, "little")
    for kind in (f.META, f.STRINGS, f.CODE, f.TOKENIZER):
        counts[kind] = len(sections[kind])
    return Encoded(sections, counts, tensor_offsets, weights_bytes)


def plan_id(plan: Plan) -> int:
    """The number that ties a plan to its library; needs no weights."""
    return encode(plan).plan_id


def _place(tensors: tuple[PlanTensor, ...]) -> tuple[dict[str, int], int]:
    """Offsets of the tensors in WEIGHTS, one after the other, and the section's size."""
    offsets: dict[str, int] = {}
    end = 0
    for tensor in tensors:
        if tensor.name in offsets:
            raise BundleError(f"two tensors are called {tensor.name!r}")
        offsets[tensor.name] = align(end)
        end = align(end) + tensor.nbytes
    return offsets, end


def _number(names: tuple[str, ...], name: str, what: str) -> int:
    """The number of `name` in one of the format's enumerations."""
    if name not in names:
        raise BundleError(f"{what} {name!r} is not one of {', '.join(n for n in names if n)}")
    return names.index(name)


def _tensor(tensor: PlanTensor, offset: int, strings: Strings) -> f.TensorRecord:
    _check_rank(tensor.name, tensor.shape)
    return f.TensorRecord(
        strings(tensor.name), strings(tensor.layout), _number(f.DTYPES, tensor.dtype, "dtype"), len(tensor.shape),
        *f.dims4(tensor.shape), offset, tensor.nbytes,
    )  # fmt: skip


def _slot(slot: Any, offset: int, strings: Strings) -> f.SlotRecord:
    _check_rank(slot.name, slot.shape)
    axis = -1 if slot.axis is None else slot.axis
    return f.SlotRecord(
        strings(slot.name), _number(f.DTYPES, slot.dtype, "dtype"), len(slot.shape),
        _number(f.UPDATES, slot.update, "update"), axis, slot.init, *f.dims4(slot.shape), offset, slot.nbytes,
    )  # fmt: skip


def _check_rank(name: str, shape: tuple[int, ...]) -> None:
    if len(shape) > f.MAX_RANK:
        raise BundleError(f"{name!r} has rank {len(shape)}, a bundle stores at most {f.MAX_RANK}")


def _graphs(graphs: list[PlanGraph], strings: Strings) -> dict[int, list[Any]]:
    """GRAPHS and IO records. `graphs` is sorted by tokens: its order is the graphs' numbering."""
    rows: list[Any] = []
    io: list[Any] = []
    first = 0
    for index, graph in enumerate(graphs):
        rows.append(f.GraphRecord(strings(graph.name), graph.tokens, first, len(graph.launches), graph.arena_bytes))
        first += len(graph.launches)
        for entry in graph.io:
            spec = entry.spec
            _check_rank(spec.name, spec.shape)
            io.append(f.IoRecord(
                strings(spec.name), _number(f.DTYPES, spec.dtype, "dtype"), len(spec.shape),
                _number(f.ROLES, spec.role, "role"), index, _number(f.DIRECTIONS, entry.direction, "direction"),
                *f.dims4(spec.shape), entry.offset, spec.nbytes,
            ))  # fmt: skip
    return {f.GRAPHS: rows, f.IO: io}


def _kernels(plan: Plan, strings: Strings) -> tuple[list[Any], bytes]:
    """KERNELS records and the CODE section; kernels compiled together share their code's bytes."""
    rows: list[Any] = []
    code = bytearray()
    places: dict[bytes, int] = {}
    for kernel in plan.kernels:
        if kernel.code and kernel.code not in places:
            code += b"\0" * (align(len(code)) - len(code))
            places[kernel.code] = len(code)
            code += kernel.code
        rows.append(f.KernelRecord(
            strings(kernel.name), kernel.n_args, _number(f.BACKENDS, kernel.backend, "backend"),
            _number(f.CODE_KINDS, kernel.code_kind, "code kind"), places.get(kernel.code, 0), len(kernel.code),
        ))  # fmt: skip
    return rows, bytes(code)


def _launches(graphs: list[PlanGraph], kernels: dict[str, int], tensor_offsets: dict[str, int]) -> dict[int, list[Any]]:
    """LAUNCHES and ARGS records, graph after graph."""
    rows: list[Any] = []
    args: list[Any] = []
    for graph in graphs:
        for launch in graph.launches:
            if launch.kernel not in kernels:
                raise BundleError(f"graph {graph.name!r} launches the kernel {launch.kernel!r}, which the plan lacks")
            flags = f.LAUNCH_OUTPUTS_ONLY if launch.outputs_only else 0
            rows.append(f.LaunchRecord(
                kernels[launch.kernel], flags, *launch.grid, *launch.block, len(args), len(launch.args)
            ))  # fmt: skip
            args += [_arg(arg, tensor_offsets) for arg in launch.args]
    return {f.LAUNCHES: rows, f.ARGS: args}


def _arg(arg: PlanArg, tensor_offsets: dict[str, int]) -> f.ArgRecord:
    offset = arg.offset
    if arg.space == "weights":
        if arg.tensor not in tensor_offsets:
            raise BundleError(f"an argument names the tensor {arg.tensor!r}, which the plan lacks")
        offset += tensor_offsets[arg.tensor]
    return f.ArgRecord(
        _number(f.SPACES, arg.space, "space"), _number(f.ACCESSES, arg.access, "access"), offset, arg.nbytes
    )


def _meta(plan: Plan, graphs: list[PlanGraph]) -> bytes:
    """META: what people and tools want to know; launches' traffic stands here in the order of LAUNCHES."""
    meta = {
        "manifest": asdict(plan.manifest),
        "target": plan.target,
        "traffic": {g.name: [launch.traffic for launch in g.launches] for g in graphs},
        "meta": plan.meta,
    }
    return json.dumps(meta, sort_keys=True, separators=(",", ":")).encode()
