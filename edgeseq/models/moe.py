"""A mixture of experts in the place of a feed-forward, each token choosing its own (Shazeer et al. 2017; Mixtral 2024).

Glossary
  B  batch            T  tokens           d  model width
  E  experts          A  experts a token chooses, the best by score
  F  width of an expert                   Fs width of the expert that all tokens share (0: there is none)

  s      = W_router h                                     [B,T,E]
  index  = the A largest of s, the lower index first among equals
  gates  = softmax over the chosen s (renormalised), or softmax over all s at the chosen ones
  out    = sum_a gates_a W_down,e(silu(W_gate,e h) * W_up,e h)          e = index_a
  out   += sigmoid(w_shared h) * shared(h), the factor only where the config has a shared gate
Published variants: Mixtral and Granite renormalise, Jamba does not, Qwen3-Next has the flag, a shared expert and its
gate. Renormalising the softmax over all scores is the softmax over the chosen ones.

The experts' matrices lie one below the other, gate rows above up rows: a step reads those of the chosen ones alone.
There is no state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models.base import Array, StoredTensor
from edgeseq.models.experts_op import expert_linear, expert_linear_parallel


@dataclass(frozen=True)
class MoeConfig:
    """Shape of a mixture: E experts of width F, A of them for a token.

    renormalise: the chosen gates sum to 1. d_shared: width of an expert that every token has, 0 for none;
    shared_gate: it is scaled by sigmoid(w h).
    """

    n_experts: int
    top_k: int
    d_ff: int
    renormalise: bool = True
    d_shared: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.n_experts:
            raise SourceError(f"A token cannot choose {self.top_k} of {self.n_experts} experts")
        if self.shared_gate and not self.d_shared:
            raise SourceError("A gate of a shared expert needs a shared expert")


class Moe(nn.Module):
    """The block: h [B,T,d], normed already, -> [B,T,d]; the residual sum is not its business.

    Parameters: router.weight [E,d], gate_up_proj.weight [E*2F,d], down_proj.weight [E*d,F], and for a shared expert
    shared_gate_proj, shared_up_proj [Fs,d], shared_down_proj [d,Fs], shared_router [1,d].
    """

    def __init__(self, d_model: int, c: MoeConfig) -> None:
        super().__init__()
        self.c = c
        self.router = nn.Linear(d_model, c.n_experts, bias=False)
        self.gate_up_proj = nn.Linear(d_model, c.n_experts * 2 * c.d_ff, bias=False)
        self.down_proj = nn.Linear(c.d_ff, c.n_experts * d_model, bias=False)
        if c.d_shared:
            self.shared_gate_proj = nn.Linear(d_model, c.d_shared, bias=False)
            self.shared_up_proj = nn.Linear(d_model, c.d_shared, bias=False)
            self.shared_down_proj = nn.Linear(c.d_shared, d_model, bias=False)
        if c.shared_gate:
            self.shared_router = nn.Linear(d_model, 1, bias=False)

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """index [B,T,A] int64, negative for no expert, and gates [B,T,A]."""
        scores = self.router(h)
        best, index = torch.topk(scores, self.c.top_k, -1)
        if self.c.renormalise:
            return index, torch.softmax(best, -1)
        return index, torch.softmax(scores, -1).gather(-1, index)

    def shared(self, h: Tensor) -> Tensor:
        """What every token gets besides: [B,T,d]."""
        y = self.shared_down_proj(F.silu(self.shared_gate_proj(h)) * self.shared_up_proj(h))
        return torch.sigmoid(self.shared_router(h)) * y if self.c.shared_gate else y

    def _through(self, h: Tensor, linear: Callable[..., Tensor]) -> Tensor:
        c = self.c
        index, gates = self.route(h)
        both = linear(h[:, :, None], index, self.gate_up_proj.weight, c.n_experts)  # [B,T,A,2F]
        inner = F.silu(both[..., : c.d_ff]) * both[..., c.d_ff :]
        y = linear(inner, index, self.down_proj.weight, c.n_experts, gates)
        return y + self.shared(h) if c.d_shared else y

    def forward(self, h: Tensor) -> Tensor:
        """The whole sequence, differentiable."""
        return self._through(h, expert_linear_parallel)

    def advance(self, h: Tensor) -> Tensor:
        """A chunk, on the operators that are exported."""
        return self._through(h, expert_linear)


def stored_stacks(
    c: MoeConfig, d_model: int, stacked: tuple[str, str], each: tuple[str, str, str]
) -> dict[str, StoredTensor]:
    """The experts of one block in a checkpoint: {gate_up_proj.weight, down_proj.weight} -> where they lie.

    stacked: names of the tensors [E,2F,d] and [E,d,F], which some checkpoints have.
    each:    names of gate, up and down of one expert with "{}" for its number, read where there are no stacks.
    """
    gate, up, down = each
    E, d, F_ = c.n_experts, d_model, c.d_ff
    rows = [StoredTensor(name.format(e), (F_, d)) for e in range(E) for name in (gate, up)]
    outputs = [StoredTensor(down.format(e), (d, F_)) for e in range(E)]
    return {
        "gate_up_proj.weight": StoredTensor(stacked[0], (E, 2 * F_, d), flatten, parts=tuple(rows)),
        "down_proj.weight": StoredTensor(stacked[1], (E, d, F_), flatten, parts=tuple(outputs)),
    }


def flatten(stack: Array) -> Array:
    """[E,M,K] -> [E*M,K]."""
    return stack.reshape(-1, stack.shape[-1])
