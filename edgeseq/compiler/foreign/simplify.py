"""Fold what is constant, infer shapes, inline: until an ONNX graph is nodes with static shapes and no control flow."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.version_converter import convert_version

from edgeseq.errors import CompileError, EdgeseqError

from .control import inline_control_flow
from .decompose import decompose
from .read import first_line
from .shapes import forget_shapes, static_shape

OPSET = 21  # what the generic path speaks; newer files stay as they are
MAX_FOLDED = 1 << 26
MAX_ROUNDS = 64


def simplify(model: ir.Model, label: str, known: Callable[[str, str], bool]) -> None:
    """Rewrite `model` in place. known(domain, op): whether the compiler has a rule for it, so that it stays.

    Outputs keep their names and their order. Raises CompileError where control flow depends on computed values or is
    longer than can be unrolled.
    """
    outputs = [str(v.name) for v in model.graph.outputs]
    with _quiet():
        _guard(label, "its functions cannot be inlined", lambda: _inline(model, known))
        _fold(model, label)
        for _ in range(MAX_ROUNDS):
            if not inline_control_flow(model.graph, label):
                break
            _fold(model, label)
        if _opset(model) < OPSET:
            forget_shapes(model.graph, {})  # onnx refuses what differs in the least from what it infers itself
            convert = lambda: convert_version(model, OPSET, fallback=True)  # noqa: E731
            _guard(label, f"opset {_opset(model)} cannot be converted to {OPSET}", convert)
            if _opset(model) < OPSET:
                raise CompileError(
                    f"{label}: opset {_opset(model)} cannot be converted to {OPSET}", "convert it with onnx"
                )
            _fold(model, label)
        if decompose(model, label):
            _fold(model, label)
        _guard(label, "it cannot be tidied", lambda: _tidy(model))
        _restore_outputs(model.graph, outputs)
        _drop_unread(model.graph)


def _opset(model: ir.Model) -> int:
    return model.opset_imports.get("", OPSET)


def _inline(model: ir.Model, known: Callable[[str, str], bool]) -> None:
    common.InlinePass(lambda f: not known(f.domain, f.name))(model)
    common.RemoveUnusedFunctionsPass()(model)


def _fold(model: ir.Model, label: str) -> None:
    """Shapes and constants, until nothing changes."""
    fold = FoldConstantsPass(
        shape_inference=True, input_size_limit=MAX_FOLDED, output_size_limit=MAX_FOLDED, should_fold=_worth_folding
    )

    def run() -> None:
        for _ in range(MAX_ROUNDS):
            changed = fold(model).modified
            common.RemoveUnusedNodesPass()(model)
            if not changed:
                return

    _guard(label, "its constants cannot be folded", run)


def _worth_folding(node: ir.Node) -> bool:
    """Constants fold when the result's size is known beforehand and bounded."""
    shapes = [static_shape(v) for v in node.outputs]
    return all(s is not None and math.prod(s) <= MAX_FOLDED for s in shapes)


def _tidy(model: ir.Model) -> None:
    for one in (
        common.RemoveUnusedNodesPass(), common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(), common.RemoveUnusedNodesPass(), common.OutputFixPass(),
        common.NameFixPass(), common.TopologicalSortPass(),
    ):  # fmt: skip
        one(model)


def _restore_outputs(graph: ir.Graph, names: list[str]) -> None:
    """Every output is a computed value of its own name again: the passes merge equal ones and drop Identity nodes."""
    seen: set[int] = set()
    for at, value in enumerate(list(graph.outputs)):
        if value.producer() is None or id(value) in seen:
            node = ir.Node("", "Identity", [value])
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.append(node)
            graph.outputs[at] = value = node.outputs[0]
        seen.add(id(value))
    taken = set(names)
    for node in graph:
        for value in node.outputs:
            if value.name in taken and id(value) not in seen:
                value.name = f"{value.name}.inner"
    for name, value in zip(names, graph.outputs, strict=True):
        value.name = name


def _drop_unread(graph: ir.Graph) -> None:
    """Initializers that only branches not taken read still count as used."""
    read = {v.name for node in graph for v in node.inputs if v is not None} | {v.name for v in graph.outputs}
    for name in [n for n in graph.initializers if n not in read]:
        del graph.initializers[name]


def _guard(label: str, what: str, call: Callable[[], object]) -> None:
    """The passes raise whatever they meet in a strange file; the user gets one sentence."""
    try:
        call()
    except EdgeseqError:
        raise
    except Exception as error:
        cause = error.__cause__ or error
        raise CompileError(f"{label}: {what}: {first_line(cause)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """The passes log what they could not do; what matters of it becomes a sentence later."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
