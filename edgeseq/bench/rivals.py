"""The same weights in another engine of this process: what those have in common, and stock onnxruntime."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeseq.bench.engines import Rival, StreamEngine
from edgeseq.bench.rows import model_type, storage
from edgeseq.bench.synthetic import slot_values
from edgeseq.spec import Manifest
from edgeseq.verify.golden import load_golden
from edgeseq.verify.report import Array, Stage
from edgeseq.verify.streams import cuts_stage, step_stage

FAST = 4
"""onnxruntime's `accuracy_level` that multiplies quantised matrices by activations in int8, as the runtime does."""


def rival_columns(manifest: Manifest, build: str, stored: str) -> dict[str, Any]:
    """What a row says of an engine that runs an export."""
    kind = model_type(manifest, stored)
    return {"build_commit": build, "model_type": kind, "model_n_params": manifest.params}


class StreamRival(StreamEngine, Rival):
    """An engine whose stream has `prefill` and `step` and whose state is a dictionary of arrays."""

    stream: Any
    stage = "torch"
    """The row of the tolerance table that it is held to."""

    def __init__(
        self, backend: str, directory: Path, manifest: Manifest, threads: int, columns: Mapping[str, Any]
    ) -> None:
        super().__init__(str(directory), backend, threads, manifest, columns)
        self.directory, self.manifest = directory, manifest
        self._logits: Array = np.zeros(manifest.vocab_size, np.float32)

    def prefill(self, ids: Array) -> int:
        begin = time.perf_counter_ns()
        self._logits = self.stream.prefill(ids.tolist())
        return time.perf_counter_ns() - begin

    def decode(self, n: int) -> list[int]:
        token, spent = int(self.ids(1)[0]), []
        for _ in range(n):
            begin = time.perf_counter_ns()
            self._logits = self.stream.step(token)
            token = self.choose()
            spent.append(time.perf_counter_ns() - begin)
        return spent

    def choose(self) -> int:
        return int(np.argmax(self._logits))

    def verified(self) -> list[Stage]:
        """Step and cuts against the golden of the export."""
        golden = load_golden(self.directory, self.manifest.step.signature)

        def fresh() -> Any:
            self._reset()
            return self.stream

        return [
            step_stage(f"{self.backend} step", self.stage, fresh, golden),
            cuts_stage(f"{self.backend} prefill", self.stage, fresh, golden),
        ]


class OrtEngine(StreamRival):
    """Stock onnxruntime. Quantised products run in its own fast way, which rounds activations to int8."""

    def __init__(self, directory: Path, threads: int) -> None:
        import onnxruntime

        from exporters.ort_check import OrtModel

        model = OrtModel(directory, threads, accuracy_level=FAST)
        self.stage = "onnx" if model.manifest.quant == "none" else "runtime"  # the latter allows for that rounding
        columns = rival_columns(model.manifest, f"onnxruntime {onnxruntime.__version__}", storage(model.manifest))
        super().__init__("onnxruntime", directory, model.manifest, threads, columns)
        self.stream = model.session()

    def _reset(self) -> None:
        self.stream.reset()

    def _save(self) -> dict[str, Array]:
        saved: dict[str, Array] = self.stream.save()
        return saved

    def _load(self, snapshot: dict[str, Array]) -> None:
        self.stream.load(snapshot)

    def _made_up(self, depth: int) -> dict[str, Array]:
        slots = {slot.name: slot_values(slot) for slot in self.manifest.step.signature.state}
        return slots | {"position": np.array(depth), "logits": np.zeros(self.vocabulary, np.float32)}
