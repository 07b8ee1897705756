"""Hybrids through the whole chain: one state holds caches and recurrent states, and what a token moves is both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgeseq
import edgeseq.cli as cli
from edgeseq.bundle.ledger import crossover_depth, ledger, memory_need, state_bytes_at
from edgeseq.bundle.plan import Plan
from edgeseq.bundle.reader import BundleFile
from edgeseq.models import families
from edgeseq.models.source import FamilySource, random_source
from edgeseq.models.twin import family_of_config
from edgeseq.runtime import Model
from edgeseq.verify.tolerances import tolerance
from exporters import export
from tests.models.hybrid_shapes import HYBRIDS
from tests.sessions import moved

CONTEXT = 48
BOTH = ("falcon-h1-odd", "samba-odd")  # a cache and a state in every layer; a ring and states that never grow
emulated = pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")


@dataclass(frozen=True)
class Made:
    """A hybrid's bundle; its export lies beside it."""

    name: str
    folder: Path
    flavour: str = "onnx"
    target: str = "host"
    quant: str = "none"

    @cached_property
    def source(self) -> FamilySource:
        config = HYBRIDS.get(self.name) or families()[self.name].tiny
        return random_source(f"odd {self.name}", family_of_config(config), config)

    @property
    def bundle(self) -> Path:
        out = self.folder / "bundle"
        if not out.exists():
            where = self.folder / "export"
            export(self.source, where, flavour=self.flavour, quant=self.quant, chunks=(5,), context=CONTEXT)
            edgeseq.compile(self.folder / "export", self.target, out)
        return out

    @property
    def plan(self) -> Plan:
        return BundleFile(self.bundle / "model.edgeseq").plan

    def verify(self) -> None:
        device = None if self.target == "host" else self.target
        report = edgeseq.verify(self.bundle, export=self.folder / "export", device=device, threads=2)
        assert report.ok, report.failed

    def logits(self, tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            return self.source.build()(torch.tensor([tokens]))[0].numpy()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    return {name: Made(name, tmp_path_factory.mktemp(name)) for name in BOTH}


@pytest.mark.parametrize("name", BOTH)
def test_every_stage_agrees(name: str, both: dict[str, Made], capfd: pytest.CaptureFixture[str]) -> None:
    """And `edgeseq inspect` names every slot by its layer, its mixer and what it is."""
    both[name].verify()
    capfd.readouterr()
    assert cli.run(["inspect", str(both[name].bundle), "--json"]) == 0
    slots = {slot["name"]: slot["update"] for slot in json.loads(capfd.readouterr().out)["state"]}
    layers = both[name].source.config.n_layers
    mixers = (
        [("mamba", "attention")] * layers if name == "falcon-h1-odd" else [("attention",), ("mamba",), ("attention",)]
    )
    parts = {"mamba": {"conv": "shift", "ssm": "overwrite"}, "attention": dict.fromkeys(("key", "value"), "ring")}
    if name == "falcon-h1-odd":
        parts["attention"] = dict.fromkeys(("key", "value"), "append")
    assert slots == {
        f"layers.{i}.{mixer}.{part}": update
        for i, used in enumerate(mixers)
        for mixer in used
        for part, update in parts[mixer].items()
    }


@pytest.fixture(scope="module", params=BOTH)
def opened(
    request: pytest.FixtureRequest, both: dict[str, Made]
) -> Iterator[tuple[Made, Model, list[int], np.ndarray]]:
    made = both[request.param]
    tokens = np.random.default_rng(1).integers(0, made.source.config.vocab_size, CONTEXT).tolist()
    with edgeseq.load(made.bundle, threads=2, poison=True) as model:
        yield made, model, tokens, made.logits(tokens)


cuts = st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["stay", "save", "fork", "reload"])), min_size=2)


