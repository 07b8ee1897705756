"""A model of one node of the domain, run by stock onnxruntime, for comparison with numpy."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from edgeseq.ops import DOMAIN, ONNX_OPSET, VERSION, Op


def model(
    op: Op, inputs: dict[str, np.ndarray], attributes: dict, outputs: dict[str, str] | None = None
) -> onnx.ModelProto:
    """The node with every optional input that `inputs` holds, the function that serves it, and static shapes.

    outputs: axes by name, where they differ from those the operator declares.
    """
    axes = {p.name: p.shape for p in op.outputs} | (outputs or {})
    op.register()
    names = [p.name if p.name in inputs else "" for p in op.inputs]
    node = helper.make_node(op.name, names, [p.name for p in op.outputs], domain=DOMAIN, **attributes)
    function = op.function_for(node)
    node.overload = function.overload
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in inputs.items()
    ]
    results = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape.strip("[]").split(","))
        for name, shape in axes.items()
    ]
    proto = helper.make_model(
        helper.make_graph([node], "one_node", values, results),
        functions=[function],
        opset_imports=[helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=10,
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run(proto: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def inferred_shapes(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes that the registered schema infers for the outputs."""
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, check_type=True)
    return {o.name: tuple(d.dim_value for d in o.type.tensor_type.shape.dim) for o in inferred.graph.output}
