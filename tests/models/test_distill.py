"""Long filters as modes: exact where a filter is one, an honest error where it is not, stable always."""

from __future__ import annotations

import numpy as np
import pytest

from edgeseq.errors import SourceError, UsageError
from edgeseq.models import distill, family
from edgeseq.models.hyena import HyenaConfig
from edgeseq.models.source import random_source
from edgeseq.models.twin import family_of_config

Array = np.ndarray


def modal_filter(seed: int, taps: int, modes: int, channels: int) -> Array:
    """Taps [R,C] of `modes` random complex modes that decay within the horizon, and a first tap of its own."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(0.6, 0.97, (channels, modes)) * np.exp(1j * rng.uniform(0.1, 3.0, (channels, modes)))
    c = rng.standard_normal((channels, modes)) + 1j * rng.standard_normal((channels, modes))
    h = distill.response(a, c, taps).T
    h[0] += rng.standard_normal(channels)
    return h


def answer(f: distill.Fit, taps: int) -> Array:
    """What a device computes from the stored float32: [R,C]."""
    a, c = (x[:, 0].astype(np.float64).T + 1j * x[:, 1].T for x in (f.poles, f.residues))
    h = distill.response(a, c, taps).T
    h[0] += f.rest
    return h


@pytest.mark.parametrize(("taps", "modes"), [(40, 1), (64, 3), (700, 4)])
def test_a_filter_that_is_made_of_modes_is_found_again(taps: int, modes: int) -> None:
    h = modal_filter(taps, taps, modes, 5)
    f = distill.fit(h, modes)
    assert f.poles.shape == f.residues.shape == (modes, 2, 5)
    assert f.poles.dtype == f.residues.dtype == np.float32
    assert f.error.max() < 2e-3
    assert np.abs(answer(f, taps) - h).max() < 1e-2 * np.abs(h).max()


def test_the_error_is_that_of_the_stored_modes() -> None:
    """Rough filters: the report says what the answer of the float32 modes misses, tap 0 being exact."""
    h = np.random.default_rng(0).standard_normal((50, 4)) * np.exp(-np.arange(50) / 12)[:, None]
    f = distill.fit(h, 3)
    missed = np.linalg.norm(answer(f, 50) - h, axis=0) / np.linalg.norm(h, axis=0)
    np.testing.assert_allclose(f.error, missed, rtol=1e-6)
    assert f.error.min() > 0.05
    np.testing.assert_allclose(answer(f, 50)[0], h[0], rtol=1e-6, atol=1e-9)


def test_more_modes_are_not_worse_and_enough_are_exact() -> None:
    h = np.random.default_rng(1).standard_normal((24, 3)) * np.exp(-np.arange(24) / 9)[:, None]
    errors = [distill.fit(h, modes).error.max() for modes in (1, 3, 6, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05 < errors[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_mode_is_stable(seed: int) -> None:
    """Filters that grow within their horizon want poles outside the unit circle."""
    rng = np.random.default_rng(seed)
    h = rng.standard_normal((30, 6)) * np.exp(np.arange(30) / 10)[:, None]
    f = distill.fit(h, 4)
    radius = np.hypot(f.poles[:, 0], f.poles[:, 1])
    assert radius.max() < 1.0
    assert np.isfinite(f.residues).all()
    assert f.beyond.max() > 0.01, "such a filter does not end at its horizon"


@pytest.mark.parametrize("h", [np.zeros((9, 2)), np.ones((1, 2)), np.ones((2, 2))])
def test_filters_with_nothing_in_them(h: Array) -> None:
    f = distill.fit(h, 3)
    assert np.isfinite(f.poles).all() and np.isfinite(f.residues).all()
    np.testing.assert_allclose(answer(f, len(h)), h, atol=2e-2)


def test_taps_that_are_not_finite_are_refused() -> None:
    with pytest.raises(SourceError, match="not finite"):
        distill.fit(np.array([[1.0], [np.nan]]), 2)


@pytest.mark.parametrize(("order", "tolerance"), [(0, 0.1), (1000, 0.1), (4, 0.0), (4, 1.5)])
def test_requests_without_sense_are_refused(order: int, tolerance: float) -> None:
    with pytest.raises(UsageError):
        distill.check_request(order, tolerance)


CONFIG = HyenaConfig(53, 10, 2, 0, 48, order=3, filter_width=8, frequency=0.5)


def test_layers_above_the_tolerance_stay_exact() -> None:
    """The tolerance between the two layers' errors: one becomes modes, the other keeps its filters."""
    record = family_of_config(CONFIG)
    read = random_source("distilled", record, CONFIG).tensor
    assert record.distil is not None
    seen: list[tuple[int, int]] = []
    loose = record.distil(CONFIG, read, 2, 0.999, lambda *done: seen.append(done))
    assert seen == [(0, 2), (1, 2), (2, 2)]
    assert loose.config.modal == (2, 2)
    errors = [layer.error for layer in loose.layers]
    between = record.distil(CONFIG, read, 2, sum(errors) / 2, lambda *done: None)
    kept = int(np.argmax(errors))
    assert between.config.modal[kept] == 0 and between.config.modal[1 - kept] == 2
    assert [layer.modes for layer in between.layers] == list(between.config.modal)
    assert all(not name.startswith(f"layers.{kept}.") for name in between.tensors)
    none = record.distil(CONFIG, read, 2, min(errors) / 2, lambda *done: None)
    assert none.config == CONFIG and not none.tensors


def test_only_families_with_long_filters_are_distilled() -> None:
    assert family("mamba").distil is None
    assert family("hyena").distil is not None
