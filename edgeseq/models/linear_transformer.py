"""Linear Transformer (Katharopoulos et al. 2020, arXiv 2006.16236), in pre-norm form with a gated feed-forward.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  heads              K  key width, V  value width of a head
  F  width of the gated feed-forward

  x       = embedding + d^-1/2 [sin, cos](position 10000^(-2i/d))
One layer, with h = rms_norm(x) and x the residual stream [B,T,d]:
  q, k, v = phi(W_q h), phi(W_k h), W_v h        phi(x) = elu(x) + 1 > 0, [B,T,H,K], [B,T,H,K], [B,T,H,V]
  S       = S + k (x) [v, 1]                     [B,H,K,V+1]; the last column is the sum of keys z
  o       = q^T S[:V] / (q . z + eps_z)
  x       = x + W_o o
  h       = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: sum [1,H,K,V+1], float32 always: z only grows, and half precision soon adds nothing to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import rotary
from edgeseq.models.base import Array, Family
from edgeseq.models.matrix_state import linear_attention_parallel
from edgeseq.models.stack import Mixer, Stack, random_tensor
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class LinearTransformerConfig:
    """Shape of a Linear Transformer; `eps_z` keeps the normaliser from 0, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_key: int
    d_value: int
    d_ff: int
    eps_z: float = 1e-6
    eps: float = 1e-6
    tie: bool = True

    def __post_init__(self) -> None:
        if self.d_model % 2:
            raise SourceError(
                f"A Linear Transformer has sine and cosine of its position, so no odd width {self.d_model}"
            )


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1 as x + 1 or e^x: e^x - 1 + 1 would keep nothing of a small e^x, and z may consist of such."""
    positive = F.relu(x)
    return torch.exp(x - positive) + positive


class LinearTransformerMixer(Mixer):
    """Linear attention with the feature map elu + 1; parameters as in the module docstring."""

    def __init__(self, c: LinearTransformerConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.k_proj = nn.Linear(c.d_model, c.n_heads * c.d_key, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.n_heads * c.d_value, bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.d_value, c.d_model, bias=False)

    def operands(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k [B,T,H*K] and [v, 1] [B,T,H*(V+1)]."""
        v = self.v_proj(h).unflatten(-1, (self.c.n_heads, self.c.d_value))
        one = torch.cat([v, torch.ones_like(v[..., :1])], -1).flatten(-2)
        return phi(self.q_proj(h)), phi(self.k_proj(h)), one

    def out(self, o: Tensor) -> Tensor:
        """Divide by the last column of each head and project."""
        c = self.c
        each = o.unflatten(-1, (c.n_heads, c.d_value + 1))
        return self.o_proj((each[..., :-1] / (each[..., -1:] + c.eps_z)).flatten(-2))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.operands(h)
        heads = self.c.n_heads
        return self.out(linear_attention_parallel(q, k, v, heads, None, None, "linear", heads, heads))

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.operands(h)
        heads = self.c.n_heads
        o, present = ops.linear_attention(q, k, v, state[0], None, None, "linear", heads, heads)
        return self.out(o), present

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        return (StateSlot("sum", "float32", (1, c.n_heads, c.d_key, c.d_value + 1)),)


class LinearTransformer(Stack):
    """Embedding and position, layers, norm and head; forms and state as in `SequenceModel`."""

    uses_position = True

    def __init__(self, config: LinearTransformerConfig) -> None:
        super().__init__(config, LinearTransformerMixer)
        self.register_buffer("frequency", torch.empty(config.d_model // 2, dtype=torch.int64))

    def embedded(self, tokens: Tensor, position: Tensor) -> Tensor:
        cos, sin = rotary.angles(self.frequency, position, tokens.shape[1])
        return self.embed(tokens) + self.config.d_model**-0.5 * torch.cat([sin, cos], -1)


def constants(c: LinearTransformerConfig) -> dict[str, Array]:
    """Frequencies [d/2] int64 of the sinusoidal position (units of rotary.py)."""
    return {"frequency": rotary.turns(10000.0 ** (-np.arange(0, c.d_model, 2) / c.d_model))}


FAMILY = Family(
    name="linear-transformer",
    config=LinearTransformerConfig,
    model=LinearTransformer,
    checkpoint=None,
    # The width and depth of GPT-2's smallest model.
    zoo={"linear-transformer-125m": LinearTransformerConfig(50257, 768, 12, 12, 64, 64, 2048)},
    tiny=LinearTransformerConfig(256, 128, 4, 4, 32, 32, 264),
    state_formula="4 L H K (V + 1)",
    growth="constant",
    ops=("linear_attention",),
    random_tensor=random_tensor,
    constants=constants,
)
