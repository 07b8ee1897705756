"""What a comparison found: `Stage` is one line of the table, `Report` the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Stage:
    """One comparison.

    name, against: what was compared with what.
    worst:     largest |difference|, infinite where one side is not finite; None where nothing was measured.
    tolerance: the largest difference that passes; 0 means bit for bit; None with `worst`.
    where:     the element of `worst`, such as "token 12, logit 101".
    ok:        whether it passed.
    note:      what the numbers do not say.
    """

    name: str
    against: str
    worst: float | None
    tolerance: float | None
    where: str
    ok: bool
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The stages of one bundle or export, in the order in which they ran.

    kind: "bundle" or "export". device: profile name, or "" for this machine through the Python binding.
    """

    path: str
    kind: str
    source: str
    model_id: str
    device: str
    stages: tuple[Stage, ...]

    @property
    def ok(self) -> bool:
        return all(stage.ok for stage in self.stages)

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(stage.name for stage in self.stages if not stage.ok)

    @property
    def worst(self) -> Stage | None:
        """The stage that came nearest to its tolerance, or went furthest beyond it."""
        measured = [s for s in self.stages if s.worst is not None and s.tolerance]
        return max(measured, key=lambda s: (s.worst or 0.0) / (s.tolerance or 1.0), default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: an infinite difference becomes the string "inf"."""
        stages = [asdict(s) | {"worst": "inf" if s.worst == float("inf") else s.worst} for s in self.stages]
        return asdict(self) | {"ok": self.ok, "stages": stages}


def compare(
    name: str,
    against: str,
    got: Array,
    wanted: Array,
    tolerance: float,
    rows: Sequence[int] | None = None,
    axes: tuple[str, str] = ("token", "logit"),
    note: str = "",
) -> Stage:
    """Compare `got` with `wanted`, both [n, ...]; `rows[i]` is the index in the sequence that row i belongs to."""
    if got.shape != wanted.shape:
        return Stage(name, against, float("inf"), tolerance, f"shape {got.shape}, expected {wanted.shape}", False, note)
    if got.size == 0:
        return Stage(name, against, None, None, "", True, note or "nothing to compare")
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.abs(got.astype(np.float64) - wanted.astype(np.float64)).reshape(len(got), -1)
    difference[~np.isfinite(difference)] = np.inf
    row, column = divmod(int(np.argmax(difference)), difference.shape[1])
    worst = float(difference[row, column])
    where = f"{axes[0]} {rows[row] if rows is not None else row}, {axes[1]} {column}"
    return Stage(name, against, worst, tolerance, where, worst <= tolerance, note)
