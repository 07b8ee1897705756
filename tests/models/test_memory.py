"""Explicit memories: each against its paper in float64 loops, its forms against one another, then to the device."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import edgeseq
from edgeseq.compiler import compile_export
from edgeseq.errors import SourceError
from edgeseq.models import families, step_families
from edgeseq.models.dnc import DncConfig, allocation
from edgeseq.models.nsm import NsmConfig
from edgeseq.models.ntm import NtmConfig
from edgeseq.models.source import load_weights, open_source, zoo_of
from edgeseq.models.state_bytes import parsed
from edgeseq.models.step_family import StepModel
from edgeseq.verify import verify
from edgeseq.verify.tolerances import tolerance
from exporters import export
from tests.models import memory_numpy as paper

ODD: dict[str, Any] = {
    "ntm-1r1w": NtmConfig(5, 3, 14, 9, 7),
    "ntm-2r3w": NtmConfig(3, 5, 11, 12, 5, n_read=2, n_write=3),
    "dnc-1r": DncConfig(5, 3, 14, 9, 7),
    "dnc-3r": DncConfig(3, 5, 11, 10, 6, n_read=3),
    "nsm": NsmConfig(7, 3, 10),
}
names = pytest.mark.parametrize("name", ODD)
STEPS = 16


@cache
def model(name: str) -> StepModel:
    """Every parameter random and large enough that heads move."""
    record, rng = step_families()[name.split("-")[0]], np.random.default_rng(3)
    made = record.meta_model(ODD[name])
    shapes = {n: tuple(t.shape) for n, t in made.state_dict().items()}
    scale = 0.3 if name == "nsm" else 0.8  # an instruction that speaks of properties alone forgets where it was
    load_weights(made, {n: (scale * rng.standard_normal(shape)).astype(np.float32) for n, shape in shapes.items()})
    return made


def definition(name: str, inputs: list[NDArray]) -> Any:
    w = {n: t.numpy().astype(np.float64) for n, t in model(name).state_dict().items()}
    c = ODD[name]
    if name.startswith("ntm"):
        return paper.Ntm(w, c.n_read, c.n_write, c.n_rows, c.d_row)
    if name.startswith("dnc"):
        return paper.Dnc(w, c.n_read, c.n_rows, c.d_row, c.d_hidden)
    return paper.Nsm(w, inputs[1][0].astype(np.float64), inputs[2][0].astype(np.float64), inputs[3][0] > 0)


def drawn(name: str, batch: int = 1, seed: int = 0) -> list[list[torch.Tensor]]:
    """Inputs of STEPS steps; a scene stays, and one of its nodes is not there."""
    rng = np.random.default_rng(seed)
    rows = [[2 * rng.standard_normal((batch, *s.shape[1:])).astype(np.float32) for s in model(name).inputs]
            for _ in range(STEPS)]  # fmt: skip
    if name == "nsm":
        scene = [*rows[0][1:3], (np.arange(7) != 4).astype(np.float32)[None].repeat(batch, 0)]
        rows = [[row[0], *scene] for row in rows]
    return [[torch.from_numpy(x) for x in row] for row in rows]


@torch.no_grad()
def stepped(name: str, inputs: list[list[torch.Tensor]], state: list[torch.Tensor] | None = None) -> tuple[list, list]:
    """(outputs of every step, last state)."""
    m, found = model(name), []
    state = m.initial_state(inputs[0][0].shape[0]) if state is None else state
    for row in inputs:
        made = m.advance(*row, *state)
        found.append(made[: len(m.outputs)])
        state = list(made[len(m.outputs) :])
    return found, state


def close(got: Any, want: Any) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and np.isfinite(want).all()
    assert np.abs(got - want).max() <= tolerance("torch", "float32", want)


@names
def test_equals_its_definition(name: str) -> None:
    inputs = drawn(name)
    reference = definition(name, [x.numpy() for x in inputs[0]])
    for row, outputs in zip(inputs, stepped(name, inputs)[0], strict=True):
        wanted = reference.step(row[0][0, 0].numpy().astype(np.float64))
        for got, want in zip(outputs, wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            close(got[0, 0], want)


@names
def test_the_reference_is_not_degenerate(name: str) -> None:
    """What was read long ago still matters, and heads leave their rows."""
    inputs = drawn(name)
    other = [[row[0] + (t == 3), *row[1:]] for t, row in enumerate(inputs)]
    first, second = stepped(name, inputs)[0], stepped(name, other)[0]
    assert (first[4][0] - second[4][0]).abs().max() > 1e-3
    assert (first[-1][0] - first[0][0]).abs().max() > 1e-2


@names
@settings(max_examples=3, derandomize=True, deadline=None)
@given(cuts=st.lists(st.integers(1, STEPS - 1), max_size=6).map(sorted))
def test_any_cut_of_chunks_equals_the_steps(name: str, cuts: list[int]) -> None:
    inputs, m = drawn(name, 2), model(name)
    whole, last = stepped(name, inputs)
    if m.chunk is None:  # steps only: the state goes through bytes at the cuts instead
        _, state = stepped(name, inputs[: max(cuts, default=0)]) if cuts and cuts[-1] else ([], None)
        rest = inputs[max(cuts, default=0) :]
        state = None if state is None else [torch.from_numpy(np.frombuffer(s.numpy().tobytes(), np.float32)
                                                             .reshape(s.shape).copy()) for s in state]  # fmt: skip
        assert torch.equal(stepped(name, rest, state)[0][-1][0], whole[-1][0])
        return
    state, begin = m.initial_state(2), 0
    for end in [*cuts, STEPS]:
        if end > begin:
            with torch.no_grad():
                joined = [torch.cat(x, 1) for x in zip(*inputs[begin:end], strict=True)]
                y, *state = m.advance(*joined, *state)
            close(y, torch.cat([out[0] for out in whole[begin:end]], 1))
            begin = end
    for got, want in zip(state, last, strict=True):
        close(got, want)


@names
def test_rows_of_a_batch_are_independent(name: str) -> None:
    inputs = drawn(name, 3)
    alone = [[x[1:2] for x in row] for row in inputs]
    for together, single in zip(stepped(name, inputs)[0], stepped(name, alone)[0], strict=True):
        for got, want in zip(together, single, strict=True):
            close(got[1:2], want)


@names
def test_the_declared_state_is_what_a_step_returns(name: str) -> None:
    slots = model(name).state_slots(0)
    _, state = stepped(name, drawn(name)[:2])
    assert [tuple(t.shape) for t in state] == [s.shape for s in slots]
    record = step_families()[name.split("-")[0]]
    assert sum(s.nbytes for s in slots) == parsed(record.state_formula).value(record.letters(ODD[name]))


def test_ties_in_usage_go_by_index() -> None:
    """Fresh memory is all ties: row 0 takes everything; then of equal rows the first, and used ones last."""
    usage = torch.tensor([[0.0] * 6, [0.5, 0.25, 0.5, 0.25, 1.0, 0.25], [1.0] * 6])
    found = allocation(usage).numpy()
    np.testing.assert_array_equal(found[0], [1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(found[1], [0.5 / 64, 0.75, 0.25 / 64, 0.1875, 0, 0.046875], atol=1e-7)
    np.testing.assert_array_equal(found[2], np.zeros(6))
    for row, want in zip(usage.numpy(), found, strict=True):
        np.testing.assert_allclose(paper.allocation(row.astype(np.float64)), want, atol=1e-7)


def test_a_node_that_is_not_there_gets_nothing() -> None:
    found, _ = stepped("nsm", drawn("nsm", 2))
    for distribution, _ in found:
        assert (distribution[..., 4] == 0).all()
        np.testing.assert_allclose(distribution.sum(-1), 1.0, atol=1e-6)


def test_families_of_steps_are_listed_apart_from_those_of_tokens() -> None:
    assert {"ntm", "dnc", "nsm"} <= set(step_families())
    assert not set(step_families()) & set(families())
    for record in step_families().values():
        assert all(open_source(f"zoo:{zoo}").family == record.name for zoo in zoo_of(record))
    with pytest.raises(SourceError, match="config of no family, so it has no twin"):
        open_source("zoo:ntm-copy-twin")


@cache
def _folder() -> Path:
    import atexit
    import tempfile

    path = Path(tempfile.mkdtemp(prefix="edgeseq-memory-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def factory(name: str) -> str:
    """The odd model as the user's own module, which is how a trained one would come."""
    path = _folder() / f"{name.replace('-', '_')}.py"
    path.write_text(f"from tests.models.test_memory import model\ndef make():\n    return model({name!r})\n")
    return f"{path}:make"


