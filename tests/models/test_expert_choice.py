"""Expert Choice: the published rule looks ahead, the policy in its place does not, and it routes nearly the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from edgeseq.errors import SourceError
from edgeseq.models.expert_choice import FAMILY, ExpertChoiceConfig, ThresholdMoe, cut_offs, expert_choice
from edgeseq.models.train import fresh_model
from tests.models.support import ODD, random_model, run_cut


def scores(n: int, experts: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.softmax(torch.randn(n, experts, generator=torch.Generator().manual_seed(seed)), -1)


def test_the_published_rule_looks_ahead() -> None:
    """Twelve more tokens reroute some of the first twenty; one token by itself is taken by every expert."""
    p = scores(32)
    assert (expert_choice(p, 2.0)[:20] != expert_choice(p[:20], 2.0)).any()
    assert expert_choice(p[:1], 2.0).all()
    taken = expert_choice(p, 2.0)
    assert taken.sum(0).tolist() == [8] * 8
    for e in range(8):
        assert p[taken[:, e], e].min() >= p[~taken[:, e], e].max()


def routed(p: torch.Tensor, threshold: torch.Tensor, c: ExpertChoiceConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """index, gates of the block for given p: its router is the identity on log p."""
    block = ThresholdMoe(c.n_experts, c).eval()
    with torch.no_grad():
        block.router.weight.copy_(torch.eye(c.n_experts))
        block.threshold.copy_(threshold)
        return block.route(p.log()[None])


def test_thresholds_route_as_the_published_rule_does() -> None:
    """Cut-offs taken from other tokens: nine choices in ten agree, and the mean is the capacity."""
    c = ExpertChoiceConfig(16, 8, 1, 1, 1, 8, 4, n_experts=8, top_k=8, capacity=2.0)
    threshold, p = cut_offs(scores(4000, seed=1), 2.0), scores(4000)
    index, gates = routed(p, threshold, c)
    taken = torch.zeros_like(p, dtype=torch.bool)
    rows, slots = (index[0] >= 0).nonzero(as_tuple=True)
    taken[rows, index[0, rows, slots]] = True
    assert torch.equal(taken, p > threshold)
    assert (taken == expert_choice(p, 2.0)).float().mean() > 0.9
    assert taken.sum(1).float().mean() == pytest.approx(2.0, abs=0.1)
    assert (taken.sum(1) == 0).any()
    assert gates[0, rows, slots].tolist() == pytest.approx(p[rows, index[0, rows, slots]].tolist())
    assert (gates[index < 0] == 0).all()


def test_at_most_so_many_experts_take_a_token_and_those_furthest_above_first() -> None:
    c = ExpertChoiceConfig(16, 8, 1, 1, 1, 8, 4, n_experts=4, top_k=2, capacity=2.0)
    index, _ = routed(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([0.35, 0.1, 0.1, 0.5]), c)
    assert index.tolist() == [[[1, 2]]]
    index, _ = routed(torch.tensor([[0.4, 0.3, 0.2, 0.1]]), torch.tensor([0.5, 0.1, 0.9, 0.5]), c)
    assert index.tolist() == [[[1, -1]]]


@torch.no_grad()
def test_no_future_token_changes_the_past() -> None:
    """To the bit: the routing of what came first, and what is said of it, whatever follows and however it is cut."""
    model = random_model(ODD["expert-choice-odd"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 61, (1, 24), generator=generator)
    other = torch.cat([tokens[:, :13], torch.randint(0, 61, (1, 11), generator=generator)], 1)
    seen: list[torch.Tensor] = []
    for layer in model.layers:
        layer.moe.register_forward_hook(lambda module, args, out: seen.append(module.route(args[0])[0]))
    model(tokens), model(other)
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert any((a < 0).any() for a in first)
    assert any((a[:, 13:] != b[:, 13:]).any() for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a[:, :13], b[:, :13]) for a, b in zip(first, second, strict=True))
    one, two = (run_cut(model, t, [5, 13, 20]) for t in (tokens, other))
    assert torch.equal(one[4], two[4])
    assert torch.equal(one[12], two[12])


def test_training_finds_the_thresholds() -> None:
    """The running mean goes to the quantile; a batch is routed by what earlier ones gave."""
    torch.manual_seed(0)
    model, window = fresh_model(FAMILY, seed=0), torch.randint(0, 256, (2, 65))
    before = [layer.moe.threshold.clone() for layer in model.layers]
    with torch.no_grad():
        for _ in range(40):
            model(window[:, :-1])
    model.eval()
    counts = []
    for layer in model.layers:
        layer.moe.register_forward_hook(
            lambda module, args, out: counts.append((module.route(args[0])[0] >= 0).sum(-1))
        )
    with torch.no_grad():
        model(window[:, :-1])
    assert all((a != layer.moe.threshold).any() for a, layer in zip(before, model.layers, strict=True))
    for count in counts:
        assert count.float().mean() == pytest.approx(FAMILY.tiny.capacity, abs=0.4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"policy": "whole-sequence"}, "see those to come"),
        ({"policy": "magic"}, "'magic' is no policy"),
        ({"capacity": 5.0}, "mean of 5.0 experts cannot be met with at most 3"),
        ({"capacity": 0.0}, "mean of 0.0 experts"),
        ({"top_k": 9}, "cannot choose 9 of 4 experts"),
    ],
)
def test_what_cannot_be_honoured_is_named(change: dict[str, object], sentence: str) -> None:
    with pytest.raises(SourceError, match=sentence):
        dataclasses.replace(FAMILY.tiny, **change)
