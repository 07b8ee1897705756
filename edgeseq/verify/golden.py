"""`golden.safetensors`: what PyTorch said when the model was exported. The file may come from anybody."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from edgeseq.errors import BundleError, UsageError
from edgeseq.spec import StepSignature
from edgeseq.verify.report import Array
from edgeseq.verify.tolerances import ROUNDING_ELEMENT, tolerance

FILE = "golden.safetensors"
HINT = "export the model again"


@dataclass(frozen=True)
class Change:
    """What another arithmetic did to one output in PyTorch.

    largest: |difference|. mean: root mean square of the differences. changed: share of rows with another largest
    element.
    """

    largest: float
    mean: float
    changed: float


@dataclass(frozen=True)
class Golden:
    """Token models: tokens int64 [n], logits float32 [n,V]. Other step models: inputs and outputs [n, *shape] by name.

    said_by: who made them. float32: what computing in float32 did, by output; none in goldens that were not made in
    float64. noise: what rounding the activations of quantised products to int8 did.
    """

    tokens: Array | None
    logits: Array | None
    inputs: dict[str, Array]
    outputs: dict[str, Array]
    said_by: str = "PyTorch"
    float32: dict[str, Change] = field(default_factory=dict)
    noise: dict[str, Change] = field(default_factory=dict)

    def bound(self, stage: str, wanted: Array, output: str = "logits") -> float:
        """The largest difference from `wanted` that passes at a stage; the runtime of a quantised model rounds."""
        changes = (self.float32, self.noise) if stage == "runtime" else (self.float32,)
        largest = sum(made[output].largest for made in changes if output in made)
        return tolerance(stage, "float32", wanted) + ROUNDING_ELEMENT * largest


def load_golden(directory: Path, signature: StepSignature, family: str = "") -> Golden:
    """Read and check the golden of a model whose step has `signature`. Of a file imported by us (family "onnx"),
    onnxruntime said what is in it.

    UsageError if there is none, BundleError for one that is malformed or does not belong to the signature.
    """
    path = directory / FILE
    if not path.is_file():
        raise UsageError(f"{directory} has no {FILE}, so there is nothing to compare with", HINT)
    tensors = _read(path)
    float32, noise = (
        {s.name: _change(path, key, tensors[key]) for s in signature.outputs if (key := f"{what}.{s.name}") in tensors}
        for what in ("float32", "noise")
    )
    said_by = "onnxruntime" if family == "onnx" else "PyTorch"
    takes_tokens = any(spec.role == "tokens" for spec in signature.inputs)
    if takes_tokens:
        return replace(_tokens(path, tensors, signature), float32=float32, noise=noise)
    specs = {f"input.{s.name}": s for s in signature.inputs} | {f"output.{s.name}": s for s in signature.outputs}
    lengths = {len(tensors[name]) for name in specs if name in tensors and tensors[name].ndim}
    for name, spec in specs.items():
        row = spec.shape[1:] if spec.shape[:1] == (1,) else spec.shape  # the batch of one is left out in the file
        if name not in tensors or tensors[name].shape[1:] != row or len(lengths) != 1 or 0 in lengths:
            raise BundleError(f"{path} does not hold {name} as [n{''.join(f', {d}' for d in row)}]", HINT)
        tensors[name] = tensors[name].reshape(-1, *spec.shape)
    return Golden(
        None,
        None,
        {s.name: tensors[f"input.{s.name}"] for s in signature.inputs},
        {s.name: tensors[f"output.{s.name}"] for s in signature.outputs},
        said_by,
        float32,
        noise,
    )


def _change(path: Path, name: str, values: Array) -> Change:
    if values.dtype != np.float32 or values.shape != (3,) or not np.isfinite(values).all() or (values < 0).any():
        raise BundleError(f"{path}: {name} is {values.dtype} {list(values.shape)}, not three sizes", HINT)
    return Change(*map(float, values))


def _read(path: Path) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise BundleError(f"{path} is not a safetensors file: {error}", HINT) from None


def _tokens(path: Path, tensors: dict[str, Array], signature: StepSignature) -> Golden:
    tokens, logits = tensors.get("tokens"), tensors.get("logits")
    vocabulary = signature.outputs[0].shape[-1]
    if tokens is None or logits is None:
        raise BundleError(f"{path} does not hold tokens and logits", HINT)
    if tokens.dtype != np.int64 or tokens.ndim != 1 or len(tokens) == 0:
        raise BundleError(f"{path}: tokens are {tokens.dtype} {list(tokens.shape)}, expected int64 [n]", HINT)
    if logits.dtype != np.float32 or logits.shape != (len(tokens), vocabulary):
        raise BundleError(
            f"{path}: logits are {logits.dtype} {list(logits.shape)}, expected float32 [{len(tokens)}, {vocabulary}]",
            HINT,
        )
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise BundleError(f"{path}: a token is not in the vocabulary of {vocabulary}", HINT)
    if not np.isfinite(logits).all():
        raise BundleError(f"{path}: a logit is not finite", HINT)
    return Golden(tokens, logits, {}, {})
