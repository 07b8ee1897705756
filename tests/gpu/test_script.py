"""What the GPU script does without a GPU: fills weights in again, makes states up."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeseq
from tests.gpu import refill
from tests.runtime import build, handmade

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build.bundle(tmp_path_factory.mktemp("handmade") / "bundle")


@pytest.mark.parametrize("kept", [1 << 20, 0])
def test_a_bundle_without_its_weights_is_filled_again(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    monkeypatch.setattr(refill, "KEPT_BYTES", kept)
    copy = tmp_path / "b"
    shutil.copytree(bundle, copy)
    refill.strip(copy)
    assert not (copy / "model.edgeseq").exists()
    assert refill.refill(copy) and not refill.refill(copy)
    with edgeseq.load(copy, threads=1) as model:
        model.check_weights()
        own = handmade.embedding().reshape(-1)
        file = (copy / "model.edgeseq").read_bytes()
        first = np.frombuffer(file, np.float32, own.size, refill.read_head(file).weights[2])
        assert np.array_equal(first, own) == (kept > 0)
        assert np.isfinite(first).all() and first.std() < (2 if kept else 0.05)
        assert np.isfinite(model.session().prefill([1, 2, 3])).all()


@pytest.mark.parametrize(("layout", "bits"), [("q4x16", 4), ("q8x16", 8), ("s8x16", 8)])
def test_quantised_fillings_are_whole_records_with_small_scales(layout: str, bits: int) -> None:
    tile = np.frombuffer(refill._tile(layout, 6), np.uint8)
    rows = tile.reshape(-1, 64 + 2 * 512 * bits // 8)
    scales = np.ascontiguousarray(rows[:, :64]).view(np.float16)
    assert len(rows) > 100 and np.abs(scales).max() < 0.2 and scales.std() > 0.005
    assert 120 < rows[:, 64:].mean() < 135


@pytest.mark.parametrize(("dtype", "numpy"), [(refill.FLOAT32, "<f4"), (refill.FLOAT16, "<f2")])
def test_other_fillings_are_small_normals(dtype: int, numpy: str) -> None:
    values = np.frombuffer(refill._tile("", dtype), numpy).astype(np.float64)
    assert abs(values.std() - refill.SCALE) < 1e-3 and abs(values.mean()) < 1e-3


def test_bfloat16_filling() -> None:
    bits = np.frombuffer(refill._tile("", refill.BFLOAT16), np.uint16).astype(np.uint32) << 16
    assert abs(bits.view(np.float32).std() - refill.SCALE) < 1e-3


@pytest.mark.parametrize("position", [0, 5, handmade.N - 1])
def test_made_up_states_are_taken(bundle: Path, monkeypatch: pytest.MonkeyPatch, position: int) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import runtime
    import speed

    model: Any = runtime.Model(bundle)
    session = model.session()
    session.load(speed.made_up_state(model, position))
    assert session.position == position
    session.step(1)
    session.close()
    model.close()


def test_a_twin_tells_from_which_depth_it_is_the_slower_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    import run

    for name, facts in (("m-fp16-none", {}), ("m-fp16-none.twin", {"twin_of": "m-fp16-none"}), ("other", {})):
        (tmp_path / name / "gpu").mkdir(parents=True)
        (tmp_path / name / "expect.json").write_text(json.dumps(facts))
    assert run.twin_depths({"twin_of": "m"})[-1] == 131072 and not run.twin_depths({})

    def speed(case: str, rate: float, depths: dict[str, float]) -> dict[str, Any]:
        return {"case": case, "check": "speed", "measured": {"tokens_per_second": rate, "at_depth": depths}}

    rates = {"1024": 900.0, "4096": 490.0, "2048": 600.0}
    made = [speed("m-fp16-none", 500.0, {}), speed("m-fp16-none.twin", 1000.0, rates), speed("other", 1.0, {})]
    (found,) = run.crossovers(made, run.cases([tmp_path]))
    assert found["case"] == "m-fp16-none.twin" and "faster from 4096 on" in found["note"]
    assert "1024: 900, 2048: 600, 4096: 490" in found["note"]
    (found,) = run.crossovers([made[0], speed("m-fp16-none.twin", 1000.0, {"1024": 900.0})], run.cases([tmp_path]))
    assert "the twin is faster at all of them" in found["note"]
    assert run.crossovers(made[:1], run.cases([tmp_path])) == [], "a twin that failed is told of elsewhere"
