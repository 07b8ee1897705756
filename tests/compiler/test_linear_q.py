"""Quantised products and lookups from ONNX nodes to running bundles: what is fused, what is packed once, what it reads,
and whether every instruction set computes it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

import edgeseq.cli as cli
from edgeseq.bundle.format import WEIGHTS
from edgeseq.bundle.ledger import ledger
from edgeseq.bundle.plan import align
from edgeseq.bundle.reader import BundleFile
from edgeseq.compiler import compile_export
from edgeseq.compiler.kernels.linear_q import LinearQ
from edgeseq.errors import BundleError, CompileError
from edgeseq.verify.chain import verify
from exporters import contrib, export
from exporters.rounding import dequantise, quantise
from tests.exporters.support import QUANTISABLE, quantised_source

from .machine import Machine, model_of, onnx_stream, port
from .test_kernels import close
from .test_quantised import rounded

PROFILE = """description = "a core without newer instructions"
triple = "{arch}-linux-gnu"
cpu = "{cpu}"

[transport]
kind = "local"
"""
ARM = {"dotprod": "cortex-a76", "i8mm": "cortex-x4"}
CPUS = {"avx2": "haswell", "plain": "nehalem"} | ARM
"""Instruction sets by LLVM's name of a core that has no more; any x86-64 machine of today can run those of x86."""


def is_x86() -> bool:
    import platform

    return platform.machine() in ("x86_64", "AMD64")


# nodes


def matrix(seed: int, m: int, k: int, bits: int) -> dict[str, NDArray]:
    """Initializers of one matrix; scales of both signs, as the exporter's 4-bit search chooses them."""
    codes, scales = quantise("w", np.random.default_rng(seed).standard_normal((m, k)).astype(np.float32), bits)
    scales[:, ::2] *= -1
    return {"codes": codes, "scales": scales}


def node(m: int, k: int, bits: int, x: str = "x", y: str = "y", **more: Any) -> onnx.NodeProto:
    inputs = [x, "codes", "scales", *more.pop("inputs", ())]
    options = {"N": m, "K": k, "bits": bits, "block_size": 32} | more
    return helper.make_node("MatMulNBits", inputs, [y], domain="com.microsoft", **options)


def graph(nodes: list[onnx.NodeProto], weights: dict[str, NDArray], x: tuple[int, ...], y: tuple[int, ...]) -> Any:
    contrib.register()
    model = model_of(nodes, [port("x", x)], [port("y", y)], weights)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


SHAPES = [(1, 33, 96, 4), (5, 50, 100, 8), (1, 97, 160, 8), (3, 16, 64, 4)]
"""Tokens, rows, width, bits: rows off 16, an odd number of blocks, a padded block, and none of these."""


def fused(t: int, m: int, k: int, bits: int) -> onnx.ModelProto:
    """residual + (W x + bias)"""
    rng = np.random.default_rng(m)
    nodes = [
        node(m, k, bits, y="product"),
        helper.make_node("Add", ["product", "bias"], ["biased"]),
        helper.make_node("Slice", ["x", "first", "last", "axis"], ["window"]),
        helper.make_node("Add", ["window", "biased"], ["y"]),
    ]
    weights = matrix(k, m, k, bits) | {
        "bias": rng.standard_normal(m).astype(np.float32),
        "first": np.array([k - m]), "last": np.array([k]), "axis": np.array([2]),
    }  # fmt: skip
    return graph(nodes, weights, (1, t, k), (1, t, m))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    return Machine(tmp_path_factory.mktemp("nodes"), {str(s): fused(*s) for s in SHAPES} | {"tied": tied()})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bias_and_residual_join_the_product(machine: Machine, shape: tuple[int, int, int, int]) -> None:
    t, m, k, _ = shape
    program = machine.programs[str(shape)]
    params = [call.kernel.params for call in program.calls if isinstance(getattr(call.kernel, "params", None), LinearQ)]
    assert len(program.calls) == 2 and len(params) == 1, "one rounding of the input, one product"
    assert params[0].bias and params[0].residual
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in program.model.graph.initializer}
    x = np.random.default_rng(0).standard_normal((1, t, k)).astype(np.float32)
    q, scale, _ = rounded(x[0], 0)
    seen = (q * scale.astype(np.float64)[..., None]).reshape(t, -1)[:, :k]
    w = dequantise(weights["codes"], weights["scales"], k)
    want = seen @ w.T.astype(np.float64) + weights["bias"] + x[0, :, k - m :]
    close(machine.step(str(shape))(x=x)["y"], want[None])
    theirs = onnx_stream(program.model)(x=x)["y"]
    assert np.sqrt(np.square(theirs - want).mean()) < 0.02 * np.sqrt(np.square(want).mean()), "int8 activations"


