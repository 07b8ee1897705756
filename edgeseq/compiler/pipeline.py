"""Compile: an export directory, or somebody else's ONNX file, to a bundle. The whole pipeline on one page.

| stage    | function                | file          | artefact                          |
|----------|-------------------------|---------------|-----------------------------------|
| read     | graph.load_graph        | graph.py      | Graph: nodes, static shapes       |
| or read  | foreign.import_onnx     | foreign/      | manifest and graph of one step    |
| lower    | lowering.Lowering.run   | lowering.py   | Calls: kernels with their values  |
| tune     | tuning.tune             | tuning/       | the fastest variants, on request  |
| place    | memory.plan_arena …     | memory.py     | offsets                           |
| generate | codegen.KernelSet       | codegen.py    | kernels.o, kernel_table.c           |
| plan     | _plan                   | pipeline.py   | bundle.plan.Plan                  |
| link     | link.link               | link.py       | libmodel.so, .a, edgeseq-device   |
| write    | bundle.writer           | bundle/       | model.edgeseq                     |
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from edgeseq.bundle.directory import new_bundle, write_facts
from edgeseq.bundle.encode import encode
from edgeseq.bundle.plan import Plan, PlanArg, PlanGraph, PlanIO, PlanLaunch, PlanTensor, Space, align
from edgeseq.bundle.tuning import KEY as TUNING
from edgeseq.bundle.writer import write_plan
from edgeseq.manifest import load_manifest
from edgeseq.spec import DTYPE_BYTES, GraphFile, Manifest

from . import dump as dumps
from .codegen import KernelSet
from .foreign.options import ImportOptions
from .gpu.argmax import NEXT, pick_next
from .gpu.codegen import GpuKernelSet
from .gpu.merge import merge
from .graph import Graph, Weight, load_graph
from .interrupts import held_interrupts
from .ir import Arg, Call, Storage
from .link import link
from .lowering import Lowering, Memory
from .memory import mark_outputs_only, place, plan_arena
from .pack import pack, packed_shape
from .targets import Target, resolve
from .tuning import Tuning, tune

Progress = Callable[[str, int, int], None]
_SPACES: dict[str, Space] = {"weight": "weights", "arena": "arena", "state": "state", "io": "io"}
_CARRIED = ("golden.safetensors", "tokenizer.json")


def compile_export(
    export_dir: Path,
    target: str,
    out: Path,
    *,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
    dump: Path | None = None,
) -> Path:
    """Compile the export in `export_dir` for `target` into the bundle directory `out`.

    target: "host", a device profile's name, or a profile file. tuning: choose kernels by measuring, or by what was
    measured before. dump: directory for the intermediate forms. Memory stays that of the largest tensor. Raises
    UsageError, CompileError, BundleError, and DeviceError when tuning; then nothing is left.
    """
    manifest = load_manifest(export_dir)

    def carry(folder: Path) -> None:
        for name in _CARRIED:
            if (export_dir / name).is_file():
                shutil.copyfile(export_dir / name, folder / name)

    return _compile(manifest, lambda g: load_graph(export_dir / g.file), target, out, carry, tuning, progress, dump)


def compile_onnx(
    path: Path,
    target: str,
    out: Path,
    options: ImportOptions,
    *,
    tuning: Tuning | None = None,
    progress: Progress | None = None,
    dump: Path | None = None,
) -> Path:
    """Compile the stateful ONNX file `path`, one step a call, for `target` into the bundle directory `out`.

    The bundle's golden is what onnxruntime makes of the file itself, where it can run it. Raises as compile_export.
    """
    from . import foreign

    resolve(target)
    imported = foreign.import_onnx(path, options)
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        foreign.save(imported, dump)

    def read(graph: GraphFile) -> Graph:
        return Graph(imported.model, imported.folder, graph.file)

    def carry(folder: Path) -> None:
        foreign.write_golden(path, imported, folder)

    return _compile(imported.manifest, read, target, out, carry, tuning, progress, dump)


def _compile(
    manifest: Manifest,
    read: Callable[[GraphFile], Graph],
    target: str,
    out: Path,
    carry: Callable[[Path], None],
    tuning: Tuning | None,
    progress: Progress | None,
    dump: Path | None,
) -> Path:
    """read: the graph of one of the manifest's files. carry: writes what else belongs into the bundle's folder."""
    chosen = resolve(target)
    with held_interrupts() as check:

        def report(what: str, done: int, total: int) -> None:
            check()
            if progress:
                progress(what, done, total)

        memory = Memory()
        lowered: list[tuple[GraphFile, list[Call], int]] = []
        graphs = sorted(manifest.graphs, key=lambda g: g.signature.tokens)
        for i, graph_file in enumerate(graphs):
            report("lower", i, len(graphs))
            lowering = Lowering(read(graph_file), graph_file.signature, memory, chosen)
            calls = lowering.run()
            if chosen.gpu:
                pick_next(lowering)
                merge(calls, chosen.gpu)
            mark_outputs_only(calls)
            lowered.append((graph_file, calls, plan_arena(calls)))
        meta: dict[str, Any] = {"tvm": version("apache-tvm")}
        if tuning is not None:
            every = [(g.signature.tokens, calls) for g, calls, _ in lowered]
            tuning = replace(tuning, device=tuning.device or target)
            meta[TUNING] = tune(every, manifest, chosen, tuning, report).to_json()
        kernels = GpuKernelSet(chosen) if chosen.gpu else KernelSet(chosen)
        total = sum(len(calls) for _, calls, _ in lowered)
        for i, call in enumerate(call for _, calls, _ in lowered for call in calls):
            report("kernels", i, total)
            kernels.add(call.kernel, len(call.args))
        if chosen.gpu:
            report("code", 0, 2)
        plan = _plan(manifest, chosen, memory, lowered, kernels, meta)
        if dump is not None:
            dumps.write(dump, lowered, kernels)
        with new_bundle(out) as folder, tempfile.TemporaryDirectory(prefix="edgeseq-") as work:
            _build(chosen, kernels, encode(plan).plan_id, folder, Path(work), report, dump)
            plan_id = write_plan(plan, folder / "model.edgeseq", report)
            write_facts(plan, plan_id, folder)
            carry(folder)
            check()
        return out


def _build(
    target: Target, kernels: KernelSet, plan_id: int, folder: Path, work: Path, report: Progress, dump: Path | None
) -> None:
    report("code", 0, 2)
    kernels.write_table(work / "kernel_table.c", plan_id)
    code = kernels.write_code(work, dump)
    report("code", 1, 2)
    link(target, code, work / "kernel_table.c", folder)
    report("code", 2, 2)


def _plan(
    manifest: Manifest,
    target: Target,
    memory: Memory,
    lowered: list[tuple[GraphFile, list[Call], int]],
    kernels: KernelSet,
    meta: dict[str, Any],
) -> Plan:
    slots = manifest.step.signature.state
    state_bytes = place([memory.slot(s.name, s.nbytes) for s in slots])
    io_bytes = place(memory.io.values())
    names = _tensor_names(memory)
    tensors = tuple(_tensor(names[s], memory.sources[s], s) for s in memory.weights.values())
    graphs = tuple(_graph(g, calls, arena, memory, kernels, names) for g, calls, arena in lowered)
    return Plan(
        manifest=manifest,
        target=target.facts(),
        graphs=graphs,
        kernels=kernels.plan_kernels(),
        tensors=tensors,
        state=tuple((s, memory.state[s.name].offset) for s in slots),
        state_bytes=state_bytes,
        io_bytes=io_bytes,
        tokenizer="bytes" if manifest.tokenizer == "bytes" else "none",
        meta=meta,
    )


def _tensor_names(memory: Memory) -> dict[Storage, str]:
    """A tensor packed in two layouts carries the layout in its name; constants of one name are numbered."""
    counts = Counter(s.name for s in memory.weights.values())
    names: dict[Storage, str] = {}
    taken: set[str] = set()
    for s in memory.weights.values():
        name = base = s.name if counts[s.name] == 1 else f"{s.name}@{s.layout}"
        number = 1
        while name in taken:
            number += 1
            name = f"{base}.{number}"
        taken.add(name)
        names[s] = name
    return names


def _tensor(name: str, sources: tuple[Weight, ...], storage: Storage) -> PlanTensor:
    shape = packed_shape(storage.layout, sources[0].shape)

    def data() -> np.ndarray:
        return pack(storage.layout, *(s.load().reshape(s.shape) for s in sources))

    return PlanTensor(name, storage.layout, sources[0].dtype, shape, storage.nbytes, data)


def _graph(
    graph: GraphFile,
    calls: list[Call],
    arena: int,
    memory: Memory,
    kernels: KernelSet,
    names: dict[Storage, str],
) -> PlanGraph:
    signature = graph.signature
    io = [PlanIO(s, "in", memory.io[s.name].offset) for s in signature.inputs if s.name in memory.io]
    io += [PlanIO(s, "out", memory.io[s.name].offset) for s in signature.outputs]
    if NEXT.name in memory.io:
        io.append(PlanIO(NEXT, "out", memory.io[NEXT.name].offset))
    launches = tuple(_launch(call, kernels, names) for call in calls)
    return PlanGraph(Path(graph.file).stem, signature.tokens, align(arena), launches, tuple(io))


def _launch(call: Call, kernels: KernelSet, names: dict[Storage, str]) -> PlanLaunch:
    name = kernels.names[call.kernel]
    args = tuple(_arg(a, names) for a in call.args)
    block = (kernels.threads(name), 1, 1)
    return PlanLaunch(name, (kernels.grids[name], 1, 1), block, args, call.outputs_only, call.traffic)


def _arg(arg: Arg, names: dict[Storage, str]) -> PlanArg:
    value, storage = arg.value, arg.value.storage
    if storage.kind == "weight":
        return PlanArg("weights", "r", names[storage], 0, storage.nbytes)
    item = DTYPE_BYTES[value.dtype]
    return PlanArg(_SPACES[storage.kind], arg.access, None, storage.offset + value.offset * item, value.span * item)
