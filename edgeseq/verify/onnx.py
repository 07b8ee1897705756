"""An export on stock onnxruntime, with nothing registered, against the golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeseq.manifest import load_manifest
from edgeseq.verify.golden import Golden, load_golden
from edgeseq.verify.report import Stage, compare
from edgeseq.verify.streams import cuts_stage, graph_stages, named_chunk_stages, step_stage


def onnx_stages(directory: Path, threads: int | None = None) -> list[Stage]:
    """Step graph, random cuts, and every chunk graph."""
    from exporters.ort_check import OrtModel

    manifest = load_manifest(directory)
    golden = load_golden(directory, manifest.step.signature)
    model = OrtModel(directory, threads)
    if golden.tokens is None:
        return _named_stages(model, golden)
    return [
        step_stage("onnxruntime step", "onnx", model.session, golden),
        cuts_stage("onnxruntime chunks", "onnx", model.session, golden),
        *graph_stages("onnxruntime", "onnx", model.session, model.sizes, golden, manifest.context),
    ]


def _named_stages(model: Any, golden: Golden) -> list[Stage]:
    session = model.session()
    n = len(next(iter(golden.inputs.values())))
    made = [session.run({name: value[i] for name, value in golden.inputs.items()}) for i in range(n)]
    stages = [
        compare(
            "onnxruntime step",
            "PyTorch step",
            np.stack([outputs[name] for outputs in made]),
            wanted,
            golden.bound("onnx", wanted, name),
            axes=("step", f"{name} element"),
        )
        for name, wanted in golden.outputs.items()
    ]
    for size in model.sizes:
        if size > 1:
            stages += named_chunk_stages("onnxruntime", "onnx", model.session().run, size, golden)
    return stages
