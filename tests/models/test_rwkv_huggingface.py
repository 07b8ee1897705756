"""RWKV-4 checkpoints of odd sizes against Hugging Face's own whole-sequence forward.

Its `rescale_every` divides weights in place on the first forward and halves the hidden state in step; only without it
(0) are its weights those of the checkpoint, so that is the reference.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeseq.errors import SourceError
from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance
from tests.models.huggingface import assert_greedy_parity, save

transformers = pytest.importorskip("transformers")

# fmt: off
CASES: dict[str, dict[str, Any]] = {
    "odd": {"vocab_size": 1009, "hidden_size": 90, "num_hidden_layers": 3, "intermediate_size": 77},
    "narrow-attention": {"vocab_size": 97, "hidden_size": 44, "num_hidden_layers": 2, "attention_hidden_size": 31,
                         "layer_norm_epsilon": 1e-3, "tie_word_embeddings": True},
    "deep": {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 8, "intermediate_size": 40},
}
# fmt: on


def randomise(model: torch.nn.Module) -> None:
    """Random everything: mixing around one half, decays from slow to immediate, norms around one."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=rng)
            if "ln" in name:
                drawn = 0.2 * drawn + (1.0 if name.endswith("weight") else 0.0)
            elif "time_mix" in name:
                drawn = 0.5 + 0.3 * drawn
            elif "time_decay" in name:
                drawn = -1.0 + 2.0 * drawn
            elif "time_first" not in name:
                drawn = 1.5 * p.shape[-1] ** -0.5 * drawn
            p.copy_(drawn)


def reference(name: str, folder: Path, rescale_every: int = 0) -> Any:
    config = transformers.RwkvConfig(**CASES[name], rescale_every=rescale_every)
    model = transformers.RwkvForCausalLM(config)
    randomise(model)
    return save(model, folder)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    model = reference(name, tmp_path)
    parameters = sum(p.numel() for p in model.parameters())
    assert_greedy_parity(tmp_path, lambda tokens: model(tokens, use_cache=False).logits, parameters)


def test_rescaled_layers_are_read_as_published(tmp_path: Path) -> None:
    """A config that rescales (6, the default) holds the same weights as one that does not, and gives the same model."""
    plain = reference("deep", tmp_path / "plain")
    reference("deep", tmp_path / "rescaled", rescale_every=6)
    assert json.loads((tmp_path / "rescaled" / "config.json").read_text())["rescale_every"] == 6
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        whole = plain(tokens, use_cache=False).logits
        ours = open_source(str(tmp_path / "rescaled")).build()(tokens)
    assert (ours - whole).abs().max() <= tolerance("torch", "float32", whole)


def test_what_the_config_gets_wrong_is_named(tmp_path: Path) -> None:
    reference("odd", tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(raw | {"attention_hidden_size": 64}))
    with pytest.raises(SourceError, match=r"attention\.\w+(\.weight)? has shape"):
        open_source(str(tmp_path))
    path.write_text(json.dumps(raw | {"num_hidden_layers": 2}))
    with pytest.raises(SourceError, match="also holds rwkv.blocks.2"):
        open_source(str(tmp_path))
