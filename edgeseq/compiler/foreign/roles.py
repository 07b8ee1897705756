"""Which input takes token ids, which the position, which output gives logits: then the file is a token model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from edgeseq.errors import UsageError
from edgeseq.spec import StepSignature, TensorSpec

from .options import known_names

INPUTS, OUTPUTS = ("tokens", "position"), ("logits",)


def check_roles(roles: Mapping[str, str], inputs: list[str], outputs: list[str]) -> None:
    """UsageError for a role nobody has, a name the file lacks on that side, or a role given twice."""
    for name, role in roles.items():
        if role not in INPUTS + OUTPUTS:
            raise UsageError(
                f"--role gives {name!r} the unknown role {role!r}", "roles are tokens, position and logits"
            )
        side, names = ("input", inputs) if role in INPUTS else ("output", outputs)
        if name not in names:
            raise UsageError(
                f"--role names the {side} {name!r}, which the file does not have", known_names(side, names)
            )
    given = list(roles.values())
    for role in given:
        if given.count(role) > 1:
            raise UsageError(f"--role gives the role {role!r} twice", "a model has one of each")
    if given and not {"tokens", "logits"} <= set(given):
        raise UsageError("a token model has both tokens and logits", "give --role NAME=tokens and --role NAME=logits")


def with_roles(signature: StepSignature, roles: Mapping[str, str]) -> StepSignature:
    """The signature with its roles; logits come first. UsageError for a tensor of the wrong kind."""
    inputs = tuple(replace(s, role=roles[s.name]) if s.name in roles else s for s in signature.inputs)  # type: ignore[arg-type]
    outputs = tuple(replace(s, role="logits") if s.name in roles else s for s in signature.outputs)
    for spec in (*inputs, *outputs):
        _check_kind(spec)
    return replace(signature, inputs=inputs, outputs=tuple(sorted(outputs, key=lambda s: s.role != "logits")))


def _check_kind(spec: TensorSpec) -> None:
    count = math.prod(spec.shape)
    if spec.role in INPUTS and (spec.dtype not in ("int64", "int32") or count != 1):
        raise UsageError(
            f"{spec.name!r} is {spec.dtype}{list(spec.shape)}, so it cannot be the {spec.role} of a step",
            "a step takes one integer; give --shape or --dim",
        )
    if spec.role == "logits" and (spec.dtype != "float32" or not spec.shape or spec.shape[-1] != count):
        raise UsageError(
            f"{spec.name!r} is {spec.dtype}{list(spec.shape)}, so it cannot be the logits of a step",
            "logits are float32, one number for each token of the vocabulary",
        )
