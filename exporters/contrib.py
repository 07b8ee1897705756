"""Schemas of the com.microsoft operators that the "ort" flavour writes, as far as it uses them.

onnxruntime knows them; onnx does not, and would stop inferring shapes there.
"""

from __future__ import annotations

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
    for name in _SCHEMAS:
        if not onnx.defs.has(name, DOMAIN):
            onnx.defs.register_schema(_schema(name))


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
