"""What tuning measured, as a bundle keeps it in META (`meta.tuning`): variants of kernels and their times."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from edgeseq.bundle.plan import Plan
from edgeseq.errors import BundleError

KEY = "tuning"


@dataclass(frozen=True)
class Tried:
    """One variant: what it has of its own, and the median nanoseconds of a launch."""

    choice: dict[str, Any]
    ns: int


@dataclass(frozen=True)
class Entry:
    """One kernel: `op` and `params` tell which; `tried` holds its variants, the compiler's own choice first."""

    kernel: str
    op: str
    params: dict[str, Any]
    tried: tuple[Tried, ...]

    @property
    def fastest(self) -> Tried:
        """The first of equals."""
        return min(self.tried, key=lambda tried: tried.ns)


@dataclass(frozen=True)
class Record:
    """All kernels, and where they were measured.

    device: the profile's name. target: what the code was made for (triple, cpu, features).
    """

    device: str
    threads: int
    repetitions: int
    target: dict[str, Any]
    kernels: tuple[Entry, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def record_of(plan: Plan) -> Record | None:
    """The plan's record, None if it was not tuned. BundleError when it cannot be read."""
    value = plan.meta.get(KEY)
    if value is None:
        return None
    try:
        return Record(
            _kind(value["device"], str), _kind(value["threads"], int), _kind(value["repetitions"], int),
            _kind(value["target"], dict), tuple(_entry(e) for e in _kind(value["kernels"], list)),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        raise BundleError("the tuning results in META cannot be read") from None


def _entry(value: Any) -> Entry:
    tried = tuple(Tried(_kind(t["choice"], dict), _kind(t["ns"], int)) for t in _kind(value["tried"], list))
    if not tried:
        raise ValueError
    return Entry(_kind(value["kernel"], str), _kind(value["op"], str), _kind(value["params"], dict), tried)


def _kind(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError
    return value
