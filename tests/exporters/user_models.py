"""Modules of a user's own, opened as path/file.py:factory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgeseq.spec import StateSlot, TensorSpec


class Sensor(nn.Module):
    """Frames in, probabilities out: named inputs, a buffer outside the state_dict, a constant of the code."""

    inputs = (TensorSpec("frame", "float32", (1, 6)),)
    outputs = (TensorSpec("speech", "float32", (1, 2)),)

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 12), nn.Linear(12, 2)
        self.register_buffer("window", torch.hann_window(6), persistent=False)
        self.register_buffer("large", torch.linspace(0.5, 1.5, 6 * 100).reshape(6, 100), persistent=False)

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return (StateSlot("h", "float32", (1, 12), 0.25),)

    def advance(self, frame: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        scaled = frame * self.window * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        h = self.cell(scaled + (frame @ self.large).mean(), h)
        return torch.softmax(self.out(h), -1), h


@dataclass
class Config:
    vocab_size: int = 50


class Tied(nn.Module):
    """A token model without the base class: tied weights under two names, states that pass through."""

    config = Config()

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight
        self.decay = nn.Parameter(torch.rand(8))

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(StateSlot(name, "float32", (1, 8)) for name in ("h", "twice", "idle"))

    def advance(
        self, tokens: Tensor, position: Tensor, h: Tensor, twice: Tensor, idle: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = self.embed(tokens)
        for t in range(x.shape[1]):
            h = h * torch.sigmoid(self.decay) + x[:, t] + 0.01 * (position[:, None] + t)
        return self.head(h[:, None]), h, h, idle


class Branching(Tied):
    """Cannot be traced: looks at values."""

    def advance(
        self, tokens: Tensor, position: Tensor, h: Tensor, twice: Tensor, idle: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if h.sum() > 0:
            h = h + 1
        return super().advance(tokens, position, h, twice, idle)


class Exploding(Tied):
    """Numbers that are not finite, and that float16 cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.embed.weight.mul_(1e30)


def _seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def sensor() -> nn.Module:
    return _seeded(Sensor)


def tied() -> nn.Module:
    return _seeded(Tied)


def branching() -> nn.Module:
    return _seeded(Branching)


def exploding() -> nn.Module:
    return _seeded(Exploding)
