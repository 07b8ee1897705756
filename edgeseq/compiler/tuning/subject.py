"""Kernels with a choice: those whose file `kernels/<op>.py` has `candidates(params, target)`, the default first."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ..codegen import describe
from ..ir import Call, KernelRef
from ..targets import Target


@dataclass(frozen=True, eq=False)
class Subject:
    """One kernel: its first call, whose arguments tell the sizes, and the parameters to choose from.

    cold: a step launches it, which finds no weights in the caches: all others have been read since.
    """

    ref: KernelRef
    call: Call
    variants: tuple[Any, ...]
    cold: bool

    @property
    def name(self) -> str:
        return describe(self.ref.op, self.ref.params)

    @cached_property
    def _words(self) -> list[dict[str, Any]]:
        return [json.loads(json.dumps(asdict(v))) for v in self.variants]

    @property
    def fixed(self) -> dict[str, Any]:
        """The parameters that all variants share, as JSON has them: they tell which kernel this is."""
        first, *others = self._words
        return {key: value for key, value in first.items() if all(o[key] == value for o in others)}

    @property
    def choices(self) -> list[dict[str, Any]]:
        """What each variant has of its own."""
        fixed = self.fixed
        return [{k: v for k, v in words.items() if k not in fixed} for words in self._words]


def subjects(graphs: Sequence[tuple[int, Sequence[Call]]], target: Target) -> list[Subject]:
    """Every distinct kernel with more than one variant, in order. graphs: tokens of each and its calls."""
    found: list[Subject] = []
    seen = set()
    for tokens, call in ((tokens, call) for tokens, calls in graphs for call in calls):
        if isinstance(call.kernel, KernelRef) and call.kernel not in seen:
            seen.add(call.kernel)
            variants = _variants(call.kernel, target)
            if len(variants) > 1:
                found.append(Subject(call.kernel, call, tuple(variants), cold=tokens == 1))
    return found


def _variants(ref: KernelRef, target: Target) -> list[Any]:
    module = importlib.import_module(f"..kernels.{ref.op}", __package__)
    offered = getattr(module, "candidates", None)
    return offered(ref.params, target) if offered else [ref.params]
