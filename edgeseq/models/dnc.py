"""Differentiable Neural Computer (Graves et al. 2016, Nature 538, 471-476, Methods): memory with allocation and links.

Glossary
  B  batch            N  rows of the memory     W  width of a row
  R  read heads       d  width of the controller

One step, x [B,d_in] the input and r [B,R W] what was read in the step before:
  h, c = lstm([x; r], h, c);  the interface is W_i h + b, cut into what follows (oneplus is 1 + softplus)
  u    = (u + w - u w) prod_R (1 - f w_r)              usage; w, w_r of the step before, f = sigmoid free gates
  a    = allocation(u)                                 first the least used rows, below
  w    = g_w (g_a a + (1 - g_a) content(M, k_w))       write weighting, gates sigmoid, strength oneplus
  M    = M (1 - w (x) e) + w (x) v                     e = sigmoid
  L_ij = (1 - w_i - w_j) L_ij + w_i p_j, L_ii = 0      links, p of the step before
  p    = (1 - sum w) p + w                             precedence
  w_r  = m_1 L^T w_r + m_2 content(M, k_r) + m_3 L w_r  backward, content, forward; m = softmax modes
  r    = w_r M;  y = W_o [h; r] + b
Allocation sorts usage upwards, of equal rows the one with the lower index first (so does ONNX's TopK), and gives row
phi_j, j-th of the order, (1 - u_phi_j) times the product of the usages before it. Usage is sorted as it is: no epsilon
is mixed in, and in a fresh state row 0 is allocated whole.
State: memory [1,N,W], usage, precedence and write [1,N], link [1,N,N], weights [1,R,N], read [1,R W], h, c [1,d].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models.step_family import LstmCell, StepFamily, StepModel, by_content, random_tensor
from edgeseq.spec import StateSlot, TensorSpec


@dataclass(frozen=True)
class DncConfig:
    """Shape of a model; letters of the module docstring."""

    d_in: int
    d_out: int
    d_hidden: int
    n_rows: int
    d_row: int
    n_read: int = 1


def allocation(usage: Tensor) -> Tensor:
    """usage [B,N] in [0,1] -> allocation weighting [B,N], which sums to at most 1 (Methods, dynamic allocation)."""
    ordered, rows = torch.sort(usage, stable=True)
    before = torch.cumprod(torch.cat([torch.ones_like(ordered[:, :1]), ordered[:, :-1]], -1), -1)
    return torch.zeros_like(usage).scatter(1, rows, (1 - ordered) * before)


class Dnc(StepModel):
    """x [1,1,d_in] -> y [1,1,d_out]."""

    def __init__(self, config: DncConfig) -> None:
        super().__init__()
        c = self.config = config
        self.inputs = (TensorSpec("x", "float32", (1, 1, c.d_in)),)
        self.outputs = (TensorSpec("y", "float32", (1, 1, c.d_out)),)
        reads = c.n_read * c.d_row
        self.controller = LstmCell(c.d_in + reads, c.d_hidden)
        # read keys, strengths, free gates, modes; write key, erase, write vector; strength, both gates
        self.sizes = (reads, c.n_read, c.n_read, 3 * c.n_read, c.d_row, c.d_row, c.d_row, 1, 1, 1)
        self.interface = nn.Linear(c.d_hidden, sum(self.sizes))
        self.out = nn.Linear(c.d_hidden + reads, c.d_out)

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        c = self.config
        shapes = {
            "memory": (c.n_rows, c.d_row), "usage": (c.n_rows,), "precedence": (c.n_rows,), "write": (c.n_rows,),
            "link": (c.n_rows, c.n_rows), "weights": (c.n_read, c.n_rows), "read": (c.n_read * c.d_row,),
            "h": (c.d_hidden,), "c": (c.d_hidden,),
        }  # fmt: skip
        return tuple(StateSlot(name, "float32", (1, *shape)) for name, shape in shapes.items())

    def step(self, *args: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        x, memory, usage, precedence, write, link, weights, read, h, c = args
        h, c = self.controller(torch.cat([x[:, 0], read], -1), h, c)
        keys, strengths, free, modes, key, erase, value, strength, allocate, gate = self.interface(h).split(
            self.sizes, -1
        )
        kept = (1 - torch.sigmoid(free)[..., None] * weights).prod(1)
        usage = (usage + write - usage * write) * kept
        content = by_content(memory, key[:, None], 1 + F.softplus(strength)[..., None])[:, 0]
        allocate = torch.sigmoid(allocate)
        write = torch.sigmoid(gate) * (allocate * allocation(usage) + (1 - allocate) * content)

        row = write[..., None]  # [B,N,1]
        memory = memory * (1 - row * torch.sigmoid(erase)[:, None]) + row * value[:, None]
        other = 1 - torch.eye(config.n_rows, device=x.device)
        link = ((1 - row - write[:, None]) * link + row * precedence[:, None]) * other
        precedence = (1 - write.sum(-1, keepdim=True)) * precedence + write

        found = by_content(memory, keys.unflatten(-1, (config.n_read, -1)), 1 + F.softplus(strengths)[..., None])
        m = torch.softmax(modes.unflatten(-1, (config.n_read, 3)), -1)
        weights = m[..., 0:1] * (weights @ link) + m[..., 1:2] * found + m[..., 2:3] * (weights @ link.transpose(1, 2))
        read = (weights @ memory).flatten(1)
        y = self.out(torch.cat([h, read], -1))[:, None]
        return y, memory, usage, precedence, write, link, weights, read, h, c


FAMILY = StepFamily(
    name="dnc",
    config=DncConfig,
    model=Dnc,
    # The graph experiments of the paper (extended data table 2) have 512 rows of 50 and 5 read heads over 256 units.
    zoo={"dnc-graph": DncConfig(92, 90, 256, 512, 50, 5)},
    tiny=DncConfig(9, 8, 64, 24, 12),
    state_formula="4 (N W + N^2 + 3 N + R N + R W + 2 d)",
    letters=lambda c: {"N": c.n_rows, "W": c.d_row, "R": c.n_read, "d": c.d_hidden},
    random_tensor=random_tensor,
)
