"""Models that no family knows: named inputs, tied weights, constants of the code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from safetensors.numpy import load_file

from edgeseq.manifest import load_manifest
from exporters import export
from exporters.ort_check import OrtModel
from tests.exporters.support import worst

MODELS = Path(__file__).parent / "user_models.py"


def test_named_inputs_and_constants(tmp_path: Path) -> None:
    out = tmp_path / "sensor"
    export(f"{MODELS}:sensor", out)
    golden = load_file(out / "golden.safetensors")
    session = OrtModel(out, threads=1).session()
    for frame, wanted in zip(golden["input.frame"], golden["output.speech"], strict=True):
        found = session.run({"frame": frame[None]})["speech"][0]
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    manifest = load_manifest(out)
    assert (manifest.family, manifest.source, manifest.context) == ("custom", "user_models.py:sensor", 0)
    stored = load_file(out / "weights.safetensors")
    constants = [name for name in stored if name.startswith("constant.")]
    assert [stored[name].shape for name in constants] == [(6, 100)], "only the large constant leaves the graph"


def test_tied_weights_are_stored_once_and_states_may_alias(tmp_path: Path) -> None:
    out = tmp_path / "tied"
    export(f"{MODELS}:tied", out, chunks=(4,))
    assert worst(out, [1, 4, 7, 36]) < 1
    stored = load_file(out / "weights.safetensors")
    assert set(stored) == {"embed.weight", "decay"}
    proto = onnx.load(str(out / "step.onnx"), load_external_data=False)
    names = [output.name for output in proto.graph.output]
    assert names == ["logits", "present.h", "present.twice", "present.idle"]
    session = OrtModel(out, threads=1).session()
    session.step(3)
    state = session.save()
    np.testing.assert_array_equal(state["h"], state["twice"])
    assert not state["idle"].any()
