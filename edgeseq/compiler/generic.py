"""The path for operators no rule knows: TVM imports, legalises and fuses them; a kernel per fused function.

Nothing here depends on a family, so any ONNX graph with static shapes compiles.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgeseq.errors import CompileError
from edgeseq.spec import DTYPE_BYTES

from .graph import Graph, Node
from .tvm_api import (
    IRModule,
    PrimFunc,
    TvmCall,
    TvmTarget,
    module_pass_sequence,
    onnx_frontend,
    relax,
    s_tir,
    structural_map,
    tirx,
    tvm,
)

ELEMENTS_PER_BLOCK = 4096
STACK_BYTES = 8192
LANES = (16, 8, 4, 2, 1)


@dataclass(frozen=True)
class FusedCall:
    """One fused function and the names it reads and writes; `#n` names stand between the calls of one group."""

    label: str
    func: PrimFunc
    grid: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    threads: int = 1


@dataclass(frozen=True)
class FusedGroup:
    """What a run of nodes became: calls in order, types of the `#n` names, constants among them, output -> name."""

    calls: tuple[FusedCall, ...]
    intermediates: dict[str, tuple[str, tuple[int, ...]]]
    constants: dict[str, np.ndarray]
    aliases: dict[str, str]


def fuse(graph: Graph, nodes: list[Node], outputs: list[str], gpu: bool = False) -> FusedGroup:
    """Compile `nodes` (a convex part of `graph`) to fused functions producing `outputs`; gpu: scheduled for threads."""
    module, inputs = _import(graph, nodes, outputs)
    main = module["main"]
    names: dict[Any, str] = dict(zip(main.params, inputs, strict=True))
    walker = _Walker(module, names, outputs, gpu)
    try:
        for block in main.body.blocks:
            for binding in block.bindings:
                walker.visit(binding.var, binding.value)
    except _Unlowered as error:
        raise _unsupported(graph, nodes, error.name) from None
    return walker.finish(main.body.body)


class _Unlowered(Exception):
    """TVM has no loops for its operator `name`."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _unsupported(graph: Graph, nodes: list[Node], name: str) -> CompileError:
    """Names the ONNX operator that TVM calls `name`, or all there are where it calls it something else."""
    same = [n.op for n in nodes if n.op.lower() == name.replace("_", "").lower()]
    which = f"operator {same[0]}" if same else "one of " + ", ".join(sorted({n.op for n in nodes}))
    return CompileError(
        f"{graph.label}: {which} cannot be compiled: no rule claims it and TVM has no code for it",
        "express it by other operators, or add a rule to edgeseq/compiler/rules",
    )


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
    protos = [_renamed(n.proto, plain) for n in nodes]
    part = helper.make_graph(protos, "part", [info(i) for i in inputs], [info(o) for o in outputs], small)
    model = helper.make_model(part, opset_imports=[helper.make_opsetid("", 21)])
    t = relax.transform
    passes = [
        t.DecomposeOpsForInference(), t.FoldConstant(), t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FoldConstant(),
        t.FuseOps(), t.FuseTIR(), t.DeadCodeElimination(),
    ]  # fmt: skip
    try:
        with warnings.catch_warnings(), TvmTarget({"kind": "llvm"}):
            warnings.simplefilter("ignore")  # the importer's checker is older than our operators
            return module_pass_sequence(passes)(_in_bounds(onnx_frontend.from_onnx(model))), inputs
    except Exception as error:  # converters and shape rules raise whatever they meet
        raise _import_error(graph, nodes, error) from error


@relax.expr_functor.mutator
class _Clipping(relax.PyExprMutator):
    """Computed indices stay within their tensor: they read or write what lies nearest. The importer's choice is any
    memory, which a file of somebody else's must never reach."""

    def visit_call_(self, call: Any) -> Any:
        call = super().visit_call_(call)
        name = getattr(call.op, "name", "")
        if name == "relax.take" and str(call.attrs.mode) == "fast":
            axis = None if call.attrs.axis is None else int(call.attrs.axis)
            return relax.op.take(*call.args, axis=axis, mode="clip")
        if name in ("relax.gather_elements", "relax.scatter_elements"):
            axis = int(call.attrs.axis)
            sizes = np.asarray(_shape(call.args[0])[axis])
        elif name in ("relax.gather_nd", "relax.scatter_nd"):
            first = int(call.attrs.batch_dims) if name == "relax.gather_nd" else 0
            sizes = np.asarray(_shape(call.args[0])[first : first + _shape(call.args[1])[-1]])
        else:
            return call
        data, index, *rest = call.args
        dtype = str(index.ty.dtype)
        n, last, zero = (relax.const(bound.astype(dtype), dtype) for bound in (sizes, sizes - 1, 0 * sizes))
        index = self.builder_.emit(relax.op.where(relax.op.less(index, zero), relax.op.add(index, n), index))
        clipped = self.builder_.emit(relax.op.minimum(relax.op.maximum(index, zero), last))
        return relax.Call(call.op, [data, clipped, *rest], call.attrs, call.ty_args)


