"""What is particular to a state of caches and recurrent states, and to a head of which only a part turns."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from edgeseq.models import rotary
from edgeseq.models.base import SequenceModel
from edgeseq.models.functional import rotary_parallel
from edgeseq.models.hybrid_attention import AttentionConfig, attention_tensors
from edgeseq.models.rope import RopeConfig, channel_order
from edgeseq.verify.tolerances import tolerance
from tests.models.hybrid_shapes import HYBRIDS
from tests.models.support import CONTEXT, random_model

TOKENS = 29
CACHES = ("append", "ring")
names = pytest.mark.parametrize("name", HYBRIDS)


@functools.cache
def case(name: str) -> tuple[SequenceModel, torch.Tensor, torch.Tensor]:
    model = random_model(HYBRIDS[name])
    tokens = torch.randint(0, model.config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model, tokens, model(tokens)


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    assert (got - want).abs().max() <= tolerance("torch", "float32", want)


@names
def test_rows_of_a_cache_that_hold_no_token_are_never_read(name: str) -> None:
    model, tokens, whole = case(name)
    slots, state = model.state_slots(CONTEXT), model.initial_state(2, CONTEXT)
    state = [torch.full_like(t, torch.nan) if s.update in CACHES else t for s, t in zip(slots, state, strict=True)]
    with torch.no_grad():
        for start in range(0, TOKENS - 2, 5):
            logits, *state = model.advance(tokens[:, start : start + 5], torch.full((2,), start), *state)
            assert_equal(logits[:, 0], whole[:, min(start + 4, TOKENS - 1)])


@names
def test_streams_of_one_batch_may_stand_at_different_positions(name: str) -> None:
    model, tokens, whole = case(name)
    state = model.initial_state(2, CONTEXT)
    with torch.no_grad():
        _, *first = model.advance(tokens[:, :9], torch.tensor([0, 0]), *state)
        _, *second = model.advance(tokens[:, :4], torch.tensor([0, 0]), *state)
        mixed = [torch.stack([a[0], b[1]]) for a, b in zip(first, second, strict=True)]
        following = torch.stack([tokens[0, 9:12], tokens[1, 4:7]])
        logits, *_ = model.advance(following, torch.tensor([9, 4]), *mixed)
    assert_equal(logits[0, 0], whole[0, 11])
    assert_equal(logits[1, 0], whole[1, 6])


@names
def test_every_slot_matters(name: str) -> None:
    """A token later, each part of the state has a say: none is declared and then forgotten."""
    model, tokens, _ = case(name)
    with torch.no_grad():
        _, *state = model.advance(tokens[:, :12], torch.zeros(2, dtype=torch.int64), *model.initial_state(2, CONTEXT))
        position = torch.full((2,), 12)
        logits, *_ = model.advance(tokens[:, 12:13], position, *state)
        for i, slot in enumerate(model.state_slots(CONTEXT)):
            other = [t.flip(0) if i == j else t for j, t in enumerate(state)]
            changed, *_ = model.advance(tokens[:, 12:13], position, *other)
            assert (changed - logits).abs().max() > 1e-4, slot.name


def test_a_shared_block_has_its_weights_once_and_a_cache_for_every_use() -> None:
    model, _, _ = case("zamba2-odd")
    config = model.config
    assert len(list(model.get_submodule("shared").children())) == config.n_blocks == 2
    caches = [s.name for s in model.state_slots(CONTEXT) if s.update == "append"]
    assert caches == [f"layers.{i}.shared.{part}" for i in config.shared_at for part in ("key", "value")]
    matrices = [n for n, _ in model.named_parameters() if n.endswith("attention.q_proj.weight")]
    assert matrices == ["shared.0.attention.q_proj.weight", "shared.1.attention.q_proj.weight"]
    layers, shared = model.get_submodule("layers"), model.get_submodule("shared")
    blocks = [layers.get_submodule(f"{i}.shared").block[0] for i in config.shared_at]
    assert blocks[0] is blocks[2] is shared.get_submodule("0")
    assert blocks[1] is shared.get_submodule("1")


def test_samba_goes_on_for_ever() -> None:
    """After 100 000 tokens the ring is still the last W, and nothing has grown."""
    model, tokens, whole = case("samba-odd")
    state, far = model.initial_state(2, 0), 100_003
    with torch.no_grad():
        for start, count in ((0, 3), (3, 1), (4, 20), (24, 5)):
            logits, *state = model.advance(tokens[:, start : start + count], torch.full((2,), far + start), *state)
    worst = (logits[:, 0] - whole[:, -1]).abs().max()
    assert worst <= 3 * tolerance("torch", "float32", whole), "the angles there are rounded otherwise"


@pytest.mark.parametrize(("width", "turned"), [(10, 4), (24, 6), (8, 8), (6, 2)])
def test_a_head_of_which_a_part_turns(width: int, turned: int) -> None:
    """Scores of channels in our order, all pairs turning, are those of the first channels turned as stored."""
    heads, rng = 3, torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 9, heads * width, generator=rng) for _ in "qk")
    order = channel_order(width, turned)
    assert sorted(order) == list(range(width))

    def scores(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        each = [x.unflatten(-1, (heads, width)).transpose(1, 2) for x in (a, b)]
        return each[0] @ each[1].transpose(-1, -2)

    def as_stored(x: torch.Tensor) -> torch.Tensor:
        angle = torch.arange(9)[:, None] * torch.from_numpy(RopeConfig().radians(turned)).float()
        parts = x.unflatten(-1, (heads, width))
        first = rotary_parallel(parts[..., :turned].flatten(-2), angle.cos()[None], angle.sin()[None], heads, False)
        return torch.cat([first.unflatten(-1, (heads, turned)), parts[..., turned:]], -1).flatten(-2)

    frequency = torch.from_numpy(RopeConfig(share=(turned + 0.5) / width if turned < width else 1.0).frequencies(width))
    assert (frequency == 0).sum() == (width - turned) // 2
    cos, sin = rotary.angles(frequency, torch.zeros(1, dtype=torch.int64), 9)

    def ours(x: torch.Tensor) -> torch.Tensor:
        moved = x.unflatten(-1, (heads, width))[..., torch.from_numpy(order)].flatten(-2)
        return rotary_parallel(moved, cos, sin, heads, False)

    torch.testing.assert_close(scores(ours(q), ours(k)), scores(as_stored(q), as_stored(k)), rtol=1e-4, atol=1e-4)
    stored = attention_tensors(AttentionConfig(12, heads, heads, width), "a.", turned)["q_proj.weight"]
    rows = np.arange(heads * width, dtype=np.float32)[:, None].repeat(12, 1)
    assert stored.convert(rows)[:, 0].tolist() == [h * width + c for h in range(heads) for c in order]
