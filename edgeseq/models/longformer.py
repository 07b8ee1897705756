"""Longformer's attention made causal (Beltagy et al. 2020, sections 3.1 and 4.1): a window per layer, global tokens.

Letters as in `transformer.py`; G global tokens, W_i the window of layer i, the current token counted.

The published model reads both ways and marks any tokens as global. Here
- a token sees the last W_i tokens, itself counted, and all G global ones before it;
- the global tokens are the first G of the sequence. A later one could not become global: it would have to read keys
  that are gone. Causally, a global token sees only tokens that are global too, so the separate projections that the
  paper gives to what global tokens see would serve G rows alone; one set of projections serves all;
- the window grows from layer to layer, as in the paper's autoregressive models; their dilated heads are left out.
Norms, rotary positions and feed-forward are those of the LLaMA layer.

One layer i differs from it, with N = G + W_i rows, in
  K[p], V[p] = k, v  where p < G, else  K[G + (p-G) mod W_i], V[..] = k, v
  o = softmax(e^-1/2 q K^T over rows 0 .. min(p, N-1)) V
State of a layer: key and value [1,Hk,G+W_i,e]; no context is too long. Keys are stored rotated, so rows need no order.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edgeseq.errors import SourceError
from edgeseq.models import transformer
from edgeseq.models.base import Family
from edgeseq.models.sparse_op import Pattern, sparse_attention, sparse_attention_parallel
from edgeseq.models.transformer import Transformer, TransformerConfig, TransformerLayer
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class SparseConfig(TransformerConfig):
    """A transformer's shape whose layers see a part of what lies before."""

    def pattern(self, layer: int) -> Pattern:
        """What a token of this layer sees."""
        raise NotImplementedError


class SparseLayer(TransformerLayer):
    """The transformer's layer with attention to a pattern."""

    c: SparseConfig
    pattern: Pattern

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.c
        return sparse_attention_parallel(q, k, v, c.n_heads, c.n_kv_heads, c.head_dim**-0.5, self.pattern)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, scale = self.c, self.c.head_dim**-0.5
        return sparse_attention(q, k, v, key, value, position, c.n_heads, c.n_kv_heads, scale, self.pattern)


class SparseTransformer(Transformer):
    """Forms as in `SequenceModel`; the state does not depend on the context."""

    layer_type = SparseLayer

    def __init__(self, config: SparseConfig) -> None:
        super().__init__(config)
        for i, layer in enumerate(self.layers):
            layer.pattern = config.pattern(i)

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        c = self.config
        return tuple(
            StateSlot(f"layers.{i}.{name}", "float32", (1, c.n_kv_heads, c.pattern(i).rows, c.head_dim), 0.0, "ring", 2)
            for i in range(c.n_layers)
            for name in ("key", "value")
        )


@dataclass(frozen=True)
class LongformerConfig(SparseConfig):
    """n_global: the first tokens, which all later ones see. windows: tokens that each layer sees, one for all or one
    per layer."""

    n_global: int = 16
    windows: tuple[int, ...] = (512,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.windows) not in (1, self.n_layers):
            raise SourceError(f"{len(self.windows)} windows are neither one for all nor one for each layer")
        for layer in range(self.n_layers):
            self.pattern(layer)

    def pattern(self, layer: int) -> Pattern:
        return Pattern(self.n_global, self.windows[layer % len(self.windows)])


class Longformer(SparseTransformer):
    """Forms and state as in `SparseTransformer`."""


FAMILY = Family(
    name="longformer",
    config=LongformerConfig,
    model=Longformer,
    checkpoint=None,
    zoo={"longformer-base": LongformerConfig(50265, 768, 12, 12, 12, 64, 2048, n_global=16, windows=(512,))},
    tiny=LongformerConfig(256, 128, 4, 4, 4, 32, 264, n_global=8, windows=(16, 32, 48, 64)),
    state_formula="8 L Hk e (G + W)",
    growth="window",
    ops=("rotary", "sparse_attention"),
    random_tensor=transformer.random_tensor,
    constants=transformer.constants,
)
