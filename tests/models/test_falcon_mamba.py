"""FalconMamba: parity with Hugging Face's whole-sequence forward (its own chunked prefill drops the state)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from edgeseq.errors import SourceError
from edgeseq.models.source import open_source
from tests.models.huggingface import assert_greedy_parity, randomise, save

transformers = pytest.importorskip("transformers")

# fmt: off
CASES: dict[str, dict[str, Any]] = {
    "odd": {"vocab_size": 1009, "hidden_size": 96, "num_hidden_layers": 3, "state_size": 8, "conv_kernel": 3,
            "time_step_rank": 5},
    "biased": {"vocab_size": 101, "hidden_size": 40, "num_hidden_layers": 2, "state_size": 3, "conv_kernel": 2,
               "expand": 3, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False,
               "layer_norm_epsilon": 1e-3, "mixer_rms_eps": 1e-2},
}
# fmt: on
WIDE = ("in_proj.weight", "conv1d.weight", "out_proj.weight")


def falcon(fields: dict[str, Any], folder: Path) -> torch.nn.Module:
    reference = transformers.FalconMambaForCausalLM(transformers.FalconMambaConfig(**fields))
    randomise(reference, wide=WIDE)
    return save(reference, folder)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    reference = falcon(CASES[name], tmp_path)
    count = sum(p.numel() for p in reference.parameters())
    assert_greedy_parity(tmp_path, lambda x: reference(x, use_cache=False).logits, count)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mixer_rms_eps": 0}, "mixer_rms_eps is 0, but must be a positive number"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"state_size": 9}, r"x_proj\.weight has shape \[21, 192\], but config\.json implies \[23, 192\]"),
        ({"num_hidden_layers": 2}, r"also holds backbone\.layers\.2\."),
        ({"num_hidden_layers": 4}, r"lacks backbone\.layers\.3\."),
    ],
)
def test_what_cannot_be_honoured_is_named(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    falcon(CASES["odd"], tmp_path)
    path = tmp_path / "config.json"
    raw = {k: v for k, v in json.loads(path.read_text()).items() if k != "intermediate_size"}
    path.write_text(json.dumps(raw | change))
    with pytest.raises(SourceError, match=sentence):
        open_source(str(tmp_path))


def test_a_norm_with_a_weight_is_surplus(tmp_path: Path) -> None:
    """Jamba's mixer has weights there; such a checkpoint is not read as FalconMamba."""
    falcon(CASES["odd"], tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {"backbone.layers.0.mixer.dt_layernorm.weight": torch.ones(5)}, path)
    with pytest.raises(SourceError, match=r"also holds backbone\.layers\.0\.mixer\.dt_layernorm\.weight"):
        open_source(str(tmp_path))
