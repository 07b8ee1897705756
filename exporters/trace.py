"""A step model traced by torch.onnx into an ONNX graph, without a byte of its weights in memory."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from edgeseq.errors import ExportError
from edgeseq.spec import StepSignature, TensorSpec
from exporters import recurrent
from exporters.translate import translations

TORCH_OPSET = 18  # torch's own table is written for this opset; what it emits is valid in ONNX_OPSET too
_LIBRARIES: dict[int, Any] = {}  # by opset, torch.onnx's registry as first read


class _Advance(nn.Module):
    """Gives `advance` the name that torch.export calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.advance(*args))


def trace(model: nn.Module, signature: StepSignature, flavour: str) -> ir.Model:
    """`model.advance` for `signature.tokens` steps as an ONNX model, values still under torch's names.

    model: on the meta device. Its parameters become initializers without a value, named as in its state_dict.
    Graph inputs: tokens (or the named inputs), position, states; outputs: logits (or the named outputs), states.
    """
    model = copy.deepcopy(model).eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _fake_weights(model)
        specs = [*signature.inputs]
        if {spec.role for spec in specs} == {"tokens"}:
            specs.append(TensorSpec("position", "int64", (1,), "position"))  # advance takes it all the same
        shapes = [(s.shape, s.dtype) for s in specs] + [(s.shape, s.dtype) for s in signature.state]
        args = tuple(torch.empty(shape, dtype=getattr(torch, dtype)) for shape, dtype in shapes)
    with _quiet(), _library_read_once():
        try:
            program = torch.export.export(_Advance(model), args, strict=False)
            onnx_program = torch.onnx.export(
                program,
                (),
                dynamo=True,
                custom_translation_table=translations(flavour) | recurrent.translations(),
                opset_version=TORCH_OPSET,
                optimize=False,
                verify=False,
                verbose=False,
            )
        except Exception as error:
            reason = str(_deepest(error)).strip().splitlines()
            raise ExportError(
                f"the model cannot be traced for {signature.tokens} tokens: {reason[0] if reason else error!r}",
                "its advance() must have static shapes and no branch on tensor values",
            ) from error
    assert onnx_program is not None
    return _named_as_in_state_dict(onnx_program.model, model)


def _deepest(error: BaseException) -> BaseException:
    """torch.onnx wraps what went wrong in advice to its own users."""
    while isinstance(error, torch.onnx.OnnxExporterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _fake_weights(model: nn.Module) -> None:
    """Replace meta tensors by fake CPU ones, in place; tied ones stay tied.

    A model may mix its weights with constants that it makes on the CPU, which meta tensors do not allow.
    """
    made: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if tensor not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[tensor] = nn.Parameter(empty, tensor.requires_grad) if table is module._parameters else empty
                table[name] = made[tensor]


def _named_as_in_state_dict(traced: ir.Model, model: nn.Module) -> ir.Model:
    """Weights lose the wrapper's prefix and their (fake) value; constants made by the code keep theirs.

    A tied weight goes by the first of its names.
    """
    first: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(tensor, name)
    names = {name: first[tensor] for name, tensor in model.state_dict(keep_vars=True).items()}
    graph = traced.graph
    for value in list(graph.initializers.values()):
        assert value.name is not None
        if not isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            continue
        del graph.initializers[value.name]
        own = value.name.removeprefix("model.")
        value.name, value.const_value = names.get(own, own), None
        if value.name in graph.initializers:
            value.replace_all_uses_with(graph.initializers[value.name])
        else:
            graph.initializers[value.name] = value
    return traced


@contextmanager
def _library_read_once() -> Iterator[None]:
    """torch.onnx reads its library of functions anew for every graph: half of the time that a small graph takes."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry  # a second, which --help need not wait for

    read = ONNXRegistry.from_torchlib

    def registry(opset_version: int) -> ONNXRegistry:
        if opset_version not in _LIBRARIES:
            _LIBRARIES[opset_version] = read(opset_version)
        known = _LIBRARIES[opset_version]
        mine = copy.copy(known)
        mine.functions = {target: list(found) for target, found in known.functions.items()}  # a caller adds its own
        return mine

    with patch.object(ONNXRegistry, "from_torchlib", staticmethod(registry)):
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx speaks of missing torchvision and of its own deprecations; a user cannot act on either."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
