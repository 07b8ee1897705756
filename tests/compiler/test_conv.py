"""The convolution kernel against a plain sum in float64, and its rule against onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import helper

from edgeseq.compiler.kernels.conv import Conv
from edgeseq.compiler.pack import pack
from edgeseq.verify.tolerances import tolerance

from .library import ON, AnyLibrary, library_on, ref, refs, unset
from .machine import Machine, Program, model_of, onnx_stream, port


def variants() -> list[Conv]:
    """Edge cases, then seeded sizes: strides, dilations, padding on both sides, groups, one row and several."""
    found = [
        Conv(1, 16, 1, 640, 1, 4, 1, 256, SW=128),
        Conv(5, 1, 1, 1, 1, 1, 1, 1, bias=True),
        Conv(9, 40, 1, 4, 1, 4, 1, 3, PW=1, bias=True, act="relu"),
        Conv(7, 17, 1, 1, 1, 1, 1, 3, PW=1),  # only the middle tap meets the input
        Conv(2, 33, 1, 30, 1, 30, 1, 7, DW=2, PW=6, wdtype="float16"),
        Conv(3, 18, 1, 200, 1, 99, 1, 80, SW=2, PW=39, tile=6),
        Conv(4, 16, 6, 7, 3, 4, 3, 3, 2, 2, 1, 1, 1, 1, bias=True),
        Conv(1, 20, 9, 40, 5, 38, 5, 3, PH=1, SH=2, tile=12),
        Conv(6, 96, 1, 20, 1, 18, 1, 3, groups=3, bias=True, act="relu", tile=6),
        Conv(8, 32, 4, 4, 4, 4, 3, 3, DH=2, DW=2, PH=2, PW=2, groups=2),
    ]
    rng = np.random.default_rng(7)
    for _ in range(12):
        kh, kw = int(rng.integers(1, 4)), int(rng.integers(1, 7))
        h, w = (int(rng.integers(1, 9)) if kh > 1 else 1), int(rng.integers(1, 40))
        sh, sw, dh, dw = (int(n) for n in rng.integers(1, 3, 4))
        ph, pw = int(rng.integers(0, kh)), int(rng.integers(0, kw))
        oh = (h + 2 * ph - (kh - 1) * dh - 1) // sh + 1
        ow = (w + 2 * pw - (kw - 1) * dw - 1) // sw + 1
        if oh > 0 and ow > 0:
            found.append(
                Conv(
                    int(rng.integers(1, 9)), int(rng.integers(1, 50)), h, w, oh, ow, kh, kw, sh, sw, dh, dw, ph, pw,
                    bias=bool(rng.integers(2)), act=["none", "relu"][rng.integers(2)], tile=int(rng.choice([6, 12])),
                )
            )  # fmt: skip
    return found


VARIANTS = variants()


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(request.param, tmp_path_factory.mktemp("conv"), refs(VARIANTS))


def reference(p: Conv, x: NDArray, w: NDArray, bias: NDArray | None) -> NDArray:
    """x [C,H,W], w [M,C/g,KH,KW] -> y [M,OH,OW]: the formula, tap by tap."""
    y = np.zeros((p.M, p.OH, p.OW))
    per, channels = p.M // p.groups, p.C // p.groups
    for oh in range(p.OH):
        for ow in range(p.OW):
            for i in range(p.KH):
                for j in range(p.KW):
                    h, c = oh * p.SH + i * p.DH - p.PH, ow * p.SW + j * p.DW - p.PW
                    if 0 <= h < p.H and 0 <= c < p.W:
                        for g in range(p.groups):
                            rows = slice(g * per, (g + 1) * per)
                            y[rows, oh, ow] += w[rows, :, i, j] @ x[g * channels : (g + 1) * channels, h, c]
    y = y if bias is None else y + bias[:, None, None]
    return np.maximum(y, 0) if p.act == "relu" else y


@pytest.mark.parametrize("p", VARIANTS, ids=[f"{i}" for i in range(len(VARIANTS))])
def test_kernel(library: AnyLibrary, p: Conv) -> None:
    rng = np.random.default_rng(p.K)
    x = rng.standard_normal((p.C, p.H, p.W)).astype(np.float32)
    w = rng.standard_normal((p.M, p.C // p.groups, p.KH, p.KW)).astype(p.wdtype)
    bias = rng.standard_normal(p.M).astype(np.float32) if p.bias else None
    arrays = [x.reshape(-1), pack("rows16", w.reshape(p.M, -1)), *([] if bias is None else [bias])]
    access = "r" * len(arrays) + "w"
    shifts = [4, 0, *([8] if p.bias else []), 12]
    (y,) = library.call(ref(p), [*arrays, unset(p.M, p.OH, p.OW)], access, shifts, seed=p.W)
    want = reference(p, x.astype(np.float64), w.astype(np.float64), bias)
    assert np.isfinite(y).all(), "something was not written"
    assert np.abs(y - want).max() <= tolerance("runtime", "float32", want)


GRAPHS: dict[str, tuple[list[int], list[int], list[int], dict[str, Any]]] = {
    "time": ([1, 4, 12], [8, 4, 3], [1, 8, 12], {"pads": [2, 0]}),
    "same upper": ([1, 3, 11], [5, 3, 4], [1, 5, 6], {"auto_pad": "SAME_UPPER", "strides": [2]}),
    "same lower": ([1, 3, 11], [5, 3, 4], [1, 5, 6], {"auto_pad": "SAME_LOWER", "strides": [2]}),
    "valid": ([1, 3, 11], [5, 3, 4], [1, 5, 8], {"auto_pad": "VALID"}),
    "plane": ([1, 2, 8, 9], [6, 2, 3, 2], [1, 6, 4, 9], {"pads": [1, 0, 0, 1], "strides": [2, 1]}),
    "depthwise": ([1, 6, 10], [6, 1, 4], [1, 6, 7], {"group": 6}),
    "grouped": ([1, 4, 10], [32, 2, 4], [1, 32, 7], {"group": 2}),
    "batch": ([2, 3, 8], [4, 3, 3], [2, 4, 6], {}),
}


@pytest.mark.parametrize("activation", ["Relu", "Tanh"])
@pytest.mark.parametrize("name", GRAPHS)
def test_rule(name: str, activation: str, tmp_path: Path) -> None:
    """Where the rule has no kernel the graph still compiles; the result is the same."""
    x_shape, w_shape, y_shape, attributes = GRAPHS[name]
    rng = np.random.default_rng(4)
    weights = {
        "w": rng.standard_normal(w_shape).astype(np.float32),
        "b": rng.standard_normal(w_shape[0]).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], **attributes), helper.make_node(activation, ["c"], ["y"])]
    model = model_of(nodes, [port("x", x_shape)], [port("y", y_shape)], weights)
    claimed = [c.kernel.op for c in Program(model).calls if hasattr(c.kernel, "op")]
    assert claimed.count("conv") == (name not in ("depthwise", "batch"))
    machine = Machine(tmp_path, {name: model})
    x = rng.standard_normal(x_shape).astype(np.float32)
    got, want = machine.step(name)(x=x)["y"], onnx_stream(model)(x=x)["y"]
    assert np.abs(got - want).max() <= tolerance("runtime", "float32", want)
