"""Mamba-2 against Hugging Face's whole-sequence forward, which alone clamps dt; checkpoints and their defects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeseq.errors import SourceError
from edgeseq.models.mamba2 import SSDConfig, SSDMixer
from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance
from tests.models.huggingface import assert_greedy_parity, randomise, save

transformers = pytest.importorskip("transformers")

# fmt: off
CASES: dict[str, dict[str, Any]] = {
    "groups": {"vocab_size": 1009, "hidden_size": 40, "num_hidden_layers": 3, "num_heads": 10, "head_dim": 8,
               "state_size": 7, "n_groups": 5, "conv_kernel": 3, "chunk_size": 16},
    "clamped": {"vocab_size": 101, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 18,
                "expand": 3, "state_size": 5, "n_groups": 2, "chunk_size": 8, "time_step_limit": (0.02, 0.3),
                "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3},
    "one-group": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
                  "state_size": 16, "n_groups": 1, "chunk_size": 32},
}
# fmt: on


def reference(name: str, folder: Path, seed: int = 0) -> torch.nn.Module:
    model = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**CASES[name]))
    randomise(model, seed, wide=("embeddings.weight", "out_proj.weight"))
    return save(model, folder)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    hf = reference(name, tmp_path)
    parameters = sum(p.numel() for p in hf.parameters())
    assert_greedy_parity(tmp_path, lambda tokens: hf(tokens, use_cache=False).logits, parameters)


def test_the_clamp_of_dt_matters_and_holds_in_every_form(tmp_path: Path) -> None:
    """Step sizes lie on both bounds, and without the bounds the logits are others."""
    reference("clamped", tmp_path)
    model, tokens = open_source(str(tmp_path)).build(), torch.arange(30)[None]
    mixer = model.layers[0].mixer
    dt = mixer.step_size(torch.linspace(-9, 9, 19)[:, None].expand(-1, 4))
    assert dt.min() == torch.tensor(0.02)
    assert dt.max() == torch.tensor(0.3)
    with torch.no_grad():
        bounded = model(tokens)
        for layer in model.layers:
            layer.mixer.c = SSDConfig(**vars(layer.mixer.c) | {"dt_min": 0.0, "dt_max": None})
        assert (model(tokens) - bounded).abs().max() > 1e-2


def test_state_spaces_layout(tmp_path: Path) -> None:
    """The authors' own repositories: other config names, `backbone.embedding`, padded vocabulary, tied head."""
    hf = reference("one-group", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    tensors["backbone.embedding.weight"] = torch.cat([tensors["backbone.embedding.weight"], torch.zeros(7, 32)])
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    folder = tmp_path / "ssm"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    raw = {"d_model": 32, "n_layer": 2, "vocab_size": 97, "pad_vocab_size_multiple": 8, "rms_norm": True}
    raw |= {"ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16}, "residual_in_fp32": True}
    (folder / "config.json").write_text(json.dumps(raw))
    source, tokens = open_source(str(folder)), torch.arange(30)[None]
    assert source.family == "mamba2"
    with torch.no_grad():
        hf.lm_head.weight.copy_(hf.backbone.embeddings.weight)
        whole = hf(tokens, use_cache=False).logits
        ours = source.build()(tokens)[..., :97]
    assert (ours - whole).abs().max() <= tolerance("torch", "float32", whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"head_dim": 9}, "num_heads 4 times head_dim 9 is not expand 2 times hidden_size 32"),
        ({"n_groups": 3}, "4 heads of a Mamba-2 mixer cannot share 3 groups"),
        ({"time_step_limit": [0.5, 0.1]}, "time_step_limit is .* a lower and an upper bound"),
        ({"time_step_limit": [0.5]}, "time_step_limit is .* two numbers"),
        ({"time_step_limit": [0.5, "much"]}, "time_step_limit is .* two numbers"),
        ({"state_size": 15}, "has shape .* but config.json implies"),
        ({"use_bias": True}, "lacks backbone.layers.0.mixer.in_proj.bias and 3 more"),
    ],
)
def test_what_cannot_be_honoured_is_named(change: dict, message: str, tmp_path: Path) -> None:
    reference("one-group", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SourceError, match=message):
        open_source(str(tmp_path))


@pytest.mark.parametrize("limit", [[0.0, {"__float__": "Infinity"}], [0.0, float("inf")], None])
def test_spellings_of_an_unbounded_step(limit: Any, tmp_path: Path) -> None:
    reference("one-group", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"time_step_limit": limit}))
    config = open_source(str(tmp_path)).config
    assert (config.dt_min, config.dt_max) == (0.0, None)


@pytest.mark.parametrize(("name", "size"), [("130m", 128_989_632), ("370m", 368_346_624), ("780m", 780_161_280)])
def test_public_shapes_and_their_twins(name: str, size: int) -> None:
    source = open_source(f"zoo:mamba2-{name}")
    assert source.param_count() == size
    assert open_source(f"zoo:mamba2-{name}-twin").param_count() == pytest.approx(size, rel=0.02)
    ssm = sum(s.nbytes for s in source.build("meta").state_slots(0) if s.name.endswith("ssm"))
    c = source.config
    assert ssm == 4 * c.n_layers * 2 * c.d_model * 128


def test_a_mixer_stands_alone_in_a_hybrid() -> None:
    """What a hybrid uses: its own shape, both orders of gate and norm, state relative to the layer."""
    torch.manual_seed(0)
    for norm in ("gate_first", "norm_first", "none"):
        mixer = SSDMixer(SSDConfig(12, 4, 6, 5, 2, norm=norm))
        torch.nn.init.normal_(mixer.conv_weight)
        torch.nn.init.constant_(mixer.A, -0.5)
        h = torch.randn(2, 9, 12)
        with torch.no_grad():
            whole, state = mixer(h), [torch.zeros(2, *s.shape[1:]) for s in mixer.state_slots()]
            first, *state = mixer.advance(h[:, :4], *state)
            second, *state = mixer.advance(h[:, 4:], *state)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)
