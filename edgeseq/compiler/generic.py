"""The path for operators no rule knows: TVM imports, legalises and fuses them; a kernel per fused function.

Nothing here depends on a family, so any ONNX graph with static shapes compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeseq.errors import CompileError

from .graph import Graph, Node
from .tvm_api import IRModule, PrimFunc, TvmCall, TvmTarget, module_pass_sequence, onnx_frontend, relax, s_tir, structural_map, tirx, tvm

ELEMENTS_PER_BLOCK = 4096
LANES = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class FusedCall:
    """One fused function and the names it reads and writes; `#n` names stand between the calls of one group."""

    label: str
    func: PrimFunc
    grid: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class FusedGroup:
    """What a run of nodes became: calls in order, types of the `#n` names, constants among them, output -> name."""

    calls: tuple[FusedCall, ...]
    intermediates: dict[str, tuple[str, tuple[int, ...]]]
    constants: dict[str, np.ndarray]
    aliases: dict[str, str]


def fuse(graph: Graph, nodes: list[Node], outputs: list[str]) -> FusedGroup:
    """Compile `nodes` (a convex part of `graph`) to fused functions producing `outputs`."""
    module, inputs = _import(graph, nodes, outputs)
    main = module["main"]
    names: dict[Any, str] = dict(zip(main.params, inputs, strict=True))
    walker = _Walker(module, names, outputs)
    for block in main.body.blocks:
        for binding in block.bindings:
            walker.visit(binding.var, binding.value)
    return walker.finish(main.body.body)


def _import(graph: Graph, nodes: list[Node], outputs: list[str]) -> tuple[IRModule, list[str]]:
    produced = {o for n in nodes for o in n.outputs}
    read = dict.fromkeys(i for n in nodes for i in n.inputs if i and i not in produced)
    constants = {i: graph.constant(i) for i in read if i in graph.weights}
    inputs = [i for i in read if constants.get(i) is None]

    def info(name: str) -> onnx.ValueInfoProto:
        dtype, shape = graph.types[name]
        return helper.make_tensor_value_info(plain[name], helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)

    # TVM wants identifiers and folds names into functions; equal layers shall give equal functions.
    plain = {name: f"t{i}" for i, name in enumerate(dict.fromkeys([*read, *(o for n in nodes for o in n.outputs)]))}
    small = [numpy_helper.from_array(np.asarray(c, order="C"), plain[n]) for n, c in constants.items() if c is not None]
    part = helper.make_graph([_renamed(n.proto, plain) for n in nodes], "part", [info(i) for i in inputs], [info(o) for o in outputs], small)
    model = helper.make_model(part, opset_imports=[helper.make_opsetid("", 21)])
    try:
        module = onnx_frontend.from_onnx(model)
    except Exception as error:  # the importer raises whatever its converters meet
        ops = ", ".join(sorted({n.op for n in nodes}))
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise CompileError(f"{graph.label}: no rule and no TVM converter for one of {ops}: {reason}") from error
    t = relax.transform
    passes = [
        t.DecomposeOpsForInference(), t.FoldConstant(), t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FoldConstant(),
        t.FuseOps(), t.FuseTIR(), t.DeadCodeElimination(),
    ]  # fmt: skip
    with TvmTarget({"kind": "llvm"}):
        return module_pass_sequence(passes)(module), inputs


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(i, i) for i in node.input]
    copy.output[:] = [names.get(o, o) for o in node.output]
    copy.name = ""
    return copy


class _Walker:
    """Turns the bindings of a legalised Relax function into calls and names."""

    def __init__(self, module: IRModule, names: dict[Any, str], outputs: list[str]) -> None:
        self.module, self.names, self.outputs = module, names, outputs
        self.calls: list[FusedCall] = []
        self.intermediates: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.constants: dict[str, np.ndarray] = {}
        self.tuples: dict[Any, list[Any]] = {}

    def visit(self, var: Any, value: Any) -> None:
        if isinstance(value, relax.expr.Tuple) or type(value).__name__ == "Tuple":
            self.tuples[var] = [self.name(f) for f in value.fields]
        elif type(value).__name__ == "TupleGetItem":
            self.names[var] = self.tuples[value.tuple_value][value.index]
        elif getattr(getattr(value, "op", None), "name", "") == "relax.call_tir":
            self._call(var, value)
        elif value in self.names or hasattr(value, "value"):
            self.names[var] = self.name(value)
        else:
            raise CompileError(f"TVM left {value} unlowered", "report the operator; it needs a rule")

    def _call(self, var: Any, call: Any) -> None:
        func = self.module[call.args[0]]
        inputs = tuple(self.name(a) for a in call.args[1].fields)
        types = call.ty_args[0]
        fields = list(types.fields) if hasattr(types, "fields") else [types]
        outputs = []
        for t in fields:
            name = f"#{len(self.intermediates)}"
            self.intermediates[name] = (str(t.dtype), tuple(int(d) for d in t.shape))
            outputs.append(name)
        if len(outputs) == 1:
            self.names[var] = outputs[0]
        else:
            self.tuples[var] = outputs
        scheduled, grid = schedule(func)
        label = str(call.args[0].name_hint).removeprefix("fused_")
        self.calls.append(FusedCall(label, scheduled, grid, inputs, tuple(outputs)))

    def name(self, expr: Any) -> str:
        if expr in self.names:
            return self.names[expr]
        if not hasattr(expr, "value"):
            raise CompileError(f"TVM reads {type(expr).__name__} where a tensor is expected", "report the graph")
        array = np.ascontiguousarray(expr.value.numpy())
        name = f"#{len(self.intermediates)}"
        self.intermediates[name] = (str(array.dtype), array.shape)
        self.constants[name] = array
        return name

    def finish(self, result: Any) -> FusedGroup:
        produced = self.tuples.get(result) or [self.name(result)]
        return FusedGroup(tuple(self.calls), self.intermediates, self.constants, dict(zip(self.outputs, produced, strict=True)))


def schedule(func: PrimFunc) -> tuple[PrimFunc, int]:
    """Inline what can be, split a lone elementwise block into a grid of vectorised blocks; else one serial block."""
    sch = s_tir.Schedule(func)
    root = sch.get_sblock("root")
    for block in sch.get_child_blocks(root):
        try:
            sch.compute_inline(block)
        except Exception:  # not inlinable: a reduction, or an output
            continue
    blocks = sch.get_child_blocks(root)
    if len(blocks) != 1 or not _spatial(sch, blocks[0]):
        return sch.mod["main"], 1
    fused = sch.fuse(*sch.get_loops(blocks[0])) if sch.get_loops(blocks[0]) else None
    if fused is None:
        return sch.mod["main"], 1
    extent = int(sch.get(fused).extent)
    lanes = next(n for n in LANES if extent % n == 0)
    units = extent // lanes
    grid = next(g for g in range(max(1, min(units, extent // ELEMENTS_PER_BLOCK)), 0, -1) if units % g == 0)
    outer, middle, inner = sch.split(fused, [grid, units // grid, lanes])
    if lanes > 1:
        sch.vectorize(inner)
    if grid > 1:
        sch.bind(outer, "blockIdx.x")
    return sch.mod["main"], grid


def _spatial(sch: Any, block: Any) -> bool:
    return all(int(v.iter_type) == 0 for v in sch.get(block).iter_vars)


def to_c_function(func: PrimFunc, name: str, lower_passes: Callable[[IRModule], IRModule]) -> PrimFunc:
    """Lower a scheduled PrimFunc of buffers to `void name(pointers…, int32 block)`, still without intrinsics lowered."""
    func = func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)
    (func,) = lower_passes(IRModule({name: func})).functions.values()
    block = tirx.Var("block", "int32")
    pointers: dict[Any, Any] = {}
    for p in func.params:
        pointers[p] = tirx.Var(p.name, tvm.ir.PointerType(tvm.ir.PrimType(str(p.ty.dtype)), "global"))
    blocks: list[Any] = []

    def data(call: Any) -> Any:
        if getattr(call.op, "name", "") == "tirx.buffer_data" and call.args[0] in pointers:
            return pointers[call.args[0]]
        return call

    def thread(attr: Any) -> Any:
        if attr.attr_key != "thread_extent":
            return attr
        blocks.append(attr.node.var)
        return attr.body

    body = structural_map(func.body, [(TvmCall, data), (tirx.AttrStmt, thread)])
    if blocks:
        old, new = blocks[0], tirx.Cast(str(blocks[0].ty.dtype), block) if str(blocks[0].ty.dtype) != "int32" else block
        body = structural_map(body, [(tvm.ir.Var, lambda v: new if v.same_as(old) else v)])
    made = tirx.PrimFunc([*pointers.values(), block], body)
    return made.with_attr("global_symbol", name).with_attr("tirx.noalias", True).with_attr("target", func.attrs["target"])
