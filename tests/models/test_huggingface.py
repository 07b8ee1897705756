"""Checkpoints of odd sizes against Hugging Face's own whole-sequence forward (`use_cache=False`; its own chunked
Mamba prefill drops the state, so only the whole sequence is a reference)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance

transformers = pytest.importorskip("transformers")

# fmt: off
MAMBA: dict[str, dict[str, Any]] = {
    "odd": {"vocab_size": 1009, "hidden_size": 96, "num_hidden_layers": 3, "state_size": 8, "conv_kernel": 3,
            "time_step_rank": 5},
    "biased": {"vocab_size": 101, "hidden_size": 40, "num_hidden_layers": 2, "state_size": 3, "conv_kernel": 2,
               "expand": 3, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False,
               "layer_norm_epsilon": 1e-3},
}
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA: dict[str, dict[str, Any]] = {
    "gqa": {"vocab_size": 1009, "hidden_size": 90, "intermediate_size": 77, "num_hidden_layers": 3,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10},
    "wide-heads": {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 31, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 22, "rms_norm_eps": 1e-3,
                   "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "linear": SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "llama3": SMALL | {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}},
}
MISTRAL: dict[str, dict[str, Any]] = {
    "gqa": {"vocab_size": 1009, "hidden_size": 90, "intermediate_size": 77, "num_hidden_layers": 3,
            "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 10, "sliding_window": 9},
    "narrow": SMALL | {"sliding_window": 4, "num_key_value_heads": 1, "tie_word_embeddings": False},
}
# fmt: on


WIDE = ("in_proj.weight", "conv1d.weight", "out_proj.weight")


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Random matrices, norms, biases and decays, time steps pushed low: default values hide errors.

    Mamba's WIDE parameters are drawn wider, or the model repeats one token for ever.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = (0.6 if name.endswith(WIDE) else 0.15) * torch.randn(p.shape, generator=rng)
            if "norm" in name:
                drawn += 1.0
            elif name.endswith("A_log"):
                drawn += p
            elif name.endswith("dt_proj.bias"):
                drawn = -9.0 * torch.rand(p.shape, generator=rng)
            p.copy_(drawn)


def save(family: str, fields: dict[str, Any], folder: Path, **how: Any) -> torch.nn.Module:
    config, model = {
        "mamba": (transformers.MambaConfig, transformers.MambaForCausalLM),
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    }[family]
    reference = model(config(**fields)).eval()
    randomise(reference)
    reference.save_pretrained(folder, **how)
    return reference


FIELDS = {"mamba": MAMBA, "llama": LLAMA, "mistral": MISTRAL}
CASES = [(family, name) for family, cases in FIELDS.items() for name in cases]


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{f}-{n}" for f, n in CASES])
def test_64_greedy_tokens_and_their_logits(family: str, name: str, tmp_path: Path) -> None:
    reference = save(family, FIELDS[family][name], tmp_path)
    source = open_source(str(tmp_path))
    model, prompt, count = source.build(), 7, 64
    assert source.param_count() == sum(p.numel() for p in reference.parameters())
    tokens = torch.randint(0, source.config.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(1))
    state, chosen, steps = model.initial_state(1, prompt + count), tokens, []
    with torch.no_grad():
        logits, *state = model.advance(tokens, torch.zeros(1, dtype=torch.int64), *state)
        for _ in range(count):
            steps.append(logits[:, 0])
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits, *state = model.advance(token, torch.tensor([chosen.shape[1]]), *state)
            chosen = torch.cat([chosen, token], 1)
        whole = reference(chosen, use_cache=False).logits
    ours, theirs = torch.cat(steps), whole[0, prompt - 1 : -1]
    assert theirs.argmax(-1).tolist() == chosen[0, prompt:].tolist()
    assert (ours - theirs).abs().max() <= tolerance("torch", "float32", theirs)
    assert len(set(chosen[0, prompt:].tolist())) > 2, "a constant answer would prove little"
    with torch.no_grad():
        parallel = model(chosen)
    assert (parallel - whole).abs().max() <= tolerance("torch", "float32", whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_storage_is_read_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    reference = save("mamba", MAMBA["odd"], tmp_path)
    reference.to(dtype).save_pretrained(tmp_path)
    model = open_source(str(tmp_path)).build()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    expected = reference.float()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        whole = expected(tokens, use_cache=False).logits
        assert (model(tokens) - whole).abs().max() <= tolerance("torch", "float32", whole)


@pytest.mark.parametrize("family", ["mamba", "llama"])
def test_shards(family: str, tmp_path: Path) -> None:
    fields = {"mamba": MAMBA["odd"], "llama": LLAMA["gqa"]}[family]
    save(family, fields, tmp_path / "one")
    save(family, fields, tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (open_source(str(tmp_path / n)) for n in ("one", "many"))
    assert one.tensor_names() == many.tensor_names()
    for name in one.tensor_names():
        assert (one.tensor(name) == many.tensor(name)).all()


@pytest.mark.parametrize("vocab_size", [97, 104])
def test_state_spaces_layout(vocab_size: int, tmp_path: Path) -> None:
    """The authors' own repositories: other config names, `backbone.embedding`, both tied tensors, padded vocabulary."""
    reference = save("mamba", MAMBA["odd"] | {"vocab_size": 104, "time_step_rank": "auto"}, tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    folder = tmp_path / "ssm"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    raw = {"d_model": 96, "n_layer": 3, "vocab_size": vocab_size, "pad_vocab_size_multiple": 8}
    raw |= {"ssm_cfg": {"d_state": 8, "d_conv": 3}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True}
    (folder / "config.json").write_text(json.dumps(raw))
    model, tokens = open_source(str(folder)).build(), torch.arange(30)[None]
    with torch.no_grad():
        whole = reference(tokens, use_cache=False).logits
        assert (model(tokens) - whole).abs().max() <= tolerance("torch", "float32", whole)


def test_a_repeated_head_is_accepted_where_the_config_ties_it(tmp_path: Path) -> None:
    save("llama", LLAMA["wide-heads"], tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, path)
    names = open_source(str(tmp_path)).tensor_names()
    assert "embed.weight" in names
    assert "head" not in names


def test_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    save("llama", LLAMA["gqa"], tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}, path)
    open_source(str(tmp_path))


def test_old_names_of_the_rotary_fields(tmp_path: Path) -> None:
    save("llama", LLAMA["llama3"], tmp_path)
    path = tmp_path / "config.json"
    want = open_source(str(tmp_path)).config
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    raw["rope_scaling"] = rope
    path.write_text(json.dumps(raw))
    assert open_source(str(tmp_path)).config == want


def test_a_tokenizer_beside_the_weights_is_found(tmp_path: Path) -> None:
    save("mamba", MAMBA["odd"], tmp_path)
    assert open_source(str(tmp_path)).tokenizer is None
    (tmp_path / "tokenizer.json").write_text("{}")
    assert open_source(str(tmp_path)).tokenizer == tmp_path / "tokenizer.json"
