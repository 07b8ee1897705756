"""compile_export as a whole, on exports written here: what runs, what repeats, what is refused and leaves nothing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import edgeseq
from edgeseq.bundle.reader import BundleFile
from edgeseq.compiler import compile_export
from edgeseq.errors import CompileError, EdgeseqError, UsageError
from edgeseq.spec import GraphFile, Manifest

from . import graphs
from .machine import model_of, onnx_stream, port, signature_of


def write_export(where: Path, model: onnx.ModelProto, **external: Any) -> Path:
    """An export directory of one step graph."""
    where.mkdir(parents=True, exist_ok=True)
    onnx.save(model, where / "step.onnx", **external)
    step = GraphFile("step.onnx", signature_of(model))
    manifest = Manifest(
        family="test", source="tests", model_id="0123456789abcdef" * 2, dtype="float32", quant="none", flavour="onnx",
        context=0, vocab_size=0, params=1, tokenizer="none", graphs=(step,),
    )  # fmt: skip
    manifest.save(where)
    return where


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("small") / "export", graphs.by_hand("linear_between"))


@pytest.fixture(scope="module")
def bundle(small: Path) -> Path:
    return compile_export(small, "host", small.parent / "bundle")


def test_a_graph_of_named_inputs_runs_in_the_runtime(small: Path, bundle: Path) -> None:
    """The step of a model that takes no tokens, in C against onnxruntime, its state kept, saved and forked."""
    theirs, rng = onnx_stream(graphs.by_hand("linear_between")), np.random.default_rng(0)
    with edgeseq.load(bundle, threads=2, poison=True) as model:
        session = model.session()
        for step in range(5):
            x = rng.standard_normal((1, 3, 10)).astype(np.float32)
            want = theirs(x=x)["y"]
            other = model.session()
            other.load(session.save())
            for stream in (session.fork(), other, session):
                np.testing.assert_allclose(stream.run({"x": x})["y"], want, atol=1e-5 * np.abs(want).max(), rtol=0)
            assert session.position == step + 1


COMPILE = """
import sys
from pathlib import Path
from edgeseq.compiler import compile_export
compile_export(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def compiled_elsewhere(export: Path, target: str, out: Path, **env: str) -> int:
    """Compile in a process of its own; returns its largest resident memory in KiB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env}
    command = [sys.executable, "-c", COMPILE, str(export), target, str(out)]
    return int(subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("target", ["host", pytest.param("raspberry-pi-5", marks=pytest.mark.slow)])
def test_the_same_export_gives_the_same_bytes(target: str, small: Path, bundle: Path, tmp_path: Path) -> None:
    """Another process, hash seed, time zone, temporary directory and place of everything."""
    shutil.copytree(small, tmp_path / "far" / "away")
    (tmp_path / "tmp").mkdir()
    first = bundle if target == "host" else compile_export(small, target, tmp_path / "first")
    changes = {"PYTHONHASHSEED": "12345", "TMPDIR": str(tmp_path / "tmp"), "TZ": "Asia/Tokyo", "SOURCE_DATE_EPOCH": "1"}
    again = tmp_path / "other name"
    compiled_elsewhere(tmp_path / "far" / "away", target, again, **changes)
    names = sorted(p.name for p in first.iterdir())
    assert names == sorted(p.name for p in again.iterdir())
    assert [n for n in names if (first / n).read_bytes() != (again / n).read_bytes()] == []
    assert list((tmp_path / "tmp").iterdir()) == []


def test_nothing_in_a_bundle_names_this_machine(small: Path, bundle: Path) -> None:
    """No path of the export, of the checkout or of a temporary directory gets into any file."""
    here = {str(small.parent), str(Path(__file__).parents[2]), "/tmp/", str(Path.home())}
    for path in bundle.iterdir():
        data = path.read_bytes()
        assert [h for h in here if h.encode() in data] == [], path.name


@pytest.mark.parametrize("target", ["mars-rover", "../host", "nowhere.toml"])
def test_an_unknown_target(target: str, small: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        compile_export(small, target, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def _damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def apply(export: Path) -> None:
        path = export / "step.onnx"
        path.write_bytes(change(path.read_bytes()))

    return apply


def _rewritten(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], object]:
    def apply(export: Path) -> None:
        model = onnx.load(export / "step.onnx")
        change(model)
        onnx.save(model, export / "step.onnx")

    return apply


def _external(location: str, offset: int = 0) -> Callable[[Path], object]:
    """The first weight moved out of the file, to `location`."""

    def change(model: onnx.ModelProto) -> None:
        weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", str(offset)), ("length", "840")):
            weight.external_data.add(key=key, value=value)

    return _rewritten(change)


def _linked_outside(export: Path) -> None:
    secret = export.parent / "secret"
    secret.write_bytes(bytes(4096))
    (export / "weights").symlink_to(secret)
    _external("weights")(export)


def _dynamic(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "batch"


def _double(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    array = onnx.numpy_helper.to_array(weight).astype(np.float64)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))


def _other_state(model: onnx.ModelProto) -> None:
    """The graph forgets to return its state."""
    del model.graph.output[1]


def _not_ours(model: onnx.ModelProto) -> None:
    del model.graph.node[2:5]


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no graph": (lambda export: (export / "step.onnx").unlink(), "step.onnx"),
    "an empty graph": (_damaged(lambda data: b""), "step.onnx"),
    "a graph cut short": (_damaged(lambda data: data[: len(data) // 2]), "step.onnx"),
    "noise": (_damaged(lambda data: bytes(range(256)) * 20), "step.onnx"),
    "weights above the folder": (_external("../../secret"), "external data"),
    "weights at the root": (_external("/etc/passwd"), "external data"),
    "weights behind a link": (_linked_outside, "external data"),
    "weights in a file that is not there": (_external("missing.bin"), "missing.bin"),
    "weights behind the end of their file": (_external("manifest.json", 1 << 40), "manifest.json"),
    "weights before their file": (_external("manifest.json", -8), "manifest.json"),
    "a dynamic shape": (_rewritten(_dynamic), "dynamic shape"),
    "a type that no kernel has": (_rewritten(_double), "step.onnx"),
    "a state that is not returned": (_rewritten(_other_state), "present.s"),
    "a hole in the graph": (_rewritten(_not_ours), "step.onnx"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_export(name: str, small: Path, tmp_path: Path) -> None:
    """One sentence that names what is wrong, and no bundle, whole or half."""
    change, words = DAMAGES[name]
    export = tmp_path / "folder" / "export"
    shutil.copytree(small, export)
    change(export)
    with pytest.raises(EdgeseqError) as refusal:
        compile_export(export, "host", tmp_path / "out" / "bundle")
    assert words in str(refusal.value)
    assert "\n" not in refusal.value.sentence and len(refusal.value.sentence) < 300
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, CompileError("zig is out of order"), MemoryError])
def test_what_stops_half_way_leaves_nothing(
    error: BaseException, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise error

    monkeypatch.setattr("edgeseq.compiler.pipeline.write_facts", stop)
    monkeypatch.setattr("edgeseq.compiler.pipeline.link", lambda *_: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    with pytest.raises(error if isinstance(error, type) else type(error)):
        compile_export(small, "host", tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["temporary"]


def test_a_failed_compile_keeps_the_bundle_that_was_there(
    small: Path, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(bundle, tmp_path / "out")
    monkeypatch.setattr("edgeseq.compiler.pipeline.link", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compile_export(small, "host", tmp_path / "out")
    assert (tmp_path / "out" / "model.edgeseq").read_bytes() == (bundle / "model.edgeseq").read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


LAYERS = 12


def wide_export(where: Path, width: int) -> Path:
    """A chain of products with weights in one sparse file, so that making it takes neither memory nor disk."""
    b, x, size = graphs.Builder(), "x", width * width * 4
    for i in range(LAYERS):
        x = b.op("MatMul", x, f"w{i}")
    b.op("Add", x, "past.s", out="y")
    b.op("Identity", "y", out="present.s")
    shape = [1, 1, width]
    model = model_of(b.nodes, [port("x", shape), port("past.s", shape)], [port("y", shape), port("present.s", shape)])
    for i in range(LAYERS):
        weight = model.graph.initializer.add(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", str(i * size)), ("length", str(size))):
            weight.external_data.add(key=key, value=value)
    write_export(where, model)
    with (where / "weights").open("wb") as file:
        file.truncate(LAYERS * size)
    return where


@pytest.mark.slow
@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    """768 MiB of weights in tensors of 64 MiB: the tensor, its packed form, what the map holds of both, and room."""
    small, large = (
        compiled_elsewhere(wide_export(tmp_path / name, width), "host", tmp_path / f"{name}.bundle")
        for name, width in (("small", 64), ("large", 4096))
    )
    largest = 4096 * 4096 * 4
    assert (tmp_path / "large.bundle" / "model.edgeseq").stat().st_size > LAYERS * largest
    assert (large - small) * 1024 < 5 * largest, f"{small >> 10} MiB, then {large >> 10} MiB"


def test_threads_and_cores_of_the_profile_travel(small: Path, tmp_path: Path) -> None:
    """META and the kernel table carry them; the binding runs them unless it is told another number."""
    profile = tmp_path / "pinned.toml"
    core = min(os.sched_getaffinity(0))
    words = ['description = "here"', 'triple = "auto"', 'cpu = "auto"', "cores = 1", f"pin = [{core}]"]
    profile.write_text("\n".join([*words, "[transport]", 'kind = "local"']))
    bundle = compile_export(small, str(profile), tmp_path / "bundle")
    with BundleFile(bundle) as file:
        assert (file.plan.target["cores"], file.plan.target["pin"]) == (1, [core])
    with edgeseq.load(bundle) as model:
        assert model.info.threads == 1
        before = os.sched_getaffinity(0)
        try:
            model.pin_caller()
            assert os.sched_getaffinity(0) == {core}
        finally:
            os.sched_setaffinity(0, before)
    with edgeseq.load(bundle, threads=2) as model:
        assert model.info.threads == 2
