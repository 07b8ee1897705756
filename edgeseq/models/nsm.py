"""Neural State Machine (Hudson and Manning 2019, arXiv 1907.03950): attention walks over a graph of named things.

Not the other projects of that name. The graph (a scene) is an input; what was thought so far is a distribution over
its nodes, and each instruction moves it.

Glossary
  B  batch      n  nodes      P  properties of a node      d  width of a property, a relation and an instruction

One step, r [B,d] the instruction, S [B,n,P,d] the nodes, E [B,n,n,d] the edges (from, to; zero where there is none):
  R    = softmax(D r)                                     [P+1], what r speaks of; D [P+1,d], the last is relations
  gs   = elu(sum_j R_j (r S_j) W_j)                       [n,d], where properties fit
  ge   = elu((r E) W_e)                                   [n,n,d]; elu(0) = 0, so that missing edges say nothing
  ps   = softmax_n(gs w_s)
  pr   = softmax_n((sum_s' p(s') ge(s',s)) w_r)           where relations lead
  p    = R_rel pr + (1 - R_rel) ps
  m    = sum_s p(s) sum_j R_j S_j                         [d], what the answer is read from
Nodes where `there` is not above 0 get no probability, now or before. State: distribution [1,n]; a fresh one is equal on
all nodes, then taken of those that are there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models.step_family import StepFamily, StepModel, random_tensor
from edgeseq.spec import StateSlot, TensorSpec

NOWHERE = -1e30


@dataclass(frozen=True)
class NsmConfig:
    """Shape of a model; letters of the module docstring."""

    n_nodes: int
    n_properties: int
    d_model: int


class Nsm(StepModel):
    """instruction [1,1,d], nodes [1,n,P,d], edges [1,n,n,d], there [1,n] -> distribution [1,1,n], answer [1,1,d].

    The graph stays while instructions come, so that its axes are not the time and there are steps only.
    """

    chunk = None  # type: ignore[assignment]

    def __init__(self, config: NsmConfig) -> None:
        super().__init__()
        c = self.config = config
        self.inputs = (
            TensorSpec("instruction", "float32", (1, 1, c.d_model)),
            TensorSpec("nodes", "float32", (1, c.n_nodes, c.n_properties, c.d_model)),
            TensorSpec("edges", "float32", (1, c.n_nodes, c.n_nodes, c.d_model)),
            TensorSpec("there", "float32", (1, c.n_nodes)),
        )
        self.outputs = (
            TensorSpec("distribution", "float32", (1, 1, c.n_nodes)),
            TensorSpec("answer", "float32", (1, 1, c.d_model)),
        )
        self.concepts = nn.Parameter(torch.zeros(c.n_properties + 1, c.d_model))
        self.property = nn.Linear(c.n_properties * c.d_model, c.d_model, bias=False)  # every W_j, side by side
        self.relation = nn.Linear(c.d_model, c.d_model, bias=False)
        self.state_score = nn.Linear(c.d_model, 1, bias=False)
        self.relation_score = nn.Linear(c.d_model, 1, bias=False)

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        n = self.config.n_nodes
        return (StateSlot("distribution", "float32", (1, n), 1.0 / n),)

    def step(self, *args: Tensor) -> tuple[Tensor, ...]:
        P = self.config.n_properties
        instruction, nodes, edges, there, p = args
        r = instruction[:, 0]
        mask = there > 0
        p = torch.where(mask, p, 0.0)
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)

        speaks = torch.softmax(F.linear(r, self.concepts), -1)  # [B,P+1]
        each = speaks[:, :P, None] * nodes.transpose(0, 1)  # [n,B,P,d]: nothing of it is a batch to products
        fits = F.elu(self.property((each * r[:, None]).flatten(2)))  # [n,B,d]
        leads = F.elu(self.relation(r[:, None, None] * edges))  # [B,n,n,d]
        arrived = (p[:, None] @ leads.flatten(2)).reshape(p.shape[0], -1, r.shape[-1])  # [B,n,d]
        by_state = torch.where(mask, self.state_score(fits)[..., 0].transpose(0, 1), NOWHERE)
        by_relation = torch.where(mask, self.relation_score(arrived)[..., 0], NOWHERE)
        moved = speaks[:, P:]
        p = moved * torch.softmax(by_relation, -1) + (1 - moved) * torch.softmax(by_state, -1)
        answer = p[:, None] @ each.sum(2).transpose(0, 1)
        return p[:, None], answer, p


FAMILY = StepFamily(
    name="nsm",
    config=NsmConfig,
    model=Nsm,
    # A scene of 36 objects with 8 properties each, in word vectors of 300 as the paper has them.
    zoo={"nsm-scene": NsmConfig(36, 8, 300)},
    tiny=None,
    state_formula="4 n",
    letters=lambda c: {"n": c.n_nodes},
    random_tensor=random_tensor,
)
