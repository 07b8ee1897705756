"""Hyena against its definition in float64, and what its history promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeseq.errors import SourceError
from edgeseq.models import family
from edgeseq.models.base import SequenceModel
from edgeseq.models.hyena import HyenaConfig
from edgeseq.verify.tolerances import tolerance
from tests.models.support import CONFIGS, CONTEXT, random_model
from tests.models.test_state_space_definition import rms, sigmoid

Array = np.ndarray


def tokens_for(model: SequenceModel, count: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(2))


def filters(p: dict[str, Array], c: HyenaConfig) -> list[Array]:
    """The filters [R,d] of a layer, tap by tap from the formula; a layer of modes answers for ever."""
    if "poles.0" in p:
        pairs = [[p[f"{kind}.{j}"] for kind in ("poles", "residues")] for j in range(c.order - 1)]
        modes = [[x[:, 0] + 1j * x[:, 1] for x in pair] for pair in pairs]
        return [np.stack([(r * a**t).sum(0).real for t in range(200)]) for a, r in modes]
    found = np.empty((c.horizon, (c.order - 1) * c.d_model))
    frequencies = np.linspace(1e-4, c.filter_bands - 1, c.filter_bands)
    delta = np.linspace(np.log(100) / 1.5, np.log(100) / 0.3, found.shape[1])
    for t in range(c.horizon):
        u = t / (c.horizon - 1)
        phase = np.exp(-2j * np.pi * frequencies * t / c.horizon)
        x = np.concatenate([[u], phase.real, phase.imag])
        for name in ("first", "second", "third"):
            x = np.sin(p["filter.frequency"] * (p[f"filter.{name}.weight"] @ x + p[f"filter.{name}.bias"]))
        found[t] = p["filter.last.weight"] @ x * np.exp(-u * np.abs(delta))
    return np.split(found, c.order - 1, 1)


def mixer(p: dict[str, Array], c: HyenaConfig, h: Array) -> Array:
    def convolved(x: Array, taps: Array) -> Array:
        return np.stack([np.convolve(x[:, i], taps[:, i])[: len(x)] for i in range(x.shape[1])], 1)

    z = h @ p["in_proj.weight"].T + p["in_proj.bias"]
    z = convolved(z, p["conv_weight"].T[::-1]) + p["conv_bias"]  # tap k-1 multiplies the current token
    *gates, v = np.split(z, c.order + 1, 1)
    for j, taps in enumerate(filters(p, c)):
        v = v * gates[c.order - 1 - j]
        v = convolved(v, taps) + p[f"skips.{j}"] * v
    return (v * gates[0]) @ p["out_proj.weight"].T + p["out_proj.bias"]


@pytest.mark.parametrize("name", ["hyena-odd", "hyena-mixed"])
def test_the_model_is_the_published_definition(name: str) -> None:
    """60 tokens: within the horizon of one model, beyond that of the other."""
    model = random_model(CONFIGS[name])
    c, w = model.config, {n: t.double().numpy() for n, t in model.state_dict().items()}
    tokens = tokens_for(model, 60)
    x = w["embed.weight"][tokens[0].numpy()]
    for i in range(c.n_layers):
        p = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if n.startswith(f"layers.{i}.")}
        inner = {n.removeprefix("mixer."): t for n, t in p.items() if n.startswith("mixer.")}
        x = x + mixer(inner, c, rms(x, p["norm"], c.eps))
        h = rms(x, p["ff_norm"], c.eps)
        gate = h @ p["gate_proj.weight"].T
        x = x + (gate * sigmoid(gate) * (h @ p["up_proj.weight"].T)) @ p["down_proj.weight"].T
    want = rms(x, w["norm"], c.eps) @ w.get("head", w["embed.weight"]).T
    with torch.no_grad():
        got = model(tokens)[0].numpy()
    assert np.abs(got - want).max() <= tolerance("torch", "float32", want)


def test_rows_of_the_history_beyond_the_position_are_never_read() -> None:
    model = random_model(CONFIGS["hyena-odd"])
    tokens, slots = tokens_for(model, 36), model.state_slots(CONTEXT)
    state = [
        torch.full_like(s, torch.nan) if slot.update == "append" else s
        for s, slot in zip(model.initial_state(1, CONTEXT), slots, strict=True)
    ]
    with torch.no_grad():
        whole = model(tokens)
        for start in range(0, 36, 4):
            logits, *state = model.advance(tokens[:, start : start + 4], torch.tensor([start]), *state)
            assert (logits[:, 0] - whole[:, start + 3]).abs().max() <= tolerance("torch", "float32", whole)


def test_a_distilled_layer_does_not_grow_and_an_exact_one_does() -> None:
    model = random_model(CONFIGS["hyena-mixed"])
    short, long = (model.state_slots(context) for context in (10, 20))
    grown = [s.name for s, other in zip(short, long, strict=True) if s.shape != other.shape]
    assert grown == ["layers.1.history.0"]
    assert model.uses_position
    assert not random_model(HyenaConfig(53, 22, 1, 19, 60, modal=(2,))).uses_position


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": 1}, "order 1"),
        ({"horizon": 0}, "horizon"),
        ({"modal": (1,)}, r"the modes \[1\]"),
        ({"modal": (1, -2, 1, 1)}, r"-2"),
    ],
)
def test_shapes_without_sense_are_refused(change: dict, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        type(family("hyena").tiny)(**(vars(family("hyena").tiny) | change))
