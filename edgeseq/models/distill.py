"""Distillation of long filters into modes (Massaroli et al. 2023, arXiv 2310.18780): h[t] ~ Re sum_n c_n a_n^t.

Poles start from the Hankel matrix of each filter (Kung 1978): the eigenvectors of its largest eigenvalues span what a
system of that order can do best, and their shift by one row is its step matrix. Unstable poles are reflected into the
unit circle, residues follow by least squares, and both are then refined together by Levenberg-Marquardt. All in double;
errors are those of the poles and residues as stored, in float32.

C channels, R taps, N modes. A channel's modes are independent complex numbers; a conjugate pair needs one of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from edgeseq.errors import SourceError, UsageError
from edgeseq.models.base import Array

MAX_ORDER = 128
DIRECT = 160  # rows of a Hankel matrix from which its leading eigenvectors are iterated for
ROUNDS = 40
LONGEST_MEMORY = 4.0  # horizons after which a mode has decayed to 1/e at the latest
RIDGE = 1e-8  # cost of a residue's square beside that of the error's: modes must not cancel each other in float32


@dataclass(frozen=True)
class LayerReport:
    """What distilling one layer gave.

    modes:  per channel, 0 where the layer was kept exact.
    error:  of the worst channel, |h - fit| / |h| over the taps within the horizon (Euclidean norms).
    median: of all channels.
    beyond: worst |fit| past the horizon / |h|, where the exact filter has ended.
    """

    layer: int
    modes: int
    error: float
    median: float
    beyond: float


@dataclass(frozen=True)
class Distilled:
    """A config with its modal layers, the tensors they have instead of the filters, and a report on every layer."""

    config: Any
    tensors: Mapping[str, Array]
    layers: tuple[LayerReport, ...]
    order: int = 0
    tolerance: float = 0.0

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        return {"order": self.order, "tolerance": self.tolerance, "layers": [asdict(layer) for layer in self.layers]}


@dataclass(frozen=True)
class Fit:
    """Poles and residues float32 [N,2,C]; `rest` float64 [C] is tap 0 of the filter less that of the fit."""

    poles: Array
    residues: Array
    rest: Array
    error: Array = field(repr=False)
    beyond: Array = field(repr=False)


def check_request(order: int, tolerance: float) -> None:
    if not 1 <= order <= MAX_ORDER:
        raise UsageError(f"filters cannot be distilled to {order} modes", f"give 1 to {MAX_ORDER}")
    if not 0.0 < tolerance < 1.0:
        raise UsageError(f"a tolerance of {tolerance} is not possible", "give a relative error between 0 and 1")


def fit(taps: Array, modes: int) -> Fit:
    """Fit every channel of taps [R,C] with `modes` complex modes; SourceError where taps are not finite."""
    h = np.ascontiguousarray(taps.T, dtype=np.float64)  # [C,R]
    if not np.isfinite(h).all():
        raise SourceError("A long filter has taps that are not finite", "check the weights")
    scale = np.linalg.norm(h, axis=1, keepdims=True)
    unit = h / np.where(scale > 0, scale, 1.0)
    parts = [_refined(unit[i : i + 32], modes) for i in range(0, len(h), 32)]
    poles, residues = (np.concatenate(x) for x in zip(*parts, strict=True))
    return _measured(h, poles, residues * scale, np.where(scale > 0, scale, 1.0)[:, 0])


def _measured(h: Array, poles: Array, residues: Array, norm: Array) -> Fit:
    """Round to float32 and compare with the filter: h [C,R], poles, residues complex [C,N]."""
    stored = [np.stack([x.real.T, x.imag.T], 1).astype(np.float32) for x in (poles, residues)]
    a, c = (x[:, 0].T.astype(np.float64) + 1j * x[:, 1].T for x in stored)
    answer = response(a, c, 4 * h.shape[1])
    rest = h[:, 0] - answer[:, 0]
    within = np.linalg.norm((h - answer[:, : h.shape[1]])[:, 1:], axis=1)
    beyond = np.linalg.norm(answer[:, h.shape[1] :], axis=1)
    return Fit(stored[0], stored[1], rest, within / norm, beyond / norm)


def response(poles: Array, residues: Array, length: int) -> Array:
    """Re sum_n c_n a_n^t for t < length: poles, residues complex [C,N] -> [C,length]."""
    found = np.empty((len(poles), length))
    power = residues.astype(np.complex128)
    for t in range(length):
        found[:, t] = power.real.sum(1)
        power = power * poles
    return found


def _refined(h: Array, wanted: int) -> tuple[Array, Array]:
    """Poles and residues [C,N] of channels h [C,R] of norm 1; modes that so few taps do not determine are silent."""
    modes = min(wanted, max(1, (h.shape[1] - 1) // 3))
    starts = [_first_poles(h, modes, whole) for whole in (False, True)]
    fitted = [(poles, *_residues(h, poles)) for poles in starts]
    better = np.argmin([error for _, _, error in fitted], 0)[:, None]
    poles, residues = (np.where(better, fitted[1][k], fitted[0][k]) for k in (0, 1))
    poles, residues = _levenberg_marquardt(h, poles, residues)
    silent = ((0, 0), (0, wanted - modes))
    return np.pad(poles, silent, constant_values=0.5), np.pad(residues, silent)


def _first_poles(h: Array, modes: int, whole: bool) -> Array:
    """Poles [C,N] from the Hankel matrix of taps 1, 2 ..: of the first half of the rows, or of all with zeros after."""
    g = h[:, 1:]
    rows = max(1, g.shape[1] if whole else g.shape[1] // 2)
    g = np.concatenate([g, np.zeros((len(h), 2 * rows))], 1)[:, : 2 * rows - 1]
    found = [_poles_of(_leading(sliding_window_view(row, rows), 2 * modes), modes) for row in g]
    return _stable(np.stack(found), h.shape[1])


def _leading(hankel: Array, count: int) -> Array:
    """Eigenvectors [rows,count'] of a symmetric matrix, largest |eigenvalue| first; by subspace iteration if large."""
    rows, width = len(hankel), count + 8
    if rows <= max(DIRECT, width):
        values, vectors = np.linalg.eigh(hankel)
    else:
        basis = np.random.default_rng(0).standard_normal((rows, width))
        for _ in range(6):
            basis, _ = np.linalg.qr(hankel @ basis)
        values, inner = np.linalg.eigh(basis.T @ hankel @ basis)
        vectors = basis @ inner
    return vectors[:, np.argsort(-np.abs(values))[:count]]


def _poles_of(vectors: Array, modes: int) -> Array:
    """`modes` poles from the leading eigenvectors: one of each conjugate pair; those that lack decay at rates apart."""
    spare = np.exp(-np.geomspace(1e-2, 1.0, modes)).astype(np.complex128)
    for rank in range(min(vectors.shape[1], len(vectors) - 1), 0, -1):
        basis = vectors[:, :rank]
        poles = np.linalg.eigvals(np.linalg.lstsq(basis[:-1], basis[1:], rcond=None)[0])
        poles = poles[poles.imag >= 0]
        if len(poles) <= modes:
            return np.concatenate([poles, spare[len(poles) :]])
    return spare


def _stable(poles: Array, taps: int) -> Array:
    """Poles reflected into the unit circle, none slower than LONGEST_MEMORY horizons, none that vanishes in a step."""
    radius = np.abs(poles)
    inside = np.where(radius > 1, 1 / np.maximum(radius, 1), radius)
    bounded = np.clip(inside, 0.05, np.exp(-1 / (LONGEST_MEMORY * taps)))
    return bounded * np.exp(1j * np.angle(poles))


def _weights(taps: int) -> Array:
    """Tap 0 has none: the skip connection makes it exact afterwards."""
    return np.minimum(np.arange(taps), 1.0)


def _powers(z: Array, taps: int) -> Array:
    """exp(t z) for t < taps: [C,N] -> [C,R,N]."""
    return np.exp(z[:, None, :] * np.arange(taps)[:, None])


def _residues(h: Array, poles: Array) -> tuple[Array, Array]:
    """Least squares for the residues [C,N], and what is left [C]."""
    powers, weights = _powers(np.log(poles), h.shape[1]), _weights(h.shape[1])[:, None]
    columns = np.concatenate([powers.real, -powers.imag], 2) * weights
    normal = columns.transpose(0, 2, 1) @ columns + RIDGE * np.eye(columns.shape[2])
    found = np.linalg.solve(normal, columns.transpose(0, 2, 1) @ (h[..., None] * weights))
    left = np.linalg.norm(h[..., None] * weights - columns @ found, axis=1)[:, 0]
    n = poles.shape[1]
    return found[:, :n, 0] + 1j * found[:, n:, 0], left


def _levenberg_marquardt(h: Array, poles: Array, residues: Array) -> tuple[Array, Array]:
    """Poles exp(-e^s + i w) and residues refined together; a step that makes a channel worse is not taken."""
    z = np.log(poles)
    x = np.concatenate([np.log(-z.real), z.imag, residues.real, residues.imag], 1)  # [C,4N]
    slowest = -np.log(LONGEST_MEMORY * h.shape[1])
    damping = np.full(len(h), 1e-2)
    left, jacobian = _model(h, x)
    cost = np.square(left).sum(1)
    for _ in range(ROUNDS):
        normal = jacobian.transpose(0, 2, 1) @ jacobian
        diagonal = np.einsum("cii->ci", normal)
        diagonal += damping[:, None] * diagonal + 1e-14
        step = np.linalg.solve(normal, jacobian.transpose(0, 2, 1) @ left[..., None])[..., 0]
        tried = x + step
        n = poles.shape[1]
        tried[:, :n] = np.clip(tried[:, :n], slowest, np.log(3.0))
        new_left, new_jacobian = _model(h, tried)
        new_cost = np.square(new_left).sum(1)
        good = new_cost < cost
        x, left, jacobian = (
            np.where(_like(good, b), a, b) for a, b in ((tried, x), (new_left, left), (new_jacobian, jacobian))
        )
        cost = np.where(good, new_cost, cost)
        damping = np.clip(np.where(good, damping / 3, damping * 4), 1e-9, 1e6)
    decay, turn, real, imag = np.split(x, 4, 1)
    return np.exp(-np.exp(decay) + 1j * turn), real + 1j * imag


def _like(rows: Array, other: Array) -> Array:
    return rows.reshape(-1, *(1,) * (other.ndim - 1))


def _model(h: Array, x: Array) -> tuple[Array, Array]:
    """What is left of h [C,R] and of the residues' ridge, [C,R+2N], and the derivatives of the fit [C,R+2N,4N]."""
    taps = h.shape[1]
    decay, turn, real, imag = np.split(x, 4, 1)
    rate = np.exp(decay)
    powers = _powers(-rate + 1j * turn, taps)
    terms = powers * (real + 1j * imag)[:, None]
    t, weights = np.arange(taps)[:, None], _weights(taps)[:, None]
    jacobian = (
        np.concatenate([-rate[:, None] * t * terms.real, -t * terms.imag, powers.real, -powers.imag], 2) * weights
    )
    ridge = np.sqrt(RIDGE) * np.concatenate([real, imag], 1)
    slope = np.zeros((len(x), ridge.shape[1], x.shape[1]))
    slope[:, :, x.shape[1] - ridge.shape[1] :] = np.sqrt(RIDGE) * np.eye(ridge.shape[1])
    left = (h - terms.real.sum(2)) * weights[:, 0]
    return np.concatenate([left, -ridge], 1), np.concatenate([jacobian, slope], 1)
