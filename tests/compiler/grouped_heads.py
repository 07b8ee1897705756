"""A token model whose linear attentions have more queries than states, fewer keys than states, and every rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models import functional as ops
from edgeseq.spec import StateSlot

K, V = 6, 20
# rule, per key, heads of queries, of keys, of the state
CASES = (
    ("linear", False, 4, 2, 2),
    ("gated", True, 4, 1, 2),
    ("delta", False, 2, 2, 4),
    ("gated_delta", True, 2, 1, 2),
)


@dataclass
class Config:
    vocab_size: int = 31


class Grouped(nn.Module):
    config = Config()
    uses_position = False

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(31, 12)
        widths = [(q * K, k * K, h * V, h * K if per_key else h, h) for _, per_key, q, k, h in CASES]
        self.ins = nn.ModuleList(nn.Linear(12, sum(w)) for w in widths)
        self.outs = nn.ModuleList(nn.Linear(max(q, h) * V, 12) for _, _, q, _, h in CASES)
        self.widths = widths

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(StateSlot(rule, "float32", (1, h, K, V)) for rule, _, _, _, h in CASES)

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new = self.embed(tokens), []
        for (rule, _, q_heads, k_heads, _), widths, project, out, past in zip(
            CASES, self.widths, self.ins, self.outs, state, strict=True
        ):
            q, k, v, g, beta = torch.split(project(x), widths, -1)
            decay = F.logsigmoid(g) if rule.startswith("gated") else None
            rate = torch.sigmoid(beta) if rule.endswith("delta") else None
            o, present = ops.linear_attention(q, 0.3 * k, v, past, decay, rate, rule, q_heads, k_heads, 0.5)
            x = x + out(torch.tanh(o))
            new.append(present)
        return F.linear(x[:, -1:], self.embed.weight), *new


def factory() -> nn.Module:
    return Grouped()