def _shape(expr: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in expr.ty.shape)


def _in_bounds(module: IRModule) -> IRModule:
    module.update_func(module.get_global_var("main"), _Clipping(module).visit_expr(module["main"]))
    return module


def _import_error(graph: Graph, nodes: list[Node], error: Exception) -> CompileError:
    """Names the first operator that TVM has no converter for; else what the importer said of one of them."""
    known = onnx_frontend._get_convert_map()
    for node in nodes:
        if node.op not in known:
            return _unsupported(graph, nodes, node.op)
    ops = ", ".join(sorted({n.op for n in nodes}))
    lines = str(error).strip().splitlines()
    reason = lines[-1] if lines else type(error).__name__
    return CompileError(f"{graph.label}: TVM's importer refused one of {ops}: {reason}")


def _renamed(node: onnx.NodeProto, names: dict[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(i, i) for i in node.input]
    copy.output[:] = [names.get(o, o) for o in node.output]
    copy.name = ""
    return copy


class _Walker:
    """Turns the bindings of a legalised Relax function into calls and names."""

    def __init__(self, module: IRModule, names: dict[Any, str], outputs: list[str], gpu: bool = False) -> None:
        self.module, self.names, self.outputs, self.gpu = module, names, outputs, gpu
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
            raise _Unlowered(str(getattr(getattr(value, "op", None), "name", value)).removeprefix("relax."))

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
        label = str(call.args[0].name_hint).removeprefix("fused_")
        if self.gpu:
            self._parts(label, inline(func), inputs, outputs)
            return
        scheduled, grid = schedule(func)
        scheduled, scratch = hoist(scheduled)
        outputs += self._scratch(scratch)
        self.calls.append(FusedCall(label, scheduled, grid, inputs, tuple(outputs)))

    def _parts(self, label: str, func: PrimFunc, inputs: tuple[str, ...], outputs: list[str]) -> None:
        """One call for each computation of `func`; what stands between them becomes memory of its own."""
        from .gpu import generic as gpu

        func, scratch = hoist(func, 0)
        names = [*inputs, *outputs, *self._scratch(scratch)]
        for part in gpu.split(func):
            reads = tuple(names[i] for i in part.reads)
            writes = tuple(names[i] for i in part.writes)
            self.calls.append(FusedCall(label, part.func, part.grid, reads, writes, part.threads))

    def _scratch(self, kinds: list[tuple[str, tuple[int, ...]]]) -> list[str]:
        made = []
        for kind in kinds:
            made.append(f"#{len(self.intermediates)}")
            self.intermediates[made[-1]] = kind
        return made

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
        aliases = dict(zip(self.outputs, produced, strict=True))
        return FusedGroup(tuple(self.calls), self.intermediates, self.constants, aliases)


def schedule(func: PrimFunc) -> tuple[PrimFunc, int]:
    """Inline what can be, split a lone elementwise block into a grid of vectorised blocks; else one serial block."""
    func = inline(func)
    if func.body.block.name_hint != "root":
        return func, 1
    sch = s_tir.Schedule(func)
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    if len(blocks) != 1 or not _spatial(sch, blocks[0]):
        return sch.mod["main"], 1
    fused = sch.fuse(*sch.get_loops(blocks[0])) if sch.get_loops(blocks[0]) else None
    if fused is None:
        return sch.mod["main"], 1
    extent = int(sch.get(fused).extent)
    lanes = next(n for n in LANES if extent % n == 0)
    units = extent // lanes
    grid = next(g for g in range(max(1, min(units, extent // ELEMENTS_PER_BLOCK)), 0, -1) if units % g == 0)
    outer, _, inner = sch.split(fused, [grid, units // grid, lanes])
    if lanes > 1:
        sch.vectorize(inner)
    if grid > 1:
        sch.bind(outer, "blockIdx.x")
    return sch.mod["main"], grid


def inline(func: PrimFunc) -> PrimFunc:
    """`func` with every computation moved into its readers where that is possible."""
    if func.body.block.name_hint != "root":
        return func  # written by hand inside TVM (scatters): loops without blocks
    sch = s_tir.Schedule(func)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        try:
            sch.compute_inline(block)
        except Exception:  # not inlinable: a reduction, or an output
            continue
    return sch.mod["main"]


def hoist(func: PrimFunc, limit: int = STACK_BYTES) -> tuple[PrimFunc, list[tuple[str, tuple[int, ...]]]]:
    """Turn buffers that would not fit a thread's stack into parameters behind the others; returns their types."""
    block = func.body.block
    types = [(str(b.dtype), tuple(int(d) for d in b.shape)) for b in block.alloc_buffers]
    sizes = list(accumulate(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in types))
    small = [b for b, total in zip(block.alloc_buffers, sizes, strict=True) if total <= limit]
    big = [b for b, total in zip(block.alloc_buffers, sizes, strict=True) if total > limit]
    if not big:
        return func, []
    inner = s_tir.SBlock(
        block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init, small, block.match_buffers,
        block.annotations,
    )  # fmt: skip
    body = s_tir.SBlockRealize(func.body.iter_values, func.body.predicate, inner)
    made = tirx.PrimFunc([*func.params, *big], body, func.ret_type).with_attrs(func.attrs)
    return made, types[len(small) :]


def _spatial(sch: Any, block: Any) -> bool:
    return all(int(v.iter_type) == 0 for v in sch.get(block).iter_vars)


def raw_pointers(
    func: PrimFunc, name: str, lower_passes: Callable[[IRModule], IRModule]
) -> tuple[PrimFunc, list[Any], Any]:
    """Lower a scheduled PrimFunc of buffers; returns it, pointers in place of its parameters, and the body of them."""
    offsets = [p.ty.elem_offset for p in func.params if isinstance(p.ty.elem_offset, tvm.ir.Var)]
    func = func.with_attr("global_symbol", name).with_attr("tirx.noalias", True)
    (func,) = lower_passes(IRModule({name: func})).functions.values()
    pointers: dict[Any, Any] = {}
    for p in func.params:
        pointers[p] = tirx.Var(p.name, tvm.ir.PointerType(tvm.ir.PrimType(str(p.ty.dtype)), "global"))

    def data(call: Any) -> Any:
        if getattr(call.op, "name", "") == "tirx.buffer_data" and call.args[0] in pointers:
            return pointers[call.args[0]]
        return call

    def pragma(attr: Any) -> Any:
        return attr.body if attr.attr_key.startswith("pragma_") else attr

    def serial(loop: Any) -> Any:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body)

    body = structural_map(func.body, [(TvmCall, data), (tirx.AttrStmt, pragma), (tirx.For, serial)])
    if offsets:  # of buffers that hand-written functions take wherever they begin
        zero = {str(v.ty.dtype): tirx.const(0, str(v.ty.dtype)) for v in offsets}

        def settled(v: Any) -> Any:
            return zero[str(v.ty.dtype)] if any(v.same_as(o) for o in offsets) else v

        body = structural_map(body, [(tvm.ir.Var, settled)])
    return func, list(pointers.values()), body


def to_c_function(func: PrimFunc, name: str, lower_passes: Callable[[IRModule], IRModule]) -> PrimFunc:
    """Lower a scheduled PrimFunc of buffers to `void name(pointers…, int32 block)`; intrinsics stay."""
    func, pointers, body = raw_pointers(func, name, lower_passes)
    block = tirx.Var("block", "int32")
    blocks: list[Any] = []

    def thread(attr: Any) -> Any:
        if attr.attr_key != "thread_extent":
            return attr
        blocks.append(attr.node.var)
        return attr.body

    body = structural_map(body, [(tirx.AttrStmt, thread)])
    if blocks:
        old, new = blocks[0], tirx.Cast(str(blocks[0].ty.dtype), block) if str(blocks[0].ty.dtype) != "int32" else block
        body = structural_map(body, [(tvm.ir.Var, lambda v: new if v.same_as(old) else v)])
    made = tirx.PrimFunc([*pointers, block], body)
    for key, value in (("global_symbol", name), ("tirx.noalias", True), ("target", func.attrs["target"])):
        made = made.with_attr(key, value)
    return made
