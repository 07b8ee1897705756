"""`--distill ORDER`: the long filters of a source as modes, and `distillation.json`, which says what that changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from edgeseq.errors import SourceError, UsageError
from edgeseq.models import families, family
from edgeseq.models.base import Array
from edgeseq.models.distill import Distilled, check_request
from edgeseq.models.source import FamilySource, Source
from edgeseq.spec import Manifest

FILE = "distillation.json"
DEFAULT_TOLERANCE = 0.02


def distilled(
    source: Source, order: int, tolerance: float | None, report: Callable[..., None]
) -> tuple[FamilySource, Distilled]:
    """The source with `order` modes for each of its long filters, where their error allows.

    tolerance: largest relative error of a channel, None for 0.02; a layer above it keeps its exact filters. UsageError
    for a wrong request and for a source that has no long filters.
    """
    tolerance = DEFAULT_TOLERANCE if tolerance is None else tolerance
    check_request(order, tolerance)
    record = families().get(source.family)
    if record is None or record.distil is None or not isinstance(source.config, record.config):
        raise UsageError(f"{source.name} has no long convolutions to distil", "leave out --distill")

    def progress(done: int, total: int) -> None:
        report("distilling", done, total)

    found = record.distil(source.config, source.tensor, order, tolerance, progress)
    if not found.layers:
        raise UsageError(f"{source.name} is distilled already", "leave out --distill")

    def read(name: str, shape: tuple[int, ...]) -> Array:
        return found.tensors[name] if name in found.tensors else source.tensor(name)

    made = FamilySource(source.name, record, found.config, source.tokenizer, read)
    made.learned = source.learned
    return made, found


def save(directory: Path, found: Distilled) -> None:
    """Write what was distilled beside the manifest."""
    (directory / FILE).write_text(json.dumps(found.facts(), indent=1) + "\n")


def load(directory: Path) -> dict[str, Any]:
    """What `save` wrote, just now: nothing of it is checked."""
    facts: dict[str, Any] = json.loads((directory / FILE).read_text())
    return facts


def rebuilt(manifest: Manifest) -> nn.Module:
    """The distilled model of an export, shapes only; SourceError where its config is none of its family's."""
    record = family(manifest.family)
    try:
        return record.meta_model(record.config(**manifest.config))
    except TypeError as error:
        raise SourceError(f"the manifest's config is not one of {manifest.family}: {error}") from None
