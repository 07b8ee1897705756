"""An export directory on stock onnxruntime, with nothing registered: the same session API as `edgeseq.runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from edgeseq.errors import ExportError, UsageError
from edgeseq.manifest import load_manifest
from edgeseq.spec import GraphFile, Manifest

FOLDER_KEY = "session.model_external_initializers_file_folder_path"


class OrtModel:
    """Step and chunk graphs of `directory`; each is loaded on first use.

    chunks: which chunk graphs prefill may use; None means all, () the step alone (a large model then loads once).
    accuracy_level: of quantised products; None multiplies in float32, 4 rounds activations to int8 and is faster.
    """

    def __init__(
        self,
        directory: Path | str,
        threads: int | None = None,
        chunks: Sequence[int] | None = None,
        accuracy_level: int | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.threads, self.accuracy_level = threads, accuracy_level
        self.manifest: Manifest = load_manifest(self.directory)
        wanted = {1, *chunks} if chunks is not None else {g.signature.tokens for g in self.manifest.graphs}
        self._graphs = {g.signature.tokens: g for g in self.manifest.graphs if g.signature.tokens in wanted}
        self._loaded: dict[int, onnxruntime.InferenceSession] = {}

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Tokens per call of the graphs, largest first; ends in 1."""
        return tuple(sorted(self._graphs, reverse=True))

    def graph(self, tokens: int) -> GraphFile:
        return self._graphs[tokens]

    def loaded(self, tokens: int) -> onnxruntime.InferenceSession:
        if tokens not in self._loaded:
            path = self.directory / self._graphs[tokens].file
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # TensorScatter warns at every call that it copies
            if self.threads:
                options.intra_op_num_threads = self.threads
            try:
                self._loaded[tokens] = onnxruntime.InferenceSession(
                    self._graph_for(path, options), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's exceptions share no base class
                raise ExportError(
                    f"onnxruntime does not load {path}: {_first_line(error)}", "export the model again"
                ) from error
        return self._loaded[tokens]

    def _graph_for(self, path: Path, options: onnxruntime.SessionOptions) -> str | bytes:
        """The file, or the graph with the accuracy level set; its weights stay where they are."""
        if self.accuracy_level is None or self.manifest.quant == "none":
            return str(path)
        model = onnx.load(path, load_external_data=False)
        for node in (*model.graph.node, *(n for f in model.functions for n in f.node)):
            if node.op_type == "MatMulNBits":
                node.attribute.append(onnx.helper.make_attribute("accuracy_level", self.accuracy_level))
        options.add_session_config_entry(FOLDER_KEY, str(self.directory.absolute()))
        graph: bytes = model.SerializeToString()
        return graph

    def session(self) -> OrtSession:
        return OrtSession(self)


class OrtSession:
    """One stream. `logits` are those of the last token consumed, float32 [V]."""

    def __init__(self, model: OrtModel) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.position = 0
        self.logits: NDArray[np.float32] = np.zeros(self.model.manifest.vocab_size, np.float32)
        slots = self.model.manifest.step.signature.state
        self._state = {s.name: np.full(s.shape, s.init, s.dtype) for s in slots}

    def step(self, token: int) -> NDArray[np.float32]:
        return self._advance(np.array([token], np.int64))

    def prefill(self, tokens: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Consume any number of tokens: the largest graphs that fit, then smaller ones."""
        ids = np.asarray(tokens, np.int64).reshape(-1)
        at = 0
        for size in self.model.sizes:
            while len(ids) - at >= size:
                self._advance(ids[at : at + size])
                at += size
        return self.logits

    def run(self, inputs: dict[str, NDArray[Any]], steps: int = 1) -> dict[str, NDArray[Any]]:
        """A step (or chunk) of a model whose inputs are not tokens: named inputs to outputs, state carried here."""
        signature = self.model.graph(steps).signature
        feeds = dict(inputs) | {f"past.{name}": value for name, value in self._state.items()}
        names = [spec.name for spec in signature.outputs] + [f"present.{name}" for name in self._state]
        results = dict(zip(names, self._call(steps, names, feeds), strict=True))
        self._state = {name: results.pop(f"present.{name}") for name in self._state}
        self.position += steps
        return results

    def _advance(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        manifest = self.model.manifest
        tokens = len(ids)
        if manifest.context and self.position + tokens > manifest.context:
            raise UsageError(
                f"position {self.position} plus {tokens} tokens exceeds the context of {manifest.context}",
                "export with a larger --context",
            )
        if ids.min() < 0 or ids.max() >= manifest.vocab_size:
            raise UsageError(f"token ids must lie in 0..{manifest.vocab_size - 1}, got {ids.min()}..{ids.max()}")
        feeds: dict[str, NDArray[Any]] = {f"past.{name}": value for name, value in self._state.items()}
        for spec in self.model.graph(tokens).signature.inputs:
            feeds[spec.name] = ids[None] if spec.role == "tokens" else np.array([self.position], np.int64)
        names = ["logits", *(f"present.{name}" for name in self._state)]
        logits, *state = self._call(tokens, names, feeds)
        self._state = dict(zip(self._state, state, strict=True))
        self.position += tokens
        self.logits = logits.reshape(-1)
        return self.logits

    def _call(self, tokens: int, names: list[str], feeds: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        try:
            return self.model.loaded(tokens).run(names, feeds)
        except ExportError:
            raise
        except Exception as error:
            file = self.model.graph(tokens).file
            raise ExportError(f"onnxruntime fails in {file}: {_first_line(error)}") from error

    def save(self) -> dict[str, NDArray[Any]]:
        """The state as arrays by slot name, with `position` and `logits` beside them."""
        return {
            **{name: value.copy() for name, value in self._state.items()},
            "position": np.array(self.position, np.int64),
            "logits": self.logits.copy(),
        }

    def load(self, saved: dict[str, NDArray[Any]]) -> None:
        for slot in self.model.manifest.step.signature.state:
            value = saved.get(slot.name)
            if value is None or value.shape != slot.shape or str(value.dtype) != slot.dtype:
                got = "missing" if value is None else f"{value.dtype}{list(value.shape)}"
                raise UsageError(f"state {slot.name} is {got}, expected {slot.dtype}{list(slot.shape)}")
        self._state = {name: np.array(saved[name]) for name in self._state}
        self.position = int(saved["position"])
        self.logits = np.array(saved["logits"], np.float32)

    def fork(self) -> OrtSession:
        twin = OrtSession(self.model)
        twin.load(self.save())
        return twin


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
