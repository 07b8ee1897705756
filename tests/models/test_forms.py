"""The properties of every family, found by listing: step = chunk = whole sequence under random cuts, states that travel
through bytes, rows that know nothing of one another, no token that sees a later one, padding that touches nothing."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseq.models import families
from edgeseq.models.base import SequenceModel
from edgeseq.models.padded import advance_padded
from edgeseq.models.twin import family_of_config
from edgeseq.verify.tolerances import tolerance
from tests.models.support import CONFIGS, CONTEXT, ODD, random_model, run_cut, through_bytes

TOKENS = 37
names = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def case(name: str) -> tuple[SequenceModel, torch.Tensor, torch.Tensor]:
    model = random_model(CONFIGS[name])
    tokens = torch.randint(0, model.config.vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model, tokens, model(tokens)


@functools.cache
def exact(name: str) -> tuple[SequenceModel, torch.Tensor, torch.Tensor]:
    """The case in float64, where only a wrong formula can make two forms differ; some models amplify the rounding of
    float32 beyond the tolerance, as the CPU's order of sums has it."""
    model, tokens, _ = case(name)
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        return model, tokens, model(tokens)


def assert_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    worst = np.abs((got - want).numpy()).max(initial=0.0)
    assert worst <= tolerance("torch", str(want.dtype).removeprefix("torch."), want), worst


@names
@settings(max_examples=15, deadline=None, derandomize=True)
@given(cuts=st.lists(st.integers(1, TOKENS - 1), max_size=8).map(sorted))
def test_any_cut_equals_the_whole_sequence(name: str, cuts: list[int]) -> None:
    model, tokens, whole = exact(name)
    for last, logits in run_cut(model, tokens, cuts).items():
        assert_equal(logits, whole[:, last])


@names
def test_steps_equal_the_whole_sequence(name: str) -> None:
    model, tokens, whole = exact(name)
    found = run_cut(model, tokens, list(range(1, TOKENS)))
    assert_equal(torch.stack([found[t] for t in range(TOKENS)], 1), whole)


@names
def test_float32_is_near(name: str) -> None:
    assert_equal(case(name)[2], exact(name)[2].float())


@names
def test_the_reference_is_not_degenerate(name: str) -> None:
    """Equality above means something: logits vary over tokens and over the vocabulary."""
    whole = case(name)[2]
    assert torch.isfinite(whole).all()
    assert whole.std(-1).min() > 1e-2
    assert (whole[:, 1:] - whole[:, :-1]).abs().amax(-1).min() > 1e-2


@names
def test_rows_of_a_batch_are_independent(name: str) -> None:
    model, tokens, whole = case(name)
    other = tokens.clone()
    other[1] = (other[1] + 1) % model.config.vocab_size
    assert_equal(run_cut(model, other, [5, 6, 20])[TOKENS - 1][0], whole[0, -1])
    assert not torch.equal(run_cut(model, other, [5])[TOKENS - 1][1], whole[1, -1])


@names
@pytest.mark.parametrize("changed", [0, 11, TOKENS - 1])
def test_no_token_sees_a_later_one(name: str, changed: int) -> None:
    model, tokens, whole = case(name)
    other = tokens.clone()
    other[:, changed] = (other[:, changed] + 1) % model.config.vocab_size
    with torch.no_grad():
        logits = model(other)
    assert_equal(logits[:, :changed], whole[:, :changed])
    assert (logits[:, changed] - whole[:, changed]).abs().max() > 1e-2


@names
def test_a_longer_context_changes_nothing(name: str) -> None:
    model, tokens, _ = case(name)
    short, long = (run_cut(model, tokens, [7], context)[TOKENS - 1] for context in (TOKENS, 3 * CONTEXT))
    assert_equal(long, short)


@pytest.mark.parametrize(
    "name",
    ["transformer-gqa", "transformer-tiny", "mistral-odd", "mistral-tiny", "gpt2-odd", "longformer-odd", "bigbird-odd"],
)
def test_rows_of_the_cache_beyond_the_position_are_never_read(name: str) -> None:
    model, tokens, whole = case(name)
    state = [torch.full_like(t, torch.nan) for t in model.initial_state(2, CONTEXT)]
    with torch.no_grad():
        for start in range(0, TOKENS - 2, 5):
            logits, *state = model.advance(tokens[:, start : start + 5], torch.full((2,), start), *state)
            assert_equal(logits[:, 0], whole[:, start + 4])


@pytest.mark.parametrize("name", ["transformer-gqa", "mistral-odd", "gpt2-odd", "longformer-odd", "bigbird-odd"])
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


def test_a_full_cache_is_an_error() -> None:
    model, tokens, _ = case("transformer-tiny")
    with torch.no_grad(), pytest.raises(IndexError, match="holds 8 tokens"):
        model.advance(tokens[:, :4], torch.tensor([5, 5]), *model.initial_state(2, 8))