@settings(max_examples=8, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(pieces=cuts)
def test_caches_and_states_travel_together(
    opened: tuple[Made, Model, list[int], np.ndarray], pieces: list[tuple[int, str]]
) -> None:
    """Any cut, the stream saved, forked or reloaded after each piece: logits as in PyTorch's whole form."""
    _, model, tokens, whole = opened
    session, at = model.session(), 0
    for n, how in pieces:
        piece = tokens[at : min(at + n, CONTEXT - 1)]
        if not piece:
            break
        at += len(piece)
        logits = session.step(piece[0]) if len(piece) == 1 else session.prefill(piece)
        assert np.abs(logits - whole[at - 1]).max() <= tolerance("runtime", "float32", whole)
        session = moved(session, how)
        assert session.position == at


def test_a_state_of_one_hybrid_is_refused_by_another(both: dict[str, Made]) -> None:
    saved = [edgeseq.load(both[name].bundle) for name in BOTH]
    states = [model.session() for model in saved]
    for session in states:
        session.prefill([1, 2, 3])
    with pytest.raises(edgeseq.EdgeseqError, match="model"):
        states[0].load(states[1].save())


def test_bytes_by_hand(both: dict[str, Made]) -> None:
    """State, its growth and the cache that a token reads, from the shapes alone."""
    c = both["falcon-h1-odd"].source.config
    a, m = c.attention, c.mamba
    row = 2 * 4 * c.n_layers * a.n_kv_heads * a.head_dim  # key and value
    fixed = 4 * c.n_layers * (m.d_inner * m.d_state + (m.d_inner + 2 * m.n_groups * m.d_state) * (m.d_conv - 1))
    plan = both["falcon-h1-odd"].plan
    assert sum(slot.nbytes for slot, _ in plan.state) == fixed + row * CONTEXT
    assert ledger(plan).kv == ((row, 0),)
    assert ledger(plan).state_bytes_rw == 2 * fixed + row
    assert state_bytes_at(plan, 10 * CONTEXT) - state_bytes_at(plan, 5 * CONTEXT) == row * 5 * CONTEXT

    c = both["samba-odd"].source.config
    a, s = c.attention, c.mamba
    attending = len(c.attention_at)
    ring = 2 * 4 * attending * a.n_kv_heads * a.head_dim
    fixed = 4 * (c.n_layers - attending) * s.d_inner * (s.d_state + s.d_conv - 1)
    plan = both["samba-odd"].plan
    assert sum(slot.nbytes for slot, _ in plan.state) == fixed + ring * a.window
    assert ledger(plan).kv == ((ring, a.window),)
    assert ledger(plan).kv_bytes_read(10**6) == ring * a.window
    assert state_bytes_at(plan, 10 * CONTEXT) == memory_need(plan)["state"]


def test_the_crossover_of_a_window_and_a_cache_beside_states(both: dict[str, Made]) -> None:
    """The depth that the lines give is the first at which the bytes really are fewer, counted depth by depth."""
    window, cache = (ledger(both[name].plan) for name in ("samba-odd", "falcon-h1-odd"))
    counted = next(d for d in range(10**5) if window.bytes_per_token(d) <= cache.bytes_per_token(d))
    assert crossover_depth(window, cache) == counted > 0
    assert crossover_depth(cache, window) == 0


OTHERS = [n for n in HYBRIDS if n not in BOTH]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flavour"), [*((n, "onnx") for n in OTHERS), *((n, "ort") for n in HYBRIDS)], ids=lambda x: str(x)
)
def test_every_hybrid_in_every_flavour(name: str, flavour: str, tmp_path: Path) -> None:
    Made(name, tmp_path, flavour).verify()


@pytest.mark.slow
@emulated
@pytest.mark.parametrize("name", HYBRIDS)
def test_aarch64_agrees(name: str, tmp_path: Path) -> None:
    Made(name, tmp_path, target="qemu-aarch64").verify()


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("name", ["falcon-h1", "zamba2", "granite-hybrid", "qwen3-next"])
def test_quantised_hybrids_agree(name: str, quant: str, tmp_path: Path) -> None:
    """Shapes wide enough to be rounded, experts and low-rank adapters among them."""
    made = Made(name, tmp_path, quant=quant)
    made.verify()
    assert any(kernel.name.startswith("linear_q") for kernel in made.plan.kernels)
