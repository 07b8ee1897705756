"""A made-up state is one that the runtime accepts, and a depth is really reached; rivals compute the same model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import edgeseq
from devices.profile import load_profile
from devices.transports.base import Completed, Transport
from edgeseq.bench import device
from edgeseq.bench import engines as module
from edgeseq.bench.cases import Case
from edgeseq.bench.engines import BundleEngine
from edgeseq.bench.rivals import OrtEngine
from edgeseq.bench.synthetic import saved_state, slot_values
from edgeseq.bench.torch_rivals import TorchEngine
from edgeseq.bundle.reader import BundleFile
from edgeseq.errors import BundleError, DeviceError, UsageError
from edgeseq.spec import StateSlot
from tests import bundles


@pytest.mark.parametrize(
    "name, depth", [("mamba", 1 << 20), ("retnet", 77), ("transformer", 100), ("transformer", 160)]
)
def test_the_runtime_accepts_a_made_up_state(name: str, depth: int) -> None:
    with BundleFile(bundles.bundled(name), check_weights=False) as file:
        plan = file.plan
    state = saved_state(plan.manifest.model_id, [slot for slot, _ in plan.state], depth)
    with edgeseq.load(bundles.bundled(name), poison=True) as model, model.session() as session:
        session.load(state)
        assert session.position == depth
        assert session.save() == state
        if depth < bundles.CONTEXT or name != "transformer":
            assert np.isfinite(session.step(1)).all()
        with pytest.raises(BundleError):
            session.load(state[:-1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_values_are_small_and_finite(dtype: str) -> None:
    values = slot_values(StateSlot("x", dtype, (1, 3, 5), init=2.0))  # type: ignore[arg-type]
    if dtype == "bfloat16":
        values = (values.astype(np.uint32) << 16).view(np.float32)
    assert values.shape == (1, 3, 5) and np.isfinite(values).all()
    assert (values == 2).all() if dtype == "int64" else 0 < np.abs(values.astype(np.float32)).max() < 1


@pytest.fixture
def engine() -> BundleEngine:
    return BundleEngine(bundles.bundled("transformer"), 1)


def test_reading_reaches_a_depth_and_resumes_from_it(engine: BundleEngine) -> None:
    for depth in (0, 20, 50):
        engine.place(depth)
        assert engine.placed == ("prefill" if depth else "fresh")
        for _ in range(2):
            engine.restore()
            assert engine.session.position == depth
            assert len(engine.decode(3)) == 3 and engine.session.position == depth + 3
    engine.close()


def test_where_reading_takes_long_a_state_is_made_up(engine: BundleEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PLACING_SECONDS", 0.0)
    engine.place(100)
    assert engine.placed == "state"
    engine.restore()
    assert engine.session.position == 100
    engine.place(0)
    engine.restore()
    assert (engine.placed, engine.session.position) == ("fresh", 0)
    engine.close()


def test_a_bandwidth_is_a_rate(engine: BundleEngine) -> None:
    assert engine.read_bandwidth(np.ones(1 << 22, np.uint8)) > 1e6
    assert engine.weights_bandwidth() > 1e6
    engine.close()


@pytest.mark.parametrize("name", ["mamba", "transformer"])
@pytest.mark.parametrize("kind", [OrtEngine, TorchEngine])
def test_rivals_compute_the_same(name: str, kind: type[OrtEngine] | type[TorchEngine]) -> None:
    rival = kind(bundles.exported(name), 1)
    assert all(stage.ok for stage in rival.verified())
    rival.place(20)
    rival.restore()
    assert (rival.placed, rival.stream.position) == ("prefill", 20)
    assert rival.prefill(rival.ids(5)) > 0 and len(rival.decode(2)) == 2 and rival.stream.position == 27
    rival.restore()
    assert rival.stream.position == 20
    rival._load(rival._made_up(30))
    assert rival.stream.position == 30 and len(rival.decode(1)) == 1
    assert np.isfinite(rival._logits).all()


def test_what_cannot_be_timed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="named inputs"):
        BundleEngine(bundles.bundled("filter"), 1)
    with pytest.raises(UsageError, match="no family"):
        TorchEngine(bundles.exported("filter"), 1)


class _Babbling(Transport):
    """A device whose driver says what the test wants."""

    said = ""

    def push(self, bundle: Path) -> str:
        return ""

    def run(self, argv: Sequence[str], timeout: float = 600.0) -> Completed:
        return Completed(tuple(argv), 0, self.said, "")

    def scratch(self, name: str) -> str:
        return name

    def read(self, path: str) -> bytes:
        return b""

    def write(self, path: str, data: bytes) -> None:
        pass

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    "said, sentence",
    [
        ("Segmentation fault", "no measurement"),
        ("[1]", "no measurement"),
        ("7", "no measurement"),
        ('{"test": "tg1"}', "no measurement"),
        ('{"test": "machine", "n_threads": "x", "read_bw": 1}', "no measurement"),
        ('{"test": "machine", "n_threads": 1, "read_bw": 1}', "did not measure tg1"),
    ],
)
def test_a_driver_that_says_nonsense(said: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Babbling, "said", said)
    monkeypatch.setattr(device, "open_transport", _Babbling)
    profile, quiet = load_profile("host"), lambda what, done, total: None
    with pytest.raises(DeviceError, match=sentence):
        device.measure_on_device([bundles.bundled("mamba")], [Case(0, 1, 0)], 1, profile, 1, quiet)
