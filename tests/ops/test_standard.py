"""The numpy references of the standard operators agree with PyTorch's chunk forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgeseq.models import functional
from edgeseq.ops import standard
from edgeseq.verify.tolerances import tolerance


def agree(ours: object, theirs: object) -> None:
    ours = ours if isinstance(ours, tuple) else (ours,)
    theirs = theirs if isinstance(theirs, tuple) else (theirs,)
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b.numpy()).max() <= tolerance("torch", "float32", a)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def both(*arrays: np.ndarray | None) -> tuple[list, list]:
    """The arrays in float64 for numpy, and as float32 tensors for torch."""
    narrow = [None if a is None else a.astype(np.float32) for a in arrays]
    return [a if a is None else a.astype(np.float64) for a in narrow], [
        a if a is None else torch.from_numpy(a) for a in narrow
    ]


@pytest.mark.parametrize("tokens", [1, 2, 7])
@pytest.mark.parametrize(("taps", "bias", "silu"), [(2, True, True), (4, False, False), (4, True, True)])
def test_causal_conv(rng: np.random.Generator, tokens: int, taps: int, bias: bool, silu: bool) -> None:
    draw = rng.standard_normal
    n, t = both(
        draw((2, tokens, 5)), draw((5, taps)), draw(5) if bias else None, draw((2, taps - 1, 5))
    )  # fmt: skip
    agree(standard.causal_conv(*n, silu), functional.causal_conv(*t, silu))


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(rng: np.random.Generator, weighted: bool) -> None:
    n, t = both(rng.standard_normal((2, 3, 9)), rng.standard_normal(9) if weighted else None)
    agree(standard.rms_norm(*n, 1e-3), functional.rms_norm(*t, 1e-3))


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary(rng: np.random.Generator, interleaved: bool) -> None:
    angle = rng.uniform(0, 6.28, (2, 5, 3))
    n, t = both(rng.standard_normal((2, 5, 4 * 6)), np.cos(angle), np.sin(angle))
    agree(standard.rotary(*n, 4, interleaved), functional.rotary(*t, 4, interleaved))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("tokens", [1, 4])
def test_cached_attention_ignores_what_lies_beyond(
    rng: np.random.Generator, heads: int, kv_heads: int, tokens: int
) -> None:
    draw, d, rows = rng.standard_normal, 5, 11
    position = np.array([3, 6])
    n, t = both(
        draw((2, tokens, heads * d)), draw((2, tokens, kv_heads * d)), draw((2, tokens, kv_heads * d)),
        draw((2, kv_heads, rows, d)), draw((2, kv_heads, rows, d)),
    )  # fmt: skip
    ours = standard.cached_attention(*n, position, heads, kv_heads, 0.3)
    agree(ours, functional.cached_attention(*t, torch.from_numpy(position), heads, kv_heads, 0.3))
    for cache in (n[3], n[4]):
        for row, at in enumerate(position):
            cache[row, :, at:] = np.nan
    poisoned = standard.cached_attention(*n, position, heads, kv_heads, 0.3)
    np.testing.assert_array_equal(poisoned[0], ours[0])


@pytest.mark.parametrize("tokens", [1, 4, 12])
@pytest.mark.parametrize("position", [(0, 2), (5, 6), (3, 41)])
def test_window_attention_ignores_what_lies_beyond(
    rng: np.random.Generator, tokens: int, position: tuple[int, int]
) -> None:
    draw, d, rows, heads, kv_heads = rng.standard_normal, 5, 6, 6, 2
    n, t = both(
        draw((2, tokens, heads * d)), draw((2, tokens, kv_heads * d)), draw((2, tokens, kv_heads * d)),
        draw((2, kv_heads, rows, d)), draw((2, kv_heads, rows, d)),
    )  # fmt: skip
    at = np.array(position)
    ours = standard.window_attention(*n, at, heads, kv_heads, 0.3)
    agree(ours, functional.window_attention(*t, torch.from_numpy(at), heads, kv_heads, 0.3))
    for cache in (t[3], t[4]):
        for row, held in enumerate(position):
            cache[row, :, held:] = torch.nan
    poisoned = functional.window_attention(*t, torch.from_numpy(at), heads, kv_heads, 0.3)
    agree(ours[0], poisoned[0])
