"""A stack of residual layers, each a token mixer and, where the family has one, a gated feed-forward.

  x = x + mixer(rms_norm(x));   x = x + W_down(silu(W_gate h) * W_up h),  h = rms_norm(x)

A family of this shape brings its `Mixer`; embedding, norms, head and the order of the state slots are here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from edgeseq.models import functional as ops
from edgeseq.models.base import Array, SequenceModel, last_logits, normal
from edgeseq.spec import StateSlot


class Mixer(nn.Module):
    """What moves information between tokens. h [B,T,d] is normed already; the residual sum is not its business."""

    def forward(self, h: Tensor) -> Tensor:
        """The whole sequence from a fresh state, differentiable: [B,T,d] -> [B,T,d]."""
        raise NotImplementedError

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """A chunk: the output [B,T,d], then the new state in the order of `state_slots`."""
        raise NotImplementedError

    def state_slots(self) -> tuple[StateSlot, ...]:
        """State of one stream, names relative to the layer."""
        raise NotImplementedError


class NegativeExp(nn.Module):
    """Training optimises log(-A), as published, so that A stays negative."""

    def forward(self, log: Tensor) -> Tensor:
        return -torch.exp(log)

    def right_inverse(self, a: Tensor) -> Tensor:
        return torch.log(-a)


class Layer(nn.Module):
    """Mixer and feed-forward (none where d_ff is 0), each with its norm and residual."""

    def __init__(self, mixer: Mixer, d_model: int, d_ff: int, eps: float) -> None:
        super().__init__()
        self.eps, self.d_ff = eps, d_ff
        self.norm = nn.Parameter(torch.ones(d_model))
        self.mixer = mixer
        if d_ff:
            self.ff_norm = nn.Parameter(torch.ones(d_model))
            self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
            self.up_proj = nn.Linear(d_model, d_ff, bias=False)
            self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def feed_forward(self, x: Tensor, norm: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        if not self.d_ff:
            return x
        h = norm(x, self.ff_norm, self.eps)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(ops.rms_norm_parallel(x, self.norm, self.eps))
        return self.feed_forward(x, ops.rms_norm_parallel)

    def advance(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, *new = self.mixer.advance(ops.rms_norm(x, self.norm, self.eps), *state)
        return self.feed_forward(x + y, ops.rms_norm), *new


class Stack(SequenceModel):
    """Embedding, layers, norm and head. `config` has vocab_size, d_model, n_layers, d_ff (0: none), eps and tie."""

    uses_position = False

    def __init__(self, config: Any, mixer: Callable[[Any], Mixer]) -> None:
        super().__init__()
        c = self.config = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(Layer(mixer(c), c.d_model, c.d_ff, c.eps) for _ in range(c.n_layers))
        self.norm = nn.Parameter(torch.ones(c.d_model))
        self.head = None if c.tie else nn.Parameter(torch.empty(c.vocab_size, c.d_model))

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def embedded(self, tokens: Tensor, position: Tensor) -> Tensor:
        """What enters the first layer [B,T,d]."""
        return self.embed(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(tokens, tokens.new_zeros(1))
        for layer in self.layers:
            x = layer(x)
        return F.linear(ops.rms_norm_parallel(x, self.norm, self.config.eps), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(
            StateSlot(f"layers.{i}.{s.name}", s.dtype, s.shape, s.init, s.update, s.axis)
            for i, layer in enumerate(self.layers)
            for s in layer.mixer.state_slots()
        )

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new, at = self.embedded(tokens, position), [], 0
        for layer in self.layers:
            count = len(layer.mixer.state_slots())
            x, *present = layer.advance(x, *state[at : at + count])
            new += present
            at += count
        logits = last_logits(x, lambda h: ops.rms_norm(h, self.norm, self.config.eps), self.head_weight())
        return (logits, *new)

    def parametrize(self) -> None:
        for layer in self.layers:
            if hasattr(layer.mixer, "A"):
                register_parametrization(layer.mixer, "A", NegativeExp())

    def unparametrize(self) -> None:
        for layer in self.layers:
            if hasattr(layer.mixer, "A"):
                remove_parametrizations(layer.mixer, "A")


def random_tensor(c: Any, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Variance-preserving matrices, those that write to the residual stream shrunk with depth; norms and D 1, biases 0.

    A = -(1..16) uniform and dt log-uniform in [0.001, 0.1], as Mamba-2 and Gated DeltaNet start.
    """
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf.endswith("norm") or leaf == "D":
        return np.ones(shape, np.float32)
    if leaf == "A":
        return -rng.uniform(1.0, 16.0, shape).astype(np.float32)
    if leaf == "dt_bias":
        dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), shape))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)  # inverse of softplus
    if leaf.endswith("bias"):
        return np.zeros(shape, np.float32)
    std = 1.0 / math.sqrt(shape[-1])
    return normal(rng, shape, std / math.sqrt(2 * c.n_layers) if leaf in ("o_proj", "out_proj", "down_proj") else std)
