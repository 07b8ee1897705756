"""The same weights in another engine: stock onnxruntime, or PyTorch without compilation. Both read the export."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from edgeseq.bench.engines import Engine
from edgeseq.bench.synthetic import slot_values
from edgeseq.errors import BundleError, UsageError
from edgeseq.manifest import load_manifest
from edgeseq.spec import Manifest
from edgeseq.verify.golden import load_golden
from edgeseq.verify.report import Array, Stage
from edgeseq.verify.streams import cuts_stage, step_stage

RIVALS = ("onnxruntime", "torch")


class Rival(Engine):
    """An engine whose stream has `prefill` and `step` and whose state is a dictionary of arrays."""

    stream: Any

    def __init__(self, backend: str, directory: Path, manifest: Manifest, threads: int) -> None:
        super().__init__(str(directory), backend, threads, manifest.context, manifest.vocab_size)
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
        stage = "onnx" if self.backend == "onnxruntime" else "torch"

        def fresh() -> Any:
            self._reset()
            return self.stream

        return [
            step_stage(f"{self.backend} step", stage, fresh, golden),
            cuts_stage(f"{self.backend} prefill", stage, fresh, golden),
        ]


class OrtEngine(Rival):
    def __init__(self, directory: Path, threads: int) -> None:
        from exporters.ort_check import OrtModel

        model = OrtModel(directory, threads)
        super().__init__("onnxruntime", directory, model.manifest, threads)
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


class TorchEngine(Rival):
    """Eager PyTorch: the chunk form for prompts, whole, and the step form for tokens."""

    def __init__(self, directory: Path, threads: int) -> None:
        import torch

        manifest = load_manifest(directory)
        super().__init__("torch", directory, manifest, threads)
        torch.set_num_threads(threads)
        self.model = rebuilt(directory, manifest)
        self._reset()

    def _reset(self) -> None:
        from edgeseq.verify.torch_live import TorchStream

        self.stream = TorchStream(self.model, self.manifest.context or 1)

    def _save(self) -> tuple[int, list[Any]]:
        return self.stream.position, [t.clone() for t in self.stream.state]

    def _load(self, snapshot: tuple[int, list[Any]]) -> None:
        self.stream.position, self.stream.state = snapshot[0], [t.clone() for t in snapshot[1]]

    def _made_up(self, depth: int) -> tuple[int, list[Any]]:
        import torch

        slots = self.model.state_slots(self.manifest.context or 1)
        return depth, [torch.from_numpy(slot_values(slot)) for slot in slots]


def rebuilt(directory: Path, manifest: Manifest) -> Any:
    """The family's module with the weights of the export. UsageError for a module of the user's own."""
    from edgeseq.models import families
    from exporters.golden import load

    record = families().get(manifest.family)
    if record is None:
        raise UsageError(
            f"{directory} was exported from a module that is no family of edgeseq, so PyTorch cannot run it from there",
            "time it in its own program, or use --against onnxruntime",
        )
    try:
        model = record.meta_model(_config(record.config, manifest.config))
    except (TypeError, ValueError) as error:
        raise BundleError(f"{directory}: the config is none of {manifest.family}: {error}") from None
    load(model, directory / "weights.safetensors")
    return model.eval()


def _config(kind: type[Any], values: Mapping[str, Any]) -> Any:
    """A config from its JSON form; a config within it is one too, and lists are tuples."""
    hints = get_type_hints(kind)

    def value(name: str, raw: Any) -> Any:
        if isinstance(raw, Mapping) and is_dataclass(hints.get(name)):
            return _config(hints[name], raw)
        return tuple(raw) if isinstance(raw, list) else raw

    return kind(**{name: value(name, raw) for name, raw in values.items()})


MAKERS: dict[str, Callable[[Path, int], Rival]] = {"onnxruntime": OrtEngine, "torch": TorchEngine}


def open_rivals(names: Sequence[str], export: Path, threads: int) -> list[Rival]:
    """The rivals called `names`, on the weights of `export`."""
    return [MAKERS[name](export, threads) for name in names]
