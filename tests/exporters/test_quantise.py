"""Which matrices are rounded, and what the export then holds; the numbers are in test_rounding.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.numpy import load_file

from edgeseq.errors import ExportError, UsageError
from edgeseq.manifest import load_manifest
from edgeseq.models.source import open_source, random_source
from exporters import export, golden
from exporters.coded import CodedMatrix, coded, rounded_input
from exporters.quantise import quantise_graph
from exporters.rounding import dequantise, quantise
from tests.exporters.support import QUANTISABLE, quantised_source, worst

FAMILIES = ("mamba", "retnet", "transformer")


# the rule


def planned(nodes: list[onnx.NodeProto], shapes: dict[str, tuple[int, ...]], bits: int = 4) -> dict[str, int]:
    """Bits of each weight that the pass rounds in a graph x [1,1,64] -> y; `shapes` are the weights."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 64])]
    inputs += [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, 1])]
    weights = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    graph = helper.make_graph(
        nodes, "g", inputs + weights, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 27)]))
    for value in list(model.graph.inputs)[2:]:
        model.graph.inputs.remove(value)
        model.graph.initializers.add(value)
    found = quantise_graph(model, bits)
    ops = [node.op_type for node in model.graph]
    assert ops.count("MatMul") + ops.count("MatMulNBits") == sum(n.op_type == "MatMul" for n in nodes)
    return {name: q.bits for name, q in found.items()}


def product(x: str, weight: str, y: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node("Transpose", [weight], [f"{weight}.t"], perm=[1, 0]),
        helper.make_node("MatMul", [x, f"{weight}.t"], [y]),
    ]


def test_size_and_use_decide() -> None:
    nodes = [
        *product("x", "wide", "a"),  # [64,64] is just large enough
        *product("x", "small", "b"),  # 63 rows of 64 are not
        *product("a", "narrow", "c"),  # K = 32
        helper.make_node("MatMul", ["a", "untransposed"], ["d"]),
        *product("a", "also_added", "e"),
        helper.make_node("Add", ["also_added", "also_added"], ["f"]),
        helper.make_node("Gather", ["looked_up", "ids"], ["g"]),
        helper.make_node("Gather", ["odd_width", "ids"], ["h"]),
        helper.make_node("Gather", ["other_axis", "ids"], ["i"], axis=1),
        helper.make_node("Concat", list("abcdefghi"), ["y"], axis=-1),
    ]
    shapes: dict[str, tuple[int, ...]] = {
        "wide": (64, 64), "small": (63, 64), "narrow": (500, 32), "untransposed": (64, 64), "also_added": (64, 64),
        "looked_up": (99, 96), "odd_width": (99, 100), "other_axis": (96, 96),
    }  # fmt: skip
    assert planned(nodes, shapes, 8) == {"wide": 8, "looked_up": 8}


def test_what_sets_a_decay_or_chooses_stays_as_it_is() -> None:
    """RWKV's decay (low rank, then -exp), a router, and a product of which only a part is a decay."""
    nodes = [
        *product("x", "down", "low"),
        helper.make_node("Tanh", ["low"], ["bent"]),
        *product("bent", "decay", "log"),
        helper.make_node("Exp", ["log"], ["exp"]),
        helper.make_node("Neg", ["exp"], ["g"]),
        *product("x", "router", "scores"),
        helper.make_node("Sigmoid", ["scores"], ["share"]),
        helper.make_node("TopK", ["share", "two"], ["best", "which"]),
        *product("x", "joint", "zxdt"),
        helper.make_node("Split", ["zxdt"], ["z", "dt"], num_outputs=2, axis=-1),
        helper.make_node("DPLRScan", ["z", "z", "z", "g", "z", "z", "past"], ["o", "s"], domain="ai.edgeseq"),
        helper.make_node("LinearAttention", ["z", "z", "z", "past", "dt"], ["p", "r"]),
        helper.make_node("Concat", ["o", "p", "best"], ["y"], axis=-1),
    ]
    shapes = {"down": (64, 64), "decay": (64, 64), "router": (64, 64), "joint": (128, 64), "two": (1,), "past": (1,)}
    assert planned(nodes, shapes, 8) == {"down": 8, "joint": 8}


