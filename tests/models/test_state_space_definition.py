"""No Hugging Face class holds these models: their definitions once more in numpy, float64 and complex128.

Each layer is computed twice, one token at a time from the paper's recurrence and as the convolution with its kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgeseq.models import s4, state_space
from edgeseq.models.base import SequenceModel
from edgeseq.verify.tolerances import tolerance
from tests.models.support import CONFIGS, random_model

Array = np.ndarray
Weights = dict[str, Array]


def rms(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-x))


def gelu(x: Array) -> Array:
    erf = np.vectorize(__import__("math").erf)
    return 0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))


def pair(x: Array) -> Array:
    """[N,2,C] -> complex [C,N]."""
    return (x[:, 0] + 1j * x[:, 1]).T


def glu(p: Weights, y: Array) -> Array:
    a, b = np.split(gelu(y) @ p["out.out_proj.weight"].T + p["out.out_proj.bias"], 2, -1)
    return a * sigmoid(b)


def linear_system(a: Array, b: Array, c: Array, u: Array, form: str) -> Array:
    """x' = a x + b u, y = c x per channel: a [C,N,N], b, c [C,N] complex, u [T,C] -> y [T,C] complex."""
    if form == "convolution":
        kernel = np.stack([np.einsum("cn,cnm,cm->c", c, np.linalg.matrix_power(a, t), b) for t in range(len(u))])
        return np.stack([(kernel[: t + 1] * u[t::-1]).sum(0) for t in range(len(u))])
    x, y = np.zeros(b.shape, complex), []
    for row in u:
        x = np.einsum("cnm,cm->cn", a, x) + b * row[:, None]
        y.append((c * x).sum(-1))
    return np.stack(y)


def diagonal(a: Array) -> Array:
    return a[..., None] * np.eye(a.shape[-1])


def s4d(p: Weights, config: Any, h: Array, form: str) -> Array:
    a, dt = (-np.exp(p["log_A_real"]) + 1j * p["A_imag"]).T, np.exp(p["log_dt"])[:, None]
    if config.discretisation == "zoh":
        step = np.exp(dt * a)
        fed = (step - 1) / a
    else:
        step, fed = (1 + dt * a / 2) / (1 - dt * a / 2), dt / (1 - dt * a / 2)
    y = 2 * linear_system(diagonal(step), fed, pair(p["C"]), h, form).real
    return glu(p, y + p["D"] * h)


def s4_dplr(p: Weights, config: Any, h: Array, form: str) -> Array:
    """Both members of every pair, A = diag - P P*, as the paper writes it; inverses by brute force."""
    diag = (-np.exp(p["log_A_real"]) + 1j * p["A_imag"]).T
    diag, low, fed, out = (np.concatenate([x, x.conj()], 1) for x in (diag, pair(p["P"]), pair(p["B"]), pair(p["C"])))
    a, dt = diagonal(diag) - low[:, :, None] * low[:, None].conj(), np.exp(p["log_dt"])[:, None, None]
    one = np.eye(a.shape[-1])
    inverse = np.linalg.inv(one - dt * a / 2)
    y = linear_system(inverse @ (one + dt * a / 2), (inverse @ (dt * fed[..., None]))[..., 0], out, h, form)
    assert np.abs(y.imag).max() < 1e-9 * np.abs(y.real).max()
    return glu(p, y.real + p["D"] * h)


def liquid(p: Weights, config: Any, h: Array, form: str) -> Array:
    a, dt, out = (-np.exp(p["log_A_real"]) + 1j * p["A_imag"]).T, np.exp(p["log_dt"])[:, None], pair(p["C"])
    step = np.exp(dt * a)
    fed = (step - 1) / a * pair(p["B"])
    y = 2 * linear_system(diagonal(step), fed, out, h, form).real
    for k in range(len(h)):
        for length in range(2, config.degree + 1):
            if k - length + 1 >= 0:
                y[k] += 2 * (out * fed**length).sum(1).real * h[k - length + 1 : k + 1].prod(0)
    return glu(p, y + p["D"] * h)


def gss(p: Weights, config: Any, h: Array, form: str) -> Array:
    u, v = (gelu(h @ p[f"{name}_proj.weight"].T) for name in "uv")
    v = rms(v, p["v_norm"], config.eps)
    rate = -np.exp(p["log_A_real"]) + 1j * np.exp(p["log_A_imag"])
    a, out = np.broadcast_to(np.exp(rate), (v.shape[1], len(rate))), pair(p["C"]) * (np.exp(rate) - 1) / rate
    y = linear_system(diagonal(a), np.ones(a.shape), out, v, form).real + p["D"] * v
    return (y @ p["gate_proj.weight"].T * u) @ p["o_proj.weight"].T + p["o_proj.bias"]


