"""Products of families and variants that take too long to be tested at every change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
EVERY = "EDGESEQ_EVERY" in os.environ


def rotated(number: int, variants: Sequence[T]) -> Sequence[T]:
    """One variant for item `number`, another for the next; all of them where EDGESEQ_EVERY is set."""
    return variants if EVERY else [variants[number % len(variants)]]
