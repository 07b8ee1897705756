"""Hybrids against Hugging Face's whole-sequence forward (`use_cache=False`): their own decoding is wrong in places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models.huggingface import assert_greedy_parity, randomise, save
from tests.models.hybrid_cases import CASES

transformers = pytest.importorskip("transformers")

CLASSES = {
    "bamba": ("BambaConfig", "BambaForCausalLM"),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM"),
    "granitemoehybrid": ("GraniteMoeHybridConfig", "GraniteMoeHybridForCausalLM"),
    "jamba": ("JambaConfig", "JambaForCausalLM"),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "zamba2": ("Zamba2Config", "Zamba2ForCausalLM"),
}
# under seed 0 the first two say one token for ever, and the last one amplifies rounding on both sides
SEEDS = {"falcon_h1-norm-first": 2, "granitemoehybrid-dense": 2, "qwen3_next": 2}
WIDE = ("embed_tokens.weight", "out_proj.weight", "o_proj.weight")


def reference(name: str, folder: Path, **changed: Any) -> torch.nn.Module:
    """The random checkpoint of a case, saved; its time steps lie on both sides of every clamp."""
    config, model = (getattr(transformers, part) for part in CLASSES[name.partition("-")[0]])
    fields = config(**CASES[name] | changed)
    fields._experts_implementation = "eager"  # the fused one refuses widths that are no multiple of four
    made = model(fields)
    randomise(made, SEEDS.get(name, 0), WIDE)
    return save(made, folder)


def saved(fields: dict[str, Any], folder: Path) -> torch.nn.Module:
    """The checkpoint of the case that has these fields."""
    return reference(next(name for name, case in CASES.items() if case is fields), folder)


@pytest.mark.parametrize("name", CASES)
def test_64_greedy_tokens_and_their_logits(name: str, tmp_path: Path) -> None:
    hf = reference(name, tmp_path)
    parameters = sum(p.numel() for p in hf.parameters())
    assert_greedy_parity(tmp_path, lambda tokens: hf(tokens, use_cache=False).logits, parameters)
