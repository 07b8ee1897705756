"""The one door to TVM 0.27: every other file of the compiler takes its TVM names from here.

TVM renames often; when it does, this file changes and no other.
"""

from __future__ import annotations

from .interrupts import held_interrupts

with held_interrupts():  # loading it is work of its C++ too
    import tvm
    import tvm.relax
    from tvm import relax, s_tir, tirx
    from tvm.ir import Call as TvmCall
    from tvm.ir import IRModule, PointerType, PrimType
    from tvm.relax.frontend.onnx import onnx_frontend
    from tvm.script.ir_builder import IRBuilder
    from tvm.target import Target as TvmTarget
    from tvm.tirx import PrimFunc
    from tvm.tirx.script.builder import ir as T
    from tvm_ffi.structural import structural_hash, structural_map

__all__ = [
    "IRBuilder", "IRModule", "PointerType", "PrimFunc", "PrimType", "T", "TvmCall", "TvmTarget",
    "get_global_func", "module_pass_sequence", "onnx_frontend", "relax", "s_tir", "structural_hash", "structural_map",
    "tirx", "tvm",
]  # fmt: skip

get_global_func = tvm.get_global_func


def module_pass_sequence(passes: list) -> tvm.ir.transform.Sequential:
    """Passes applied in order, as one callable on an IRModule."""
    return tvm.ir.transform.Sequential(passes)
