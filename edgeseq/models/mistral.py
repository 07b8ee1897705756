"""Sliding-window attention (Jiang et al. 2023, Mistral 7B): the LLaMA layer whose tokens see the last W only.

Letters as in `transformer.py`; W is the window, the current token counted. One layer differs in
  K[p mod W], V[p mod W] = k, v
  o = softmax(e^-1/2 q K^T over the tokens p-W+1 .. p) V
State of a layer: key and value [1,Hk,W,e], a ring: no context is too long. Keys are stored rotated, so rows need no
order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import parallel, transformer
from edgeseq.models.base import Checkpoint, Family
from edgeseq.models.hf import ConfigReader
from edgeseq.models.transformer import Transformer, TransformerConfig, TransformerLayer
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class MistralConfig(TransformerConfig):
    """A transformer's shape, and the tokens that each one sees."""

    window: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise SourceError(f"A window of {self.window} tokens does not even hold the current one")


class MistralLayer(TransformerLayer):
    """The transformer's layer with attention to the window."""

    c: MistralConfig

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c, scale = self.c, self.c.head_dim**-0.5
        return parallel.window_attention_parallel(q, k, v, c.n_heads, c.n_kv_heads, scale, c.window)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        return ops.window_attention(q, k, v, key, value, position, c.n_heads, c.n_kv_heads, c.head_dim**-0.5)


class Mistral(Transformer):
    """Forms as in `SequenceModel`; the state does not depend on the context."""

    layer_type = MistralLayer

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        c = self.config
        shape = (1, c.n_kv_heads, c.window, c.head_dim)
        return tuple(
            StateSlot(f"layers.{i}.{name}", "float32", shape, 0.0, "ring", 2)
            for i in range(c.n_layers)
            for name in ("key", "value")
        )


def config_from_hf(raw: Mapping[str, Any]) -> MistralConfig:
    """config.json of `MistralForCausalLM`. One without a window is a LLaMA in all but its name, and is told so."""
    r = ConfigReader(raw)
    if r.get("sliding_window") is None:
        raise SourceError(
            "config.json: sliding_window is null, so every token sees all before it",
            'such a checkpoint is a LLaMA: set "model_type" to "llama" in config.json',
        )
    for name in ("attention_bias", "mlp_bias"):
        r.only(name, False)
    theirs = {"num_key_value_heads": 8} | {k: v for k, v in raw.items() if v is not None}
    whole = transformer.config_from_hf(theirs)
    transformer.refuse_limit(whole, r.positive("sliding_window"))
    return MistralConfig(**{f.name: getattr(whole, f.name) for f in fields(whole)}, window=r.positive("sliding_window"))


FAMILY = Family(
    name="mistral",
    config=MistralConfig,
    model=Mistral,
    checkpoint=Checkpoint(
        model_types=("mistral",),
        config=config_from_hf,
        tensors=transformer.hf_tensors,
        ignored=("rotary_emb.inv_freq",),
    ),
    zoo={},
    tiny=MistralConfig(256, 128, 4, 4, 4, 32, 264, window=32),
    state_formula="8 L Hk e W",
    growth="window",
    ops=("rotary", "window_attention"),
    random_tensor=transformer.random_tensor,
    constants=transformer.constants,
)
