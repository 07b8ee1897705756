"""What a hybrid's checkpoint may get wrong, each refused in one sentence that names it before anything is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeseq.errors import SourceError
from edgeseq.models import families
from edgeseq.models.source import open_source
from tests.models.hybrid_cases import CASES


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Checkpoint directory of a case, of constant tensors; the defaults of absent fields are the reader's own."""
    made: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp(name)
            raw = json.loads(json.dumps(CASES[name] | {"model_type": name.partition("-")[0]}))
            known = [c for f in families().values() for c in f.checkpoints if raw["model_type"] in c.model_types]
            stored = known[0].tensors(known[0].config(raw)).values()
            tensors = {t.name: torch.full(t.shape, 0.5) for t in stored}
            save_file(tensors, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(raw))
        return made[name]

    return write


def changed(origin: Path, folder: Path, change: dict[str, Any]) -> Path:
    shutil.copytree(origin, folder, dirs_exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_the_untouched_directories_open(name: str, written: Any) -> None:
    source = open_source(str(written(name)))
    model = source.build("meta")
    names = [slot.name for slot in model.state_slots(8)]
    assert all(n.startswith("layers.") for n in names)
    assert model.uses_position == any(n.endswith(".key") for n in names)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("bamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("bamba", {"attn_layer_indices": [3]}, r"attn_layer_indices is \[3\], but the layers are 0 to 2"),
    ("bamba", {"attn_layer_indices": [True]}, "attn_layer_indices is .* a list of layer numbers"),
    ("bamba", {"attn_layer_indices": [0]}, "lacks model.layers.0.self_attn"),
    ("bamba", {"partial_rotary_factor": 0.25}, "partial_rotary_factor is 0.25, but must be 0.5"),
    ("bamba", {"rope_parameters": {"partial_rotary_factor": 1.0}}, "rope_parameters.partial_rotary_factor is 1.0"),
    ("bamba", {"attn_rotary_emb": 20}, "attn_rotary_emb is 20, but must be 10"),
    ("bamba", {"mamba_d_head": 21}, "mamba_n_heads 6 times mamba_d_head 21 is not the width of 120"),
    ("bamba", {"mamba_n_groups": 4}, "6 heads of a Mamba-2 mixer cannot share 4 groups"),
    ("bamba", {"num_key_value_heads": 2}, "3 query heads cannot share 2 key/value heads"),
    ("bamba", {"mamba_d_state": 8}, "has shape .* but config.json implies"),
    ("bamba", {"mlp_bias": True}, "lacks model.layers.0.feed_forward.down_proj.bias and 8 more"),
    ("bamba", {"rope_parameters": {"rope_type": "su"}}, "rope_parameters.rope_type is 'su'"),
    (
        "bamba",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 9},
        "9 tokens only",
    ),
    ("falcon_h1", {"mlp_multipliers": [1.0]}, "mlp_multipliers is .* 2 numbers"),
    ("falcon_h1", {"ssm_multipliers": [1, 1, 1, 1, "x"]}, "ssm_multipliers.4. is 'x'"),
    ("falcon_h1", {"key_multiplier": 0}, "key_multiplier is 0"),
    ("falcon_h1", {"attn_layer_indices": [0]}, "attn_layer_indices"),
    ("falcon_h1", {"mamba_use_mlp": False}, "mamba_use_mlp is False"),
    ("falcon_h1", {"mamba_rms_norm": True}, "lacks model.layers.0.mamba.norm.weight"),
    ("falcon_h1", {"projectors_bias": False}, "also holds model.layers.0.mamba.out_proj.bias"),
    ("falcon_h1", {"partial_rotary_factor": 0.5}, "partial_rotary_factor|cannot be rotated"),
    ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types is .* the kinds of 3 layers"),
    ("granitemoehybrid", {"layer_types": ["mamba", "rwkv", "mamba"]}, "layer_types has 'rwkv'"),
    ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type is 'alibi'"),
    ("granitemoehybrid", {"num_experts_per_tok": 6}, "cannot choose 6 of 5 experts"),
    ("granitemoehybrid", {"num_local_experts": 4}, "has shape .* but config.json implies"),
    ("granitemoehybrid", {"num_local_experts": 0}, "also holds model.layers.0.block_sparse_moe"),
    ("granitemoehybrid", {"logits_scaling": -1}, "logits_scaling is -1"),
    ("jamba", {"attn_layer_offset": 3}, "attn_layer_offset 3 is not below attn_layer_period 3"),
    ("jamba", {"expert_layer_period": 0}, "expert_layer_period is 0"),
    ("jamba", {"num_experts": 4}, "feed_forward"),
    ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms is False"),
    ("jamba", {"sliding_window": 64}, "sliding_window is 64"),
    ("jamba", {"mamba_dt_rank": 6}, "has shape .* but config.json implies"),
    ("qwen3_next", {"layer_types": ["sliding_attention"] * 2}, "layer_types has 'sliding_attention'"),
    ("qwen3_next", {"mlp_only_layers": [7]}, r"mlp_only_layers is \[7\]"),
    ("qwen3_next", {"linear_num_value_heads": 5}, "5 value heads cannot share 2 key heads"),
    ("qwen3_next", {"partial_rotary_factor": 0.04}, "0 of 24 channels of a head cannot be rotated"),
    ("qwen3_next", {"attention_bias": True}, "lacks model.layers.1.self_attn"),
    ("qwen3_next", {"norm_topk_prob": "yes"}, "norm_topk_prob is 'yes'"),
    ("qwen3_next", {"num_experts": 0}, "lacks model.layers.1.mlp.down_proj.weight"),
    ("zamba2", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
    ("zamba2", {"use_long_context": True}, "use_long_context is True"),
    ("zamba2", {"use_conv_bias": False}, "use_conv_bias is False"),
    ("zamba2", {"num_key_value_heads": 1}, "use_shared_attention_adapter makes keys and values 72 wide"),
    ("zamba2", {"layers_block_type": None}, "lacks layers_block_type"),
    ("zamba2", {"layers_block_type": ["hybrid"]}, "layers_block_type is .* the kinds of 5 layers"),
    ("zamba2", {"n_mamba_heads": 7}, "n_mamba_heads 7 do not divide the inner width 72"),
    ("zamba2", {"mamba_headdim": 13}, "mamba_headdim is 13, but must be 12"),
    ("zamba2", {"num_mem_blocks": 3}, "lacks model.layers.3.shared_transformer"),
    ("zamba2", {"adapter_rank": 6}, "has shape .* but config.json implies"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=[f"{n}-{next(iter(c))}" for n, c, _ in REFUSED])
def test_what_cannot_be_honoured_is_named(
    name: str, change: dict[str, Any], message: str, written: Any, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        open_source(str(changed(written(name), tmp_path, change)))
    assert "\n" not in caught.value.sentence


@pytest.mark.parametrize("name", ["bamba", "zamba2", "jamba"])
def test_a_missing_and_a_surplus_weight_are_named(name: str, written: Any, tmp_path: Path) -> None:
    folder = changed(written(name), tmp_path, {})
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.extra.weight": torch.ones(3)}, path)
    with pytest.raises(SourceError, match="also holds model.layers.0.extra.weight"):
        open_source(str(folder))
    tensors.pop("model.final_layernorm.weight")
    save_file(tensors, path)
    with pytest.raises(SourceError, match="lacks model.final_layernorm.weight"):
        open_source(str(folder))


def test_a_drafting_head_beside_qwen3_next_is_left_where_it_is(written: Any, tmp_path: Path) -> None:
    folder = changed(written("qwen3_next"), tmp_path, {})
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"mtp.fc.weight": torch.ones(3)}, path)
    assert not any("mtp" in name for name in open_source(str(folder)).tensor_names())


def test_stacked_and_single_experts_are_the_same(written: Any, tmp_path: Path) -> None:
    """Jamba's experts one by one, as published, or as Hugging Face keeps them in memory."""
    folder = changed(written("jamba"), tmp_path, {})
    path = folder / "model.safetensors"
    tensors = load_file(path)
    rng = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(t.shape, generator=rng) if "experts" in n else t for n, t in tensors.items()}
    save_file(tensors, path)
    before = open_source(str(folder))
    kept = {n: t for n, t in tensors.items() if ".experts." not in n}
    for i in (0, 2):
        inside = f"model.layers.{i}.feed_forward.experts."
        gate_up, down = tensors[f"{inside}gate_up_proj"], tensors[f"{inside}down_proj"]
        for e in range(len(down)):
            gate, up = gate_up[e].chunk(2)
            for part, tensor in (("gate", gate), ("up", up), ("down", down[e])):
                kept[f"{inside}{e}.{part}_proj.weight"] = tensor.contiguous()
    other = tmp_path / "single"
    changed(folder, other, {})
    save_file(kept, other / "model.safetensors")
    after = open_source(str(other))
    for name in before.tensor_names():
        np.testing.assert_array_equal(before.tensor(name), after.tensor(name))
