"""The custom operators: schemas, gradients of the parallel forms, exactness of the rotary angle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edgeseq.models import functional as ops
from edgeseq.models import parallel, rotary


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


@pytest.mark.parametrize("tokens", [1, 4])
def test_operators_declare_their_shapes(tokens: int) -> None:
    b, t, d, n = 2, tokens, 6, 3
    u, a, past = draw(b, t, d), -draw(n, d).abs(), draw(b, n, d)
    bc, cache = draw(b, t, n), draw(b, 1, 9, 4)
    cases = {
        "selective_scan": (u, draw(b, t, d), a, bc, bc + 1, draw(d), u + 1, draw(d), past, True, 0.0, math.inf),
        "retention": (u, u + 1, draw(b, t, 8), -draw(2).abs(), draw(b, 2, 3, 4), 2, 0.5),
        "causal_conv": (u, draw(d, 4), None, draw(b, 3, d), True),
        "rms_norm": (u, draw(d), 1e-5),
        "rotary": (u, draw(b, t, 1), draw(b, t, 1), 3, True),
        "cached_attention": (
            *(draw(b, t, 8), draw(b, t, 4), draw(b, t, 4), cache, cache + 1),
            *(torch.tensor([0, 3]), 2, 1, 0.5),
        ),
        "window_attention": (
            *(draw(b, t, 8), draw(b, t, 4), draw(b, t, 4), cache, cache + 1),
            *(torch.tensor([0, 30]), 2, 1, 0.5),
        ),
    }
    for name, args in cases.items():
        torch.library.opcheck(
            getattr(torch.ops.edgeseq, name).default, args, test_utils=("test_schema", "test_faketensor")
        )


def test_scans_of_whole_sequences_are_whole_operators() -> None:
    """Schema, fake tensors and gradients hold when a compiler traces through them: torch.compile takes them as one."""
    shapes = [(7, 2, 4), (7, 2, 4), (3, 4), (7, 2, 3), (7, 2, 3)]
    scan = [draw(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]
    gated = [x.requires_grad_() for x in (draw(2, 7, 4), -draw(2, 7, 4, seed=1).abs(), draw(2, 4, seed=2))]
    for operator, args in (("selective_scan_whole", (*scan, 3)), ("gated_scan", gated)):
        torch.library.opcheck(getattr(torch.ops.edgeseq, operator).default, tuple(args))


def test_time_step_is_clamped_in_every_form() -> None:
    raw = torch.tensor([-30.0, 0.0, 25.0])
    bounded = ops.time_step(raw, None, True, 1e-3, 10.0)
    torch.testing.assert_close(bounded, torch.tensor([1e-3, math.log(2.0), 10.0]))
    torch.testing.assert_close(ops.time_step(raw, torch.ones(3), False, 0.0, math.inf), raw + 1)


def test_selective_scan_has_the_published_order_of_discretisation() -> None:
    """One channel, one state element, two tokens, by hand: exp(dt A) on the state, dt B (not exact) on the input."""
    u, dt = torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[0.5], [0.25]]])
    a, b, c = torch.tensor([[-1.0]]), torch.tensor([[[1.0], [4.0]]]), torch.tensor([[[1.0], [2.0]]])
    y, s = ops.selective_scan(u, dt, a, b, c, None, None, None, torch.zeros(1, 1, 1), dt_softplus=False)
    first = 0.5 * 2.0
    second = math.exp(-0.25) * first + 0.25 * 4.0 * 3.0
    torch.testing.assert_close(y.flatten(), torch.tensor([first, 2.0 * second]))
    torch.testing.assert_close(s.flatten(), torch.tensor([second]))


@pytest.mark.parametrize("block", [1, 3, 16])
def test_gradients_of_the_selective_scan(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "SCAN_BLOCK", block)
    shapes = [(2, 7, 4), (2, 7, 4), (3, 4), (2, 7, 3), (2, 7, 3)]
    args = [draw(*s, seed=i).double() for i, s in enumerate(shapes)]
    args[1], args[2] = args[1].abs(), -args[2].abs()
    assert torch.autograd.gradcheck(parallel.selective_scan_parallel, [x.requires_grad_() for x in args])


def test_gradients_of_the_chunkwise_retention_equal_the_parallel_ones() -> None:
    q, k, v = (draw(2, 11, w, seed=w).double().requires_grad_() for w in (6, 6, 10))
    decay = torch.tensor([-0.03, -0.4], dtype=torch.float64, requires_grad=True)
    weight = draw(2, 11, 10, seed=5).double()
    forms = (
        parallel.retention_parallel(q, k, v, decay, 2, 0.7),
        parallel.retention_chunkwise(q, k, v, decay, 2, 0.7, chunk=4),
    )
    grads = [torch.autograd.grad((o * weight).sum(), (q, k, v, decay)) for o in forms]
    torch.testing.assert_close(forms[0], forms[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("position", [0, 1, 4095, 1_000_003, (1 << 29) - 1])
def test_rotary_angles_are_exact_at_any_depth(position: int) -> None:
    """Compared with Python's whole numbers of unlimited size; a fp32 product is wrong by radians here."""
    radians = 10000.0 ** -np.linspace(0.0, 1.0, 16)
    frequency = rotary.turns(radians)
    cos, sin = rotary.angles(torch.from_numpy(frequency), torch.tensor([position]), 2)
    for t in range(2):
        angle = [((position + t) * int(f)) % rotary.TURN * (2 * math.pi / rotary.TURN) for f in frequency]
        np.testing.assert_allclose(cos[0, t], np.cos(angle), atol=1e-6)
        np.testing.assert_allclose(sin[0, t], np.sin(angle), atol=1e-6)


def test_quantised_frequencies_stay_close_to_the_real_ones() -> None:
    radians = 10000.0 ** -np.linspace(0.0, 1.0, 16)
    drift = rotary.turns(radians) * (2 * math.pi / rotary.TURN) - radians
    assert np.abs(drift).max() * 1e5 < 1e-5  # radians after a hundred thousand tokens


def test_both_pairings_of_the_rotation() -> None:
    x, angle = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[0.3, 0.7]]])
    for interleaved, pairs in ((True, [(0, 1), (2, 3)]), (False, [(0, 2), (1, 3)])):
        y = ops.rotary(x, angle.cos(), angle.sin(), 1, interleaved)[0, 0]
        for i, (a, b) in enumerate(pairs):
            turned = complex(x[0, 0, a], x[0, 0, b]) * complex(math.cos(angle[0, 0, i]), math.sin(angle[0, 0, i]))
            assert complex(y[a], y[b]) == pytest.approx(turned, rel=1e-6)
