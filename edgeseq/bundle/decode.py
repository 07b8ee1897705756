"""Sections of a bundle -> Plan. The bytes may come from anybody: every number is checked, each defect has its sentence.

Sizes are Python integers and cannot overflow; the C reader makes the same checks with overflow tests.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from edgeseq.bundle import format as f
from edgeseq.bundle.plan import ALIGNMENT, Plan, PlanArg, PlanGraph, PlanIO, PlanKernel, PlanLaunch, PlanTensor
from edgeseq.errors import BundleError
from edgeseq.manifest import parse_json, parse_manifest
from edgeseq.spec import DTYPE_BYTES, StateSlot, TensorSpec

Buffer = bytes | memoryview
MAX_BLOCKS = (1 << 31) - 1
MAX_GROUP, MAX_GRID_YZ, MAX_BLOCK_Z = 1024, 65535, 64
"""Limits of a GPU's launch, the last two CUDA's."""
TRAFFIC_KEYS = ("weights", "state", "kv", "kv_rows", "activations")


def decode(
    sections: Mapping[int, Buffer],
    header: f.Header,
    weights_bytes: int,
    weights: Callable[[int, int], Buffer] | None = None,
) -> Plan:
    """The plan in `sections` (all kinds but WEIGHTS). `weights(offset, nbytes)` reads from WEIGHTS when asked."""
    return _Decoder(sections, header, weights_bytes, weights or _no_weights).plan()


def _no_weights(offset: int, nbytes: int) -> Buffer:
    raise BundleError(f"the weights at offset {offset} are not here")


class _Decoder:
    """Reads one section after the other; later ones refer to earlier ones."""

    def __init__(
        self,
        sections: Mapping[int, Buffer],
        header: f.Header,
        weights_bytes: int,
        weights: Callable[[int, int], Buffer],
    ) -> None:
        self.header = header
        self.weights_bytes = weights_bytes
        self.weights = weights
        self.code = bytes(sections[f.CODE])
        self.strings = _strings(bytes(sections[f.STRINGS]))
        self.rows = {kind: f.unpack(record, sections[kind]) for kind, record in f.RECORDS.items()}
        self.meta = parse_json(bytes(sections[f.META]), "META")
        self.tokenizer = bytes(sections[f.TOKENIZER])

    def plan(self) -> Plan:
        if not isinstance(self.meta, dict):
            raise BundleError("META is not a JSON object")
        self.tensors = [self._tensor(r) for r in self.rows[f.TENSORS]]
        self.tensor_ends = [r.offset + r.bytes for r in self.rows[f.TENSORS]]
        _unique("tensor", (t.name for t in self.tensors))
        _increasing(self.rows[f.TENSORS], self.tensors)
        self.kernels = [self._kernel(r) for r in self.rows[f.KERNELS]]
        self._one_backend(self.rows[f.KERNELS])
        _unique("kernel", (k.name for k in self.kernels))
        state = [(self._slot(r), r.offset) for r in self.rows[f.SLOTS]]
        _unique("state slot", (s.name for s, _ in state))
        _disjoint(state)
        graphs = self._graphs()
        if len(self.tokenizer) < 4:
            raise BundleError(f"the TOKENIZER section has {len(self.tokenizer)} bytes, expected at least 4")
        return Plan(
            manifest=self._manifest(),
            target=self._mapping("target"),
            graphs=tuple(graphs),
            kernels=tuple(self.kernels),
            tensors=tuple(self.tensors),
            state=tuple(state),
            state_bytes=self.header.state_bytes,
            io_bytes=self.header.io_bytes,
            tokenizer=_name(f.TOKENIZERS, int.from_bytes(self.tokenizer[:4], "little"), "tokenizer"),  # type: ignore[arg-type]
            meta=self._mapping("meta"),
        )

    def _mapping(self, key: str) -> dict[str, Any]:
        value = self.meta.get(key)
        if not isinstance(value, dict):
            raise BundleError(f"META has no object {key!r}")
        return value

    def _manifest(self) -> Any:
        manifest = parse_manifest(self._mapping("manifest"), "META")
        if bytes.fromhex(manifest.model_id) != self.header.model_id:
            raise BundleError(f"META names the model {manifest.model_id}, the header {self.header.model_id.hex()}")
        if manifest.context != self.header.context:
            raise BundleError(f"META says context {manifest.context}, the header {self.header.context}")
        return manifest

    def _string(self, offset: int, what: str) -> str:
        if offset >= len(self.strings):
            raise BundleError(f"the name of {what} lies at {offset}, STRINGS has {len(self.strings)} bytes")
        raw = self.strings[offset : self.strings.index(b"\0", offset)]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise BundleError(f"the name of {what} is not UTF-8") from None

    def _named(self, offset: int, what: str) -> str:
        name = self._string(offset, what)
        if not name:
            raise BundleError(f"{what} has no name")
        return name

    def _tensor(self, r: f.TensorRecord) -> PlanTensor:
        name = self._named(r.name, "a tensor")
        _placed(f"tensor {name!r}", r.offset, r.bytes, self.weights_bytes, "WEIGHTS")
        dtype = _name(f.DTYPES, r.dtype, f"dtype of tensor {name!r}")
        layout = self._string(r.layout, f"the layout of {name!r}")

        def data() -> Buffer:
            return self.weights(r.offset, r.bytes)

        return PlanTensor(name, layout, dtype, _shape(r, name), r.bytes, data)

    def _slot(self, r: f.SlotRecord) -> StateSlot:
        name = self._named(r.name, "a state slot")
        shape, dtype = _typed(r, f"state slot {name!r}")
        _placed(f"state slot {name!r}", r.offset, r.bytes, self.header.state_bytes, "the state block")
        update = _name(f.UPDATES, r.update, f"update of state slot {name!r}")
        if (update == "overwrite") != (r.axis == -1) or not -1 <= r.axis < len(shape):
            raise BundleError(f"state slot {name!r} has axis {r.axis} with update {update!r} and rank {len(shape)}")
        if math.isnan(r.init):
            raise BundleError(f"state slot {name!r} starts as NaN")
        return StateSlot(name, dtype, shape, r.init, update, None if r.axis == -1 else r.axis)  # type: ignore[arg-type]

    def _kernel(self, r: f.KernelRecord) -> PlanKernel:
        name = self._named(r.name, "a kernel")
        backend = _name(f.BACKENDS, r.backend, f"backend of kernel {name!r}")
        kind = _name(f.CODE_KINDS, r.code, f"code kind of kernel {name!r}")
        if r.code_offset + r.code_bytes > len(self.code):
            raise BundleError(
                f"the code of kernel {name!r} ends at {r.code_offset + r.code_bytes}, CODE has {len(self.code)} bytes"
            )
        if (backend == "cpu") != (r.code_bytes == 0) or (kind == "none") != (r.code_bytes == 0):
            raise BundleError(f"kernel {name!r} for {backend} has {r.code_bytes} bytes of {kind} code")
        code = self.code[r.code_offset : r.code_offset + r.code_bytes]
        return PlanKernel(name, r.n_args, backend, code, kind)  # type: ignore[arg-type]

    def _one_backend(self, rows: list[f.KernelRecord]) -> None:
        """A plan is for the CPU or for one GPU, whose kernels are one piece of code of its kind."""
        for r, kernel in zip(rows, self.kernels, strict=True):
            if r.backend != rows[0].backend:
                raise BundleError(f"kernel {kernel.name!r} is for {kernel.backend}, the first for another backend")
            place = (r.code_offset, r.code_bytes)
            if r.backend and (r.code != r.backend or place != (rows[0].code_offset, rows[0].code_bytes)):
                raise BundleError(f"kernel {kernel.name!r} has code of its own or of the wrong kind")

    def _graphs(self) -> list[PlanGraph]:
        rows = self.rows[f.GRAPHS]
        tokens = [r.tokens for r in rows]
        if sorted(set(tokens)) != tokens or tokens[:1] != [1]:
            raise BundleError(f"graphs consume {tokens} tokens, expected increasing numbers that start with 1")
        io: list[list[PlanIO]] = [[] for _ in rows]
        for r in self.rows[f.IO]:
            if r.graph >= len(rows):
                raise BundleError(f"an input or output belongs to graph {r.graph}, there are {len(rows)}")
            io[r.graph].append(self._io(r))
        traffic = self._mapping("traffic")
        graphs: list[PlanGraph] = []
        self.next_launch = self.next_arg = 0
        for r, entries in zip(rows, io, strict=True):
            name = self._named(r.name, "a graph")
            launches = self._launches(r, name, traffic.get(name))
            graphs.append(PlanGraph(name, r.tokens, r.arena_bytes, launches, tuple(entries)))
        _unique("graph", (g.name for g in graphs))
        _next_tokens(graphs)
        _exhausted("LAUNCHES", self.next_launch, len(self.rows[f.LAUNCHES]))
        _exhausted("ARGS", self.next_arg, len(self.rows[f.ARGS]))
        return graphs

    def _io(self, r: f.IoRecord) -> PlanIO:
        name = self._named(r.name, "an input or output")
        shape, dtype = _typed(r, f"{name!r}")
        _placed(f"{name!r}", r.offset, r.bytes, self.header.io_bytes, "the io block")
        role = _name(f.ROLES, r.role, f"role of {name!r}")
        direction = _name(f.DIRECTIONS, r.direction, f"direction of {name!r}")
        return PlanIO(TensorSpec(name, dtype, shape, role), direction, r.offset)  # type: ignore[arg-type]

    def _launches(self, r: f.GraphRecord, graph: str, traffic: Any) -> tuple[PlanLaunch, ...]:
        rows = self.rows[f.LAUNCHES]
        if r.first_launch != self.next_launch or r.first_launch + r.n_launches > len(rows):
            raise BundleError(
                f"graph {graph!r} has launches {r.first_launch}+{r.n_launches}, "
                f"expected them to follow {self.next_launch} and to end by {len(rows)}"
            )
        self.next_launch += r.n_launches
        moved = _traffic(traffic, graph, r.n_launches)
        mine = rows[r.first_launch : self.next_launch]
        return tuple(self._launch(row, r, graph, bytes_) for row, bytes_ in zip(mine, moved, strict=True))

    def _launch(self, r: f.LaunchRecord, graph: f.GraphRecord, name: str, traffic: dict[str, int]) -> PlanLaunch:
        if r.kernel >= len(self.kernels):
            raise BundleError(f"graph {name!r} launches kernel {r.kernel}, there are {len(self.kernels)}")
        kernel = self.kernels[r.kernel]
        grid, block = (r.grid_x, r.grid_y, r.grid_z), (r.block_x, r.block_y, r.block_z)
        if min(grid + block) < 1 or max(math.prod(grid), math.prod(block)) > MAX_BLOCKS:
            raise BundleError(f"graph {name!r} launches {kernel.name!r} over the grid {grid} and block {block}")
        high = max(grid[1:]) > MAX_GRID_YZ or block[2] > MAX_BLOCK_Z
        if kernel.backend != "cpu" and (math.prod(block) > MAX_GROUP or (kernel.backend == "cuda" and high)):
            raise BundleError(f"graph {name!r} launches {kernel.name!r} over {grid} x {block}, beyond {kernel.backend}")
        if kernel.backend == "cpu" and grid[1:] + block != (1, 1, 1, 1, 1):
            raise BundleError(f"graph {name!r} launches the CPU kernel {kernel.name!r} over {grid} x {block}")
        if r.flags & ~f.LAUNCH_OUTPUTS_ONLY:
            raise BundleError(f"graph {name!r} launches {kernel.name!r} with unknown flags {r.flags:#x}")
        rows = self.rows[f.ARGS]
        if r.n_args != kernel.n_args:
            raise BundleError(
                f"graph {name!r} gives {kernel.name!r} {r.n_args} arguments, the kernel takes {kernel.n_args}"
            )
        if r.first_arg != self.next_arg or r.first_arg + r.n_args > len(rows):
            raise BundleError(
                f"a launch of graph {name!r} has arguments {r.first_arg}+{r.n_args}, "
                f"expected them to follow {self.next_arg} and to end by {len(rows)}"
            )
        self.next_arg += r.n_args
        args = tuple(self._arg(row, graph.arena_bytes, name) for row in rows[r.first_arg : self.next_arg])
        return PlanLaunch(kernel.name, grid, block, args, bool(r.flags & f.LAUNCH_OUTPUTS_ONLY), traffic)

    def _arg(self, r: f.ArgRecord, arena_bytes: int, graph: str) -> PlanArg:
        space = _name(f.SPACES, r.space, f"space of an argument in graph {graph!r}")
        access = _name(f.ACCESSES, r.access, f"access of an argument in graph {graph!r}")
        sizes = {
            "weights": self.weights_bytes,
            "arena": arena_bytes,
            "state": self.header.state_bytes,
            "io": self.header.io_bytes,
        }
        if r.bytes < 1 or r.offset + r.bytes > sizes[space]:
            raise BundleError(
                f"graph {graph!r} passes {r.bytes} bytes at {r.offset} of {space}, which has {sizes[space]}"
            )
        if space != "weights":
            return PlanArg(space, access, None, r.offset, r.bytes)  # type: ignore[arg-type]
        if access != "r":
            raise BundleError(f"graph {graph!r} writes to weights at {r.offset}")
        index = bisect_right(self.rows[f.TENSORS], r.offset, key=lambda t: t.offset) - 1
        if index < 0 or r.offset + r.bytes > self.tensor_ends[index]:
            raise BundleError(
                f"graph {graph!r} passes {r.bytes} bytes at {r.offset} of weights, outside any one tensor"
            )
        tensor = self.rows[f.TENSORS][index]
        return PlanArg("weights", "r", self.tensors[index].name, r.offset - tensor.offset, r.bytes)


def _next_tokens(graphs: list[PlanGraph]) -> None:
    """The role `next`: one integer like the tokens, an output of every graph or of none."""
    found = [[e for e in graph.io if e.spec.role == "next"] for graph in graphs]
    if len({len(entries) for entries in found}) > 1 or max(map(len, found), default=0) > 1:
        raise BundleError("the next token is not an output of every graph, once")
    for graph, entries in zip(graphs, found, strict=True):
        tokens = {e.spec.dtype for e in graph.io if e.spec.role == "tokens"}
        for entry in entries:
            if entry.direction != "out" or math.prod(entry.spec.shape) != 1 or tokens != {entry.spec.dtype}:
                raise BundleError(f"{entry.spec.name!r} of graph {graph.name!r} cannot be the next token")


def _strings(data: bytes) -> bytes:
    if not data or data[0] != 0 or data[-1] != 0:
        raise BundleError("STRINGS does not start and end with a NUL")
    return data


def _name(names: tuple[str, ...], number: int, what: str) -> str:
    if number >= len(names) or not names[number]:
        raise BundleError(f"the {what} is {number}, which this version does not know")
    return names[number]


def _shape(r: Any, what: str) -> tuple[int, ...]:
    dims = (r.d0, r.d1, r.d2, r.d3)
    if r.rank > f.MAX_RANK:
        raise BundleError(f"{what} has rank {r.rank}, the largest is {f.MAX_RANK}")
    if min(dims[: r.rank], default=1) < 1 or any(dims[r.rank :]):
        raise BundleError(f"{what} has rank {r.rank} with dimensions {dims}")
    return dims[: r.rank]


def _typed(r: Any, what: str) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of a record whose bytes must be exactly its elements."""
    shape, dtype = _shape(r, what), _name(f.DTYPES, r.dtype, f"dtype of {what}")
    if math.prod(shape) * DTYPE_BYTES[dtype] != r.bytes:
        raise BundleError(f"{what} is {dtype} {list(shape)} but has {r.bytes} bytes")
    return shape, dtype


