"""PrimFuncs to an object file of plain C functions: no TVM symbol, no packed call, nothing to link but memcpy.

Source of the pass order: tvm/s_tir/pipeline.py of TVM 0.27, without MakePackedAPI and LowerTVMBuiltin.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from . import mathlib
from .tvm_api import IRModule, PrimFunc, TvmTarget, get_global_func, module_pass_sequence, s_tir, tirx


def _passes(target: TvmTarget, exact: bool) -> list:
    """exact: what is allocated is what is used, so nothing is to be cut down, which takes most of the time."""
    s, t = s_tir.transform, tirx.transform
    # threads of a GPU pass each other: shared memory that one has read for the last time, another is about to read
    reuse = [t.StorageRewrite()] if str(target.kind) == "llvm" else []
    return [
        t.BindTarget(target),
        s.CanonicalizeLoop(),
        s.LowerInitBlock(),
        s.PlanAndUpdateBufferAllocationLocation(),
        s.ConvertBlocksToOpaque(),
        *([] if exact else [s.CompactBufferAllocation()]),
        s.LowerMatchBuffer(),
        s.StmtSimplify(),
        s.LowerOpaqueBlock(),
        t.FlattenBuffer(),
        t.NarrowDataType(32),
        s.LoopPartition(),
        t.VectorizeLoop(True),
        *reuse,
        t.UnrollLoop(),
        t.StmtSimplify(),
        t.RemoveNoOp(),
        s.RewriteUnsafeSelect(),
        t.CommonSubexprElim(),
    ]


def passes(target: TvmTarget) -> Callable[[IRModule], IRModule]:
    """The passes up to, but without, the lowering of intrinsics."""
    return module_pass_sequence(_passes(target, exact=False))


def finish(func: PrimFunc) -> PrimFunc:
    """Intrinsics lowered and transcendentals expanded: ready for LLVM."""
    name = str(func.attrs["global_symbol"])
    module = module_pass_sequence([tirx.transform.LowerIntrin()])(IRModule({name: mathlib.mark(func)}))
    (lowered,) = module.functions.values()
    return mathlib.expand(lowered).with_attr("global_symbol", name)


def lower(func: PrimFunc, target: TvmTarget, finish: Callable[[PrimFunc], PrimFunc] = finish) -> PrimFunc:
    """One hand-built PrimFunc through all of it; finish: the last stage, which differs by the code generator."""
    name = str(func.attrs["global_symbol"])
    exact = str(target.kind) == "llvm"
    (lowered,) = module_pass_sequence(_passes(target, exact))(IRModule({name: func})).functions.values()
    return finish(lowered.with_attr("global_symbol", name))


def emit_object(funcs: list[PrimFunc], target: TvmTarget, path: Path, assembly: Path | None = None) -> None:
    """Write one relocatable object holding `funcs` (already lowered) as C functions of the same names."""
    module = IRModule({str(f.attrs["global_symbol"]): f for f in funcs})
    built = get_global_func("target.build.llvm")(module, target)
    if assembly is not None:
        assembly.write_text(built.inspect_source("asm"))
    built.write_to_file(str(path), "o")
