"""What a file in this folder declares: `Op`, an operator as ONNX schema, ONNX function body and numpy reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import NodeProto, helper
from onnx.defs import OpSchema

DOMAIN = "ai.edgeseq"
VERSION = 1
ONNX_OPSET = 27  # LinearAttention and CausalConvWithState begin here

Shape = tuple[int | str | None, ...]
Attributes = Mapping[str, int | float]


@dataclass(frozen=True)
class Param:
    """A formal input or output. `shape` names its axes, the same letter meaning the same size everywhere.

    type: float32 unless it says "int64" (an index) or "uint8" (codes of a quantised matrix).
    """

    name: str
    shape: str
    doc: str
    optional: bool = False
    type: str = "float"


@dataclass(frozen=True)
class Op:
    """One operator of the domain; its arithmetic, state and outputs are float32.

    attributes: name -> (default, sentence). The default's Python type is the attribute's type.
    infer:      (input shapes, None for an absent optional; attributes) -> output shapes. Raises ValueError.
    variant:    (names of the inputs present, attributes) -> tag of the function body that serves them, "" for the
                plain one. It becomes the ONNX `overload`, so nodes of different signatures share one file.
    body:       (names of the inputs present, attributes) -> nodes over the names of inputs and outputs. Attribute
                values that do not choose the variant are taken by reference (`ref_attr_name`).
    reference:  the numpy definition, any float dtype, same names: reference(**inputs, **attributes) -> outputs.
    """

    name: str
    doc: str
    inputs: tuple[Param, ...]
    outputs: tuple[Param, ...]
    attributes: dict[str, tuple[int | float, str]]
    infer: Callable[[dict[str, Shape | None], Attributes], Sequence[Shape]]
    variant: Callable[[frozenset[str], Attributes], str]
    body: Callable[[frozenset[str], Attributes], list[NodeProto]]
    reference: Callable[..., Any]
    domain: str = field(default=DOMAIN)
    version: int = field(default=VERSION)

    def defaults(self) -> dict[str, int | float]:
        return {name: default for name, (default, _) in self.attributes.items()}

    def schema(self) -> OpSchema:
        option = OpSchema.FormalParameterOption
        formal = [
            OpSchema.FormalParameter(
                p.name,
                "T" if p.type == "float" else f"tensor({p.type})",
                f"{p.shape}: {p.doc}",
                param_option=option.Optional if p.optional else option.Single,
            )
            for p in (*self.inputs, *self.outputs)
        ]
        schema = OpSchema(
            self.name,
            self.domain,
            self.version,
            doc=self.doc,
            inputs=formal[: len(self.inputs)],
            outputs=formal[len(self.inputs) :],
            type_constraints=[("T", ["tensor(float)"], "All arithmetic and state are float32.")],
            attributes=[
                OpSchema.Attribute(name, helper.make_attribute(name, default), doc)
                for name, (default, doc) in self.attributes.items()
            ],
        )
        schema.set_type_and_shape_inference_function(self._infer_onnx)
        return schema

    def register(self) -> None:
        if not onnx.defs.has(self.name, self.domain):
            onnx.defs.register_schema(self.schema())

    def function(self, present: frozenset[str], attributes: Attributes | None = None) -> onnx.FunctionProto:
        """The function body for nodes with exactly these inputs; stock runtimes inline it. Serves any T >= 1."""
        values = self.defaults() | dict(attributes or {})
        proto = helper.make_function(
            self.domain,
            self.name,
            [p.name for p in self.inputs],
            [p.name for p in self.outputs],
            self.body(present, values),
            [helper.make_opsetid("", ONNX_OPSET)],
            attribute_protos=[helper.make_attribute(name, value) for name, value in self.defaults().items()],
        )
        proto.overload = self.variant(present, values)
        return proto

    def function_for(self, node: NodeProto) -> onnx.FunctionProto:
        """The function body that serves this node."""
        return self.function(self.present(node), self.attributes_of(node))

    def present(self, node: NodeProto) -> frozenset[str]:
        return frozenset(p.name for p, value in zip(self.inputs, node.input, strict=False) if value)

    def attributes_of(self, node: NodeProto) -> dict[str, int | float]:
        return self.defaults() | {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def _infer_onnx(self, ctx: Any) -> None:
        shapes: dict[str, Shape | None] = {}
        for index, param in enumerate(self.inputs):
            given = index < ctx.get_num_inputs() and ctx.has_input(index)
            shapes[param.name] = _shape(ctx.get_input_type(index), param) if given else None
        attributes = self.defaults()
        for name in attributes:
            proto = ctx.get_attribute(name)
            if proto is not None:
                attributes[name] = helper.get_attribute_value(proto)
        try:
            results = self.infer(shapes, attributes)
        except ValueError as error:
            raise onnx.shape_inference.InferenceError(f"{self.name}: {error}") from error
        for index, shape in enumerate(results):
            ctx.set_output_type(index, helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, shape))


def attribute_ref(name: str, source: str, kind: onnx.AttributeProto.AttributeType) -> onnx.AttributeProto:
    """Attribute `name` of a node in a function body, its value that of the function's attribute `source`."""
    return onnx.AttributeProto(name=name, ref_attr_name=source, type=kind)


def _shape(proto: onnx.TypeProto, param: Param) -> Shape:
    """Axis sizes: an int, a symbol, or None where unknown; all None where the rank is unknown."""
    tensor = proto.tensor_type
    rank = param.shape.count(",") + 1
    if not tensor.HasField("shape"):
        return (None,) * rank
    return tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)


def unify(shapes: Mapping[str, Shape | None], params: Sequence[Param], sizes: dict[str, int | str | None]) -> None:
    """Bind each axis letter of `params` ("[B,T,D]") to the size found; ValueError where two known sizes differ."""
    for param in params:
        shape = shapes.get(param.name)
        if shape is None:
            continue
        axes = param.shape.strip("[]").split(",")
        if len(axes) != len(shape):
            raise ValueError(f"{param.name} has {len(shape)} axes, wanted {param.shape}")
        for axis, size in zip(axes, shape, strict=True):
            known = sizes.get(axis)
            if isinstance(known, int) and isinstance(size, int) and known != size:
                raise ValueError(f"{param.name} {param.shape} has {axis}={size}, but {axis}={known} elsewhere")
            if known is None or isinstance(size, int):
                sizes[axis] = size
