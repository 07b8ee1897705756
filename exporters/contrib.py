"""Schemas of the com.microsoft operators that exports use, as far as they use them: quantised products and lookups
in both flavours, the rest in the "ort" flavour.

onnxruntime knows them; onnx does not, and would stop inferring shapes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import onnx
from onnx import helper
from onnx.defs import OpSchema
from onnxscript.values import Opset

DOMAIN = "com.microsoft"
OPSET = Opset(DOMAIN, 1)

# name -> inputs (a trailing ? marks an optional one), outputs, attributes; outputs have the shapes of these inputs
_SCHEMAS: dict[str, tuple[str, str, dict[str, Any], tuple[str, str]]] = {
    "CausalConvWithState": (
        "input weight bias? past_state",
        "output present_state",
        {"activation": "none", "channels_last": 0},
        ("input", "past_state"),
    ),
    "LinearAttention": (
        "query key value past_state decay? beta?",
        "output present_state",
        {"update_rule": "gated_delta", "q_num_heads": 0, "kv_num_heads": 0, "scale": 0.0},
        ("value", "past_state"),
    ),
}


def register() -> None:
    """Make the schemas known to onnx; doing it twice is harmless."""
    makers: dict[str, Callable[[], OpSchema]] = {name: partial(_schema, name) for name in _SCHEMAS}
    makers |= {"MatMulNBits": _matmul_schema, "GatherBlockQuantized": _gather_schema}
    for name, make in makers.items():
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(make())


def _schema(name: str) -> OpSchema:
    inputs, outputs, attributes, like = _SCHEMAS[name]
    names = [part.rstrip("?") for part in inputs.split()]
    option = OpSchema.FormalParameterOption
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(
                part.rstrip("?"), "T", param_option=option.Optional if part.endswith("?") else option.Single
            )
            for part in inputs.split()
        ],
        outputs=[OpSchema.FormalParameter(part, "T") for part in outputs.split()],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            OpSchema.Attribute(key, helper.make_attribute(key, value), "") for key, value in attributes.items()
        ],
    )
    sources = [names.index(source) for source in like]

    def infer(ctx: Any) -> None:
        for index, source in enumerate(sources):
            ctx.set_output_type(index, ctx.get_input_type(source))

    schema.set_type_and_shape_inference_function(infer)
    return schema


def _matmul_schema() -> OpSchema:
    """Y[..,N] = A[..,K] W[N,K]^T, W in blocks: B uint8 [N,blocks,bytes of a block], scales [N,blocks]."""

    def infer(ctx: Any) -> None:
        rows = _sizes(ctx.get_input_type(0))[:-1]
        ctx.set_output_type(0, helper.make_tensor_type_proto(FLOAT, [*rows, _attribute(ctx, "N")]))

    numbers = {"K": None, "N": None, "bits": 4, "block_size": None, "accuracy_level": 0}
    return _quantised("MatMulNBits", [("A", "T"), ("B", "Q"), ("scales", "T")], "Y", numbers, infer)


def _gather_schema() -> OpSchema:
    """output[..,K] = rows of W by index; data uint8 [M, K bits / 8], scales [M, K / block_size]."""

    def infer(ctx: Any) -> None:
        (_, packed), indices = _sizes(ctx.get_input_type(0)), _sizes(ctx.get_input_type(1))
        shape = [*indices, packed * 8 // _attribute(ctx, "bits")]
        ctx.set_output_type(0, helper.make_tensor_type_proto(FLOAT, shape))

    numbers = {"bits": 4, "block_size": 128, "gather_axis": 0, "quantize_axis": 1}
    inputs = [("data", "Q"), ("indices", "I"), ("scales", "T")]
    return _quantised("GatherBlockQuantized", inputs, "output", numbers, infer)


FLOAT = onnx.TensorProto.FLOAT


def _quantised(
    name: str, inputs: list[tuple[str, str]], output: str, numbers: Mapping[str, int | None], infer: Any
) -> OpSchema:
    """numbers: integer attributes and their defaults, None for those that must be given."""
    attributes = [
        OpSchema.Attribute(key, OpSchema.AttrType.INT, required=True)
        if default is None
        else OpSchema.Attribute(key, helper.make_attribute(key, default), "")
        for key, default in numbers.items()
    ]
    types = [("T", ["tensor(float)"], ""), ("Q", ["tensor(uint8)"], "")]
    if any(kind == "I" for _, kind in inputs):
        types.append(("I", ["tensor(int64)", "tensor(int32)"], ""))
    schema = OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(key, kind) for key, kind in inputs],
        outputs=[OpSchema.FormalParameter(output, "T")],
        type_constraints=types,
        attributes=attributes,
    )
    schema.set_type_and_shape_inference_function(infer)
    return schema


def _sizes(kind: onnx.TypeProto) -> list[int]:
    return [d.dim_value for d in kind.tensor_type.shape.dim]


def _attribute(ctx: Any, name: str) -> int:
    return int(helper.get_attribute_value(ctx.get_attribute(name)))
