"""Read config.json fields strictly: every value is checked, and what a family cannot honour is refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from edgeseq.errors import SourceError

LARGEST = (1 << 31) - 1
MOST_LAYERS = 4096


class ConfigReader:
    """Typed access to the fields of one config.json object; `prefix` names a nested object in messages."""

    def __init__(self, raw: Any, prefix: str = "") -> None:
        if not isinstance(raw, Mapping):
            raise SourceError(f"config.json: {prefix.rstrip('.') or 'the file'} is no object, but {raw!r:.40}")
        self.raw: Mapping[str, Any] = raw
        self.prefix = prefix

    def _refuse(self, name: str, value: Any, wanted: str) -> SourceError:
        return SourceError(f"config.json: {self.prefix}{name} is {value!r:.60}, but must be {wanted}")

    def get(self, name: str) -> Any:
        """The value, None when absent or null."""
        return self.raw.get(name)

    def positive(self, name: str, default: int | None = None, least: int = 1, most: int = LARGEST) -> int:
        """A whole number from `least` to `most`; required when there is no default."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise SourceError(f"config.json lacks {self.prefix}{name}")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._refuse(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite positive number; required when there is no default."""
        value = self.raw.get(name)
        value = default if value is None else value
        if value is None:
            raise SourceError(f"config.json lacks {self.prefix}{name}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._refuse(name, value, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self._refuse(name, value, "true or false")
        return value

    def interval(self, name: str, low: float, high: float) -> tuple[float, float]:
        """Two numbers, the first not above the second, infinity allowed (also spelled {"__float__": "Infinity"})."""
        value = self.raw.get(name)
        if value is None:
            return low, high
        ends: list[Any] = [
            v.get("__float__") if isinstance(v, Mapping) else v for v in (value if isinstance(value, list) else [])
        ]
        ends = [float(v) if v in ("Infinity", "-Infinity", "inf") else v for v in ends]
        if len(ends) != 2 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in ends):
            raise self._refuse(name, value, "two numbers")
        if not ends[0] <= ends[1]:
            raise self._refuse(name, value, "a lower and an upper bound")
        return float(ends[0]), float(ends[1])

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse every value but those listed; an absent or null field passes."""
        value = self.raw.get(name)
        if value is not None and not any(type(value) is type(a) and value == a for a in allowed):
            raise self._refuse(name, value, " or ".join(repr(a) for a in allowed))
