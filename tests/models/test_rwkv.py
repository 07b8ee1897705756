"""RWKV-4, 5.2, 6 and 7 from files in BlinkDL's layout: our forms = his package = the papers' formulas."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from edgeseq.models import functional as ops
from edgeseq.models import rwkv, rwkv4, rwkv7
from edgeseq.models.source import Source, open_source
from edgeseq.verify.tolerances import tolerance
from tests.models import blink, rwkv_numpy
from tests.models.support import run_cut

VERSIONS = (4, 5, 6, 7)
GOLDEN = json.loads((Path(__file__).parent / "golden_rwkv.json").read_text())
versions = pytest.mark.parametrize("version", VERSIONS)


def source(version: int, folder: Path, dtype: torch.dtype = torch.float32) -> Source:
    path = folder / f"v{version}.pth"
    torch.save(blink.stored(blink.checkpoint(version), dtype), path)
    return open_source(str(path))


@functools.cache
def by_formula(version: int, count: int) -> np.ndarray:
    weights = {name: t.numpy() for name, t in blink.checkpoint(version).items()}
    return rwkv_numpy.logits(version, weights, blink.tokens(count))


@versions
def test_all_forms_equal_the_formulas_and_the_authors_package(version: int, tmp_path: Path) -> None:
    """Stored logits of the package hold the formulas; the formulas hold every form at every token."""
    opened = source(version, tmp_path)
    tokens = torch.tensor([blink.tokens(48)])
    assert opened.family == f"rwkv{version}"
    assert opened.param_count() == sum(t.numel() for n, t in blink.checkpoint(version).items() if not _unread(n))
    wanted = by_formula(version, 48)
    golden = np.array(GOLDEN[f"version {version}"])
    assert np.abs(wanted[GOLDEN["rows"]] - golden).max() <= tolerance("torch", "float32", golden)
    model = opened.build()
    with torch.no_grad():
        whole = model(tokens)[0]
    assert np.abs(whole.numpy() - wanted).max() <= tolerance("torch", "float32", wanted)
    steps = run_cut(model, tokens, list(range(1, 48)))
    chunks = run_cut(model, tokens, [5, 6, 13, 40])
    for last, logits in [*steps.items(), *chunks.items()]:
        assert np.abs(logits[0].numpy() - wanted[last]).max() <= tolerance("torch", "float32", wanted)


def _unread(name: str) -> bool:
    return name.startswith("blocks.0.att.v") and name[len("blocks.0.att.v") :].isdigit()


@versions
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_are_read_as_float32(version: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """Published files are bfloat16. The formulas on the same rounded weights give the same logits."""
    model = source(version, tmp_path, dtype).build()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    rounded = {name: t.float().numpy() for name, t in blink.stored(blink.checkpoint(version), dtype).items()}
    wanted = rwkv_numpy.logits(version, rounded, blink.tokens(9))
    with torch.no_grad():
        whole = model(torch.tensor([blink.tokens(9)]))[0].numpy()
    assert np.abs(whole - wanted).max() <= tolerance("torch", "float32", wanted)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def assert_same_gradients(parallel, stepwise, inputs: list[torch.Tensor]) -> None:  # type: ignore[no-untyped-def]
    weights, found = None, []
    for form in (parallel, stepwise):
        leaves = [x.double().requires_grad_() for x in inputs]
        y = form(*leaves)
        weights = draw(*y.shape, seed=9).double() if weights is None else weights
        found.append((y.detach(), torch.autograd.grad((weights * y).sum(), leaves, materialize_grads=True)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("tokens", [1, 2, 13])
def test_the_scan_of_version_4_has_the_gradients_of_its_definition(tokens: int) -> None:
    k, v, decay, first = 2 * draw(2, tokens, 5), draw(2, tokens, 5, seed=1), draw(5), draw(5, seed=2)

    def stepwise(k, v, decay, first):  # type: ignore[no-untyped-def]
        num, den, out = 0.0, 0.0, []
        for t in range(tokens):
            own = torch.exp(first + k[:, t])
            out.append((num + own * v[:, t]) / (den + own))
            keep = torch.exp(-torch.exp(decay))
            num, den = keep * num + torch.exp(k[:, t]) * v[:, t], keep * den + torch.exp(k[:, t])
        return torch.stack(out, 1)

    assert_same_gradients(rwkv4.wkv4_parallel, stepwise, [k, v, decay, first])


def test_the_scan_of_version_4_survives_keys_that_overflow() -> None:
    k, v = 300.0 * draw(1, 40, 6), draw(1, 40, 6, seed=1)
    decay, first = draw(6), draw(6, seed=2)
    state = torch.full((1, 3, 6), rwkv4.FRESH)
    stepwise, _ = ops.wkv4(k, v, decay, first, state)
    parallel = rwkv4.wkv4_parallel(k, v, decay, first)
    assert torch.isfinite(parallel).all()
    torch.testing.assert_close(parallel, stepwise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_the_blocks_of_versions_5_and_6_have_the_gradients_of_their_definition(tokens: int) -> None:
    r, k, v, u = draw(2, tokens, 6), draw(2, tokens, 6, seed=1), draw(2, tokens, 6, seed=2), draw(6)
    g = -torch.exp(2 * draw(2, tokens, 6, seed=3))

    def stepwise(r, k, v, g, u):  # type: ignore[no-untyped-def]
        state, out = torch.zeros(2, 2, 3, 3, dtype=r.dtype), []
        uh = u.view(2, 3, 1)
        for t in range(tokens):
            rt, kt, vt, gt = (x[:, t].view(2, 2, 3) for x in (r, k, v, g))
            kv = kt[..., None] * vt[:, :, None]
            out.append((rt[:, :, None] @ (state + uh * kv)).flatten(1))
            state = torch.exp(gt)[..., None] * state + kv
        return torch.stack(out, 1)

    def parallel(r, k, v, g, u):  # type: ignore[no-untyped-def]
        return rwkv.wkv_parallel(r, k, v, g, u, 2)

    assert_same_gradients(parallel, stepwise, [r, k, v, g, u])


def test_a_fast_decay_before_slow_ones_costs_no_precision() -> None:
    """One token forgets by e^-4000, the next ones by e^-0.001: sums of both would leave nothing of the small ones."""
    tokens = 16
    r, k, v, u = (draw(1, tokens, 4, seed=s) for s in range(4))
    g = torch.full((1, tokens, 4), -1e-3)
    g[:, 2] = -4000.0
    state = torch.zeros(1, 2, 2, 2)
    stepwise, _ = rwkv.wkv(r, k, v, g, u[0, 0], state, 2)
    torch.testing.assert_close(rwkv.wkv_parallel(r, k, v, g, u[0, 0], 2), stepwise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 32, 45])
def test_the_blocks_of_version_7_have_the_gradients_of_their_definition(tokens: int) -> None:
    q, k, v, rate = (draw(2, tokens, 6, seed=s) for s in range(4))
    g = -0.606 * torch.sigmoid(3 * draw(2, tokens, 6, seed=4))
    kappa = torch.nn.functional.normalize(draw(2, tokens, 2, 3, seed=5), dim=-1).flatten(2)
    inputs = [q, k, v, g, kappa, -kappa * torch.sigmoid(rate)]

    def stepwise(q, k, v, g, a, b):  # type: ignore[no-untyped-def]
        state, out = torch.zeros(2, 2, 3, 3, dtype=q.dtype), []
        for t in range(tokens):
            qt, kt, vt, gt, at, bt = (x[:, t].view(2, 2, 3) for x in (q, k, v, g, a, b))
            read = at[:, :, None] @ state
            state = torch.exp(gt)[..., None] * state + bt[..., None] * read + kt[..., None] * vt[:, :, None]
            out.append((qt[:, :, None] @ state).flatten(1))
        return torch.stack(out, 1)

    def parallel(*x):  # type: ignore[no-untyped-def]
        return rwkv7.dplr_parallel(*x, 2)

    assert_same_gradients(parallel, stepwise, inputs)


def test_a_key_of_zero_removes_nothing() -> None:
    """kappa of a head whose key is all zero is zero, not NaN."""
    mixer = rwkv7.TimeMix7(rwkv7.Rwkv7Config(7, 8, 1, 2, 8), 0)
    torch.nn.init.ones_(mixer.key_removed)
    k = torch.tensor([[[0.0, 0.0, 0.0, 0.0, 3.0, 0.0, 4.0, 0.0]]])
    for parallel in (True, False):
        kappa = mixer.removal_key(k, parallel)
        torch.testing.assert_close(kappa, torch.tensor([[[0.0, 0.0, 0.0, 0.0, 0.6, 0.0, 0.8, 0.0]]]))
