"""Kernels without barriers that do not depend on one another, in one launch: each has its own range of blocks.

`Batch` is of kernels written here, `Generics` of those that TVM derived.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from ..ir import GenericRef
from ..tvm_api import IRModule, PrimFunc, T, structural_map, tirx, tvm
from . import Built
from .generic import to_device_function


@dataclass(frozen=True)
class Batch:
    """parts: op and parameters of each kernel; their arguments follow one another, each as `<part>.<name>`."""

    parts: tuple[tuple[str, Any], ...]

    @property
    def args(self) -> tuple[str, ...]:
        return tuple(f"{i}.{a}" for i, (_, p) in enumerate(self.parts) for a in p.args)

    @property
    def label(self) -> str:
        """Every part's operator and the first's sizes, as a C name."""
        from ..codegen import describe

        names = [op for op, _ in self.parts]
        return f"{'_'.join(dict.fromkeys(names))}_x{len(names)}_{describe(*self.parts[0])}"


@dataclass(frozen=True)
class Generics:
    """Kernels that TVM derived; their arguments follow one another."""

    parts: tuple[GenericRef, ...]

    @property
    def label(self) -> str:
        """The number of parts and what the first does, as a C name."""
        return f"fused_x{len(self.parts)}_{self.parts[0].label}"[:54]

    def build(self, name: str, lower_passes: Callable[[IRModule], IRModule]) -> Built:
        """The device function, intrinsics not yet lowered."""
        built = [Built(to_device_function(p.func, name, lower_passes), p.grid, p.threads) for p in self.parts]
        made = together(name, built)
        (func,) = tirx.transform.ConvertSSA()(IRModule({name: made.func})).functions.values()  # equal parts share names
        return Built(func, made.grid, made.threads)


def build_part(op: str, params: Any, gpu: Any) -> Built:
    """One kernel by itself."""
    built: Built = importlib.import_module(f"{__package__}.{op}").build("part", params, gpu)
    return built


def build(name: str, p: Batch, gpu: Any) -> Built:
    """Every part has as many threads in a block, which `merge` sees to."""
    built = [build_part(op, params, gpu) for op, params in p.parts]
    assert len({b.threads for b in built}) == 1
    return together(name, built)


def together(name: str, built: list[Built]) -> Built:
    """One function for all parts; a block has as many threads as the widest asks for."""
    threads, grid = max(b.threads for b in built), sum(b.grid for b in built)
    block, thread = tirx.Var("block", "int32"), tirx.Var("thread", "int32")
    starts = [0, *accumulate(b.grid for b in built)]
    bodies = [_body(b.func, block - start, thread) for b, start in zip(built, starts, strict=False)]
    for i, b in enumerate(built):
        if b.threads < threads:
            bodies[i] = tirx.IfThenElse(thread < b.threads, bodies[i], None)
    chosen = bodies[-1]
    for body, end in zip(reversed(bodies[:-1]), reversed(starts[1:-1]), strict=True):
        chosen = tirx.IfThenElse(block < end, body, chosen)
    for var, tag, extent in ((thread, "threadIdx.x", threads), (block, "blockIdx.x", grid)):
        axis = tirx.IterVar((0, extent), var, 1, tag)
        chosen = tirx.AttrStmt(axis, "thread_extent", T.int32(extent), chosen)
    params = [v for b in built for v in b.func.params]
    func = tirx.PrimFunc(params, chosen).with_attrs(built[0].func.attrs).with_attr("global_symbol", name)
    return Built(func, grid, threads)


def _body(func: PrimFunc, block: Any, thread: Any) -> Any:
    """What stands within the function's launch, for these indices."""
    found: list[Any] = []

    def strip(attr: Any) -> Any:
        if attr.attr_key != "thread_extent":
            return attr
        found.append(attr.node)
        return attr.body

    body = structural_map(func.body, [(tirx.AttrStmt, strip)])
    by = {str(axis.thread_tag): axis.var for axis in found}

    def settle(v: Any) -> Any:
        if v.same_as(by["blockIdx.x"]):
            return block
        return thread if v.same_as(by["threadIdx.x"]) else v

    return structural_map(body, [(tvm.ir.Var, settle)])
