"""`golden.safetensors` of an imported file: what onnxruntime makes of the file as it came, from a fresh state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgeseq.spec import StateSlot, StepSignature, TensorSpec

if TYPE_CHECKING:
    from . import Imported

FILE = "golden.safetensors"
LENGTH = 16
SEED = 20240917


def write_golden(path: Path, imported: Imported, folder: Path) -> bool:
    """Write `input.<name>` and `output.<name>` [n,...] of seeded inputs; of a token model `tokens` [n], `logits` [n,V].

    False, and nothing is written, when onnxruntime cannot run the file or says what is not finite.
    """
    from safetensors.numpy import save

    recorded = _run(path, imported)
    if recorded is None or not all(np.isfinite(a).all() for a in recorded.values() if a.dtype.kind == "f"):
        return False
    (folder / FILE).write_bytes(save(recorded))
    return True


def _run(path: Path, imported: Imported) -> dict[str, np.ndarray] | None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    signature = imported.manifest.step.signature
    rng = np.random.default_rng(SEED)
    state = {slot: _fresh(imported, slot) for slot in signature.state if slot.name in imported.names}
    recorded: dict[str, list[np.ndarray]] = {}
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for position in range(LENGTH):
            inputs = {spec.name: _draw(spec, rng, position, imported.manifest.vocab_size) for spec in signature.inputs}
            feeds = {**imported.constants, **inputs, **{imported.names[s.name][0]: v for s, v in state.items()}}
            names = [spec.name for spec in signature.outputs] + [imported.names[s.name][1] for s in state]
            results = session.run(names, feeds)
            state = dict(zip(state, results[len(signature.outputs) :], strict=True))
            for name, value in inputs.items():
                recorded.setdefault(f"input.{name}", []).append(value)
            for spec, value in zip(signature.outputs, results):
                recorded.setdefault(f"output.{spec.name}", []).append(np.asarray(value).reshape(spec.shape))
    except Exception:  # onnxruntime's exceptions share no base class; a file it cannot run has no golden
        return None
    if imported.manifest.vocab_size:
        return _of_tokens(signature, recorded)
    return {name: np.stack([_without_batch(v) for v in values]) for name, values in recorded.items()}


def _of_tokens(signature: StepSignature, recorded: dict[str, list[np.ndarray]]) -> dict[str, np.ndarray] | None:
    """`tokens` and `logits`; None when the model also wants what no token stream has."""
    if any(spec.role == "data" for spec in signature.inputs):
        return None
    names = {spec.role: f"input.{spec.name}" for spec in signature.inputs}
    tokens = np.concatenate([value.reshape(-1) for value in recorded[names["tokens"]]]).astype(np.int64)
    logits = np.stack([value.reshape(-1) for value in recorded[f"output.{signature.outputs[0].name}"]])
    return {"tokens": tokens, "logits": logits.astype(np.float32)}


def _fresh(imported: Imported, slot: StateSlot) -> np.ndarray:
    given = imported.defaults.get(imported.names[slot.name][0])
    return np.full(slot.shape, slot.init, slot.dtype) if given is None else given.reshape(slot.shape)


def _draw(spec: TensorSpec, rng: np.random.Generator, position: int, vocabulary: int) -> np.ndarray:
    """Gaussian numbers; zeros and ones for integers, which may be indices."""
    if spec.role == "tokens":
        return rng.integers(0, vocabulary, spec.shape).astype(spec.dtype)
    if spec.role == "position":
        return np.full(spec.shape, position, spec.dtype)
    if "float" in spec.dtype:
        return rng.standard_normal(spec.shape).astype(spec.dtype)
    return rng.integers(0, 2, spec.shape).astype(spec.dtype)


def _without_batch(array: np.ndarray) -> np.ndarray:
    return array[0] if array.shape[:1] == (1,) else array
