"""Dataclasses every stage shares. Facts travel in files: `Manifest` is what an export directory declares.

Stdlib only, so that the command line, the bundle and the devices can import it without torch or tvm.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

DType = Literal["float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool"]
DTYPE_BYTES: dict[str, int] = {
    "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip

Update = Literal["overwrite", "shift", "ring", "append"]
Role = Literal["data", "tokens", "position", "logits", "next"]

MANIFEST_VERSION = 1


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor with a static shape, batch first. `role` says what the runtime does with it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    role: Role = "data"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class StateSlot:
    """One state tensor carried from step to step.

    In a graph it is the input `past.<name>` and the output `present.<name>`, same shape and dtype.
    init:   value of every element of a fresh state.
    update: overwrite (all new each step), shift (FIFO along `axis`), ring (slot = f(position) along `axis`),
            append (row `position` along `axis` is written; rows >= position are never read).
    axis:   the time axis for shift, ring and append; None for overwrite.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    init: float = 0.0
    update: Update = "overwrite"
    axis: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class StepSignature:
    """What one call consumes and produces for `tokens` steps: inputs, outputs, and the state slots in order."""

    tokens: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StateSlot, ...]


@dataclass(frozen=True)
class GraphFile:
    """One ONNX graph of an export: `file` relative to the manifest, consuming `signature.tokens` steps a call."""

    file: str
    signature: StepSignature


@dataclass(frozen=True)
class Manifest:
    """The facts of an export directory, stored as `manifest.json`.

    model_id: 32 hex digits naming weights and state layout; a saved state carries it.
    context:  longest sequence the state can hold; 0 means unbounded.
    params:   number of parameters (tied tensors counted once).
    tokenizer: "bytes" (id = byte), "tokenizer.json" (file beside the manifest) or "none".
    config:   the family's own configuration, for people and for `edgeseq verify`.
    """

    family: str
    source: str
    model_id: str
    dtype: str
    quant: str
    flavour: str
    context: int
    vocab_size: int
    params: int
    tokenizer: str
    graphs: tuple[GraphFile, ...]
    config: dict[str, Any] = field(default_factory=dict)
    version: int = MANIFEST_VERSION

    @property
    def step(self) -> GraphFile:
        return next(g for g in self.graphs if g.signature.tokens == 1)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def save(self, directory: Path) -> None:
        (directory / "manifest.json").write_text(self.to_json())

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read and check `directory/manifest.json`: UsageError if there is none, BundleError if it is malformed."""
        from edgeseq.manifest import load_manifest

        return load_manifest(Path(directory))
