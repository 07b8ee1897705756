"""The layer norm kernel against float64: any width, rows apart, with and without weight and bias, quantised or not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.compiler.kernels._quantise import BLOCK, blocks
from edgeseq.compiler.kernels.layer_norm import FLOATS_PER_BLOCK, LayerNorm
from edgeseq.verify.tolerances import tolerance

from .library import ON, AnyLibrary, library_on, ref, refs, unset
from .machine import Machine, model_of, onnx_stream, port

EPS = 1e-5
VARIANTS = [
    LayerNorm(1, 768, 768, EPS, True, True),
    LayerNorm(3, 77, 80, EPS, True, False),
    LayerNorm(5, 7, 7, 64e-5),
    LayerNorm(FLOATS_PER_BLOCK // 64 * 2, 64, 64, 64e-5),
    LayerNorm(2, 1, 1, EPS, False, True),
    LayerNorm(2, 96, 96, EPS, True, True, quant=128),
]


@pytest.fixture(scope="module", params=ON)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AnyLibrary:
    return library_on(request.param, tmp_path_factory.mktemp("kernels"), refs(VARIANTS))


def defined(x: np.ndarray, w: np.ndarray, b: np.ndarray, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * w + b


@pytest.mark.parametrize("p", VARIANTS, ids=lambda p: f"{p.R}x{p.D}{'-q' if p.quant else ''}")
@settings(max_examples=4, derandomize=True, deadline=None)
@given(seed=st.integers(0, 10**6), shift=st.sampled_from([0.0, -1000.0]))
def test_kernel_equals_its_definition(library: AnyLibrary, p: LayerNorm, seed: int, shift: float) -> None:
    """A mean of 1000 costs three digits of x itself, not the whole variance as E[x^2] - E[x]^2 would."""
    rng = np.random.default_rng(seed)
    held = np.full((p.R, p.ldx), np.nan, np.float32)
    held[:, : p.D] = shift + rng.standard_normal((p.R, p.D))
    w, b = (rng.standard_normal(p.D).astype(np.float32) for _ in range(2))
    wanted = defined(held[:, : p.D].astype(np.float64), w if p.weight else 1.0, b if p.bias else 0.0, p.eps)
    given_ = [held.reshape(-1)[: (p.R - 1) * p.ldx + p.D].copy(), *([w] if p.weight else []), *([b] if p.bias else [])]
    limit = tolerance("runtime", "float32", wanted) * (1.0 if shift == 0 else 100.0)
    if p.quant is None:
        (y,) = library.call(ref(p), [*given_, unset(p.R, p.D)], "r" * len(given_) + "w", seed=seed)
        assert np.abs(y - wanted).max() <= limit
        return
    n = blocks(p.D)
    outputs = [unset(p.R, n * BLOCK, dtype="int8"), unset(p.R, n), unset(p.R, n, dtype="int32")]
    q, scale, offset = library.call(ref(p), [*given_, *outputs], "r" * len(given_) + "www", seed=seed)
    read = (q.reshape(p.R, n, BLOCK) * scale[..., None]).reshape(p.R, -1)
    assert np.abs(read[:, : p.D] - wanted).max() <= np.abs(wanted).max() / 127 * 0.51 + limit
    assert not read[:, p.D :].any()
    assert (offset == -p.quant * q.reshape(p.R, n, BLOCK).astype(np.int32).sum(-1)).all()


def test_the_rule_takes_what_it_can_and_leaves_the_rest(tmp_path: Path) -> None:
    """Weight and bias, neither, a computed bias and a norm over two axes, side by side; as onnxruntime has them."""
    from onnx import helper

    def norm(x: str, y: str, *weights: str, **attrs: float) -> object:
        return helper.make_node("LayerNormalization", [x, *weights], [y], **attrs)

    rng = np.random.default_rng(1)
    weights = {"w": rng.standard_normal(20), "b": rng.standard_normal(20), "ones": np.ones(20), "w2": np.ones((3, 20))}
    nodes = [
        norm("x", "full", "w", "b", axis=-1),
        norm("full", "plain", "ones", axis=2, epsilon=64e-5),
        helper.make_node("Tanh", ["b"], ["computed"]),
        norm("plain", "shifted", "w", "computed", axis=-1),
        norm("shifted", "wide", "w2", axis=1),
        helper.make_node("Add", ["wide", "past.s"], ["y"]),
        helper.make_node("Mul", ["y", "ones"], ["present.s"]),
    ]
    shape = [1, 3, 20]
    model = model_of(
        nodes,  # type: ignore[arg-type]
        [port("x", shape), port("past.s", shape)],
        [port("y", shape), port("present.s", shape)],
        {name: w.astype(np.float32) for name, w in weights.items()},
    )
    machine, reference = Machine(tmp_path, {"norms": model}), onnx_stream(model)
    kernels = [c.kernel.op for c in machine.programs["norms"].calls if hasattr(c.kernel, "op")]
    assert kernels.count("layer_norm") == 2
    step = machine.step("norms")
    for _ in range(3):
        x = rng.standard_normal(shape).astype(np.float32)
        ours, theirs = step(x=x)["y"], reference(x=x)["y"]
        assert np.abs(ours - theirs).max() <= tolerance("runtime", "float32", theirs)
