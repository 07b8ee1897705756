"""Exports on stock onnxruntime agree with PyTorch's whole-sequence form, however the sequence is cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

from edgeseq.errors import UsageError
from edgeseq.manifest import load_manifest
from edgeseq.models import families
from exporters import export
from exporters.ort_check import OrtModel
from tests.every import rotated
from tests.exporters.support import CONFIGS, golden, source, worst

Exported = Callable[..., Path]
QUICK = [
    ("mamba", "onnx", "fp32"), ("retnet", "onnx", "fp32"), ("transformer", "onnx", "fp32"),
    ("mamba", "ort", "fp32"), ("retnet", "ort", "fp32"), ("mamba", "onnx", "fp16"), ("transformer", "onnx", "bf16"),
]  # fmt: skip
EVERY = [(f, *kind) for i, f in enumerate(families()) for kind in rotated(i, (("ort", "fp16"), ("onnx", "bf16")))]
EVERY += [(f, *kind) for f in CONFIGS for kind in (("onnx", "fp32"), ("ort", "fp32"))]
KINDS = QUICK + [pytest.param(*kind, marks=pytest.mark.slow) for kind in EVERY if kind not in QUICK]


@pytest.mark.parametrize(("family", "flavour", "dtype"), KINDS)
def test_agrees_with_pytorch_under_any_cut(exported: Exported, family: str, flavour: str, dtype: str) -> None:
    directory = exported(family, flavour, dtype)
    rng = np.random.default_rng(5)
    length = len(golden(directory)[0])
    random_cuts = np.diff([0, *sorted(rng.choice(np.arange(1, length), 6, replace=False)), length]).tolist()
    for cuts in ([1] * length, [length], [8] * (length // 8), random_cuts):
        assert worst(directory, cuts) < 1, cuts


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_state_survives_saving_loading_and_forking(exported: Exported, family: str) -> None:
    model = OrtModel(exported(family), threads=1)
    tokens, logits = golden(model.directory)
    session = model.session()
    session.prefill(tokens[:21])
    saved, fork = session.save(), session.fork()
    session.prefill(tokens[21:])
    other = model.session()
    other.load(saved)
    np.testing.assert_array_equal(other.prefill(tokens[21:]), session.logits)
    fork.step(int(tokens[0]))  # leaves the session it came from alone
    assert session.position == len(tokens) and fork.position == 22
    session.reset()
    np.testing.assert_allclose(session.step(int(tokens[0])), logits[0], atol=1e-4)


@pytest.mark.parametrize(("family", "flavour", "dtype"), KINDS)
def test_weights_are_one_file_under_their_own_names(exported: Exported, family: str, flavour: str, dtype: str) -> None:
    directory = exported(family, flavour, dtype)
    stored = load_file(directory / "weights.safetensors")
    own, record = set(source(family).tensor_names()), families()[family]
    derived = set(record.derived(source(family).config))
    assert {name for name in stored if not name.startswith("constant.")} == own | derived
    raw = (directory / "weights.safetensors").read_bytes()
    for path in directory.glob("*.onnx"):
        proto = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(str(path), full_check=True)
        assert {(o.domain, o.version) for o in proto.opset_import} <= {
            ("", 27),
            ("ai.edgeseq", 1),
            ("com.microsoft", 1),
        }
        external = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        read = {t.name for t in external if not t.name.startswith("constant.")}
        assert derived <= read <= own if record.derive else read == own
        for tensor in external:
            entry = {e.key: e.value for e in tensor.external_data}
            assert entry["location"] == "weights.safetensors"
            begin = int(entry["offset"])
            data = raw[begin : begin + int(entry["length"])]
            assert data == stored[tensor.name].tobytes(), tensor.name
            if tensor.data_type == onnx.TensorProto.FLOAT:
                assert begin % 4 == 0
        inline = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
        assert all(len(t.raw_data) <= 1024 for t in inline)


def test_half_precision_touches_matrices_only(exported: Exported) -> None:
    stored = load_file(exported("mamba", "onnx", "fp16") / "weights.safetensors")
    halves = {name for name, array in stored.items() if array.dtype == np.float16}
    matrices = ("embed.weight", "head", "in_proj.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight")
    assert halves == {name for name in stored if name.endswith(matrices)}


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_graphs_are_small_and_say_nothing_of_this_machine(exported: Exported, family: str) -> None:
    directory = exported(family)
    for path in [*directory.glob("*.onnx"), directory / "manifest.json"]:
        data = path.read_bytes()
        for word in (b"site-packages", b".py", b"Traceback", b"pkg.torch", b"torch.", str(Path.home()).encode() + b"/"):
            assert word not in data, (path.name, word)
    proto = onnx.load(str(directory / "step.onnx"), load_external_data=False)
    used = [node.op_type for node in proto.graph.node]
    assert not {"Identity", "Constant", "CastLike", "SplitToSequence", "SequenceAt"} & set(used)
    assert not any(n.doc_string or n.metadata_props for n in proto.graph.node)
    values = {v.name for v in (*proto.graph.value_info, *proto.graph.output)}
    assert all(name in values for node in proto.graph.node for name in node.output), "every value has a shape"
    assert not any(name.startswith(("val_", "getitem")) for name in values), "every value has a readable name"
    read = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    assert all(any(o in read for o in node.output) for node in proto.graph.node), "no dead node"
    assert {i.name for i in proto.graph.initializer} <= read


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_manifest_declares_the_graphs(exported: Exported, family: str) -> None:
    directory = exported(family)
    manifest = load_manifest(directory)
    assert manifest.family == family
    assert manifest.context == (64 if family == "transformer" else 0)
    assert manifest.params == source(family).param_count()
    assert [g.signature.tokens for g in manifest.graphs] == [1, 3, 8]
    for graph in manifest.graphs:
        proto = onnx.load(str(directory / graph.file), load_external_data=False)
        declared = [s.name for s in graph.signature.inputs] + [f"past.{s.name}" for s in graph.signature.state]
        assert [i.name for i in proto.graph.input] == declared
        shapes = {i.name: tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in proto.graph.input}
        assert shapes["tokens"] == (1, graph.signature.tokens)
        assert all(shapes[f"past.{s.name}"] == s.shape for s in graph.signature.state)
        results = [s.name for s in graph.signature.outputs] + [f"present.{s.name}" for s in graph.signature.state]
        assert [o.name for o in proto.graph.output] == results


def test_flavours_differ_where_they_should_and_share_the_model_id(exported: Exported) -> None:
    def operators(directory: Path) -> set[str]:
        proto = onnx.load(str(directory / "step.onnx"), load_external_data=False)
        return {f"{n.domain}:{n.op_type}" for n in proto.graph.node}

    portable, ort = exported("retnet"), exported("retnet", "ort")
    assert "ai.edgeseq:Retention" in operators(portable)
    assert not any(name.startswith("com.microsoft") for name in operators(portable))
    assert "com.microsoft:LinearAttention" in operators(ort)
    assert "com.microsoft:CausalConvWithState" in operators(exported("mamba", "ort"))
    assert ":CausalConvWithState" in operators(exported("mamba"))
    assert load_manifest(portable).model_id == load_manifest(ort).model_id
    assert load_manifest(exported("mamba")).model_id != load_manifest(exported("mamba", "onnx", "fp16")).model_id


def test_same_input_same_bytes(exported: Exported, tmp_path: Path) -> None:
    first = exported("retnet")
    export(source("retnet"), tmp_path / "again", chunks=(8, 3), context=64)
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (first / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_context_bounds_a_kv_cache(exported: Exported) -> None:
    session = OrtModel(exported("transformer"), threads=1).session()
    session.prefill(np.arange(64))
    with pytest.raises(UsageError, match="exceeds the context of 64"):
        session.step(1)
    with pytest.raises(UsageError, match="token ids"):
        OrtModel(exported("mamba"), threads=1).session().step(97)


def test_short_context_keeps_only_the_chunks_that_fit(tmp_path: Path) -> None:
    manifest = export(source("transformer"), tmp_path / "short", context=8)
    assert [g.signature.tokens for g in manifest.graphs] == [1, 8]
    assert json.loads((tmp_path / "short" / "manifest.json").read_text())["context"] == 8
    assert len(golden(tmp_path / "short")[0]) == 8
