"""Expert Choice routing (Zhou et al. 2022, arXiv 2202.09368) under a causal policy, in the layer of `mixtral.py`.

As published, experts choose tokens: with p = softmax(W_router h) over all n tokens of a sequence, each of the E experts
takes the n c / E tokens for which its p is largest, with p as the gate; a token has c experts in the mean, any number
from 0 to E. Whether a token is taken then depends on tokens that come after it, and one token by itself is taken by
every expert: no step form equals that.

The policy here, `threshold`: expert e takes a token where p_e > threshold_e, at most A experts for one token (those
furthest above their thresholds), gates p. A token decides by itself, so step = chunk = whole sequence. The thresholds
are the quantile 1 - c / E of each expert's p, the value that choosing among all tokens would have cut at; training
keeps a running mean of that quantile, uses what earlier batches gave, and the weights carry it. A token that no expert
takes passes the feed-forward unchanged. The policy stands in the manifest with the rest of the config.

Letters as in `mixtral.py`; c is the capacity. State of a layer: key and value [1,Hk,M,e].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import transformer
from edgeseq.models.base import Array, Family
from edgeseq.models.mixtral import Mixtral, MixtralConfig, MixtralLayer
from edgeseq.models.moe import Moe, MoeConfig
from edgeseq.models.transformer import TransformerLayer

KEPT = 0.95  # of the running mean, a batch


@dataclass(frozen=True)
class ExpertChoiceConfig(MixtralConfig):
    """A Mixtral's shape; top_k is the largest number of experts for one token, capacity the mean that is aimed at."""

    capacity: float = 2.0
    policy: str = "threshold"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy == "whole-sequence":
            raise SourceError(
                "Experts that choose among all tokens of a sequence see those to come, so there is no step",
                'policy "threshold" lets each token decide by the cut-offs that such choices had',
            )
        if self.policy != "threshold":
            raise SourceError(
                f"{self.policy!r:.40} is no policy of expert choice", 'the one that is causal: "threshold"'
            )
        if not 0 < self.capacity <= self.top_k:
            raise SourceError(
                f"A mean of {self.capacity} experts cannot be met with at most {self.top_k} for one token"
            )

    def moe(self) -> MoeConfig:
        return MoeConfig(self.n_experts, self.top_k, self.d_ff, renormalise=False)


def expert_choice(scores: Tensor, capacity: float) -> Tensor:
    """The published rule, for comparison: scores p [n,E] of a whole sequence -> bool [n,E], which expert takes which.

    Each expert takes round(n c / E) tokens, at least one. Not causal.
    """
    n, experts = scores.shape
    count = min(n, max(1, round(n * capacity / experts)))
    taken = torch.zeros_like(scores, dtype=torch.bool)
    return taken.scatter_(0, scores.topk(count, 0).indices, True)


def cut_offs(scores: Tensor, capacity: float) -> Tensor:
    """The thresholds [E] that choosing among the tokens of scores p [n,E] amounts to: the quantile 1 - c / E."""
    return torch.quantile(scores, max(0.0, 1.0 - capacity / scores.shape[1]), dim=0)


class ThresholdMoe(Moe):
    """The block with that policy; `threshold` [E] is kept as a running mean, without a gradient."""

    def __init__(self, d_model: int, c: ExpertChoiceConfig) -> None:
        super().__init__(d_model, c.moe())
        self.capacity = c.capacity
        self.threshold = nn.Parameter(torch.full((c.n_experts,), 1.0 / c.n_experts), requires_grad=False)

    def route(self, h: Tensor) -> tuple[Tensor, Tensor]:
        p = torch.softmax(self.router(h), -1)
        above, best = torch.topk(p - self.threshold, self.c.top_k, -1)
        taken = above > 0.0
        gates = p.gather(-1, best) * taken.to(p.dtype)
        if self.training:
            self._follow(p.detach().flatten(0, -2))
        return torch.where(taken, best, -1), gates

    @torch.no_grad()
    def _follow(self, p: Tensor) -> None:
        self.threshold.lerp_(cut_offs(p, self.capacity), 1.0 - KEPT)


class ExpertChoiceLayer(MixtralLayer):
    """Mixtral's layer with the other routing."""

    def __init__(self, c: ExpertChoiceConfig) -> None:
        super().__init__(c)
        self.moe = ThresholdMoe(c.d_model, c)


class ExpertChoice(Mixtral):
    """Forms as in `SequenceModel`."""

    layer_type: ClassVar[type[TransformerLayer]] = ExpertChoiceLayer


def random_tensor(c: Any, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """As the transformer's; thresholds at the mean of p."""
    if name.endswith("threshold"):
        return np.full(shape, 1.0 / c.n_experts, np.float32)
    return transformer.random_tensor(c, name, shape, rng)


FAMILY = Family(
    name="expert-choice",
    config=ExpertChoiceConfig,
    model=ExpertChoice,
    checkpoint=None,
    zoo={},
    tiny=ExpertChoiceConfig(256, 128, 4, 4, 4, 32, 64, n_experts=4, top_k=3, capacity=2.0),
    state_formula="8 L Hk e M",
    growth="linear",
    ops=("rotary", "cached_attention", "expert_linear"),
    random_tensor=random_tensor,
    constants=transformer.constants,
)
