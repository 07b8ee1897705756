"""RetNet has no Hugging Face class: its definition once more in numpy, float64, one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeseq.models.base import SequenceModel
from edgeseq.verify.tolerances import tolerance
from tests.models.support import CONFIGS, random_model

Array = np.ndarray


def rms(x: Array, eps: float) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


def rotate_every_two(x: Array, position: int) -> Array:
    """x [H,K], interleaved pairs turned by position * 10000^-linspace(0, 1, K/2), as in torchscale."""
    angle = position * np.repeat(10000.0 ** -np.linspace(0.0, 1.0, x.shape[-1] // 2), 2)
    turned = np.stack([-x[:, 1::2], x[:, 0::2]], -1).reshape(x.shape)
    return x * np.cos(angle) + turned * np.sin(angle)


def definition(model: SequenceModel, tokens: list[int], normalised: bool) -> Array:
    """Logits [T,V]; `normalised` adds torchscale's running scale of the state, S / sqrt(1 + gamma + gamma^2 ...)."""
    c, w = model.config, {n: t.double().numpy() for n, t in model.state_dict().items()}
    gamma = (1.0 - 2.0 ** (-5.0 - np.arange(c.n_heads)))[:, None, None]
    state = np.zeros((c.n_layers, c.n_heads, c.d_key, c.d_value))
    scale, out = np.zeros((c.n_heads, 1, 1)), []
    for position, token in enumerate(tokens):
        x, scale = w["embed.weight"][token], gamma * scale + 1.0
        for i in range(c.n_layers):
            p = {n.removeprefix(f"layers.{i}.").removesuffix(".weight"): t for n, t in w.items() if f"layers.{i}." in n}
            h = rms(x, c.eps) * p["norm"]
            q = rotate_every_two((p["q_proj"] @ h).reshape(c.n_heads, c.d_key), position)
            k = rotate_every_two((p["k_proj"] @ h).reshape(c.n_heads, c.d_key) * c.d_key**-0.5, position)
            v = (p["v_proj"] @ h).reshape(c.n_heads, c.d_value)
            state[i] = gamma * state[i] + k[:, :, None] * v[:, None, :]
            seen = state[i] / np.sqrt(scale) if normalised else state[i]
            o = rms(np.einsum("hk,hkv->hv", q, seen), c.eps).reshape(-1)
            x = x + p["o_proj"] @ (silu(p["g_proj"] @ h) * o)
            h = rms(x, c.eps) * p["ff_norm"]
            x = x + p["down_proj"] @ (silu(p["gate_proj"] @ h) * (p["up_proj"] @ h))
        out.append(w.get("head", w["embed.weight"]) @ (rms(x, c.eps) * w["norm"]))
    return np.stack(out)


@pytest.mark.parametrize("name", ["retnet-odd", "retnet-tiny"])
def test_the_model_is_the_published_definition(name: str) -> None:
    model = random_model(CONFIGS[name])
    tokens = torch.randint(0, model.config.vocab_size, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    want = definition(model, tokens, normalised=False)
    with torch.no_grad():
        got = model(torch.tensor([tokens]))[0].numpy()
    assert np.abs(got - want).max() <= tolerance("torch", "float32", want)


def test_the_running_scale_of_torchscale_cancels_up_to_eps() -> None:
    model = random_model(CONFIGS["retnet-odd"])
    tokens = list(range(40))
    plain, scaled = (definition(model, tokens, normalised) for normalised in (False, True))
    assert np.abs(plain - scaled).max() < 1e-3 * np.abs(plain).max()
    assert np.abs(plain - scaled).max() > 0
