"""The one table of tolerances: every test and `edgeseq verify` compare with these numbers.

An element may differ by at most relative * max(1, max|reference|). The parity of fp32 references with one another is
2e-6 on that scale, so 1e-5 leaves room for another order of summation and none for a wrong formula. Some models carry
rounding on much further: goldens are made in float64 and say how much PyTorch's float32 differs, and a small multiple
of that is allowed beside.

A quantised bundle rounds the activations of its products to int8, which its golden, PyTorch on the same weights, does
not. How much that moves each output differs from model to model, so the exporter measures it: PyTorch rounds the same
activations the same way once more, and the golden carries what changed. The runtime may differ by a small multiple.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeseq.errors import UsageError

# stage -> dtype of the arithmetic -> relative tolerance
TABLE: dict[str, dict[str, float]] = {
    "torch": {"float32": 1e-5, "float64": 1e-6},  # chunk and step forms against the whole; S4 is partly float32
    "onnx": {"float32": 1e-5},  # a graph on stock onnxruntime against PyTorch
    "runtime": {"float32": 1e-5},  # a bundle on a device against PyTorch
}

ROUNDING_ELEMENT = 4.0  # times the largest difference that rounding, to float32 or to int8, made in PyTorch
ROUNDING_MEAN = 2.0  # times its root mean square
ROUNDING_CHOICES = 0.125  # more of the positions than in PyTorch may have another likeliest token


def tolerance(stage: str, dtype: str, ref: Any) -> float:
    """The largest absolute difference from `ref` that counts as equal; 0 when `ref` is not finite.

    stage: a row of the table. dtype: of the arithmetic. Raises UsageError for a pair that the table lacks.
    """
    relative = TABLE.get(stage, {}).get(dtype)
    if relative is None:
        raise UsageError(
            f"no tolerance is set for {dtype} at stage {stage!r}", "add it to edgeseq/verify/tolerances.py"
        )
    largest = float(np.max(np.abs(np.asarray(ref)), initial=0.0))
    return relative * max(1.0, largest) if math.isfinite(largest) else 0.0
