"""PyTorch built again from the source the manifest names: does the golden still hold, and do its three forms agree?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeseq.errors import SourceError, UsageError
from edgeseq.manifest import load_manifest
from edgeseq.spec import Manifest
from edgeseq.verify.golden import load_golden
from edgeseq.verify.report import Array, Stage, compare
from edgeseq.verify.streams import cuts_stage, step_stage


class TorchStream:
    """A model's chunk and step form as a stream; `model` has its weights."""

    def __init__(self, model: Any, context: int) -> None:
        import torch

        self.model, self.position = model, 0
        slots = model.state_slots(context)
        self.state = [torch.full(s.shape, s.init, dtype=getattr(torch, s.dtype)) for s in slots]

    def prefill(self, ids: Sequence[int]) -> Array:
        """Logits float32 [V] after the last id."""
        import torch

        with torch.inference_mode():
            position = torch.tensor([self.position])
            logits, *self.state = self.model.advance(torch.tensor([list(ids)]), position, *self.state)
        self.position += len(ids)
        last: Array = logits.float().numpy().reshape(-1)
        return last

    def step(self, token: int) -> Array:
        return self.prefill([token])


def _rebuilt(manifest: Manifest, directory: Path) -> Any:
    """The source's module: with its own weights, or with the export's where they were rounded or fitted on the way."""
    from edgeseq.models.source import open_source
    from exporters import distill, golden

    source = open_source(manifest.source)
    distilled = (directory / distill.FILE).is_file()
    if (manifest.quant, manifest.dtype, distilled) == ("none", "float32", False):
        return source.build("cpu")
    model = distill.rebuilt(manifest) if distilled else source.build("meta")
    golden.load(model, directory / "weights.safetensors")
    return model


def live_stages(directory: Path) -> list[Stage]:
    """Whole, step and chunk form of the model rebuilt from `manifest.source`, against the golden.

    UsageError when the source cannot be rebuilt from here: only zoo names and paths that still exist can.
    """
    import torch

    from edgeseq.models.base import SequenceModel

    manifest = load_manifest(directory)
    golden = load_golden(directory, manifest.step.signature)
    try:
        model = _rebuilt(manifest, directory).eval()
    except (UsageError, SourceError) as error:
        raise UsageError(
            f"the source {manifest.source} cannot be built again: {error.sentence}",
            "leave out --live, or run this where the source is",
        ) from None
    if golden.tokens is None or golden.logits is None:
        raise UsageError("a model with named inputs is not built again", "leave out --live")
    stages = []
    if isinstance(model, SequenceModel):
        with torch.inference_mode():
            whole = model(torch.from_numpy(golden.tokens)[None])[0].float().numpy()
        bound = golden.bound("torch", golden.logits)
        stages.append(compare("PyTorch whole sequence", "golden", np.asarray(whole), golden.logits, bound))
    context = manifest.context or 1

    def fresh() -> TorchStream:
        return TorchStream(model, context)

    stages.append(step_stage("PyTorch step", "torch", fresh, golden))
    stages.append(cuts_stage("PyTorch chunks", "torch", fresh, golden))
    return stages
