"""Variants of kernels timed where they will run: a bundle of nothing but their launches, through its own driver.

Kernel i is graph i. Its variants take turns over memory of the real sizes; the first launch warms up and does not
count. What a step launches takes its turns over so many copies of the memory that the caches have forgotten a copy when
it comes again; the others share one, so that each finds the caches as the one before left them. Everything is run again
and again, and the median counts. The memory is a state slot, which the runtime fills: with floats of 0.5, whose bytes
are harmless as any dtype.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from devices.profile import load_profile
from devices.transports import Transport, open_transport
from edgeseq.bundle.encode import encode
from edgeseq.bundle.format import MODEL_FILE
from edgeseq.bundle.plan import Plan, PlanArg, PlanGraph, PlanIO, PlanLaunch, align
from edgeseq.bundle.tuning import Entry, Record, Tried
from edgeseq.bundle.writer import write_plan
from edgeseq.errors import DeviceError
from edgeseq.spec import Manifest, StateSlot, TensorSpec

from ..codegen import KernelSet
from ..ir import Arg, KernelRef, Storage
from ..link import link_driver
from ..targets import Target
from .subject import Subject

Progress = Callable[[str, int, int], None]
REPETITIONS = 15
COLD_BYTES, COPIES = 64 << 20, 256
TIMEOUT = 3600.0
IDENTITY = ("triple", "cpu", "features")
POSITION = TensorSpec("position", "int64", (1,), "position")


def identity(target: Target) -> dict[str, Any]:
    """What measurements are valid for."""
    return {key: value for key, value in target.facts().items() if key in IDENTITY}


def measured(subjects: Sequence[Subject], manifest: Manifest, target: Target, device: str, report: Progress) -> Record:
    """Time every variant of every subject on `device`, by its profile's threads. Raises DeviceError."""
    profile = load_profile(device)
    entries, threads = [], 0
    with open_transport(profile) as transport, tempfile.TemporaryDirectory(prefix="edgeseq-tune-") as folder:
        if subjects:
            write_bundle(subjects, manifest, target, Path(folder), report)
            handle = transport.push(Path(folder))
        for i, subject in enumerate(subjects):
            report("measure", i, len(subjects))
            threads, ns = run(transport, handle, i, subject)
            tried = tuple(Tried(*pair) for pair in zip(subject.choices, ns, strict=True))
            entries.append(Entry(subject.name, subject.ref.op, subject.fixed, tried))
        report("measure", 1, 1)
    return Record(profile.name, threads, REPETITIONS, identity(target), tuple(entries))


def run(transport: Transport, handle: str, index: int, subject: Subject) -> tuple[int, list[int]]:
    """(threads, median nanoseconds of each variant) of graph `index`, whose first launch is for warming up."""
    arguments = ["profile", "--graph", str(index), "-r", str(REPETITIONS), *transport.profile.pool_options()]
    try:
        said = transport.driver(handle, *arguments, timeout=TIMEOUT).stdout
    except DeviceError as error:
        raise DeviceError(f"{error.sentence} (while variants of {subject.name} were tried)", error.hint) from None
    try:
        lines = [json.loads(line) for line in said.splitlines()]
        taken = [[int(ns) for ns in line["launch_ns"][1:]] for line in lines]
        turns = len(subject.variants)
        if len(taken) != REPETITIONS or any(not row or len(row) % turns for row in taken):
            raise ValueError
        columns = [[ns for row in taken for ns in row[variant::turns]] for variant in range(turns)]
        return int(lines[0]["n_threads"]), [round(median(column)) for column in columns]
    except (KeyError, TypeError, ValueError):
        name = transport.profile.name
        raise DeviceError(f"the driver on {name} said something that is no measurement: {said[:80]!r}") from None


def write_bundle(
    subjects: Sequence[Subject], manifest: Manifest, target: Target, folder: Path, report: Progress
) -> None:
    """model.edgeseq and edgeseq-device in `folder`."""
    kernels = KernelSet(target)
    graphs, need = [], 0
    total = sum(len(s.variants) for s in subjects)
    for i, subject in enumerate(subjects):
        names = []
        for variant in subject.variants:
            report("variants", len(kernels.pointers), total)
            names.append(kernels.add(KernelRef(subject.ref.op, variant), len(subject.call.args)))
        memory = _Memory(subject, manifest)
        need = max(need, memory.nbytes)
        order = [(names[0], 0), *((n, i) for i, n in enumerate(names * memory.copies))]
        launches = tuple(
            PlanLaunch(n, (kernels.grids[n], 1, 1), (1, 1, 1), memory.arguments(turn % memory.copies))
            for n, turn in order
        )
        graphs.append(PlanGraph(str(i), i + 1, 64, launches, (PlanIO(POSITION, "in", 0),)))
    slot = StateSlot("memory", "float32", (need // 4,), init=0.5)
    plan = Plan(
        manifest=replace(manifest, context=0), target=target.facts(), graphs=tuple(graphs),
        kernels=kernels.plan_kernels(), tensors=(), state=((slot, 0),), state_bytes=need, io_bytes=align(1),
    )  # fmt: skip
    write_plan(plan, folder / MODEL_FILE)
    with tempfile.TemporaryDirectory(prefix="edgeseq-") as work:
        kernels.write_table(Path(work, "kernel_table.c"), encode(plan).plan_id)
        link_driver(target, kernels.write_code(Path(work), None), Path(work, "kernel_table.c"), folder)


class _Memory:
    """Where the storages of a subject's call lie, each at a place of its own, `copies` times; the position is the
    runtime's."""

    def __init__(self, subject: Subject, manifest: Manifest) -> None:
        self.args = subject.call.args
        self.positions = {s.name for s in manifest.step.signature.inputs if s.role == "position"}
        self.places: dict[Storage, int] = {}
        self.stride = 0
        for storage, nbytes in self._sizes().items():
            self.places[storage] = self.stride
            self.stride += align(nbytes)
        self.copies = min(COPIES, -(-COLD_BYTES // self.stride) + 1) if subject.cold else 1

    @property
    def nbytes(self) -> int:
        return self.copies * self.stride

    def _sizes(self) -> dict[Storage, int]:
        """Bytes of each storage that the call can see."""
        sizes: dict[Storage, int] = {}
        for value in (arg.value for arg in self.args):
            end = (value.offset + value.span) * value.item_bytes
            sizes[value.storage] = max(sizes.get(value.storage, 0), end, value.storage.nbytes)
        return sizes

    def arguments(self, copy: int) -> tuple[PlanArg, ...]:
        return tuple(self._argument(arg, copy * self.stride) for arg in self.args)

    def _argument(self, arg: Arg, base: int) -> PlanArg:
        value, storage = arg.value, arg.value.storage
        if storage.kind == "io" and storage.name in self.positions:
            return PlanArg("io", "r", None, 0, POSITION.nbytes)
        packed = storage.kind == "weight"  # a value of weights has the shape from before they were packed
        nbytes = storage.nbytes if packed else value.span * value.item_bytes
        offset = 0 if packed else value.offset * value.item_bytes
        return PlanArg("state", arg.access, None, base + self.places[storage] + offset, nbytes)
