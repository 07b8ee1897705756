"""Tuning: the fastest measured variant goes into the plan, what was measured is kept, and the same record gives the
same bytes. Real measurements here and under qemu; which variant wins them is nobody's promise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeseq
import edgeseq.cli as cli
from edgeseq.bundle.reader import BundleFile
from edgeseq.bundle.tuning import Entry, Record, Tried, record_of
from edgeseq.compiler import Tuning, compile_export, pipeline, tuning
from edgeseq.compiler.codegen import KernelSet
from edgeseq.compiler.ir import KernelRef
from edgeseq.compiler.kernels import linear
from edgeseq.compiler.kernels._emit import splat, store
from edgeseq.compiler.kernels._tiles import accumulators, tiles
from edgeseq.compiler.targets import resolve
from edgeseq.compiler.tuning.measure import identity
from edgeseq.compiler.tuning.subject import Subject
from edgeseq.errors import BundleError, DeviceError, UsageError
from tests.bundles import exported

from . import graphs
from .test_compile import write_export


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step with two products of three rows, which have several tiles."""
    return write_export(tmp_path_factory.mktemp("small") / "export", graphs.by_hand("linear_between"))


@pytest.fixture(scope="module")
def tuned(small: Path) -> Path:
    return compile_export(small, "host", small.parent / "tuned", tuning=Tuning())


def record(bundle: Path) -> Record:
    with BundleFile(bundle) as file:
        found = record_of(file.plan)
    assert found is not None
    return found


def timed(ns: Callable[[int, int], int]) -> Callable[..., Record]:
    """Stands for `measured`: variant i of n takes ns(i, n)."""

    def measured(subjects: Sequence[Subject], manifest: Any, target: Any, device: str, report: Any) -> Record:
        entries = [
            Entry(s.name, s.ref.op, s.fixed, tuple(Tried(c, ns(i, len(s.variants))) for i, c in enumerate(s.choices)))
            for s in subjects
        ]
        return Record(device, 1, 1, identity(target), tuple(entries))

    return measured


class Watched(KernelSet):
    """Remembers what is compiled."""

    built: list[KernelRef] = []

    def add(self, ref: Any, n_args: int) -> str:
        Watched.built.append(ref)
        return super().add(ref, n_args)


def products(monkeypatch: pytest.MonkeyPatch, export: Path, out: Path, how: Tuning | None) -> list[linear.Linear]:
    """Parameters of the linear kernels with a choice that a compilation ends with; nothing is linked."""
    monkeypatch.setattr(pipeline, "KernelSet", Watched)
    monkeypatch.setattr(pipeline, "link", lambda *_: None)
    Watched.built = []
    compile_export(export, "host", out, tuning=how)
    found = dict.fromkeys(ref.params for ref in Watched.built if isinstance(ref, KernelRef) and ref.op == "linear")
    return [p for p in found if len(linear.candidates(p, resolve("host"))) > 1]


def same_bytes(one: Path, other: Path) -> bool:
    names = sorted(p.name for p in one.iterdir())
    return names == sorted(p.name for p in other.iterdir()) and all(
        (one / n).read_bytes() == (other / n).read_bytes() for n in names
    )


def test_every_variant_is_measured_here(small: Path, tuned: Path) -> None:
    found = record(tuned)
    assert (found.device, found.repetitions, found.target) == ("host", 15, identity(resolve("host")))
    assert found.threads >= 1 and [e.op for e in found.kernels] == ["linear", "linear"]
    for entry in found.kernels:
        assert entry.params["T"] == 3 and "tile" not in entry.params
        choices = [tuple(t.choice["tile"]) for t in entry.tried]
        assert choices[0] == resolve("host").gemm_tile and len(set(choices)) == len(choices) >= 2
        assert all(t.ns > 0 for t in entry.tried)