def test_no_layer_sees_beyond_its_window() -> None:
    """Two layers of 5 tokens reach back 8: an older token changes nothing, the eighth does."""
    model, tokens, whole = case("mistral-odd")
    for age in (8, 9):
        other = tokens.clone()
        other[:, -1 - age] = (other[:, -1 - age] + 1) % model.config.vocab_size
        with torch.no_grad():
            changed = (model(other)[:, -1] - whole[:, -1]).abs().max()
        assert (changed > 1e-4) == (age == 8)


def test_a_ring_goes_round_for_ever() -> None:
    """After 100 000 tokens a ring is still the last W: keys turn by the difference of positions alone."""
    model, tokens, whole = case("mistral-odd")
    state, far = model.initial_state(2, CONTEXT), 100_003
    with torch.no_grad():
        for start, count in ((0, 3), (3, 1), (4, 20), (24, 13)):
            logits, *state = model.advance(tokens[:, start : start + count], torch.full((2,), far + start), *state)
    assert_equal(logits[:, 0], whole[:, -1])


@pytest.mark.parametrize("chunk", [1, 5, 16, TOKENS, 100])
@pytest.mark.parametrize("name", ["retnet-odd", "retnet-tiny"])
def test_retnet_chunkwise_equals_parallel(name: str, chunk: int) -> None:
    model, tokens, whole = case(name)
    with torch.no_grad():
        assert_equal(model(tokens, chunk=chunk), whole)


@names
def test_declared_state_is_what_advance_returns(name: str) -> None:
    model, tokens, _ = case(name)
    slots = model.state_slots(CONTEXT)
    assert len({slot.name for slot in slots}) == len(slots)
    with torch.no_grad():
        logits, *state = model.advance(
            tokens[:1, :3], torch.zeros(1, dtype=torch.int64), *model.initial_state(1, CONTEXT)
        )
    assert logits.shape == (1, 1, model.config.vocab_size)
    assert [(tuple(t.shape), str(t.dtype)) for t in state] == [(s.shape, f"torch.{s.dtype}") for s in slots]
    growing = "append" in {slot.update for slot in slots}
    assert growing == (sum(s.nbytes for s in model.state_slots(2 * CONTEXT)) > sum(s.nbytes for s in slots))


def test_every_family_is_held_to_these() -> None:
    """Its tiny shape by itself, and at least one of odd sizes that somebody wrote."""
    assert {family_of_config(c).name for c in CONFIGS.values()} == set(families())
    assert {family_of_config(c).name for c in ODD.values()} == set(families())


@names
@settings(max_examples=3, deadline=None, derandomize=True)
@given(lengths=st.tuples(*[st.integers(0, 12)] * 3), begin=st.integers(0, 3), seed=st.integers(0, 99))
def test_padded_tokens_touch_no_state(name: str, lengths: tuple[int, ...], begin: int, seed: int) -> None:
    """Rows of a padded chunk: states and logits are those of the row alone, and the padding may be anything."""
    model = case(name)[0]
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.config.vocab_size, (3, begin + 12), generator=rng)
    given_, position = torch.tensor(lengths), torch.full((3,), begin)
    with torch.no_grad():
        state = model.initial_state(3, CONTEXT)
        if begin:
            _, *state = model.advance(tokens[:, :begin], torch.zeros(3, dtype=torch.int64), *state)
        chunk = tokens[:, begin:].clone()
        logits, *after = advance_padded(model, chunk, given_, position, *state)
        padding = torch.arange(12) >= given_[:, None]
        chunk[padding] = torch.randint(0, model.config.vocab_size, (int(padding.sum()),), generator=rng)
        again, *same = advance_padded(model, chunk, given_, position, *state)
        assert torch.equal(logits, again) and all(torch.equal(a, b) for a, b in zip(after, same, strict=True))
        for row, count in enumerate(lengths):
            alone = [s[row : row + 1] for s in state]
            if count == 0:
                assert all(torch.equal(new[row : row + 1], old) for new, old in zip(after, alone, strict=True))
                continue
            wanted, *alone = model.advance(chunk[row : row + 1, :count], position[:1], *alone)
            assert_equal(logits[row : row + 1], wanted)
            follow = torch.full((1, 1), 7 % model.config.vocab_size)
            ours, theirs = (
                model.advance(follow, position[:1] + count, *s)[0] for s in ([a[row : row + 1] for a in after], alone)
            )
            assert_equal(ours, theirs)


def test_lengths_beyond_the_chunk_are_refused() -> None:
    model, tokens, _ = case("mamba-tiny")
    with pytest.raises(ValueError, match=r"lengths \[2, 38\] do not fit 37 tokens"):
        advance_padded(model, tokens, torch.tensor([2, 38]), torch.zeros(2, dtype=torch.int64))


@names
def test_a_state_through_bytes_is_the_state(name: str) -> None:
    """What follows is the same to the last bit, and advancing never writes into the state it was given."""
    model, tokens, _ = case(name)
    with torch.no_grad():
        _, *state = model.advance(tokens[:, :9], torch.zeros(2, dtype=torch.int64), *model.initial_state(2, CONTEXT))
        before = [t.clone() for t in state]
        position = torch.full((2,), 9)
        first, *_ = model.advance(tokens[:, 9:14], position, *state)
        again, *_ = model.advance(tokens[:, 9:14], position, *through_bytes(state))
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
