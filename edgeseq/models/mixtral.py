"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): the LLaMA layer with a mixture of experts as its feed-forward.

Letters as in `transformer.py` and `moe.py`; every token chooses A of E experts of width F, whose gates sum to 1. With a
window W the attention is that of `mistral.py`. One layer differs in
  h = rms_norm(x);  x = x + sum_a gates_a W_down,e(silu(W_gate,e h) * W_up,e h)
State of a layer: key and value, [1,Hk,M,e] or a ring [1,Hk,W,e].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor

from edgeseq.errors import SourceError
from edgeseq.models import transformer
from edgeseq.models.base import Checkpoint, Family, StoredTensor
from edgeseq.models.hf import ConfigReader
from edgeseq.models.mistral import MistralLayer
from edgeseq.models.moe import Moe, MoeConfig, stored_stacks
from edgeseq.models.transformer import RopeConfig, Transformer, TransformerConfig, TransformerLayer
from edgeseq.spec import StateSlot

NO_WINDOW = 0


@dataclass(frozen=True)
class MixtralConfig(TransformerConfig):
    """A transformer's shape, `d_ff` being the width of one expert; window: tokens that each one sees, 0 for all."""

    n_experts: int = 8
    top_k: int = 2
    window: int = NO_WINDOW

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 0:
            raise SourceError(f"A window of {self.window} tokens does not even hold the current one")
        if self.mlp_bias:
            raise SourceError("Experts with a bias are not Mixtral's")
        self.moe()

    def moe(self) -> MoeConfig:
        return MoeConfig(self.n_experts, self.top_k, self.d_ff)


class MixtralLayer(MistralLayer):
    """The transformer's layer with experts; attention to the window where there is one."""

    c: MixtralConfig  # type: ignore[assignment]

    def __init__(self, c: MixtralConfig) -> None:
        super().__init__(replace(c, d_ff=1))
        self.c = c
        del self.gate_proj, self.up_proj, self.down_proj
        self.moe = Moe(c.d_model, c.moe())

    def feed_forward_whole(self, h: Tensor) -> Tensor:
        return self.moe(h)

    def feed_forward(self, h: Tensor) -> Tensor:
        return self.moe.advance(h)

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kind = MistralLayer if self.c.window else TransformerLayer
        return kind.attend_whole(self, q, k, v)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        kind = MistralLayer if self.c.window else TransformerLayer
        return kind.attend(self, q, k, v, key, value, position)


class Mixtral(Transformer):
    """Forms as in `SequenceModel`."""

    layer_type: ClassVar[type[TransformerLayer]] = MixtralLayer

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        rows = self.config.window or context
        slots = super().state_slots(rows)
        return tuple(replace(slot, update="ring") for slot in slots) if self.config.window else slots


def config_from_hf(raw: Mapping[str, Any]) -> MixtralConfig:
    """config.json of `MixtralForCausalLM`."""
    r = ConfigReader(raw)
    for name in ("attention_bias", "mlp_bias"):
        r.only(name, False)
    defaults = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "intermediate_size": 14336}
    if r.get("rope_parameters") is None and r.get("rope_theta") is None:
        defaults["rope_theta"] = 1e6
    whole = transformer.config_from_hf(defaults | {k: v for k, v in raw.items() if v is not None})
    if r.get("sliding_window") is not None:
        transformer.refuse_limit(whole, r.positive("sliding_window"))
    return MixtralConfig(
        **{f.name: getattr(whole, f.name) for f in fields(whole)},
        n_experts=r.positive("num_local_experts", default=8, most=1 << 16),
        top_k=r.positive("num_experts_per_tok", default=2),
        window=NO_WINDOW if r.get("sliding_window") is None else r.positive("sliding_window"),
    )


def hf_tensors(c: MixtralConfig) -> dict[str, StoredTensor]:
    """Our names -> where `MixtralForCausalLM` keeps them: `block_sparse_moe.experts.<e>.w1/w3/w2` (gate, up, down) as
    published, or the stacks `mlp.experts.gate_up_proj`, `down_proj`."""
    feed_forward = tuple(f"{name}_proj.weight" for name in ("gate", "up", "down"))
    names = {n: t for n, t in transformer.hf_tensors(c).items() if not n.endswith(feed_forward)}
    for i in range(c.n_layers):
        stacks, each = f"model.layers.{i}.mlp", f"model.layers.{i}.block_sparse_moe"
        router = (c.n_experts, c.d_model)
        parts = (StoredTensor(f"{each}.gate.weight", router),)
        names[f"layers.{i}.moe.router.weight"] = StoredTensor(f"{stacks}.gate.weight", router, parts=parts)
        w1, w3, w2 = (f"{each}.experts.{{}}.{w}.weight" for w in ("w1", "w3", "w2"))
        stacked = (f"{stacks}.experts.gate_up_proj", f"{stacks}.experts.down_proj")
        found = stored_stacks(c.moe(), c.d_model, stacked, (w1, w3, w2))
        names |= {f"layers.{i}.moe.{name}": tensor for name, tensor in found.items()}
    return names


FAMILY = Family(
    name="mixtral",
    config=MixtralConfig,
    model=Mixtral,
    checkpoint=Checkpoint(
        model_types=("mixtral",),
        config=config_from_hf,
        tensors=hf_tensors,
        ignored=("rotary_emb.inv_freq",),
    ),
    zoo={
        "mixtral-8x7b": MixtralConfig(
            32000, 4096, 32, 32, 8, 128, 14336, eps=1e-5, tie=False, rope=RopeConfig(1e6), n_experts=8
        )
    },
    tiny=MixtralConfig(256, 128, 4, 4, 4, 32, 64, n_experts=4, top_k=2),
    state_formula="8 L Hk e M",
    growth="linear",
    ops=("rotary", "cached_attention", "expert_linear"),
    random_tensor=transformer.random_tensor,
    constants=transformer.constants,
)
