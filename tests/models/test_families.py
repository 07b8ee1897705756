"""A family made of existing operators is one new file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import edgeseq.models
from edgeseq.errors import SourceError
from edgeseq.models import families, family
from edgeseq.models.source import open_source

NEW_FAMILY = '''
"""A running mean of embeddings: x [B,T,d], S = (1 - r) S + r x, logits = E S."""
from dataclasses import dataclass
import torch
from edgeseq.models.base import Family, SequenceModel, normal
from edgeseq.spec import StateSlot

@dataclass(frozen=True)
class MeanConfig:
    vocab_size: int
    d_model: int
    tie: bool = True

class Mean(SequenceModel):
    uses_position = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = torch.nn.Embedding(config.vocab_size, config.d_model)

    def state_slots(self, context):
        return (StateSlot("mean", "float32", (1, self.config.d_model)),)

    def advance(self, tokens, position, mean):
        for t in range(tokens.shape[1]):
            mean = 0.9 * mean + 0.1 * self.embed(tokens[:, t])
        return (mean @ self.embed.weight.T)[:, None], mean

FAMILY = Family(
    name="mean", config=MeanConfig, model=Mean, checkpoint=None,
    zoo={"mean-5": MeanConfig(11, 5)}, tiny=MeanConfig(256, 8),
    state_formula="4 d", growth="constant", ops=(), random_tensor=lambda c, name, shape, rng: normal(rng, shape, 1.0),
)
'''


@pytest.fixture
def new_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "mean.py").write_text(NEW_FAMILY)
    monkeypatch.setattr(edgeseq.models, "__path__", [*edgeseq.models.__path__, str(tmp_path)])
    families.cache_clear()
    yield
    families.cache_clear()
    sys.modules.pop("edgeseq.models.mean", None)


@pytest.mark.usefixtures("new_family")
def test_a_new_file_is_a_new_family() -> None:
    assert "mean" in families()
    source = open_source("zoo:mean-5")
    model = source.build()
    logits, mean = model.advance(torch.tensor([[1, 2, 3]]), torch.tensor([0]), *model.initial_state(1, 0))
    assert (logits.shape, mean.shape) == ((1, 1, 11), (1, 5))
    assert source.param_count() == 55


def test_the_families_of_the_package() -> None:
    assert {"mamba", "retnet", "rwkv4", "rwkv5", "rwkv6", "rwkv7", "transformer"} <= set(families())
    assert "rwkv" not in families(), "what families share is none"
    assert list(families()) == sorted(families())
    with pytest.raises(SourceError, match="the families are .*mamba.*, retnet, .*transformer"):
        family("mean")
