"""Hybrids against Hugging Face's whole-sequence forward (`use_cache=False`): their own decoding is wrong in places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.huggingface import assert_greedy_parity, randomise, save

transformers = pytest.importorskip("transformers")

# fmt: off
MUP: dict[str, Any] = {
    "embedding_multiplier": 1.7, "lm_head_multiplier": 0.6, "attention_in_multiplier": 1.3, "key_multiplier": 0.7,
    "attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.8,
    "ssm_multipliers": [0.35, 0.25, 1.2, 0.5, 0.9], "mlp_multipliers": [0.88, 0.58],
}
CASES: dict[str, dict[str, Any]] = {
    "bamba": {"vocab_size": 1009, "hidden_size": 60, "intermediate_size": 77, "num_hidden_layers": 3,
              "num_attention_heads": 3, "num_key_value_heads": 1, "attn_layer_indices": [1], "mamba_n_heads": 6,
              "mamba_n_groups": 3, "mamba_d_state": 7, "mamba_d_conv": 3, "mamba_chunk_size": 16},
    "bamba-biased": {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 31, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "attn_layer_indices": [0],
                     "mamba_n_heads": 4, "mamba_d_head": 36, "mamba_expand": 3, "mamba_d_state": 5,
                     "mamba_chunk_size": 8, "time_step_limit": (0.02, 0.3), "mamba_proj_bias": True,
                     "mamba_conv_bias": False, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-3,
                     "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "falcon_h1": {"vocab_size": 1009, "hidden_size": 42, "intermediate_size": 37, "num_hidden_layers": 2,
                  "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 10, "mamba_d_ssm": 48,
                  "mamba_n_heads": 6, "mamba_d_state": 7, "mamba_n_groups": 3, "mamba_d_conv": 3,
                  "mamba_chunk_size": 16, "projectors_bias": True} | MUP,
    "falcon_h1-norm-first": {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 31, "num_hidden_layers": 2,
                             "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": None,
                             "mamba_n_heads": 4, "mamba_d_state": 5, "mamba_n_groups": 2, "mamba_chunk_size": 8,
                             "mamba_rms_norm": True, "time_step_limit": (0.02, 0.3), "mamba_proj_bias": True,
                             "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True} | MUP,
    "falcon_h1-gate-first": {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 31, "num_hidden_layers": 1,
                             "num_attention_heads": 4, "num_key_value_heads": 4, "mamba_d_ssm": 40,
                             "mamba_n_heads": 4, "mamba_d_state": 5, "mamba_n_groups": 2, "mamba_chunk_size": 8,
                             "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_conv_bias": False},
    "granitemoehybrid": {"vocab_size": 1009, "hidden_size": 36, "intermediate_size": 11, "num_hidden_layers": 3,
                         "num_attention_heads": 6, "num_key_value_heads": 2,
                         "layer_types": ["mamba", "attention", "mamba"],
                         "mamba_n_heads": 6, "mamba_n_groups": 3, "mamba_d_state": 7, "mamba_d_conv": 3,
                         "mamba_chunk_size": 16, "num_local_experts": 5, "num_experts_per_tok": 2,
                         "shared_intermediate_size": 13, "attention_multiplier": 0.3, "embedding_multiplier": 3.0,
                         "residual_multiplier": 0.6, "logits_scaling": 1.7, "position_embedding_type": "nope"},
    "granitemoehybrid-dense": {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                               "layer_types": ["attention", "mamba"], "mamba_n_heads": 4, "mamba_d_state": 5,
                               "mamba_chunk_size": 8, "num_local_experts": 0, "shared_intermediate_size": 31,
                               "position_embedding_type": "rope", "attention_bias": True, "mamba_proj_bias": True,
                               "residual_multiplier": 0.7, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "granitemoehybrid-no-attention": {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2,
                                      "num_attention_heads": 4, "layer_types": None, "mamba_n_heads": 4,
                                      "mamba_d_state": 5, "mamba_chunk_size": 8, "num_local_experts": 3,
                                      "intermediate_size": 9, "shared_intermediate_size": 31},
    "jamba": {"vocab_size": 1009, "hidden_size": 36, "intermediate_size": 11, "num_hidden_layers": 4,
              "num_attention_heads": 6, "num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2,
              "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 0,
              "mamba_d_state": 7, "mamba_d_conv": 3, "mamba_dt_rank": 5},
    "jamba-dense": {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2,
                    "num_attention_heads": 4, "num_key_value_heads": 4, "num_experts": 1, "attn_layer_period": 2,
                    "attn_layer_offset": 0, "mamba_d_state": 5, "mamba_expand": 3, "mamba_proj_bias": True,
                    "mamba_conv_bias": False, "rms_norm_eps": 1e-3},
    "qwen3_next": {"vocab_size": 1009, "hidden_size": 36, "intermediate_size": 31, "num_hidden_layers": 3,
                   "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24, "linear_num_key_heads": 2,
                   "linear_num_value_heads": 6, "linear_key_head_dim": 7, "linear_value_head_dim": 5,
                   "linear_conv_kernel_dim": 3, "num_experts": 5, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 11, "shared_expert_intermediate_size": 13,
                   "full_attention_interval": 2, "mlp_only_layers": [2]},
    "qwen3_next-biased": {"vocab_size": 97, "hidden_size": 24, "intermediate_size": 31, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                          "linear_num_key_heads": 3, "linear_num_value_heads": 3, "linear_key_head_dim": 8,
                          "linear_value_head_dim": 9, "num_experts": 4, "num_experts_per_tok": 3,
                          "moe_intermediate_size": 8, "shared_expert_intermediate_size": 5, "norm_topk_prob": False,
                          "layer_types": ["full_attention", "linear_attention"], "attention_bias": True,
                          "decoder_sparse_step": 2, "rope_parameters": {
                              "rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "zamba2": {"vocab_size": 1009, "hidden_size": 36, "num_hidden_layers": 5, "num_attention_heads": 3,
               "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid", "mamba"], "num_mem_blocks": 2,
               "use_shared_attention_adapter": True, "adapter_rank": 5, "use_mem_rope": True, "intermediate_size": 31,
               "n_mamba_heads": 6, "mamba_d_state": 7, "mamba_ngroups": 3, "mamba_d_conv": 3, "chunk_size": 16,
               "time_step_min": 0.02},
    "zamba2-plain": {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                     "num_key_value_heads": 2, "layers_block_type": ["mamba", "hybrid"], "adapter_rank": 3,
                     "n_mamba_heads": 4, "mamba_d_state": 5, "chunk_size": 8, "add_bias_linear": True,
                     "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
}
# fmt: on
CLASSES = {
    "bamba": ("BambaConfig", "BambaForCausalLM"),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM"),
    "granitemoehybrid": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM"),
    "jamba": ("JambaConfig", "JambaForCausalLM"),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "zamba2": ("Zamba2Config", "Zamba2ForCausalLM"),
}
# under seed 0 the first two say one token for ever, and both sides of the last one are as far from float64 as apart
SEEDS = {"falcon_h1-norm-first": 2, "granitemoehybrid-dense": 2, "qwen3_next": 1}
WIDE = ("embed_tokens.weight", "out_proj.weight", "o_proj.weight")


def reference(name: str, folder: Path, **changed: Any) -> torch.nn.Module:
    """The random checkpoint of a case, saved; its time steps lie on both sides of every clamp."""
    config, model = (getattr(transformers, part) for part in CLASSES[name.partition("-")[0]])
    fields = config(**CASES[name] | changed)
    fields._experts_implementation = "eager"  # the fused one refuses widths that are no multiple of four
    made = model(fields)
    randomise(made, SEEDS.get(name, 0), WIDE)
    return save(made, folder)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    hf = reference(name, tmp_path)
    parameters = sum(p.numel() for p in hf.parameters())
    assert_greedy_parity(tmp_path, lambda tokens: hf(tokens, use_cache=False).logits, parameters)
