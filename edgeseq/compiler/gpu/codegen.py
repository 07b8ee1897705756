"""Kernel references to one program for a GPU: OpenCL C source, or CUDA machine code and PTX."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from edgeseq.bundle.plan import PlanKernel
from edgeseq.errors import CompileError

from ..codegen import KernelSet
from ..ir import GenericRef, KernelRef
from ..lower import lower, passes
from ..targets import Target
from ..tvm_api import IRModule, PrimFunc, module_pass_sequence, tirx
from . import generic, nvrtc
from .batch import Generics
from .source import program


class GpuKernelSet(KernelSet):
    """Every distinct kernel of a model; `code` is compiled once, when everything is known."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        assert target.gpu is not None
        self.gpu = target.gpu
        self.block_threads: dict[str, int] = {}
        self._code: bytes | None = None

    def _tvm(self, target: Target) -> Any:
        assert target.gpu is not None
        if target.gpu.backend == "cuda":
            return {"kind": "cuda", "arch": f"sm_{target.gpu.sm[0]}", "max_num_threads": target.gpu.threads}
        return {"kind": "opencl", "max_num_threads": target.gpu.threads}

    def _build(self, name: str, ref: KernelRef | GenericRef) -> None:
        if isinstance(ref, GenericRef):
            self.funcs[name] = finish(generic.to_device_function(ref.func, name, passes(self.target)))
            self.grids[name], self.block_threads[name] = ref.grid, ref.threads
            return
        if isinstance(ref.params, Generics):
            built = ref.params.build(name, passes(self.target))
            self.funcs[name], self.grids[name], self.block_threads[name] = finish(built.func), built.grid, built.threads
            return
        try:
            module = importlib.import_module(f"{__package__}.{ref.op}")
        except ModuleNotFoundError:
            raise CompileError(
                f"the operator {ref.op} has no kernel for GPUs yet", "compile for a CPU target"
            ) from None
        built = module.build(name, ref.params, self.gpu)
        self.funcs[name] = lower(built.func, self.target, finish)
        self.grids[name], self.block_threads[name] = built.grid, built.threads

    def threads(self, name: str) -> int:
        return self.block_threads[name]

    def source(self) -> str:
        """The program text."""
        return program(list(self.funcs.values()), self.block_threads, self.gpu, self.target)

    def code(self) -> bytes:
        """What the plan carries: source text for OpenCL, an archive of images for CUDA."""
        if self._code is None:
            text = self.source()
            self._code = text.encode() if self.gpu.backend == "opencl" else nvrtc.images(text, self.gpu.sm)
        return self._code

    def plan_kernels(self) -> tuple[PlanKernel, ...]:
        kind = "source" if self.gpu.backend == "opencl" else "binary"
        return tuple(
            PlanKernel(name, n, self.gpu.backend, self.code(), kind)  # type: ignore[arg-type]
            for name, n in self.pointers.items()
        )

    def write_code(self, work: Path, dump: Path | None) -> Path | None:
        """Nothing to link: the code is in the plan."""
        if dump:
            (dump / ("kernels.cl" if self.gpu.backend == "opencl" else "kernels.cu")).write_text(self.source())
        return None

    def write_table(self, path: Path, plan_id: int) -> None:
        """The CPU library's table is empty: it has the runtime alone."""
        path.write_text(
            '#include "edgeseq.h"\n\n'
            "const es_kernel_table es_linked_kernels = {\n"
            f"    (uint32_t)sizeof(es_kernel_table), {plan_id}u, 0u, 0u, 0, 0, 0, 0u, 0}};\n"
        )


def finish(func: PrimFunc) -> PrimFunc:
    """Intrinsics lowered to what the program text calls them."""
    name = str(func.attrs["global_symbol"])
    (lowered,) = module_pass_sequence([tirx.transform.LowerIntrin()])(IRModule({name: func})).functions.values()
    return lowered.with_attr("global_symbol", name)