def definition(model: SequenceModel, tokens: list[int], mixer: Callable[..., Array], form: str) -> Array:
    """Logits [T,V]."""
    c, w = model.config, {n: t.double().numpy() for n, t in model.state_dict().items()}
    x = w["embed.weight"][tokens]
    for i in range(c.n_layers):
        p = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        inner = {n.removeprefix("mixer."): t for n, t in p.items() if n.startswith("mixer.")}
        x = x + mixer(inner, c, rms(x, p["norm"], c.eps), form)
        if c.d_ff:
            h = rms(x, p["ff_norm"], c.eps)
            gate = h @ p["gate_proj.weight"].T
            x = x + (gate * sigmoid(gate) * (h @ p["up_proj.weight"].T)) @ p["down_proj.weight"].T
    return rms(x, w["norm"], c.eps) @ w.get("head", w["embed.weight"]).T


CASES = {"s4d-odd": s4d, "s4d-bilinear": s4d, "s4-odd": s4_dplr, "liquid-s4-odd": liquid, "gss-odd": gss}


@pytest.mark.parametrize("form", ["recurrence", "convolution"])
@pytest.mark.parametrize("name", CASES)
def test_the_model_is_the_published_definition(name: str, form: str) -> None:
    model = random_model(CONFIGS[name])
    tokens = torch.randint(0, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    want = definition(model, tokens, CASES[name], form)
    with torch.no_grad():
        got = model(torch.tensor([tokens]))[0].numpy()
    assert np.abs(got - want).max() <= tolerance("torch", "float32", want)


def test_hippo_is_diagonal_plus_low_rank() -> None:
    """V (diag - P P*) V* gives the eigenvalues -1, -2 .. -2N of HiPPO-LegS back, from one member of each pair."""
    pairs = 5
    turn, p, b = s4.hippo(pairs)
    assert (turn > 0).all()
    diag, low = (np.concatenate([x, x.conj()]) for x in (-0.5 + 1j * turn, p))
    found = np.linalg.eigvals(np.diag(diag) - np.outer(low, low.conj()))
    assert np.sort(found.real) == pytest.approx(-np.arange(2 * pairs, 0, -1), rel=1e-6)
    assert np.abs(found.imag).max() < 1e-6
    assert 2 * (np.abs(b) ** 2).sum() == pytest.approx((2 * np.arange(2 * pairs) + 1.0).sum())


def test_why_s4_is_never_diagonalised() -> None:
    """32 states: a step with the dense matrix in float32 holds, one with its eigenvalues in complex64 does not."""
    pairs, tokens = 16, 400
    turn, low, fed = (x[:, None] for x in s4.hippo(pairs))
    rng = np.random.default_rng(0)
    out = rng.standard_normal((pairs, 2, 1))
    given = [
        np.log([0.02]),
        np.full((pairs, 1), np.log(0.5)),
        turn,
        *(np.stack([x.real, x.imag], 1) for x in (low, fed)),
        out,
    ]
    a, b, c = (x[..., 0] for x in state_space.numpy_of(s4.matrices, *given))
    u = rng.standard_normal(tokens)

    def run(step: Array, start: Array, read: Array, dtype: Any) -> Array:
        step, start, read, x, y = (
            step.astype(dtype),
            start.astype(dtype),
            read.astype(dtype),
            0 * start.astype(dtype),
            [],
        )
        for value in u.astype(np.float32):
            x = step @ x + start * dtype(value)
            y.append((read @ x).real)
        return np.array(y, np.float64)

    exact = run(a, b, c, np.float64)
    values, vectors = np.linalg.eig(a.astype(np.float64))
    modal = (np.diag(values), np.linalg.solve(vectors, b.astype(np.complex128)), c @ vectors)
    assert np.abs(run(*modal, np.complex128) - exact).max() < 1e-5 * np.abs(exact).max(), "the same system"
    assert np.abs(run(a, b, c, np.float32) - exact).max() < 1e-5 * np.abs(exact).max()
    assert np.abs(run(*modal, np.complex64) - exact).max() > 1e-2 * np.abs(exact).max()


def test_every_step_of_s4_shortens_the_state() -> None:
    model = random_model(CONFIGS["s4-odd"])
    step = model.state_dict()["layers.0.mixer.step"].permute(2, 0, 1)
    assert torch.linalg.matrix_norm(step, 2).max() <= 1.0 + 1e-6
