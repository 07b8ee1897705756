"""Products of families and variants that take too long to be tested at every change."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from edgeseq.models import step_families
from edgeseq.models.nsm import NsmConfig

T = TypeVar("T")
EVERY = "EDGESEQ_EVERY" in os.environ
# The families without tokens, each with a small shape.
STEP_MODELS = {name: (record, record.tiny or NsmConfig(5, 2, 64)) for name, record in step_families().items()}


def chunks(family: str) -> tuple[int, ...]:
    """Chunk lengths to export the family's models with: none of an nsm, whose graph stays while instructions come."""
    return () if family == "nsm" else (4,)


def rotated(number: int, variants: Sequence[T]) -> Sequence[T]:
    """One variant for item `number`, another for the next; all of them where EDGESEQ_EVERY is set."""
    return variants if EVERY else [variants[number % len(variants)]]
