"""Neural Turing Machine (Graves et al. 2014, arXiv 1410.5401): an LSTM that reads and writes a memory by address.

Glossary
  B  batch            N  rows of the memory     W  width of a row
  R  read heads       A  write heads            d  width of the controller

One step, x [B,d_in] the input and r [B,R W] what was read in the step before:
  h, c  = lstm([x; r], h, c)
  of every head, from W_a h + b:  k = tanh(.) [W], beta = softplus(.), g = sigmoid(.), s = softmax(. . .),
                                  gamma = 1 + softplus(.)
  w     = softmax(beta cos(M, k))                                   (5)(6)  by content
  w     = g w + (1 - g) w_before                                    (7)     or where it was
  w_i   = s_0 w_(i-1) + s_1 w_i + s_2 w_(i+1), circular             (8)     moved by one row
  w     = w^gamma / sum w^gamma                                     (9)     sharpened
  r     = w^T M of each read head: these see the memory as the step found it
  M     = M (1 - w (x) e) + w (x) a of each write head in order,    (3)(4)  e = sigmoid(.), a = tanh(.)
  y     = W_o [h; r] + b
The power of (9) is taken of w / max w: the same quotient, and none of it vanishes where N or gamma is large.
State: memory [1,N,W] (fresh rows are all 1e-6), weights [1,R+A,N], read [1,R W], h, c [1,d], and started [1,1], which
is 0 in a fresh state: then the learned first weights, reads, h and c take the place of the zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models.step_family import LstmCell, StepFamily, StepModel, by_content, random_tensor
from edgeseq.spec import StateSlot, TensorSpec

FRESH = 1e-6


@dataclass(frozen=True)
class NtmConfig:
    """Shape of a model; letters of the module docstring."""

    d_in: int
    d_out: int
    d_hidden: int
    n_rows: int
    d_row: int
    n_read: int = 1
    n_write: int = 1


def addressed(
    memory: Tensor, before: Tensor, key: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, sharpen: Tensor
) -> Tensor:
    """Equations (5) to (9): memory [B,N,W], before [B,R,N], key [B,R,W], shift [B,R,3], the rest [B,R,1] -> [B,R,N]."""
    w = gate * by_content(memory, key, strength) + (1 - gate) * before
    behind = torch.cat([w[..., -1:], w[..., :-1]], -1)  # w_(i-1)
    ahead = torch.cat([w[..., 1:], w[..., :1]], -1)
    w = shift[..., 0:1] * behind + shift[..., 1:2] * w + shift[..., 2:3] * ahead
    w = (w / w.amax(-1, keepdim=True)).clamp_min(1e-30) ** sharpen
    return w / w.sum(-1, keepdim=True)


class Ntm(StepModel):
    """x [1,1,d_in] -> y [1,1,d_out]."""

    def __init__(self, config: NtmConfig) -> None:
        super().__init__()
        c = self.config = config
        self.inputs = (TensorSpec("x", "float32", (1, 1, c.d_in)),)
        self.outputs = (TensorSpec("y", "float32", (1, 1, c.d_out)),)
        heads, reads = c.n_read + c.n_write, c.n_read * c.d_row
        self.controller = LstmCell(c.d_in + reads, c.d_hidden)
        self.address = nn.Linear(c.d_hidden, heads * (c.d_row + 6))  # k, beta, g, s, gamma of every head
        self.write = nn.Linear(c.d_hidden, c.n_write * 2 * c.d_row)  # e and a
        self.out = nn.Linear(c.d_hidden + reads, c.d_out)
        self.first_weights = nn.Parameter(torch.zeros(heads, c.n_rows))
        self.first_read = nn.Parameter(torch.zeros(reads))
        self.first_h = nn.Parameter(torch.zeros(c.d_hidden))
        self.first_c = nn.Parameter(torch.zeros(c.d_hidden))

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        c = self.config
        return (
            StateSlot("memory", "float32", (1, c.n_rows, c.d_row), FRESH),
            StateSlot("weights", "float32", (1, c.n_read + c.n_write, c.n_rows)),
            StateSlot("read", "float32", (1, c.n_read * c.d_row)),
            StateSlot("h", "float32", (1, c.d_hidden)),
            StateSlot("c", "float32", (1, c.d_hidden)),
            StateSlot("started", "float32", (1, 1)),
        )

    def step(self, *args: Tensor) -> tuple[Tensor, ...]:
        config = self.config
        x, memory, weights, read, h, c, started = args
        fresh = 1 - started
        read, h, c = read + fresh * self.first_read, h + fresh * self.first_h, c + fresh * self.first_c
        weights = weights + fresh[..., None] * torch.softmax(self.first_weights, -1)

        h, c = self.controller(torch.cat([x[:, 0], read], -1), h, c)
        heads = self.address(h).unflatten(-1, (config.n_read + config.n_write, -1))  # [B,R+A,W+6]
        W, R = config.d_row, config.n_read
        how = (
            torch.tanh(heads[..., :W]),
            F.softplus(heads[..., W : W + 1]),
            torch.sigmoid(heads[..., W + 1 : W + 2]),
            torch.softmax(heads[..., W + 2 : W + 5], -1),
            1 + F.softplus(heads[..., W + 5 :]),
        )
        now = [addressed(memory, weights[:, :R], *(part[:, :R] for part in how))]
        read = (now[0] @ memory).flatten(1)
        values = self.write(h).unflatten(-1, (config.n_write, 2, W))
        for i in range(config.n_write):
            at = slice(R + i, R + i + 1)
            w = addressed(memory, weights[:, at], *(part[:, at] for part in how))  # [B,1,N]
            erase, add = torch.sigmoid(values[:, i, :1]), torch.tanh(values[:, i, 1:])  # [B,1,W]
            column = w.transpose(1, 2)
            memory = memory * (1 - column * erase) + column * add
            now.append(w)
        y = self.out(torch.cat([h, read], -1))[:, None]
        return y, memory, torch.cat(now, 1), read, h, c, torch.ones_like(started)


FAMILY = StepFamily(
    name="ntm",
    config=NtmConfig,
    model=Ntm,
    # The copy experiment of the paper (section 4.1): 8 bits and a delimiter, 128 rows of 20, a controller of 100.
    zoo={"ntm-copy": NtmConfig(9, 8, 100, 128, 20)},
    tiny=NtmConfig(9, 8, 64, 32, 12),
    state_formula="4 (N W + (R + A) N + R W + 2 d + 1)",
    letters=lambda c: {"N": c.n_rows, "W": c.d_row, "R": c.n_read, "A": c.n_write, "d": c.d_hidden},
    random_tensor=random_tensor,
)
