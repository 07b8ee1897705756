"""Kernel references to one object file of C functions and the table that names them to the runtime."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path
from typing import Any

from edgeseq.bundle.plan import PlanKernel

from . import generic, lower
from .ir import GenericRef, KernelRef
from .targets import Target
from .tvm_api import TvmTarget


class KernelSet:
    """Every distinct kernel of a model: its C name, its grid, how many pointers it takes."""

    def __init__(self, target: Target) -> None:
        self.target = TvmTarget(self._tvm(target))
        self.features = target.features
        self.cores, self.pin = target.cores, target.pin
        self.names: dict[KernelRef | GenericRef, str] = {}
        self.grids: dict[str, int] = {}
        self.pointers: dict[str, int] = {}
        self.funcs: dict[str, Any] = {}

    def _tvm(self, target: Target) -> Any:
        return target.llvm

    def add(self, ref: KernelRef | GenericRef, n_args: int) -> str:
        """The C name of `ref`, building it the first time."""
        if ref not in self.names:
            name = self._name(ref)
            self.names[ref] = name
            self.pointers[name] = n_args
            self._build(name, ref)
        return self.names[ref]

    def _build(self, name: str, ref: KernelRef | GenericRef) -> None:
        if isinstance(ref, GenericRef):
            self.funcs[name] = lower.finish(generic.to_c_function(ref.func, name, lower.passes(self.target)))
            self.grids[name] = ref.grid
        else:
            built = importlib.import_module(f"{__package__}.kernels.{ref.op}").build(name, ref.params)
            self.funcs[name] = lower.lower(built.func, self.target)
            self.grids[name] = built.grid

    def threads(self, name: str) -> int:
        """Threads of a block."""
        return 1

    def plan_kernels(self) -> tuple[PlanKernel, ...]:
        return tuple(PlanKernel(name, n) for name, n in self.pointers.items())

    def _name(self, ref: KernelRef | GenericRef) -> str:
        if isinstance(ref, GenericRef):
            base = "fused_" + re.sub(r"\W+", "_", ref.label)[:48]
        else:
            base = describe(ref.op, ref.params)
        name, count = base, 2
        while name in self.pointers:
            name, count = f"{base}_v{count}", count + 1
        return name

    def write_code(self, work: Path, dump: Path | None) -> Path | None:
        """The object file to link, in `work`; dump: a folder for its assembly."""
        path = work / "kernels.o"
        self.write_object(path, dump / "kernels.s" if dump else None)
        return path

    def write_object(self, path: Path, assembly: Path | None = None) -> None:
        lower.emit_object(list(self.funcs.values()), self.target, path, assembly)

    def write_table(self, path: Path, plan_id: int) -> None:
        """C source of `es_linked_kernels`, in the order of the plan's kernels."""
        lines = ['#include "edgeseq.h"', ""]
        for name, n in self.pointers.items():
            lines.append(f"extern void {name}({', '.join(['void *'] * n)}, int32_t);")
        for name, n in self.pointers.items():
            pointers = ", ".join(f"a[{i}]" for i in range(n))
            lines.append(f"static void run_{name}(void *const *a, int32_t b, int32_t e) {{")
            lines.append(f"    for (; b < e; b++) {name}({pointers}, b);\n}}")
        entries = ",\n    ".join(f'{{"{name}", run_{name}}}' for name in self.pointers)
        features = ", ".join(f'"{f}"' for f in self.features) or "0"
        lines += [
            f"static const es_kernel_entry kernels[] = {{\n    {entries}\n}};",
            f"static const char *const features[] = {{{features}}};",
            f"static const int32_t cores[] = {{{', '.join(map(str, self.pin)) or '-1'}}};",
            "const es_kernel_table es_linked_kernels = {",
            f"    (uint32_t)sizeof(es_kernel_table), {plan_id}u, {len(self.pointers)}u, {len(self.features)}u,",
            f"    kernels, features, {self.cores or len(self.pin)}, {len(self.pin)}u, cores}};",
        ]
        path.write_text("\n".join(lines) + "\n")


def describe(op: str, params: Any) -> str:
    """A C name that tells what the kernel is."""
    own = getattr(params, "label", None)
    return own if isinstance(own, str) else "_".join([op, *_describe(params)])


def _describe(params: object) -> list[str]:
    """`t1 m3072 k768 bias`: fields with their values, switches by name when on; lengths and dtypes in short."""
    words = []
    for f in dataclasses.fields(params):  # type: ignore[arg-type]
        value = getattr(params, f.name)
        if value is True:
            words.append(f.name.lower())
        elif (
            isinstance(value, bool | float)
            or value == f.default
            or f.name.startswith("ld")
            or f.name in ("tile", "streams", "ahead", "chains")
        ):
            continue
        elif f.name == "wdtype" or f.name == "dtype":
            words.append(str(value))
        else:
            words.append(f"{f.name.lower()}{value}")
    return words
