"""What is written reads back, is the same bytes each time, and leaves nothing behind when it fails."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeseq.bundle import writer
from edgeseq.bundle.encode import plan_id
from edgeseq.bundle.plan import Plan, PlanTensor
from edgeseq.bundle.reader import BundleFile
from edgeseq.bundle.writer import PIECE, write_plan
from edgeseq.errors import BundleError
from tests.bundle.plans import cached_plan, gpu_plan, recurrent_plan


@pytest.mark.parametrize("make", [recurrent_plan, cached_plan, gpu_plan])
def test_a_plan_reads_back(make, tmp_path: Path) -> None:
    plan: Plan = make()
    path = tmp_path / "model.edgeseq"
    number = write_plan(plan, path)
    with BundleFile(tmp_path) as bundle:
        assert bundle.plan == plan
        assert bundle.plan_id == number == plan_id(plan)
        assert [bytes(t.data()) for t in bundle.plan.tensors] == [t.data() for t in plan.tensors]
        again = tmp_path / "again"
        write_plan(bundle.plan, again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "model.edgeseq"]


def test_weights_lie_on_a_page_and_tensors_on_64_bytes(tmp_path: Path) -> None:
    plan = recurrent_plan()
    path = tmp_path / "model.edgeseq"
    write_plan(plan, path)
    data = path.read_bytes()
    first, second = (t.data() for t in plan.tensors)
    assert data.index(first) % 4096 == 0
    assert data.index(second) % 64 == 0
    assert data.endswith(second)


def test_large_weights_are_written_in_whole_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system gets pieces of 2 MiB at multiples of 2 MiB, whatever the tensors' sizes."""
    written: list[tuple[int, int]] = []

    class Recorded(io.FileIO):
        def write(self, data: Any) -> int:
            written.append((self.tell(), len(data)))
            return super().write(data)

    def opened(path: Path, mode: str, buffering: int) -> io.BufferedWriter:
        return io.BufferedWriter(Recorded(path, mode), buffering)

    monkeypatch.setattr(writer, "open", opened, raising=False)
    plan = recurrent_plan()
    arrays = [np.full(n, n % 251, np.uint8) for n in (3 * PIECE + 5, 7, PIECE - 1, 2 * PIECE)]
    large = tuple(PlanTensor(f"t{i}", "plain", "uint8", a.shape, a.nbytes, a.tobytes) for i, a in enumerate(arrays))
    write_plan(replace(plan, tensors=(*plan.tensors, *large)), tmp_path / "model.edgeseq")
    *whole, rest, header = written
    assert whole == [(i * PIECE, PIECE) for i in range(len(whole))] and len(whole) >= 6
    assert rest[0] == len(whole) * PIECE and rest[1] < PIECE and header[0] == 0
    with BundleFile(tmp_path) as bundle:
        assert [bytes(t.data()) for t in bundle.plan.tensors[-4:]] == [a.tobytes() for a in arrays]


def test_equal_code_is_stored_once(tmp_path: Path) -> None:
    path = tmp_path / "model.edgeseq"
    write_plan(gpu_plan(), path)
    assert path.read_bytes().count(b"__kernel void gather") == 1


def test_arrays_are_written_as_they_lie(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((VOCAB, 8)).astype(np.float16)
    tensor = PlanTensor("embed", "plain", "float16", array.shape, array.nbytes, lambda: array)
    plan = replace(recurrent_plan(), tensors=(tensor, recurrent_plan().tensors[1]), graphs=_without_embed())
    write_plan(plan, tmp_path / "model.edgeseq")
    with BundleFile(tmp_path) as bundle:
        assert bytes(bundle.plan.tensors[0].data()) == array.tobytes()


VOCAB = 17


def _without_embed():
    def keep(graph):
        return replace(graph, launches=tuple(launch for launch in graph.launches if launch.kernel == "scan"))

    return tuple(keep(g) for g in recurrent_plan().graphs)


def test_plan_id_needs_no_weights_and_sees_the_launches() -> None:
    plan = recurrent_plan()

    def never() -> bytes:
        raise AssertionError("weights were asked for")

    blind = replace(plan, tensors=tuple(replace(t, data=never) for t in plan.tensors))
    assert plan_id(blind) == plan_id(plan)
    step = plan.graphs[0]
    other = replace(step, launches=(replace(step.launches[0], grid=(2, 1, 1)), *step.launches[1:]))
    assert plan_id(replace(plan, graphs=(other, plan.graphs[1]))) != plan_id(plan)


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    write_plan(recurrent_plan(), tmp_path / "model.edgeseq", lambda *step: seen.append(step))
    assert seen[-1][1] == seen[-1][2] == 576 + 50
    assert [s[1] for s in seen] == sorted(s[1] for s in seen)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, BundleError])
def test_an_interrupted_write_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fail() -> bytes:
        raise error("stop")

    plan = recurrent_plan()
    broken = replace(plan, tensors=(plan.tensors[0], replace(plan.tensors[1], data=fail)))
    with pytest.raises(error):
        write_plan(broken, tmp_path / "model.edgeseq")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.edgeseq"
    write_plan(recurrent_plan(), path)
    before = path.read_bytes()
    plan = recurrent_plan()
    short = replace(plan, tensors=(plan.tensors[0], replace(plan.tensors[1], data=lambda: b"short")))
    with pytest.raises(BundleError, match="announced with 50 bytes but packed to 5"):
        write_plan(short, path)
    assert path.read_bytes() == before