def exported(name: str, flavour: str = "onnx") -> Path:
    out = _folder() / f"{name}.{flavour}"
    if not out.is_dir():
        export(factory(name), out, flavour=flavour, chunks=None if model(name).chunk is None else (2,))
    return out


def bundled(name: str, target: str) -> Path:
    out = _folder() / f"{name}.{target}"
    if not out.is_dir():
        compile_export(exported(name), target, out)
    return out


SLOW = ("ntm-2r3w", "dnc-1r", "dnc-3r")
few = pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ODD])


@few
@pytest.mark.parametrize("flavour", ["onnx", pytest.param("ort", marks=pytest.mark.slow)])
def test_the_graphs_on_stock_onnxruntime(name: str, flavour: str) -> None:
    import onnx

    report = verify(exported(name, flavour))
    assert report.ok, [s for s in report.stages if not s.ok]
    graph = onnx.load(str(exported(name, flavour) / "step.onnx"), load_external_data=False)
    assert {n.domain for n in graph.graph.node} <= {""}, "standard operators only"


@few
def test_compiled_and_verified_here(name: str) -> None:
    """Every stage of verify, then each output of a stream under cuts: forked, saved, loaded and rewound."""
    bundle, inputs = bundled(name, "host"), drawn(name)
    report = verify(bundle)
    assert report.ok, [s for s in report.stages if not s.ok]
    whole, m = stepped(name, inputs)[0], model(name)
    with edgeseq.load(bundle, poison=True) as opened:
        session, moves = opened.session(), np.random.default_rng(1)
        for row, wanted in zip(inputs, whole, strict=True):
            given_ = {s.name: x.numpy() for s, x in zip(m.inputs, row, strict=True)}
            found = session.run(given_)
            for spec, want in zip(m.outputs, wanted, strict=True):
                close(found[spec.name], want)
            match moves.integers(4):
                case 0:
                    saved, session = session.save(), opened.session()
                    session.run({n: 3 * x for n, x in given_.items()})
                    session.load(saved)
                case 1:
                    fork = session.fork()
                    session.run(given_)
                    session = fork
                case 2:
                    saved = session.save()
                    session.run(given_)
                    session.load(saved)


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize("name", ["nsm", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ntm-2r3w", "dnc-3r"))])
def test_compiled_and_verified_for_aarch64(name: str) -> None:
    report = verify(bundled(name, "raspberry-pi-5"), device="qemu-aarch64")
    assert report.ok, [s for s in report.stages if not s.ok]


def copy_task() -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("copy_task", Path(__file__).parents[2] / "docs" / "examples" / "copy_task.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["ntm", "dnc"])
def test_the_shipped_memories_copy(name: str) -> None:
    """Every bit of sequences as long as in training; without its memory the controller cannot."""
    task, m = copy_task(), open_source(f"zoo:tiny-{name}").build()
    with torch.no_grad():
        for rows in (1, 6, 10):
            x, bits = (torch.from_numpy(a) for a in task.sequence(np.random.default_rng(rows), rows, 16))
            assert torch.equal(task.said(m, x) > 0, bits.bool()), rows
        state, lost = m.initial_state(16), []
        for t in range(x.shape[1]):
            y, *state = m.step(x[:, t : t + 1], *state)
            state[0] = torch.full_like(state[0], 1e-6)
            lost.append(y)
    assert ((torch.cat(lost[11:], 1) > 0) != bits.bool()).float().mean() > 0.3


@pytest.mark.slow
def test_the_copy_example_as_a_user_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export("zoo:tiny-dnc", tmp_path / "export")
    compile_export(tmp_path / "export", "host", tmp_path / "bundle")
    copy_task().run(tmp_path / "bundle", 3)
    assert " 1 rows: 0 of 24 bits wrong" in (told := capsys.readouterr().out) and "10 rows: 0 of 240 bits" in told