@pytest.mark.parametrize("winner", [0, 1, -1])
def test_the_fastest_goes_into_the_plan(
    winner: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [
        linear.candidates(p, resolve("host"))[winner] for p in products(monkeypatch, small, tmp_path / "plain", None)
    ]
    monkeypatch.setattr(tuning, "measured", timed(lambda i, n: 10 if i == winner % n else 99 + i))
    assert products(monkeypatch, small, tmp_path / "tuned", Tuning()) == wanted
    found = record(tmp_path / "tuned").kernels
    assert [e.fastest.choice for e in found] == [{"tile": list(p.tile)} for p in wanted]


def test_of_equals_the_compilers_own_choice_stays(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    default = products(monkeypatch, small, tmp_path / "plain", None)
    monkeypatch.setattr(tuning, "measured", timed(lambda i, n: 7))
    assert products(monkeypatch, small, tmp_path / "tuned", Tuning()) == default


def test_the_record_repeats_the_bytes_without_measuring(
    small: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> Record:
        raise AssertionError("measured again")

    monkeypatch.setattr(tuning, "measured", never)
    again = compile_export(small, "host", tmp_path / "again", tuning=Tuning(record=tuned))
    assert same_bytes(tuned, again)
    third = compile_export(small, "host", tmp_path / "third", tuning=Tuning(record=again))
    assert same_bytes(tuned, third)


def test_a_record_of_another_model_decides_only_what_it_knows(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "link", lambda *_: None)
    export = write_export(tmp_path / "export", graphs.by_hand("copies_only"))
    bundle = compile_export(export, "host", tmp_path / "bundle", tuning=Tuning(record=tuned))
    assert record(bundle).kernels == ()


def test_variants_that_are_gone_do_not_count(
    small: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record may come from a version with other tiles, or from anybody."""
    default = products(monkeypatch, small, tmp_path / "plain", None)
    gone = Tried({"tile": [1000, 1000]}, 1)
    wild = tuple(replace(e, tried=(*e.tried[:1], gone)) for e in record(tuned).kernels)
    monkeypatch.setattr(tuning, "record_of", lambda plan: replace(record(tuned), kernels=wild))
    assert products(monkeypatch, small, tmp_path / "tuned", Tuning(record=tuned)) == default


MODELS = ["mamba", pytest.param("transformer", marks=pytest.mark.slow), pytest.param("retnet", marks=pytest.mark.slow)]


@pytest.mark.parametrize("name", MODELS)
def test_a_tuned_model_says_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last variant of every kernel against the first: products, attention, recurrences."""
    logits = []
    for i, ns in enumerate((lambda i, n: 1 + i, lambda i, n: 99 - i)):
        monkeypatch.setattr(tuning, "measured", timed(ns))
        bundle = compile_export(exported(name), "host", tmp_path / str(i), tuning=Tuning())
        with edgeseq.load(bundle, threads=2, poison=True) as model:
            logits.append(model.session().prefill(np.arange(47) % model.info.vocab_size))
    assert any(e.fastest is not e.tried[0] for e in record(bundle).kernels)
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=2e-5 * np.abs(logits[0]).max())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
def test_measured_through_a_device(tmp_path: Path) -> None:
    how = Tuning(device="qemu-aarch64")
    bundle = compile_export(exported("mamba"), "raspberry-pi-5", tmp_path / "tuned", tuning=how)
    found = record(bundle)
    assert found.device == "qemu-aarch64" and found.threads == 2 and found.target["cpu"] == "cortex-a76"
    assert len(found.kernels) > 2 and all(t.ns > 0 for e in found.kernels for t in e.tried)
    again = compile_export(exported("mamba"), "raspberry-pi-5", tmp_path / "again", tuning=Tuning(record=bundle))
    assert same_bytes(bundle, again)


def test_tiles_fit_the_registers_and_cut_evenly() -> None:
    assert (accumulators(("avx2", "avx512f")), accumulators(("neon",))) == (28, 7)
    for rows in (1, 3, 8, 64, 100):
        for groups in (1, 5, 6, 48):
            for room in (3, 7, 28):
                found = tiles(rows, groups, room)
                assert len(set(found)) == len(found) >= 1
                assert all(1 <= t <= rows and t * g <= room and g <= groups for t, g in found)
                assert any(g == 1 for _, g in found)


# what is refused


def _crashing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every variant but the first writes far behind its output."""

    def build(name: str, p: linear.Linear) -> Any:
        if p.tile == resolve("host").gemm_tile:
            return real(name, p)
        with linear.kernel(name, [(a, "float32", 1 << 30) for a in p.args]) as k:
            store(k["y"], (1 << 30) - 16, splat(0.0))
        return linear.Built(k.func, 1)

    real = linear.build
    monkeypatch.setattr(linear, "build", build)


def test_a_variant_that_crashes_is_named(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _crashing(monkeypatch)
    with pytest.raises(DeviceError, match=r"edgeseq-device on host ended with -11: .* variants of linear_t3_\w+ were"):
        compile_export(small, "host", tmp_path / "bundle", tuning=Tuning())
    assert not list(tmp_path.iterdir())


def test_a_driver_that_says_nonsense_is_refused(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link_driver(target: Any, kernels: Any, table: Any, out: Path) -> None:
        (out / "edgeseq-device").write_text("#!/bin/sh\necho '{\"launch_ns\": [1, 2]}'\n")
        (out / "edgeseq-device").chmod(0o755)

    monkeypatch.setattr("edgeseq.compiler.tuning.measure.link_driver", link_driver)
    with pytest.raises(DeviceError, match="said something that is no measurement"):
        compile_export(small, "host", tmp_path / "bundle", tuning=Tuning())


def test_a_device_out_of_reach(small: Path, tmp_path: Path) -> None:
    profile = tmp_path / "board.toml"
    words = ['description = "d"', 'triple = "aarch64-linux-gnu"', 'cpu = "cortex-a76"']
    profile.write_text("\n".join([*words, "[transport]", 'kind = "qemu"', 'emulator = "qemu-none"']))
    with pytest.raises(DeviceError, match="qemu-none is not installed"):
        compile_export(small, str(profile), tmp_path / "bundle", tuning=Tuning())
    assert not (tmp_path / "bundle").exists()


def test_a_record_of_another_target_is_refused(small: Path, tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"was tuned for .*this is for aarch64-linux-gnu\S* cortex-a76"):
        compile_export(small, "raspberry-pi-5", tmp_path / "bundle", tuning=Tuning(record=tuned))


@pytest.mark.parametrize(
    "value", ["x", {}, {"device": "d"}, {"device": "d", "threads": 1, "repetitions": 1, "target": {}, "kernels": [{}]}]
)
def test_a_malformed_record_is_refused(value: Any, tuned: Path) -> None:
    with BundleFile(tuned) as file:
        plan = file.plan
    with pytest.raises(BundleError, match="the tuning results in META cannot be read"):
        record_of(replace(plan, meta={"tuning": value}))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tune", "--tune-from", "{tuned}"], "--tune measures and --tune-from does not"),
        (["--device", "qemu-aarch64"], "--device qemu-aarch64 is where --tune measures"),
        (["--tune", "--device", "nowhere"], "nowhere"),
        (["--tune-from", "{plain}"], "holds no measurements"),
        (["--tune-from", "{small}"], "is not a bundle directory"),
        (["--tune", "--target", "opencl"], "the kernels for opencl have no variants to choose from"),
    ],
)
def test_wrong_use(
    arguments: list[str], words: str, small: Path, tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = small.parent / "plain"
    if "{plain}" in arguments and not plain.exists():
        compile_export(small, "host", plain)
    given = [a.format(tuned=tuned, plain=plain, small=small) for a in arguments]
    assert cli.run(["compile", str(small), "--target", "host", "-o", str(tmp_path / "out"), *given]) == 2
    assert words in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_inspect_shows_it(tuned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(tuned)]) == 0
    text = capfd.readouterr().out
    assert "tuned on host" in text and "linear_t3" in text
    assert cli.run(["inspect", str(tuned), "--json"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["tuning"] == json.loads((tuned / "bundle.json").read_text())["tuning"] == record_json(tuned)


def record_json(bundle: Path) -> Any:
    return json.loads(json.dumps(record(bundle).to_json()))
