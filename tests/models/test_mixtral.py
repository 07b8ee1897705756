"""Mixtral and the block of experts: parity with Hugging Face, the layouts checkpoints have, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from edgeseq.errors import SourceError
from edgeseq.models.moe import Moe, MoeConfig
from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance
from tests.models.huggingface import assert_greedy_parity, randomise, save

transformers = pytest.importorskip("transformers")

# fmt: off
CASES: dict[str, dict[str, Any]] = {
    "gqa": {"vocab_size": 211, "hidden_size": 54, "intermediate_size": 37, "num_hidden_layers": 3,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10, "num_local_experts": 5,
            "num_experts_per_tok": 2},
    "window": {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
               "num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 3,
               "sliding_window": 6, "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default",
                                                                                   "rope_theta": 300.0}},
}
# fmt: on


def mixtral(fields: dict[str, Any], folder: Path) -> torch.nn.Module:
    config = transformers.MixtralConfig(**fields, experts_implementation="eager")  # the grouped one wants even sizes
    reference = transformers.MixtralForCausalLM(config)
    randomise(reference, wide=("mlp.gate.weight",))
    return save(reference, folder)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    reference = mixtral(CASES[name], tmp_path)
    count = sum(p.numel() for p in reference.parameters())
    assert_greedy_parity(tmp_path, lambda x: reference(x, use_cache=False).logits, count)


def test_both_layouts_of_the_experts_give_one_model(tmp_path: Path) -> None:
    """The published checkpoints hold every expert apart, transformers 5 holds stacks in memory: both are read."""
    reference = mixtral(CASES["gqa"], tmp_path)
    apart = open_source(str(tmp_path)).build()
    assert any("experts.4.w3" in name for name in load_file(tmp_path / "model.safetensors"))
    tensors = {name: p.detach().clone() for name, p in reference.named_parameters()}
    assert any(name.endswith("experts.gate_up_proj") for name in tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    for name, p in open_source(str(tmp_path)).build().state_dict().items():
        assert (p == apart.state_dict()[name]).all(), name


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"num_experts_per_tok": 6}, "cannot choose 6 of 5 experts"),
        ({"num_local_experts": 0}, "num_local_experts is 0"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_local_experts": 6}, r"gate\.weight has shape \[5, 54\]|lacks .*experts\.5\.w1\.weight and"),
        ({"num_local_experts": 4}, r"also holds .*experts\.4\.w1\.weight|gate\.weight has shape \[5, 54\]"),
        (
            {"intermediate_size": 38},
            r"experts\.0\.w1\.weight has shape \[37, 54\], but config\.json implies \[38, 54\]",
        ),
    ],
)
def test_what_cannot_be_honoured_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    mixtral(CASES["gqa"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SourceError, match=sentence):
        open_source(str(tmp_path))


def test_one_expert_missing_is_named(tmp_path: Path) -> None:
    mixtral(CASES["gqa"], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    save_file(tensors, path)
    with pytest.raises(SourceError, match=r"lacks model\.layers\.1\.block_sparse_moe\.experts\.2\.w2\.weight"):
        open_source(str(tmp_path))


VARIANTS = {
    "mixtral": MoeConfig(5, 2, 11),
    "jamba": MoeConfig(5, 2, 11, renormalise=False),
    "qwen3-next": MoeConfig(7, 3, 11, d_shared=13, shared_gate=True),
    "granite": MoeConfig(4, 4, 11, d_shared=6),
    "one": MoeConfig(3, 1, 11),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_block_is_its_formula(name: str) -> None:
    """Every token by itself, every expert as a matrix of its own."""
    c, rng = VARIANTS[name], torch.Generator().manual_seed(3)
    block = Moe(9, c)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=rng))
    h = torch.randn(2, 6, 9, generator=rng)
    gate_up, down = (w.unflatten(0, (c.n_experts, -1)) for w in (block.gate_up_proj.weight, block.down_proj.weight))
    want = torch.zeros(2, 6, 9)
    for b in range(2):
        for t in range(6):
            gates, chosen = torch.softmax(block.router.weight @ h[b, t], -1).topk(c.top_k)
            if c.renormalise:
                gates = gates / gates.sum()
            for g, e in zip(gates, chosen, strict=True):
                gate, up = (gate_up[e] @ h[b, t]).chunk(2)
                want[b, t] += g * (down[e] @ (F.silu(gate) * up))
    if c.d_shared:
        shared = F.silu(h @ block.shared_gate_proj.weight.T) * (h @ block.shared_up_proj.weight.T)
        shared = shared @ block.shared_down_proj.weight.T
        want += torch.sigmoid(h @ block.shared_router.weight.T) * shared if c.shared_gate else shared
    with torch.no_grad():
        for got in (block(h), block.advance(h)):
            assert (got - want).abs().max() <= tolerance("torch", "float32", want)
