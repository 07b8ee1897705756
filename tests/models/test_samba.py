"""Samba against a model put together from Hugging Face's own Mamba mixer, Mistral attention and Mistral feed-forward.

The checkpoint is written in flash-linear-attention's layout, whose `SambaForCausalLM` needs a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edgeseq.errors import SourceError
from edgeseq.models.source import open_source
from tests.models.huggingface import assert_greedy_parity, randomise

transformers = pytest.importorskip("transformers")
from transformers.models.mamba.modeling_mamba import MambaMixer  # noqa: E402
from transformers.models.mistral.modeling_mistral import (  # noqa: E402
    MistralAttention,
    MistralMLP,
    MistralRMSNorm,
    MistralRotaryEmbedding,
)

CONFIG: dict[str, Any] = {
    "model_type": "samba", "vocab_size": 211, "hidden_size": 42, "num_hidden_layers": 3, "state_size": 5,
    "conv_kernel": 3, "expand": 2, "time_step_rank": 3, "norm_eps": 1e-4, "hidden_ratio": 4,
    "attn": {"layers": [1], "num_heads": 3, "num_kv_heads": 1, "qkv_bias": True, "window_size": 7,
             "rope_theta": 500.0},
}  # fmt: skip


class Reference(nn.Module):
    """The layers in turn; names as in the checkpoint."""

    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__()
        a, d, eps = raw["attn"], raw["hidden_size"], raw["norm_eps"]
        mamba = transformers.MambaConfig(
            hidden_size=d, state_size=raw["state_size"], conv_kernel=raw["conv_kernel"], expand=raw["expand"],
            time_step_rank=raw["time_step_rank"],
        )  # fmt: skip
        self.attention = transformers.MistralConfig(
            hidden_size=d, num_attention_heads=a["num_heads"], num_key_value_heads=a["num_kv_heads"],
            intermediate_size=256, sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": a["rope_theta"]}, attn_implementation="eager",
        )  # fmt: skip
        self.window, self.rotary = a["window_size"], MistralRotaryEmbedding(self.attention)
        self.backbone = nn.Module()
        self.backbone.embeddings = nn.Embedding(raw["vocab_size"], d)
        self.backbone.norm_f = MistralRMSNorm(d, eps)
        self.backbone.layers = nn.ModuleList()
        for i in range(raw["num_hidden_layers"]):
            layer = nn.Module()
            layer.mixer = MistralAttention(self.attention, i) if i in a["layers"] else MambaMixer(mamba, i)
            if i in a["layers"] and a["qkv_bias"]:
                for proj in (layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj):
                    proj.bias = nn.Parameter(torch.zeros(proj.out_features))
            layer.mixer_norm, layer.mlp_norm = MistralRMSNorm(d, eps), MistralRMSNorm(d, eps)
            layer.mlp = MistralMLP(self.attention)
            self.backbone.layers.append(layer)
        self.lm_head = nn.Linear(d, raw["vocab_size"], bias=False)

    @torch.no_grad()
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.backbone.embeddings(tokens)
        index = torch.arange(tokens.shape[1])
        turned, age = self.rotary(x, index[None]), index[:, None] - index
        mask = torch.where((age >= 0) & (age < self.window), 0.0, -torch.inf)[None, None]
        for layer in self.backbone.layers:
            h = layer.mixer_norm(x)
            mixer = layer.mixer
            y = mixer(h, turned, mask)[0] if isinstance(mixer, MistralAttention) else mixer(h)
            x = x + y
            x = x + layer.mlp(layer.mlp_norm(x))
        return self.lm_head(self.backbone.norm_f(x))


def saved(folder: Path, **changed: Any) -> Reference:
    raw = CONFIG | changed
    reference = Reference(raw).eval()
    randomise(reference, 0, ("embeddings.weight", "out_proj.weight", "o_proj.weight"))
    save_file({n: t.contiguous() for n, t in reference.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    return reference


def test_64_greedy_tokens_and_their_logits(tmp_path: Path) -> None:
    reference = saved(tmp_path)
    assert_greedy_parity(tmp_path, reference, sum(p.numel() for p in reference.parameters()))


def test_the_window_counts_the_current_token(tmp_path: Path) -> None:
    saved(tmp_path)
    state = open_source(str(tmp_path)).build("meta").state_slots(0)
    rings = {s.name: s.shape for s in state if s.update == "ring"}
    assert rings == {f"layers.1.attention.{n}": (1, 1, 7, 14) for n in ("key", "value")}
    assert {s.name.rpartition(".")[2] for s in state if s.update != "ring"} == {"conv", "ssm"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"use_conv_bias": False}, "use_conv_bias is False"),
        ({"attn": None}, "attn is no object"),
        ({"attn": CONFIG["attn"] | {"layers": [3]}}, r"attn.layers is \[3\], but the layers are 0 to 2"),
        ({"attn": CONFIG["attn"] | {"layers": "all"}}, "attn.layers is 'all'"),
        ({"attn": CONFIG["attn"] | {"num_heads": 4}}, "attn.num_heads 4 do not divide the width 42"),
        ({"attn": CONFIG["attn"] | {"num_kv_heads": 2}}, "3 query heads cannot share 2 key/value heads"),
        ({"attn": CONFIG["attn"] | {"qk_norm": True}}, "attn.qk_norm is True"),
        ({"attn": CONFIG["attn"] | {"window_size": 0}}, "attn.window_size is 0"),
        ({"attn": CONFIG["attn"] | {"layers": [0]}}, "lacks backbone.layers.0.mixer.k_proj.bias and"),
        ({"intermediate_size": 99}, "intermediate_size is 99, but must be 84"),
        ({"state_size": 6}, "has shape .* but config.json implies"),
        ({"use_bias": True}, "lacks backbone.layers.0.mixer.in_proj.bias and 3 more"),
    ],
)
def test_what_cannot_be_honoured_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


def test_a_surplus_weight_is_named(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"backbone.layers.1.mixer.q_norm.weight": torch.ones(14)}, path)
    with pytest.raises(SourceError, match="also holds backbone.layers.1.mixer.q_norm.weight"):
        open_source(str(tmp_path))