def tied() -> onnx.ModelProto:
    """Rows of a table of 40 x 64 looked up and multiplied with the same table."""
    weights = matrix(7, 40, 64, 4)
    lookup = helper.make_node(
        "GatherBlockQuantized", ["rows", "ids", "scales"], ["row"],
        domain="com.microsoft", bits=4, block_size=32, gather_axis=0, quantize_axis=1,
    )  # fmt: skip
    nodes = [helper.make_node("Cast", ["x"], ["ids"], to=onnx.TensorProto.INT64), lookup, node(40, 64, 4, x="row")]
    weights["rows"] = weights["codes"].reshape(40, 32)
    return graph(nodes, weights, (1, 3), (1, 3, 40))


def test_a_lookup_reads_one_row(machine: Machine) -> None:
    program = machine.programs["tied"]
    names = [getattr(call.kernel, "op", "generic") for call in program.calls]
    assert names.count("embed_q") == 1 and names.count("linear_q") == 1
    weights = {w.name: onnx.numpy_helper.to_array(w) for w in program.model.graph.initializer}
    table = dequantise(weights["codes"], weights["scales"], 64)
    rows = table[[39, 0, 17]]
    q, scale, _ = rounded(rows, 0)
    want = (q * scale.astype(np.float64)[..., None]).reshape(3, 64) @ table.T.astype(np.float64)
    close(machine.step("tied")(x=np.array([[39, 0, 17]], np.float32))["y"], want[None])
    call = next(c for c in program.calls if getattr(c.kernel, "op", "") == "embed_q")
    assert call.traffic["weights"] == 3 * (4 + 32), "three rows: two float16 scales and 64 codes of half a byte each"


# bundles


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """built(family, quant, set) -> bundle; the export it came from lies beside it as `export`."""
    made: dict[tuple[str, str, str], Path] = {}
    exports: dict[tuple[str, str], Path] = {}

    def make(family: str, quant: str, isa: str) -> Path:
        if (family, quant) not in exports:
            exports[family, quant] = tmp_path_factory.mktemp(f"{family}-{quant}") / "export"
            source = quantised_source(family)
            export(source, exports[family, quant], quant=quant, chunks=(5,), context=96)
        folder = exports[family, quant].parent
        if (family, quant, isa) not in made:
            target = isa if isa not in CPUS else str(folder / f"{isa}.toml")
            if isa in CPUS:
                Path(target).write_text(PROFILE.format(arch="aarch64" if isa in ARM else "x86_64", cpu=CPUS[isa]))
            made[family, quant, isa] = compile_export(folder / "export", target, folder / isa)
        return made[family, quant, isa]

    return make


def kernels(bundle: Path) -> str:
    with BundleFile(bundle) as file:
        return " ".join(k.name for k in file.plan.kernels)


@pytest.mark.parametrize(
    ("family", "quant", "isa"),
    [
        ("mamba", "int8", "host"), ("mamba", "int4", "host"), ("retnet", "int4", "host"),
        ("transformer", "int8", "host"), ("mamba", "int4", "avx2"), ("retnet", "int8", "avx2"),
        ("mamba", "int8", "plain"), ("retnet", "int4", "plain"),
    ],
)  # fmt: skip
def test_bundles_hold_to_pytorch(built: Callable[[str, str, str], Path], family: str, quant: str, isa: str) -> None:
    """Every form of the model, on every instruction set this machine has, within the noise of int8 activations."""
    if isa != "host" and not is_x86():
        pytest.skip("kernels for x86-64")
    bundle = built(family, quant, isa)
    report = verify(bundle, export=bundle.parent / "export")
    assert report.ok, [s for s in report.stages if not s.ok]
    stages = {stage.name: stage for stage in report.stages}
    assert (stages["onnxruntime step"].tolerance or 1) < 1e-3, "the graph itself is exact"
    assert 1e-5 < (stages["runtime rounding"].worst or 0) <= (stages["runtime rounding"].tolerance or 0) < 1
    assert f"bits{quant[-1]}" in kernels(bundle)
    if isa in CPUS:
        assert f"isa{isa}" in kernels(bundle)