def _placed(what: str, offset: int, nbytes: int, size: int, where: str) -> None:
    if nbytes < 1 or offset + nbytes > size:
        raise BundleError(f"{what} takes {nbytes} bytes at {offset} of {where}, which has {size}")
    if offset % ALIGNMENT:
        raise BundleError(f"{what} lies at {offset} of {where}, not a multiple of {ALIGNMENT}")


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleError(f"two {what}s are called {name!r}")
        seen.add(name)


def _disjoint(state: list[tuple[StateSlot, int]]) -> None:
    end, before = 0, ""
    for slot, offset in sorted(state, key=lambda entry: entry[1]):
        if offset < end:
            raise BundleError(f"the state slots {before!r} and {slot.name!r} overlap")
        end, before = offset + slot.nbytes, slot.name


def _increasing(rows: list[f.TensorRecord], tensors: list[PlanTensor]) -> None:
    end = 0
    for row, tensor in zip(rows, tensors, strict=True):
        if row.offset < end:
            raise BundleError(f"tensor {tensor.name!r} starts at {row.offset}, before the one in front of it ends")
        end = row.offset + row.bytes


def _exhausted(section: str, used: int, count: int) -> None:
    if used != count:
        raise BundleError(f"{section} has {count} records, {used} of them belong to a graph")


def _traffic(value: Any, graph: str, n_launches: int) -> list[dict[str, int]]:
    if not isinstance(value, list) or len(value) != n_launches:
        raise BundleError(f"META has no traffic for the {n_launches} launches of graph {graph!r}")
    for entry in value:
        if not isinstance(entry, dict) or any(
            key not in TRAFFIC_KEYS or type(number) is not int or number < 0 for key, number in entry.items()
        ):
            raise BundleError(f"META has malformed traffic for graph {graph!r}: {str(entry)[:80]}")
    return value