@pytest.mark.parametrize(("rows", "bits"), [(64, 8), (2000, 4)])
def test_a_small_head_of_a_4_bit_model_gets_8_bits(rows: int, bits: int) -> None:
    nodes = [*product("x", "body", "h"), *product("h", "head", "s"), helper.make_node("Add", ["s", "bias"], ["y"])]
    shapes = {"body": (2000, 64), "head": (rows, 64), "bias": (rows,)}
    assert planned(nodes, shapes) == {"body": 4, "head": bits}


# the export


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[tuple[Any, ...], Path] = {}

    def make(family: str, quant: str, **options: Any) -> Path:
        key = (family, quant, *sorted(options.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("quantised") / family
            export(quantised_source(family), made[key], quant=quant, chunks=(8,), context=64, **options)
        return made[key]

    return make


@pytest.mark.parametrize("quant", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_onnxruntime_agrees_with_pytorch_on_the_rounded_weights(
    exported: Callable[..., Path], family: str, quant: str
) -> None:
    """M and K off every multiple; the golden is PyTorch's whole form of what the codes mean."""
    directory = exported(family, quant)
    assert worst(directory, [1] * 48) < 1
    assert worst(directory, [8, 1, 3, 16, 8, 12]) < 1


def test_the_other_flavour_and_other_storage_of_the_rest(exported: Callable[..., Path]) -> None:
    directory = exported("mamba", "int4", flavour="ort", dtype="fp16")
    assert worst(directory, [8, 1, 3, 16, 8, 12]) < 1
    stored = load_file(directory / "weights.safetensors")
    assert stored["layers.0.dt_proj.weight"].dtype == np.float16
    assert stored["layers.0.A"].dtype == np.float32


def test_what_is_stored(exported: Callable[..., Path]) -> None:
    """Codes and scales under the matrix's name; the time step, the convolution and vectors untouched."""
    directory, source = exported("mamba", "int4"), quantised_source("mamba")
    stored = load_file(directory / "weights.safetensors")
    config = QUANTISABLE["mamba"]
    matrices = {"embed.weight", *(f"layers.{i}.{n}.weight" for i in (0, 1) for n in ("in_proj", "x_proj", "out_proj"))}
    assert {n.removesuffix(".codes") for n in stored if n.endswith(".codes")} == matrices
    for name in source.tensor_names():
        tensor = source.tensor(name)
        if name not in matrices:
            assert np.array_equal(stored[name], tensor)
            continue
        codes, scales = stored[f"{name}.codes"], stored[f"{name}.scales"]
        assert codes.shape == (len(tensor), -(-tensor.shape[1] // 32), 16)
        step = np.repeat(np.abs(scales), 32, axis=1)[:, : tensor.shape[1]]  # an extreme may be cut by 1.5 steps
        assert (np.abs(dequantise(codes, scales, tensor.shape[1]) - tensor) <= 1.51 * step).all()
    assert stored["layers.0.dt_proj.weight"].shape == (config.d_inner, 64), "wide enough, but it sets the time step"


def test_a_tied_table_is_two_views_of_the_same_bytes(exported: Callable[..., Path]) -> None:
    model = onnx.load(str(exported("mamba", "int4") / "step.onnx"), load_external_data=False)
    where = {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer}
    dims = {t.name: tuple(t.dims) for t in model.graph.initializer}
    assert where["embed.weight.codes"] == where["embed.weight.rows"]
    assert dims["embed.weight.codes"] == (97, 3, 16) and dims["embed.weight.rows"] == (97, 48)
    nodes = [n for n in model.graph.node if n.domain == "com.microsoft"]
    assert sorted({n.op_type for n in nodes}) == ["GatherBlockQuantized", "MatMulNBits"]
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        assert len(node.input) == 3, "symmetric: no zero points"
        assert attributes["block_size"] == 32 and attributes["bits"] == 4
        assert "accuracy_level" not in attributes, "onnxruntime then computes in float32"


def test_the_file_repeats_and_each_tensor_is_read_once(
    exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = quantised_source("mamba")
    reads: list[str] = []
    original = type(source).tensor
    monkeypatch.setattr(type(source), "tensor", lambda self, name: reads.append(name) or original(self, name))
    seen: list[tuple[str, int, int]] = []
    export(source, tmp_path / "again", quant="int4", chunks=(8,), context=64, progress=lambda *p: seen.append(p))
    assert sorted(reads) == sorted(source.tensor_names()), "one tensor in memory at a time, none twice"
    first = exported("mamba", "int4")
    for path in first.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    writing = [(done, total) for what, done, total in seen if what == "writing weights"]
    assert [done for done, _ in writing] == sorted(done for done, _ in writing)
    assert writing[-1][0] <= writing[-1][1] and len(writing) > 20


def test_the_id_covers_the_rounded_bytes(exported: Callable[..., Path]) -> None:
    manifests = [load_manifest(exported("mamba", quant)) for quant in ("int8", "int4")]
    assert len({m.model_id for m in manifests}) == 2
    assert [m.quant for m in manifests] == ["int8", "int4"]


def test_the_golden_says_what_rounded_activations_change(exported: Callable[..., Path]) -> None:
    tensors = load_file(exported("mamba", "int8") / "golden.safetensors")
    largest, mean, changed = tensors["noise.logits"]
    assert 0 < mean < largest < 0.5 * np.abs(tensors["logits"]).max() and 0 <= changed < 0.5
    model = quantised_source("mamba").build("meta").eval()
    matrices = golden.load_coded(model, exported("mamba", "int8") / "weights.safetensors")
    assert len(matrices) == 7


def test_a_matrix_made_when_it_is_read_is_the_matrix(exported: Callable[..., Path]) -> None:
    """Within coded() a placeholder acts as its matrix, looked up or multiplied with; outside it is NaN."""
    import torch

    path = exported("mamba", "int4") / "weights.safetensors"
    tokens = torch.tensor([[3, 1, 4, 1, 5, 96]])
    whole, lazy = (quantised_source("mamba").build("meta").eval() for _ in range(2))
    golden.load(whole, path)
    matrices = golden.load_coded(lazy, path)
    with torch.no_grad():
        with coded(matrices):
            assert torch.equal(lazy(tokens), whole(tokens))
        assert torch.isnan(lazy(tokens)).all()
        with coded(matrices, round_inputs=True):
            assert 0 < (lazy(tokens) - whole(tokens)).abs().max() < 1


def test_every_form_of_a_product_sees_the_matrix(exported: Callable[..., Path]) -> None:
    """What torch makes of linear() and matmul() depends on ranks, strides and biases; each rounds its input alike."""
    import torch

    path = exported("mamba", "int4") / "weights.safetensors"
    name = "layers.0.in_proj.weight"
    matrix = CodedMatrix(path, name, quantised_source("mamba").tensor(name).shape[1])
    w = matrix.rows()
    standing = matrix.placeholder(len(w))
    x, bias = torch.randn(2, 3, w.shape[1], generator=torch.Generator().manual_seed(0)), torch.ones(len(w))
    linear = torch.nn.functional.linear
    inputs = [x[0, 0], x[0], x[:1], x, x.mT.contiguous().mT, x[:1].mT.contiguous().mT]
    forms = [lambda x, w: linear(x, w), lambda x, w: linear(x, w, bias), lambda x, w: x @ w.T, lambda x, w: x @ w.mT]
    with torch.no_grad():
        for x in inputs:
            for form in forms:
                wanted, rounded = form(x, w), form(rounded_input(x), w)
                with coded({standing.data_ptr(): matrix}):
                    torch.testing.assert_close(form(x, standing), wanted)
                with coded({standing.data_ptr(): matrix}, round_inputs=True):
                    torch.testing.assert_close(form(x, standing), rounded)
        with coded({standing.data_ptr(): matrix}), pytest.raises(ExportError, match="is read as"):
            _ = standing[:3] + 1


def test_activations_are_rounded_as_the_kernels_do() -> None:
    import torch

    x = torch.zeros(1, 40)
    x[0, :3] = torch.tensor([127.0, 1.5, -0.4])
    x[0, 32:34] = torch.tensor([-1.0, 0.5])
    rounded = rounded_input(x)[0]
    assert rounded[:3].tolist() == [127.0, 2.0, 0.0]
    assert rounded[32:34].tolist() == pytest.approx([-1.0, 64 / 127])
    assert not rounded[3:32].any() and rounded.shape == (40,)


# calibration


def test_trained_models_are_calibrated_by_themselves(tmp_path: Path) -> None:
    """The default is not what --calibrate 0 gives, repeats, and is nearer to the model; random weights have no text."""
    import torch

    source = "zoo:tiny-retnet"
    export(source, tmp_path / "plain", quant="int4", chunks=(), calibrate=0)
    export(source, tmp_path / "a", quant="int4", chunks=())
    export(source, tmp_path / "b", quant="int4", chunks=(), calibrate=4096)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "plain").iterdir())
    stored = {d: (tmp_path / d / "weights.safetensors").read_bytes() for d in ("plain", "a", "b")}
    assert stored["a"] == stored["b"] != stored["plain"]
    tokens = torch.tensor([list(b'small boat: a boat that is driven by oars; "the man rowed"')])
    with torch.no_grad():
        exact = open_source(source).build("cpu").eval()(tokens)
        rows = {}
        for name in ("plain", "a"):
            model = open_source(source).build("meta").eval()
            golden.load(model, tmp_path / name / "weights.safetensors")
            rows[name] = float((model(tokens) - exact).square().mean())
    assert rows["a"] < 0.7 * rows["plain"]


def test_matrices_with_the_same_input_share_one_sum(tmp_path: Path) -> None:
    from exporters.calibrate import moments

    model = open_source("zoo:tiny-retnet").build("cpu").eval()
    names = [n for n, p in model.named_parameters() if p.ndim == 2]
    found = moments(model, names, 64, tmp_path, lambda done, total: None)
    assert set(found) == set(names)
    for name, sums in found.items():
        assert sums.shape == (model.get_parameter(name).shape[1],) * 2 and np.isfinite(sums).all()
        assert np.allclose(sums, sums.T, rtol=1e-4, atol=1e-3) and sums.trace() > 0
    layer = [f"layers.0.{n}_proj.weight" for n in ("q", "k", "v", "g")]
    assert len({id(found[n]) for n in layer}) == 1
    assert len({id(found[n]) for n in names}) < len(names)


@torch.no_grad()
def test_experts_are_calibrated_with_what_any_of_them_sees(tmp_path: Path) -> None:
    """The sums of one layer against those of the inputs themselves, and the codes they lead to against plain ones."""
    from edgeseq.models.mixtral import FAMILY, MixtralConfig
    from exporters.calibrate import moments

    config = MixtralConfig(97, 64, 1, 2, 2, 32, 64, n_experts=4, top_k=2, window=16)
    model, seen = random_source("experts", FAMILY, config).build(), []
    moe, name = model.layers[0].moe, "layers.0.moe.gate_up_proj.weight"
    plain_advance = moe.advance
    moe.advance = lambda h: (seen.append(h.clone()), plain_advance(h))[1]
    sums = moments(model, [name, "layers.0.moe.down_proj.weight"], 256, tmp_path, lambda done, total: None)
    x = torch.cat(seen).flatten(0, 1)
    assert np.allclose(sums[name], (x.T @ x).numpy(), rtol=1e-4, atol=1e-3)
    moe.advance = plain_advance
    exact, errors = moe(x[None]), []
    stacks = {n: model.get_parameter(n).clone() for n in sums}
    for given in ({}, sums):
        for n, w in stacks.items():
            rounded = dequantise(*quantise(n, w.numpy(), 4, given.get(n)), w.shape[1])
            model.get_parameter(n).copy_(torch.from_numpy(rounded))
        errors.append(float((moe(x[None]) - exact).square().mean()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"quant": "int8", "calibrate": 100}, "changes nothing at --quant int8"),
        ({"calibrate": 100}, "changes nothing at --quant none"),
        ({"quant": "int4", "calibrate": -1}, "calibration with -1 tokens"),
        ({"quant": "int4", "calibrate": 1 << 30}, "calibration with"),
    ],
)
def test_wrong_calibration(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export(quantised_source("mamba"), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_module_without_text_is_not_calibrated(tmp_path: Path) -> None:
    models = Path(__file__).parent / "user_models.py"
    with pytest.raises(UsageError, match="no text to write"):
        export(f"{models}:sensor", tmp_path / "out", quant="int4", calibrate=64)
    manifest = export(f"{models}:sensor", tmp_path / "out", quant="int4")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["quant"] == manifest.quant == "int4"