@pytest.mark.skipif(shutil.which("qemu-aarch64-static") is None, reason="qemu-user-static is not installed")
@pytest.mark.parametrize(("family", "quant", "isa"), [("mamba", "int4", "dotprod"), ("retnet", "int8", "i8mm")])
def test_bundles_hold_on_arm(built: Callable[[str, str, str], Path], family: str, quant: str, isa: str) -> None:
    """Of a Cortex-A76 and a Cortex-X4, emulated; a core that lacks the instructions is refused by name."""
    bundle = built(family, quant, isa)
    assert f"isa{isa}" in kernels(bundle)
    report = verify(bundle, device="qemu-aarch64")
    assert report.ok, [s for s in report.stages if not s.ok]
    assert any(stage.name.endswith("rounding") for stage in report.stages)
    older = {"dotprod": "cortex-a72", "i8mm": "cortex-a76"}[isa]
    command = ["qemu-aarch64-static", "-cpu", older, bundle / "edgeseq-device", bundle / "model.edgeseq", "check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode and isa in done.stderr, done.stderr


def packed(m: int, k: int, bits: int) -> int:
    """Groups of 16 rows times pairs of blocks, each 2 x 16 scales of 2 bytes and 2 x 16 x 32 codes."""
    return -(-m // 16) * -(-k // 64) * (2 * 16 * 2 + 2 * 16 * 32 * bits // 8)


@pytest.mark.parametrize(("quant", "bits"), [("int8", 8), ("int4", 4)])
def test_inspect_counts_what_a_token_reads(
    built: Callable[[str, str, str], Path], quant: str, bits: int, capfd: pytest.CaptureFixture[str]
) -> None:
    c = QUANTISABLE["mamba"]
    d, inner, n, r, v = c.d_model, c.d_inner, c.d_state, c.dt_rank, c.vocab_size
    projections = packed(2 * inner, d, bits) + packed(r + 2 * n, inner, bits) + packed(d, inner, bits)
    vectors = d + inner * (c.d_conv + 1) + inner * n + inner + inner  # norm; convolution and bias; A; D; dt bias
    time_step = -(-inner // 16) * 16 * r  # not quantised
    layer = projections + 4 * (vectors + time_step)
    row = 2 * (2 * 2 + 2 * 32 * bits // 8)  # two pairs of blocks of one row, of which the last block is padding
    bundle = built("mamba", quant, "host")
    assert cli.run(["inspect", str(bundle), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["ledger"]["weight_bytes"] == c.n_layers * layer + row + 4 * d + packed(v, d, bits)
    with BundleFile(bundle) as file:
        assert ledger(file.plan).weight_bytes == facts["ledger"]["weight_bytes"]
        names = [t.name for t in file.plan.tensors]
        assert len([n for n in names if n.startswith("embed.weight")]) == 1, "the tied table is stored once"
        assert not any(n.endswith(".scales") for n in names), "scales lie among the codes"


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x88
    path.write_bytes(data)


def test_one_flipped_code_fails(built: Callable[[str, str, str], Path], tmp_path: Path) -> None:
    """In the bundle by its checksum; in the export by its numbers alone."""
    bundle = built("mamba", "int4", "host")
    shutil.copytree(bundle, tmp_path / "bundle")
    shutil.copytree(bundle.parent / "export", tmp_path / "export")
    with BundleFile(bundle) as file:
        names = [t.name for t in file.plan.tensors]
        before = file.plan.tensors[: names.index("layers.0.in_proj.weight.codes")]
        start = file.sections[WEIGHTS].offset + sum(align(t.nbytes) for t in before)
    damage(tmp_path / "bundle" / "model.edgeseq", start + 64)
    report = verify(tmp_path / "bundle")
    assert not report.ok and "weights" in report.failed
    model = onnx.load(str(tmp_path / "export" / "step.onnx"), load_external_data=False)
    codes = next(t for t in model.graph.initializer if t.name == "layers.0.in_proj.weight.codes")
    damage(tmp_path / "export" / "weights.safetensors", int({e.key: e.value for e in codes.external_data}["offset"]))
    assert "onnxruntime step" in verify(tmp_path / "export").failed


def test_noise_is_no_licence(built: Callable[[str, str, str], Path], tmp_path: Path) -> None:
    """A golden of other weights fails the quantised bundle too: the bound is that of the rounding alone."""
    from safetensors.numpy import load_file, save_file

    bundle = built("mamba", "int8", "host")
    shutil.copytree(bundle, tmp_path / "bundle")
    golden = load_file(bundle / "golden.safetensors")
    spread = 3 * float(golden["noise.logits"][1])
    logits = golden["logits"] + np.random.default_rng(0).normal(0, spread, golden["logits"].shape).astype(np.float32)
    save_file(golden | {"logits": logits.astype(np.float32)}, tmp_path / "bundle" / "golden.safetensors")
    assert "runtime rounding" in verify(tmp_path / "bundle").failed
    for name in ("noise.logits", "float32.logits"):
        broken = golden | {name: np.array([-1, 0, 0], np.float32)}
        save_file(broken, tmp_path / "bundle" / "golden.safetensors")
        with pytest.raises(BundleError, match=rf"{name} is float32 \[3\]"):
            verify(tmp_path / "bundle")


@pytest.mark.parametrize(
    "change", [{"inputs": ("zeros",)}, {"block_size": 64}, {"bits": 2}], ids=["zero points", "block 64", "2 bits"]
)
def test_other_forms_are_refused_with_a_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    weights = matrix(3, 32, 64, 4) | {"zeros": np.full((32, 1), 0x88, np.uint8)}
    with pytest.raises(CompileError) as caught:
        one = node(32, 64, **({"bits": 4} | change))
        Machine(tmp_path, {"one": graph([one], weights, (1, 1, 64), (1, 1, 32))})
    assert "MatMulNBits" in str(caught.value)
