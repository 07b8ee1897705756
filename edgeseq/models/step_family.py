"""A family whose steps have named inputs and outputs in the place of tokens and logits (explicit memories)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.models.base import Array, Growth, StepModule, normal
from edgeseq.spec import StateSlot, TensorSpec


class StepModel(nn.Module):
    """A module that follows `base.StepModule`. The sequence itself decides what is read next, so that there is no
    parallel form: `chunk` runs its steps in order.

    inputs, outputs: of one step, (1, 1, ...) each: batch, time, and the rest.
    default_chunks:  lengths that are exported unless asked otherwise; none, as a chunk saves nothing here.
    """

    default_chunks: ClassVar[tuple[int, ...]] = ()

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        """The state of one stream (leading axis 1); `context` does not matter."""
        raise NotImplementedError

    def step(self, *args: Tensor) -> tuple[Tensor, ...]:
        """(*inputs, *state) of one step -> (*outputs, *new state)."""
        raise NotImplementedError

    def chunk(self, *args: Tensor) -> tuple[Tensor, ...]:
        """The same for T steps: axis 1 of every input and output is the time."""
        count, made = len(self.inputs), []
        inputs, state = args[:count], args[count:]
        for t in range(inputs[0].shape[1]):
            now = self.step(*(x[:, t : t + 1] for x in inputs), *state)
            made.append(now[: len(self.outputs)])
            state = now[len(self.outputs) :]
        return (*(torch.cat(column, 1) for column in zip(*made, strict=True)), *state)

    def advance(self, *args: Tensor) -> tuple[Tensor, ...]:
        return self.step(*args) if args[0].shape[1] == 1 else self.chunk(*args)

    def initial_state(self, batch: int) -> list[Tensor]:
        """A fresh state for `batch` streams."""
        slots = self.state_slots(0)
        return [torch.full((batch, *s.shape[1:]), s.init, dtype=getattr(torch, s.dtype)) for s in slots]


@dataclass(frozen=True)
class StepFamily:
    """One family of step models, found by listing the folder; fields as in `base.Family`.

    tiny: the shape of `zoo:tiny-<name>` where it ships trained, else None.
    letters: config -> values of the letters of `state_formula`.
    """

    name: str
    config: type[Any]
    model: Callable[[Any], StepModule]
    zoo: Mapping[str, Any]
    tiny: Any
    state_formula: str
    random_tensor: Callable[[Any, str, tuple[int, ...], np.random.Generator], Array]
    letters: Callable[[Any], Mapping[str, int]]
    growth: Growth = "constant"
    ops: tuple[str, ...] = ()
    constants: Callable[[Any], dict[str, Array]] = lambda config: {}

    def meta_model(self, config: Any) -> Any:
        """The module with shapes but no storage."""
        with torch.device("meta"):
            model: Any = self.model(config)
        return model.eval()

    def param_count(self, config: Any) -> int:
        """Parameters, tied tensors once, constants not counted."""
        return sum(p.numel() for p in self.meta_model(config).parameters())


def random_tensor(config: Any, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Variance-preserving matrices, biases 0, learned initial values Gaussian."""
    if name.endswith("bias"):
        return np.zeros(shape, np.float32)
    return normal(rng, shape, 1.0 if name.startswith("first_") else 1.0 / math.sqrt(shape[-1]))


class LstmCell(nn.Module):
    """The controller of NTM and DNC: i, f, g, o = W [x; h] + b, c = f c + i g, h = o tanh(c)."""

    def __init__(self, d_in: int, d_hidden: int) -> None:
        super().__init__()
        self.gates = nn.Linear(d_in + d_hidden, 4 * d_hidden)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """x [B,d_in]; h, c [B,d_hidden] -> h, c."""
        i, f, g, o = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


def by_content(memory: Tensor, key: Tensor, strength: Tensor) -> Tensor:
    """softmax_i(strength cos(M_i, key)): memory [B,N,W], key [B,R,W], strength [B,R,1] -> [B,R,N].

    1e-8 is added to the product of the lengths, so that rows of zeros have a cosine of 0.
    """
    lengths = _length(memory)[:, None] * _length(key)[..., None]
    return torch.softmax(strength * (key @ memory.transpose(1, 2)) / (lengths + 1e-8), -1)


def _length(x: Tensor) -> Tensor:
    return torch.sqrt((x * x).sum(-1))
