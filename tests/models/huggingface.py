"""Parity with a Hugging Face class: 64 greedy tokens and every logit against one whole forward without cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from edgeseq.models.source import open_source
from edgeseq.verify.tolerances import tolerance

PROMPT, COUNT = 7, 64


def randomise(model: torch.nn.Module, seed: int = 0, wide: tuple[str, ...] = ()) -> None:
    """Random matrices, norms, biases and decays, time steps pushed low: default values hide errors."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            drawn = (0.6 if name.endswith(wide) else 0.15) * torch.randn(p.shape, generator=rng)
            if "norm" in name:
                drawn += 1.0
            elif name.endswith("A_log"):
                drawn = 2.0 * torch.rand(p.shape, generator=rng)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                drawn = -9.0 * torch.rand(p.shape, generator=rng)
            p.copy_(drawn)


def save(reference: torch.nn.Module, folder: Path, **how: Any) -> torch.nn.Module:
    """The reference as a checkpoint directory."""
    reference.eval().save_pretrained(folder, **how)
    return reference


def assert_greedy_parity(
    folder: Path, reference: Callable[[torch.Tensor], torch.Tensor], parameters: int | None = None
) -> None:
    """The model in `folder` against reference(tokens [1,T]) -> logits [1,T,V] of a whole sequence."""
    source = open_source(str(folder))
    model = source.build()
    assert parameters is None or source.param_count() == parameters
    chosen = torch.randint(0, source.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    state, steps = model.initial_state(1, PROMPT + COUNT), []
    with torch.no_grad():
        logits, *state = model.advance(chosen, torch.zeros(1, dtype=torch.int64), *state)
        for _ in range(COUNT):
            steps.append(logits[:, 0])
            token = logits[:, -1].argmax(-1, keepdim=True)
            logits, *state = model.advance(token, torch.tensor([chosen.shape[1]]), *state)
            chosen = torch.cat([chosen, token], 1)
        whole, parallel = reference(chosen), model(chosen)
    ours, theirs = torch.cat(steps), whole[0, PROMPT - 1 : -1]
    assert theirs.argmax(-1).tolist() == chosen[0, PROMPT:].tolist()
    assert len(set(chosen[0, PROMPT:].tolist())) > 2, "a constant answer would prove little"
    for got, want in ((ours, theirs), (parallel, whole)):
        worst = (got - want).abs().max()
        assert worst <= tolerance("torch", "float32", want), worst
